"""The frozen settings of a run: what the model is, how the engine serves it, which latency is promised.

``ModelConfig.from_folder`` reads a hub model's ``config.json`` with our own parser. ``EngineConfig`` and ``SLO`` are what
the command lines and ``LLM(...)`` fill in; a key that is not a field is an error that names the nearest field.
Knows nothing about torch, files of weights or devices.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields

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
    deterministic: bool = False  # tiles and splits fixed: outputs do not depend on the batch
    seed: int = 0
    slo: SLO = SLO()

    def __post_init__(self):
        for name in ("max_num_seqs", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.05 <= self.memory_fraction <= 0.99:
            raise ConfigError(f"memory_fraction must lie between 0.05 and 0.99, got {self.memory_fraction}")
        for name, allowed in (
            ("dtype", ("auto", "bfloat16", "float16", "float32")),
            ("load_format", ("auto", "dummy")),
            ("dummy_draw", ("unit_rms", "uniform")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
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

    architecture: str  # LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM
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
