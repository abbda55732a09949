"""Reading config.json: real hub models in both of its forms, and every refusal by name."""

import json
from pathlib import Path

import pytest

from nanodrift.config import ConfigError, EngineConfig, ModelConfig, RopeConfig

CONFIGS = Path(__file__).parent / "configs"
LLAMA3_ROPE = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)

# name, parameters in millions (as their model cards count them), rope, what else tells the family apart
MODELS = {
    "meta-llama-3-8b": (8030, RopeConfig(500000.0), {"max_position": 8192, "eos_token_ids": (128001,)}),
    "llama-3.1-8b-instruct": (8030, LLAMA3_ROPE, {"max_position": 131072, "eos_token_ids": (128001, 128008, 128009)}),
    "llama-3.2-1b": (
        1236,
        RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        {"head_dim": 64, "is_head_tied": True},
    ),
    "mistral-7b-v0.1": (7242, RopeConfig(10000.0), {"vocab_size": 32000, "bos_token_id": 1}),
    "mistral-7b-v0.3": (7248, RopeConfig(1e6), {"vocab_size": 32768, "max_position": 32768}),
    "qwen2.5-7b-instruct": (7616, RopeConfig(1e6), {"has_qkv_bias": True, "num_kv_heads": 4, "norm_eps": 1e-6}),
    "qwen3-0.6b": (596, RopeConfig(1e6), {"has_qk_norm": True, "is_head_tied": True, "head_dim": 128, "num_heads": 16}),
    "qwen3-8b": (8191, RopeConfig(1e6), {"has_qk_norm": True, "is_head_tied": False, "num_layers": 36}),
}


def read(name: str, **changes) -> ModelConfig:
    """A stored config with keys replaced; the value ... removes a key."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    return ModelConfig.from_dict({k: v for k, v in raw.items() if v is not ...}, "m/config.json", max_model_len=4096)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_of_real_configs_say_the_same(name):
    millions, rope, facts = MODELS[name]
    config = read(name)
    assert config == read(f"{name}.v5")
    assert round(config.num_parameters / 1e6) == millions
    assert config.rope == rope
    assert {key: getattr(config, key) for key in facts} == facts
    assert config.dtype == "bfloat16"
    assert config.has_qkv_bias == name.startswith("qwen2") and config.has_qk_norm == name.startswith("qwen3")


def test_kv_size_of_llama_3_8b():
    assert read("meta-llama-3-8b").num_kv_values_per_token * 2 == 128 * 1024  # bytes in bf16


def test_head_dim_may_be_absent_or_null():
    assert read("meta-llama-3-8b", head_dim=None).head_dim == 128
    assert read("llama-3.2-1b", head_dim=...).head_dim == 64
    assert (
        read("qwen3-0.6b", head_dim=...).head_dim == 128
    )  # the family's default, not hidden_size / num_attention_heads


def test_defaults_of_old_files():
    config = read("meta-llama-3-8b", rope_theta=..., num_key_value_heads=..., torch_dtype=..., architectures=...)
    assert config.rope.theta == 10000.0 and config.num_kv_heads == 32 and config.dtype == "bfloat16"
    assert config.architecture == "LlamaForCausalLM"  # from model_type
    assert read("llama-3.1-8b-instruct", rope_scaling={"type": "linear", "factor": 2}).rope.kind == "linear"


def test_eos_ids_are_merged_with_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / "qwen3-8b.json").read_text())
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645, 151643)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        ModelConfig.from_folder(tmp_path)


LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSALS = [
    ("meta-llama-3-8b", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    ("meta-llama-3-8b", {"attention_bias": True}, "attention_bias = true"),
    ("qwen3-8b", {"attention_bias": True}, "attention_bias = true"),
    ("meta-llama-3-8b", {"mlp_bias": True}, "mlp_bias = true"),
    ("meta-llama-3-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (
        "meta-llama-3-8b",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor",
    ),
    ("meta-llama-3-8b", {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
    ("meta-llama-3-8b", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 'rope_scaling: type = "yarn"'),
    ("qwen3-8b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "default, linear and llama3"),
    ("qwen3-8b", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ("qwen3-8b", {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ("llama-3.1-8b-instruct", {"rope_scaling": LLAMA3_SCALING}, "'original_max_position_embeddings' is missing"),
    ("llama-3.1-8b-instruct", {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor"),
    ("meta-llama-3-8b", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*Served are LlamaForCausalLM"),
    ("meta-llama-3-8b", {"architectures": ..., "model_type": "gemma3"}, "gemma3"),
    ("qwen2.5-7b-instruct", {"use_sliding_window": True, "sliding_window": 2048}, "max-model-len 2048"),
    ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36, "sliding_window": 1024}, "max-model-len 1024"),
    ("qwen3-8b", {"layer_types": ["linear_attention"] * 36}, "layer_types"),
    ("meta-llama-3-8b", {"hidden_size": ...}, "config.json: the key 'hidden_size' is missing"),
    ("qwen3-8b", {"num_key_value_heads": ...}, "'num_key_value_heads' is missing"),
    ("meta-llama-3-8b", {"num_hidden_layers": "many"}, 'num_hidden_layers = "many" should be a positive number'),
    ("meta-llama-3-8b", {"num_hidden_layers": 3.5}, "whole number"),
    ("meta-llama-3-8b", {"vocab_size": True}, "vocab_size = true"),
    ("meta-llama-3-8b", {"head_dim": 96}, "64 and 128"),
    ("meta-llama-3-8b", {"num_key_value_heads": 5}, "cannot share 5 KV heads"),
    ("meta-llama-3-8b", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
    ("meta-llama-3-8b", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ("meta-llama-3-8b", {"eos_token_id": [1, -2]}, "eos_token_id"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS, ids=lambda v: "" if isinstance(v, dict) else str(v))
def test_what_is_not_implemented_is_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(name, **changes)


def test_a_sliding_window_is_served_within_its_length(tmp_path):
    raw = json.loads((CONFIGS / "mistral-7b-v0.1.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_folder(tmp_path, max_model_len=4096).max_position == 32768
    for max_model_len in (None, 4097):
        with pytest.raises(ConfigError, match=r"sliding_window = 4096.*--max-model-len 4096"):
            ModelConfig.from_folder(tmp_path, max_model_len)
    with pytest.raises(ConfigError, match="sliding_window"):  # absent means 4096 in this family, null means none
        ModelConfig.from_dict({k: v for k, v in raw.items() if k != "sliding_window"}, "config.json")
    assert ModelConfig.from_dict(raw | {"sliding_window": None}, "config.json").max_position == 32768
    read("qwen2.5-7b-instruct", use_sliding_window=False, sliding_window=128)


def test_junk_in_any_key_is_a_config_error_or_harmless():
    for name in ("llama-3.1-8b-instruct", "qwen3-0.6b.v5", "mistral-7b-v0.1"):
        for key in json.loads((CONFIGS / f"{name}.json").read_text()):
            for junk in ([], [[]], {}, {"a": []}, "x", "", -1, 0, 1.5, True, None, float("nan"), 10**400, ...):
                try:
                    read(name, **{key: junk})
                except ConfigError as error:
                    assert "config.json" in str(error)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"llama"', "\udcff"])
def test_unreadable_files_are_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.json does not exist.*alias"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_engine_options():
    assert EngineConfig.from_options(max_num_seqs=8).max_num_seqs == 8
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        EngineConfig.from_options(max_num_seq=8)
    with pytest.raises(ConfigError, match="memory_fraction"):
        EngineConfig(memory_fraction=1.5)
    for device in ("cuda:x", "cuda:-1", "gpu"):
        with pytest.raises(ConfigError, match="auto, cpu, cuda or cuda:N"):
            EngineConfig(device=device)
    for name in ("max_num_seqs", "prefill_layers", "num_kv_blocks"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1"):
            EngineConfig(**{name: 0})
