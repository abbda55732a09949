"""Weights into their places: one file or shards, tied or not; everything wrong with a folder is said in one error."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Driver, config_json, transformers_model

from nanodrift.config import ConfigError, ModelConfig
from nanodrift.model import Model
from nanodrift.ops import LaneResources
from nanodrift.weights import dummy_weights, load_weights, named_places, resolve_dtype

CPU = torch.device("cpu")


def tiny_config(family: str, **changes) -> ModelConfig:
    return ModelConfig.from_dict(config_json(family, **changes), "config.json")


def load(folder, dtype=torch.float32, progress=None):
    return load_weights(folder, ModelConfig.from_folder(folder), CPU, dtype, progress)


@pytest.fixture
def folder(tmp_path):
    transformers_model("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, **tensors):
    """Rewrites model.safetensors with tensors replaced, added, or (None) removed; ``__`` stands for a dot."""
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama3.1", "qwen2", "qwen3"])
def test_shards_and_one_file_give_every_tensor_of_the_checkpoint(family, tmp_path):
    model = transformers_model(family)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    config = ModelConfig.from_folder(tmp_path / "one")
    for folder in ("one", "many"):
        weights = load(tmp_path / folder)
        places = named_places(weights, config)
        assert {n: p for n, p in model.named_parameters() if not torch.equal(places[n], p)} == {}
        assert len(places) == len(list(model.named_parameters()))
        assert weights.bytes() == (config.num_parameters + config.hidden_size) * 4  # one row pads the head
        assert (weights.head[303:] == 0).all() and weights.head.shape[0] == 304
        if config.is_head_tied:
            assert weights.embedding.data_ptr() == weights.head.data_ptr()


def test_a_tied_model_may_store_its_head_and_old_files_their_frequencies(tmp_path):
    transformers_model("qwen3").save_pretrained(tmp_path)
    change(
        tmp_path,
        lm_head__weight=torch.zeros(303, 128),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(32),
    )
    assert load(tmp_path).head.std() > 0.01


def test_converts_to_the_dtype_asked_for(folder):
    weights = load(folder, torch.bfloat16)
    assert weights.layers[0].qkv.dtype == weights.head.dtype == torch.bfloat16
    torch.testing.assert_close(weights.embedding.float(), load(folder).embedding, atol=0, rtol=2**-8)


def test_progress_counts_to_the_end(folder):
    seen = []
    weights = load(folder, progress=lambda *numbers: seen.append(numbers))
    totals = {total for _, total in seen}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert totals == {seen[-1][0]} and abs(seen[-1][0] - weights.bytes()) < 4096


def test_misfits_are_all_listed_before_anything_is_copied(folder):
    change(
        folder,
        model__norm__weight=None,
        lm_head__weight=torch.zeros(5, 256),
        model__extra__bias=torch.zeros(3),
        model__layers__1__self_attn__o_proj__weight=torch.zeros(256, 256, dtype=torch.int8),
    )
    with pytest.raises(ConfigError) as caught:
        load(folder)
    for words in (
        "in 4 places",
        "model.layers.1.self_attn.o_proj.weight is stored as I8",
        "model.norm.weight is missing",
        "lm_head.weight has shape [5, 256], config.json asks for [303, 256]",
        "model.extra.bias is not part of Qwen2ForCausalLM",
    ):
        assert words in str(caught.value)


def test_only_the_first_ten_misfits_are_shown(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"in 72 places: .* and 62 more") as caught:
        load(folder)
    assert str(caught.value).count("is missing") == 10


def test_damaged_files_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 64, b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read.*Download it again"):
            load(folder)


def test_missing_shards_are_named(tmp_path):
    transformers_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../other/model.safetensors"}}, "names '../other/model.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {"a": "model.bin"}}, r"names 'model\.bin'"),
        ({"weight_map": {"a": 3}}, "names 3"),
        ({"weight_map": {}}, r"model\.embed_tokens\.weight is missing"),
        ({"weight_map": []}, "not an index"),
        ({}, "not an index"),
        ([], "not an index"),
    ],
)
def test_an_index_names_only_weight_files_beside_it(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_pickles_are_refused_and_empty_folders_explained(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no weights.*--load-format dummy"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, a pickle, which can run code"):
        load(folder)


@pytest.mark.parametrize("form", ["classic", "v5"])
def test_both_config_forms_serve_the_same_logits(form, tmp_path):
    transformers_model("llama3.1").save_pretrained(tmp_path)  # in the form of the installed version
    raw = config_json("llama3.1")
    if form == "v5":
        raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
        raw["dtype"] = "float32"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    prompt = torch.arange(90)
    logits = Driver(Model(ModelConfig.from_folder(tmp_path), load(tmp_path))).forward([(0, 0, prompt.tolist(), True)])
    expected = transformers_model("llama3.1")(prompt[None]).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_unit_rms_draw_keeps_activations_near_one(family):
    config = dataclasses.replace(tiny_config(family), num_layers=12, hidden_size=256, vocab_size=304)
    model = Model(config, dummy_weights(config, CPU, torch.float32))
    driver, lane = Driver(model), LaneResources()
    batch = driver.batch([(0, 0, list(range(64)), True)])
    model.embed(batch, driver.state, lane)
    for layer in range(12):
        model.run_layers(batch, driver.state, driver.kv, layer, layer + 1, lane)
        if not config.is_head_tied or layer > 8:  # a tied embedding starts small
            assert 0.5 < driver.state.residual[:64].square().mean().sqrt() < 2
    assert 0.5 < model.head(batch, driver.state, lane).std() < 2


def test_draws_are_repeatable_and_of_the_stated_range():
    config = tiny_config("qwen2")
    for draw in ("unit_rms", "uniform"):
        one, same, other = (dummy_weights(config, CPU, torch.float32, draw, seed) for seed in (3, 3, 4))
        assert torch.equal(one.layers[2].down, same.layers[2].down) and torch.equal(one.head, same.head)
        assert not torch.equal(one.layers[2].down, other.layers[2].down)
        assert not torch.equal(one.layers[2].down, one.layers[1].down)
    tensors = [*named_places(one, config).values()]
    assert all(t.abs().max() <= 1e-3 and t.std() > 4e-4 for t in tensors)
    with pytest.raises(ConfigError, match="unit_rms and uniform"):
        dummy_weights(config, CPU, torch.float32, "zeros")


def test_auto_dtype():
    config, gpu = tiny_config("llama"), torch.device("cuda", 0)
    assert resolve_dtype("auto", config, CPU) is torch.float32
    assert resolve_dtype("auto", dataclasses.replace(config, dtype="float16"), gpu) is torch.float16
    assert resolve_dtype("auto", dataclasses.replace(config, dtype="float32"), gpu) is torch.bfloat16
    assert resolve_dtype("float16", config, CPU) is torch.float16
