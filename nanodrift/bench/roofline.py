"""The least time a piece of work can take: bytes over bandwidth, operations over rate, whichever is longer.

Counts what any engine must do and no more: each weight read once, each cached key and value read once, two operations
per weight and token, four per head dimension and attended pair. Pure arithmetic on a ModelConfig; measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanodrift.config import ModelConfig


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do in this run."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Load:
    """The least memory traffic and arithmetic of one piece of work."""

    num_bytes: float
    num_flops: float

    def floor_s(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bytes_per_s, self.num_flops / ceilings.flops_per_s)

    def bound_by(self, ceilings: Ceilings) -> str:
        is_memory = self.num_bytes / ceilings.bytes_per_s >= self.num_flops / ceilings.flops_per_s
        return "memory" if is_memory else "compute"


def layer_weights(model: ModelConfig) -> int:
    """Weights of the matrix products of one layer: q, k, v, o, gate, up, down."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    return attention + 3 * model.hidden_size * model.intermediate_size


def kv_bytes_per_token(model: ModelConfig, num_bytes: int) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * num_bytes


def decode_load(model: ModelConfig, num_bytes: int, batch: int, mean_context: float) -> Load:
    """One decode step of ``batch`` rows; ``num_bytes`` is the width of a weight and of a cached value."""
    head = model.vocab_size * model.hidden_size
    weights = model.num_layers * layer_weights(model) + head
    cached = batch * (mean_context + 1) * kv_bytes_per_token(model, num_bytes)  # + 1: the new token is written
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * batch * mean_context
    return Load(weights * num_bytes + cached, 2 * weights * batch + attention)


def prefill_load(model: ModelConfig, num_bytes: int, prompt_lens: list[int]) -> Load:
    """Prefill of whole prompts with causal attention; the head runs once a prompt."""
    num_tokens = sum(prompt_lens)
    head = model.vocab_size * model.hidden_size
    weights = model.num_layers * layer_weights(model)
    pairs = sum(n * (n + 1) // 2 for n in prompt_lens)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * pairs
    return Load(
        (weights + head) * num_bytes + num_tokens * kv_bytes_per_token(model, num_bytes),
        2 * weights * num_tokens + 2 * head * len(prompt_lens) + attention,
    )
