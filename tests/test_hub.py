"""Names of models: folders, aliases, hub ids; a hub that says no; memory compared before loading. No network."""

import dataclasses
import fnmatch
import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from nanodrift.config import ConfigError, ModelConfig
from nanodrift.hub import ALIASES, EMBEDDED, GIB, check_memory, free_memory_bytes, memory_need, resolve_model
from nanodrift.weights import empty_weights, named_places


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: records what is asked for, answers with a folder, or raises ``hub.error``."""

    class Hub:
        calls: list = []
        error: Exception | None = None

        def snapshot_download(self, hub_id, **options):
            self.calls.append((hub_id, options))
            if self.error is not None:
                raise self.error
            return str(tmp_path)

    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return stand_in


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x/y"))


def test_nothing_means_the_built_in_model_and_a_folder_means_itself(hub, tmp_path):
    assert resolve_model(None) == EMBEDDED
    assert resolve_model(tmp_path) == tmp_path and resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "qwen3-8b").mkdir()
    assert resolve_model("qwen3-8b") == Path("qwen3-8b")  # a local folder wins over an alias
    assert not hub.calls


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_downloaded_without_anything_that_runs(hub, alias):
    hub.calls.clear()
    resolve_model(alias)
    resolve_model(alias.upper())
    ((hub_id, options), (again, _)) = hub.calls
    assert hub_id == again == ALIASES[alias]

    def is_fetched(name):
        allowed = any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, p) for p in options["ignore_patterns"])

    wanted = ["config.json", "model-00001-of-00004.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    assert all(map(is_fetched, [*wanted, "chat_template.jinja", "tokenizer_config.json", "merges.txt"]))
    others = ["pytorch_model.bin", "model.py", "original/params.json", "consolidated.safetensors", "a.pth", "a.gguf"]
    assert not any(map(is_fetched, others))


def test_dummy_weights_need_no_download_for_an_alias_and_no_weights_for_a_hub_id(hub):
    hub.calls.clear()
    shapes = {alias: ModelConfig.from_folder(resolve_model(alias, "dummy")) for alias in ALIASES}
    assert not hub.calls
    billions = {alias: round(config.num_parameters / 1e9, 1) for alias, config in shapes.items()}
    assert billions == {"llama-3-8b": 8, "llama-3.1-8b": 8, "qwen3-0.6b": 0.6, "qwen3-8b": 8.2, "qwen2.5-7b": 7.6}
    assert shapes["llama-3-8b"].eos_token_ids == (128009, 128001)
    resolve_model("someone/some-model", "dummy")
    assert "*.safetensors" not in hub.calls[0][1]["allow_patterns"]


@pytest.mark.parametrize("name", ["llama-9b", "gpt2", "a/b/c", "../nowhere", "-x/y", "qwen3 8b"])
def test_an_unknown_name_lists_the_aliases(hub, name, tmp_path):
    hub.calls.clear()
    with pytest.raises(ConfigError, match=r"no folder and no alias.*llama-3-8b, llama-3\.1-8b.*Qwen/Qwen3-8B"):
        resolve_model(name)
    assert not hub.calls
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model("config.json")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            GatedRepoError("gated", response=answer(403)),
            r"accepted its licence, at https://huggingface\.co/meta-llama/",
        ),
        (RepositoryNotFoundError("none", response=answer(401)), "does not know it"),
        (httpx.ConnectError("no route"), r"cannot be reached \(ConnectError: no route\)"),
        (OSError("offline"), "cannot be reached"),
    ],
)
def test_a_hub_that_says_no_is_explained_with_the_ways_out(hub, error, words):
    hub.error = error
    with pytest.raises(ConfigError, match=words) as caught:
        resolve_model("llama-3-8b")
    for way in ("HF_TOKEN", "huggingface-cli login", "local folder", "--load-format dummy", "qwen3-0.6b"):
        assert way in str(caught.value)


def test_memory_is_compared_with_both_numbers_and_the_largest_alias_that_fits():
    llama = ModelConfig.from_folder(resolve_model("llama-3.1-8b", "dummy"))
    weight_bytes, kv_bytes = memory_need(llama, 2, 8192)
    check_memory(llama, torch.bfloat16, weight_bytes + kv_bytes, 8192)
    places = named_places(empty_weights(llama, torch.device("meta"), torch.bfloat16), llama)
    assert weight_bytes == sum(place.nbytes for place in places.values())
    assert kv_bytes == GIB  # 8,192 tokens of 128 KiB
    numbers = r"needs 16\.0 GiB \(15\.0 for weights in bfloat16, 1\.0 for 8192 tokens.*15\.5 GiB are free"
    with pytest.raises(ConfigError, match=numbers):
        check_memory(llama, torch.bfloat16, int(15.5 * GIB), 8192)
    for free_gib, alias in ((15.7, "qwen2.5-7b"), (15.9, "qwen2.5-7b"), (10, "qwen3-0.6b")):
        with pytest.raises(ConfigError, match=f"largest alias that fits: {alias}"):
            check_memory(llama, torch.bfloat16, int(free_gib * GIB), 8192)
    with pytest.raises(ConfigError, match="largest alias that fits: none"):
        check_memory(llama, torch.float32, GIB, 8192)
    with pytest.raises(ConfigError, match=r"lower --max-model-len to 8192\."):
        check_memory(llama, torch.bfloat16, weight_bytes + kv_bytes + 1000, 131072)
    small = dataclasses.replace(llama, num_layers=1)
    assert memory_need(small, 2, 1)[1] == 64 * 4096  # a whole block


def test_free_host_memory_is_a_plausible_number():
    assert 10 << 20 < free_memory_bytes(torch.device("cpu")) < 1 << 50


def test_a_containers_limit_holds_and_its_cached_files_count_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr("nanodrift.hub.CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("9000\n")
    (tmp_path / "memory.current").write_text("8000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nfile 6000\nactive_file 1000\ninactive_file 5000\n")
    assert free_memory_bytes(torch.device("cpu")) == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(torch.device("cpu")) > 10 << 20


def test_the_alias_configs_are_the_real_ones():
    """The package's copies and the tests' copies of the same hub files agree."""
    stored = Path(__file__).parent / "configs"
    for alias, name in (("qwen3-8b", "qwen3-8b"), ("llama-3.1-8b", "llama-3.1-8b-instruct")):
        shipped = json.loads((resolve_model(alias, "dummy") / "config.json").read_text())
        assert shipped == json.loads((stored / f"{name}.json").read_text())
