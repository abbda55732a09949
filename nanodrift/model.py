"""The decoder of Llama 3, Mistral, Qwen2.5 and Qwen3: embed, run_layers(first, last), head.

A layer range is the unit of work, and its state belongs to the work: between two ranges stand ``hidden``, already
normalised for the layer that comes next (or for the head), and ``residual``. So any piece of a prefill may wait, and
two passes may be in flight over the same weights. Metadata comes in a Batch, memory in a lane; nothing is kept here.

Shape letters, used bare everywhere: T tokens in this launch, R prefill slices, B decoding rows, Q tokens whose logits
are wanted, S split-K partials, H query heads, K KV heads, D head dim, C hidden size, I MLP width, V vocabulary,
L layers, N blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nanodrift import ops
from nanodrift.batch import Batch
from nanodrift.config import BLOCK_SIZE, ModelConfig, RopeConfig
from nanodrift.ops import LaneResources, Scratch
from nanodrift.weights import Weights


class KVPool:
    """The paged cache of every layer: k and v [L, 1 + N, K, 64, D]. Block 0 is nobody's: the spare row writes there."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, 1 + num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)


@dataclass
class LayerState:
    """What one pass carries from layer to layer. Larger than a pass needs: T tokens use the first T rows."""

    hidden: torch.Tensor  # [max_tokens, C] normalised input of the next layer
    residual: torch.Tensor  # [max_tokens, C]


class Model:
    """Weights, the table of rotary angles, and the arithmetic between them."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int | None = None):
        self.config, self.weights = config, weights
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        num_positions = min(max_model_len or config.max_position, config.max_position)
        self.cos_sin = rope_table(config.rope, config.head_dim, num_positions).to(self.device)  # [positions, D]
        self.attention_scale = config.head_dim**-0.5

    def new_state(self, max_tokens: int) -> LayerState:
        shape = (max_tokens, self.config.hidden_size)
        return LayerState(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def new_scratch(self, max_tokens: int, sm_counts: tuple[int, ...]) -> Scratch:
        """Memory for one lane that runs passes of up to ``max_tokens`` tokens, on any of these SM counts.

        Parts of a pass may run side by side on two of them.
        """
        c = self.config
        qkv_width, attention_width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim
        products = ((qkv_width, c.hidden_size), (c.hidden_size, attention_width), (c.hidden_size, c.intermediate_size))
        num_elements = {
            "product": max_tokens * qkv_width,
            "query": max_tokens * attention_width,
            "attended": max_tokens * attention_width,
            "gated": max_tokens * c.intermediate_size,
            "sampled": max_tokens * c.hidden_size,
            "partials": max(
                ops.num_splits(tokens, width, depth, num_sms) * tokens * width
                for tokens in range(1, min(max_tokens, ops.MAX_SKINNY_TOKENS) + 1)
                for width, depth in products
                for num_sms in sm_counts
            ),
            # one buffer per SM count: its layout depends on the count, and it keeps counters between launches
            **{
                f"decode {num_sms}": ops.decode_scratch_elements(c.num_heads, c.num_kv_heads, c.head_dim, num_sms)
                for num_sms in sm_counts
            },
            # tiles that prefill attention has handed out: one for prompts, one for decoding rows, at the same time
            **{f"counter {kind}": 1 for kind in range(2)},
            "parts": ops.prefill_scratch_elements(c.head_dim),  # only prompts have any
        }
        kinds = {"partials": torch.float32, "decode": torch.float32, "parts": torch.float32, "counter": torch.int32}
        dtypes = {name: kinds.get(name.split()[0], self.dtype) for name in num_elements}
        scratch = Scratch(num_elements, dtypes, self.device)
        scratch.buffers["one_each"] = torch.arange(max_tokens + 1, dtype=torch.int32, device=self.device)
        return scratch

    def embed(self, batch: Batch, state: LayerState, lane: LaneResources) -> None:
        """Token ids -> residual, and hidden as layer 0 wants it."""
        num_tokens = batch.num_tokens
        residual, hidden = state.residual[:num_tokens], state.hidden[:num_tokens]  # [T, C]
        torch.index_select(self.weights.embedding, 0, batch.token_ids, out=residual)
        ops.rmsnorm(residual, self.weights.layers[0].attention_norm, self.config.norm_eps, hidden, lane)

    def run_layers(self, batch: Batch, state: LayerState, kv: KVPool, first: int, last: int, lane: LaneResources):
        """Layers first .. last - 1 over the batch: updates ``state`` and writes these layers' keys and values."""
        c, num_tokens = self.config, batch.num_tokens
        residual, hidden = state.residual[:num_tokens], state.hidden[:num_tokens]  # [T, C]
        for index in range(first, last):
            layer = self.weights.layers[index]
            is_last = index + 1 == c.num_layers
            next_norm = self.weights.final_norm if is_last else self.weights.layers[index + 1].attention_norm
            qkv = ops.linear_partials(hidden, layer.qkv, layer.qkv_bias, lane)  # [S, T, (H + 2K) D]
            q = ops.rope_kv_write(
                qkv, self.cos_sin, batch.positions, batch.rows, batch.block_table, kv.k[index], kv.v[index],
                c.num_heads, layer.q_norm, layer.k_norm, c.norm_eps, lane,
            )  # [T, H, D]  # fmt: skip
            attended = self._attend(q, batch, kv, index, lane)  # [T, H, D]
            ops.linear_add_norm(attended.flatten(1), layer.o, residual, layer.mlp_norm, c.norm_eps, hidden, lane)
            gated = ops.gemm_swiglu(hidden, layer.gate_up, lane)  # [T, I]
            ops.linear_add_norm(gated, layer.down, residual, next_norm, c.norm_eps, hidden, lane)

    def _attend(self, q: torch.Tensor, batch: Batch, kv: KVPool, index: int, lane: LaneResources) -> torch.Tensor:
        """Prefill slices through one kernel, decoding rows through the other; q [T, H, D] -> [T, H, D]."""
        out = lane.take("attended", q.shape, q)
        cache = (kv.k[index], kv.v[index], batch.block_table)
        num_decoding = batch.shape.num_decoding

        def attend_decoding(lane: LaneResources) -> None:
            rows, lens, scale = batch.decode_rows, batch.decode_context_lens, self.attention_scale
            queries, results = q[:num_decoding], out[:num_decoding]  # [B, H, D]
            if num_decoding > 0 and lane.deterministic:
                # the prefill kernel on slices of one token: the same bits as when it was a prompt
                starts = lane.take("one_each", (num_decoding + 1,), rows)
                if lane.scratch is None:
                    torch.arange(num_decoding + 1, out=starts)
                ops.attn_prefill(queries, *cache, rows, starts, lens, 1, scale, results, lane)
            elif num_decoding > 0:
                ops.attn_decode(queries, *cache, rows, lens, scale, results, lane)

        def attend_prompts(lane: LaneResources) -> None:
            if batch.shape.num_slices > 0:
                ops.attn_prefill(
                    q, *cache, batch.prefill_rows, batch.query_starts, batch.prefill_context_lens,
                    batch.num_tokens, self.attention_scale, out, lane,
                )  # fmt: skip

        ops.side_by_side(lane, attend_prompts, attend_decoding)  # they write different tokens
        return out

    def head(
        self, batch: Batch, state: LayerState, lane: LaneResources, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [Q, V] fp32 of the (first ``len(out)``) tokens at ``batch.sample_indices``, after the last layer."""
        shape = (batch.sample_indices.shape[0], self.config.vocab_size)
        out = torch.empty(shape, dtype=torch.float32, device=self.device) if out is None else out
        num_sampled = out.shape[0]
        if num_sampled > 0:
            picked = lane.take("sampled", (num_sampled, self.config.hidden_size), state.hidden)  # [Q, C]
            torch.index_select(state.hidden, 0, batch.sample_indices[:num_sampled], out=picked)
            ops.logits(picked, self.weights.head, out, lane)
        return out


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """-> [num_positions, D] fp32: cosines of the D/2 angles of each position, then their sines.

    Every step in fp32 and in this order, since the sines of large angles show each rounding: the table equals that of
    transformers bit for bit.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [D/2]
    frequencies = 1.0 / (rope.theta**exponents)  # [D/2] radians per position
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _scale_llama3(frequencies, rope)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies  # [positions, D/2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _scale_llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: waves short beside the original window stay, long ones are stretched, between them a blend."""
    wavelengths = 2 * math.pi / frequencies  # [D/2] positions per turn
    turns = rope.original_max_position / wavelengths  # within the original window
    stretched = frequencies / rope.factor
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    is_long = wavelengths > rope.original_max_position / rope.low_freq_factor
    is_short = wavelengths < rope.original_max_position / rope.high_freq_factor
    return torch.where(is_long, stretched, torch.where(is_short, frequencies, blended))
