"""The decoder against transformers: logits and greedy tokens, however a pass is cut into token and layer chunks."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, Driver, config_json, transformers_config, transformers_model, transformers_twin

from nanodrift.config import ModelConfig
from nanodrift.model import Model, rope_table
from nanodrift.ops import LaneResources
from nanodrift.weights import dummy_weights, load_weights

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parent / "configs"
PROMPTS = [150, 70, 1, 64]  # tokens; the last joins while the others decode


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> the folder its model was saved in."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            transformers_model(family).save_pretrained(made[family])
        return made[family]

    return folder


def load(folder) -> Model:
    config = ModelConfig.from_folder(folder)
    return Model(config, load_weights(folder, config, CPU, torch.float32))


def random_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]


def serve(driver: Driver, num_steps: int) -> list[tuple[list[int], torch.Tensor]]:
    """Prefill in chunks, decode together, one prompt joining midway -> per prompt (tokens, logits [steps, V])."""
    prompts = random_prompts(driver.model.config.vocab_size)
    layers = driver.model.config.num_layers
    tokens, logits = [list(p) for p in prompts], [[] for _ in prompts]

    def take(rows, results):
        for row, result in zip(rows, results, strict=True):
            logits[row].append(result)
            tokens[row].append(int(result.argmax()))

    def decode(rows):
        return [(row, tokens[row][-1], len(tokens[row]) - 1) for row in rows]

    first = driver.forward(
        [(0, 0, prompts[0][:100], False), (1, 0, prompts[1], True)], layer_chunks=[(0, 1), (1, layers)]
    )
    take([1], first)
    take([0, 2], driver.forward([(0, 100, prompts[0][100:], True), (2, 0, prompts[2], True)]))
    for _ in range(2):
        take([1, 0, 2], driver.forward(decode=decode([1, 0, 2])))
    joined = driver.forward([(3, 0, prompts[3], True)], decode([0, 1, 2]), [(0, 2), (2, layers)])
    take([3, 0, 1, 2], joined)
    for _ in range(num_steps - 4):
        padded = [*decode([3, 2]), (-1, 0, 0), *decode([1, 0]), (-1, 0, 0)]
        results = driver.forward(decode=padded)
        take([3, 2, 1, 0], results[[0, 1, 3, 4]])  # what padding gives is nobody's business
    return [(t, torch.stack(x)) for t, x in zip(tokens, logits, strict=True)]


def check_against_transformers(served, reference, atol):
    for (tokens, logits), num_prompt in zip(served, PROMPTS, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([tokens[:-1]])).logits[0, num_prompt - 1 :].float()
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
        assert tokens[num_prompt:] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_and_mixed_passes_equal_transformers(family, folders):
    served = serve(Driver(load(folders(family))), num_steps=12)
    check_against_transformers(served, transformers_model(family), atol=2e-4)


def test_preallocated_memory_and_fixed_tiles_change_nothing(folders):
    model = load(folders("qwen3"))
    served = serve(Driver(model), num_steps=6)
    for deterministic in (False, True):
        lane = LaneResources(deterministic=deterministic, scratch=model.new_scratch(256, (1,)))
        for (tokens, logits), (expected_tokens, expected) in zip(serve(Driver(model, lane), 6), served, strict=True):
            assert tokens == expected_tokens
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_two_passes_in_flight_do_not_touch_each_other(folders):
    """A prefill suspended between layers survives another prefill and a decode step over the same weights and cache."""
    model = load(folders("llama3.1"))
    driver, lane = Driver(model), LaneResources()
    long, short, _, other = random_prompts(model.config.vocab_size)
    whole = driver.forward([(4, 0, long, True)])
    driver.forward([(1, 0, short, True)])
    batch, state = driver.batch([(0, 0, long, True)]), model.new_state(200)
    model.embed(batch, state, lane)
    for layer in range(model.config.num_layers):
        model.run_layers(batch, state, driver.kv, layer, layer + 1, lane)
        driver.forward([(2, 0, other, True)])
        driver.forward(decode=[(1, 7, len(short))])
    assert torch.equal(model.head(batch, state, lane), whole)


def test_256_sequences_of_8192_tokens_at_once(folders):
    driver = Driver(load(folders("mistral")), num_rows=256, max_len=64, max_tokens=8192)
    tokens = torch.randint(303, (256, 33), generator=torch.Generator().manual_seed(2))
    first = driver.forward([(row, 0, tokens[row, :32].tolist(), True) for row in range(256)])
    second = driver.forward(decode=[(row, int(tokens[row, 32]), 32) for row in range(256)])
    expected = transformers_model("mistral")(tokens).logits[:, -2:]  # [256, 2, V]
    torch.testing.assert_close(torch.stack((first, second), 1), expected, atol=2e-4, rtol=0)


def test_padding_writes_nothing_to_the_cache(folders):
    driver = Driver(load(folders("llama")))
    driver.forward([(0, 0, list(range(70)), True)])
    before = driver.kv.k.clone(), driver.kv.v.clone()
    driver.forward(decode=[(-1, 0, 0), (-1, 5, 0)])
    assert torch.equal(driver.kv.k, before[0]) and torch.equal(driver.kv.v, before[1])
    batch = driver.batch([(0, 70, [1, 2], False)])  # a chunk that does not end its prompt asks for no logits
    assert driver.model.head(batch, driver.state, driver.lane).shape == (0, 303)


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "llama-3.2-1b", "qwen3-8b", "mistral-7b-v0.3"])
def test_rope_table_equals_transformers_over_the_window(name):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    config, theirs = ModelConfig.from_dict(raw, name), transformers_config(raw)
    rotary = __import__(f"transformers.models.{raw['model_type']}.modeling_{raw['model_type']}", fromlist=["x"])
    rotary = getattr(rotary, raw["architectures"][0].replace("ForCausalLM", "RotaryEmbedding"))(theirs)
    window = config.max_position
    table = rope_table(config.rope, config.head_dim, window)
    assert table.shape == (window, config.head_dim) and table.dtype == torch.float32
    positions = torch.cat([torch.arange(300), torch.arange(300, window, 97), torch.arange(window - 300, window)])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    half = config.head_dim // 2
    torch.testing.assert_close(table[positions, :half], cos[0, :, :half], atol=1e-6, rtol=0)
    torch.testing.assert_close(table[positions, half:], sin[0, :, half:], atol=1e-6, rtol=0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled where there is a GPU")
def test_the_model_runs_through_triton_in_the_interpreter():
    """The wiring of the kernels, S partials and scratch included; their arithmetic has tests of its own."""
    config = ModelConfig.from_dict(config_json("qwen3", num_hidden_layers=2), "config.json")
    model = Model(config, dummy_weights(config, CPU, torch.float32), max_model_len=512)
    prompt = random_prompts(model.config.vocab_size)[1]
    for deterministic in (False, True):
        lane = LaneResources(2, deterministic, model.new_scratch(128, (2,)), use_triton=True)
        results = []
        for driver in (Driver(model), Driver(model, lane)):
            results.append(
                [driver.forward([(0, 0, prompt[:66], True)]), driver.forward(decode=[(0, 5, 66), (-1, 0, 0)])[:1]]
            )
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def gpu_lane(model: Model, deterministic: bool = False) -> LaneResources:
    num_sms = torch.cuda.get_device_properties(model.device).multi_processor_count
    return LaneResources(num_sms, deterministic, model.new_scratch(512, (num_sms,)))


def drawn_model(raw: dict, dtype: torch.dtype = torch.bfloat16) -> Model:
    config = ModelConfig.from_dict(raw, "config.json")
    return Model(config, dummy_weights(config, torch.device("cuda"), dtype), max_model_len=512)


def errors_beside_bf16(raw: dict, model: Model, served) -> tuple[float, float]:
    """Root mean square distance to transformers in fp32, over every logit served: (ours, transformers' own in bf16)."""
    squares = torch.zeros(2, dtype=torch.float64)
    twins = [transformers_twin(raw, model.config, model.weights, d) for d in (torch.float32, torch.bfloat16)]
    for (tokens, logits), num_prompt in zip(served, PROMPTS, strict=True):
        inputs = torch.tensor([tokens[:-1]], device=model.device)
        exact, rounded = (twin(inputs).logits[0, num_prompt - 1 :].double().cpu() for twin in twins)
        squares += torch.stack([((x.double() - exact) ** 2).mean() for x in (logits, rounded)])
    ours, theirs = (squares / len(served)).sqrt().tolist()
    print(f"logit error against fp32: {ours:.5f} ours, {theirs:.5f} transformers in bf16")
    return ours, theirs


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "head_dim"), [*((f, 64) for f in FAMILIES), ("llama3.1", 128), ("qwen3", 128)])
def test_bf16_on_the_gpu_errs_no_more_than_transformers(family, head_dim):
    sizes = {"hidden_size": 4 * head_dim, "head_dim": head_dim, "intermediate_size": 768, "num_hidden_layers": 6}
    raw = config_json(family, **sizes)
    model = drawn_model(raw)
    ours, theirs = errors_beside_bf16(raw, model, serve(Driver(model, gpu_lane(model)), num_steps=12))
    assert ours <= 1.5 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama3.1", "qwen3"])
def test_deterministic_bits_do_not_depend_on_how_a_pass_is_cut(family):
    model = drawn_model(config_json(family, num_hidden_layers=6))
    prompts = random_prompts(model.config.vocab_size)
    one = Driver(model, gpu_lane(model, deterministic=True))
    whole = [one.forward([(0, 0, prompt, True)]) for prompt in prompts]
    other = Driver(model, gpu_lane(model, deterministic=True), seed=1)
    other.lane.num_sms //= 2
    other.forward([(1, 0, prompts[1][:69], False), (0, 0, prompts[0][:77], False)], layer_chunks=[(0, 4), (4, 6)])
    other.forward([(0, 77, prompts[0][77:149], False)])
    last = [(0, prompts[0][149], 149), (-1, 0, 0), (1, prompts[1][69], 69)]
    results = other.forward([(2, 0, prompts[2], True), (3, 0, prompts[3], True)], decode=last)
    assert torch.equal(results[[2, 4, 0, 1]], torch.cat(whole))


@pytest.mark.gpu
def test_llama_3_8b_shape_errs_no_more_than_transformers():
    raw = json.loads((CONFIGS / "meta-llama-3-8b.json").read_text())
    model = drawn_model(raw)
    ours, theirs = errors_beside_bf16(raw, model, serve(Driver(model, gpu_lane(model)), num_steps=8))
    assert ours <= 1.5 * theirs
