"""The frozen settings of a run: what the model is, how the engine serves it, which latency is promised.

``ModelConfig.from_folder`` reads a hub model's ``config.json`` with our own parser. ``EngineConfig`` and ``SLO`` are
what the command lines and ``LLM(...)`` fill in; a key that is not a field is an error that names the nearest field.
Knows nothing about torch, files of weights or devices.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

BLOCK_SIZE = 64  # tokens in one KV block; one (block, KV head) tile of 64 x 128 bf16 is a contiguous 16 KB


class ConfigError(ValueError):
    """A setting or a model folder that cannot be served; the text says what to do about it."""


@dataclass(frozen=True)
class SLO:
    """The latency promise of one request: time to first token and time between tokens."""

    ttft_ms: float = 2000.0
    tbt_ms: float = 50.0

    def __post_init__(self):
        if self.ttft_ms <= 0 or self.tbt_ms <= 0:
            raise ConfigError(f"an SLO must be positive milliseconds, got ttft {self.ttft_ms} and tbt {self.tbt_ms}")


POLICIES = ("auto", "mux", "turns", "chunked", "chunked-auto", "prefill-first", "static", "overlap")


@dataclass(frozen=True)
class EngineConfig:
    """How one engine serves one model on one device."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto (the checkpoint's on a GPU, float32 on a CPU) | bfloat16 | float16 | float32
    load_format: str = "auto"  # auto (safetensors) | dummy
    dummy_draw: str = "unit_rms"  # of load_format dummy: unit_rms | uniform
    max_model_len: int | None = None  # tokens of prompt plus output; None = the model's window
    max_num_seqs: int = 256  # requests that decode together
    max_prefill_tokens: int = 2048  # tokens of one prefill launch (one token chunk)
    prefill_layers: int | None = None  # layers of one prefill launch (one layer chunk); None = all of them
    memory_fraction: float = 0.9  # of the device's memory, for weights, cache and scratch together
    num_kv_blocks: int | None = None  # None = as many as fit
    prefix_caching: bool = True  # prompts start behind what the cache holds of them
    deterministic: bool = False  # tiles and splits fixed: outputs do not depend on the batch
    policy: str = "auto"  # POLICIES; auto is mux where the device can be divided, else turns
    modes: str = "split,fused,exclusive"  # what mux may choose from
    chunk_tokens: int = 512  # of every step under policy chunked: decoding rows and prompt tokens together
    decode_sms: int = 0  # of the decode half under policies static and overlap; 0 = the best by the cost profile
    profile: str | None = None  # measured costs, from `bench.py calibrate`; None = those shipped for GPU and model
    seed: int = 0
    slo: SLO = SLO()

    def __post_init__(self):
        for name in ("max_num_seqs", "max_prefill_tokens", "chunk_tokens", "prefill_layers", "num_kv_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0.05 <= self.memory_fraction <= 0.99:
            raise ConfigError(f"memory_fraction must lie between 0.05 and 0.99, got {self.memory_fraction}")
        for name, allowed in (
            ("dtype", ("auto", "bfloat16", "float16", "float32")),
            ("load_format", ("auto", "dummy")),
            ("dummy_draw", ("unit_rms", "uniform")),
            ("policy", POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {self.device!r}")

    @classmethod
    def from_options(cls, **options) -> EngineConfig:
        """Builds the config and refuses a key it does not know, naming the closest one it does."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown engine option {key!r}{hint}")
        return cls(**options)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and, for Llama-3.1 and later, the piecewise scaling of its frequencies."""

    theta: float
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, as one of the five families writes it in config.json."""

    architecture: str  # one of ARCHITECTURES
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    is_head_tied: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """Weights to be held: a tied head is counted once."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        if self.has_qkv_bias:
            attention += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if self.has_qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * self.intermediate_size * self.hidden_size + 2 * self.hidden_size
        vocabularies = 1 if self.is_head_tied else 2
        return self.num_layers * layer + vocabularies * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: str | Path, max_model_len: int | None = None) -> ModelConfig:
        """Reads config.json, and generation_config.json where there is one, of a model folder.

        ``max_model_len`` is the context that will be served: a sliding window at least as long as that changes nothing.
        Raises ConfigError for a file that cannot be read and for every setting whose mathematics is not implemented.
        """
        folder = Path(folder)
        generation = read_json(folder / "generation_config.json", is_needed=False)
        return cls.from_dict(read_json(folder / "config.json"), folder / "config.json", generation, max_model_len)

    @classmethod
    def from_dict(
        cls, raw: dict, path: str | Path, generation: dict | None = None, max_model_len: int | None = None
    ) -> ModelConfig:
        """The same from parsed JSON; ``path`` is what errors call it."""
        keys = _Keys(raw, path)
        architecture = _architecture(keys)
        family = ARCHITECTURES[architecture]
        for key, neutral in _NEUTRAL.items():
            if keys.get(key, neutral) not in (neutral, None):
                keys.refuse(key, f"changes the mathematics and is not implemented; {json.dumps(neutral)} is served")
        if keys.get("hidden_act", "silu") != "silu":
            keys.refuse("hidden_act", "is not implemented; the MLP is gated with silu")
        max_position = keys.count("max_position_embeddings")
        _refuse_sliding_window(keys, family, min(max_model_len or max_position, max_position))

        hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
        has_default_kv_heads = family == "llama" or "num_key_value_heads" in raw  # absent means a constant elsewhere
        num_kv_heads = keys.count("num_key_value_heads", default=num_heads if has_default_kv_heads else None)
        head_dim = keys.count("head_dim", default=_QWEN3_HEAD_DIM if family == "qwen3" else hidden_size // num_heads)
        if head_dim not in (64, 128):
            raise ConfigError(
                f"{path}: heads of {head_dim} values are not served; the attention kernels do 64 and 128."
            )
        if num_heads % num_kv_heads:
            raise ConfigError(f"{path}: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly.")
        generation_keys = _Keys(generation or {}, Path(path).with_name("generation_config.json"))
        eos_token_ids = keys.token_ids("eos_token_id") + generation_keys.token_ids("eos_token_id")
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            intermediate_size=keys.count("intermediate_size"),
            num_layers=keys.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=keys.count("vocab_size"),
            max_position=max_position,
            norm_eps=keys.positive("rms_norm_eps", default=1e-6),
            rope=_rope(keys),
            is_head_tied=keys.flag("tie_word_embeddings"),
            has_qkv_bias=family == "qwen2",
            has_qk_norm=family == "qwen3",
            dtype=_dtype(keys),
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),  # each once, config.json's first
        )


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_QWEN3_HEAD_DIM = 128  # what the family assumes where config.json does not say
_NEUTRAL = {  # settings that change the mathematics, and the one value each may have
    "quantization_config": None,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


class _Keys:
    """The keys of one JSON file, typed; every error names file and key."""

    def __init__(self, raw: dict, path: str | Path):
        self.raw, self.path = raw, path

    def get(self, key: str, default: Any = None) -> Any:
        return self.raw.get(key, default)

    def refuse(self, key: str, why: str):
        value = json.dumps(self.raw.get(key))
        raise ConfigError(f"{self.path}: {key} = {value if len(value) < 80 else value[:76] + ' ...'} {why}.")

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; without a default the key must be there."""
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.path}: the key {key!r} is missing. Is this a model folder, and whole?")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
            self.refuse(key, "should be a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.positive(key, default)
        if value != int(value):
            self.refuse(key, "should be a whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value not in (None, True, False):
            self.refuse(key, "should be true or false")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            self.refuse(key, "should be a token id or a list of them")
        return tuple(ids)


def read_json(path: Path, is_needed: bool = True) -> dict:
    """The object in a model folder's JSON file; empty for a file that is not there and not needed. Else ConfigError."""
    if not is_needed and not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist. A model is a folder with config.json, *.safetensors and tokenizer.json; name such "
            "a folder, a hub id or an alias."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Download it again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(raw).__name__}. Download it again.")
    return raw


def _architecture(keys: _Keys) -> str:
    named = keys.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        architecture = named[0]
    else:  # some folders carry the family only
        family = keys.get("model_type")
        architecture = next((a for a, f in ARCHITECTURES.items() if f == family), named or family)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{keys.path}: the architecture {architecture!r} is not served. Served are {', '.join(ARCHITECTURES)}."
        )
    return architecture


def _refuse_sliding_window(keys: _Keys, family: str, context_tokens: int):
    """Mistral's window holds unless it is null, Qwen's only if switched on; newer files may say it layer by layer."""
    kinds = keys.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        keys.refuse("layer_types", "is not implemented; every layer has full attention here")
    if not (family == "mistral" or keys.flag("use_sliding_window") or "sliding_attention" in kinds):
        return
    if keys.get("sliding_window", 0) is None:
        return
    window = keys.count("sliding_window", default=4096)  # the families' own default
    if window < context_tokens:
        raise ConfigError(
            f"{keys.path}: sliding_window = {window} lets attention see only the last {window} tokens; that"
            f" is not implemented for a context of {context_tokens}. Stay within it: --max-model-len {window}."
        )


def _rope(keys: _Keys) -> RopeConfig:
    """Both forms: rope_theta beside rope_scaling, and the newer rope_parameters that holds everything."""
    name = "rope_parameters" if keys.get("rope_parameters") is not None else "rope_scaling"
    scaling = keys.get(name) or {}
    if not isinstance(scaling, dict):
        keys.refuse(name, "should be an object")
    inner = _Keys(scaling, f"{keys.path}, {name}")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        inner.refuse("rope_type" if "rope_type" in scaling else "type", "is not served; default, linear and llama3 are")
    if inner.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        inner.refuse("partial_rotary_factor", "is not implemented; only 1.0 is served")
    theta = inner.positive("rope_theta", default=keys.positive("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(theta)
    factor = inner.positive("factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low_freq_factor, high_freq_factor = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
    if low_freq_factor >= high_freq_factor:
        inner.refuse("high_freq_factor", f"should be above low_freq_factor, {low_freq_factor}")
    original_max_position = inner.count("original_max_position_embeddings")
    return RopeConfig(theta, kind, factor, low_freq_factor, high_freq_factor, original_max_position)


def _dtype(keys: _Keys) -> str:
    name = keys.get("dtype") or keys.get("torch_dtype") or "bfloat16"
    if name not in ("bfloat16", "float16", "float32"):
        keys.refuse("dtype" if keys.get("dtype") else "torch_dtype", "is not served; bfloat16, float16 and float32 are")
    return name
