"""One function per operator: the Triton kernel when the tensors lie on a GPU, its plain-torch reference otherwise.

A lane's resources are the last argument everywhere: how many SMs a kernel may fill, whether tiles and splits are
fixed, memory to work in, and perhaps two halves of the device. Knows nothing about models or requests;
``nanodrift/kernels.py`` says where kernels live. Shape letters as in nanodrift/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanodrift.kernels import attn_decode as decode_attention
from nanodrift.kernels import attn_prefill as prefill_attention
from nanodrift.kernels import filter as filters
from nanodrift.kernels import gemm as gemms
from nanodrift.kernels import gemm_skinny as skinny_gemms
from nanodrift.kernels import penalties
from nanodrift.kernels import rmsnorm as norms
from nanodrift.kernels import rope as ropes
from nanodrift.kernels import sample as samplers
from nanodrift.kernels import swiglu as swiglus

MAX_SKINNY_TOKENS = skinny_gemms.MAX_SKINNY_TOKENS
num_splits = skinny_gemms.num_splits  # (T, width, depth, num_sms) -> S of a [T, depth] x [width, depth] product
IN_PROMPT = penalties.IN_PROMPT
# kernels of a decode step that may start under the one before them, beside skinny products and what adds them up
_OVERLAPPING = (norms.rmsnorm, ropes.rope_kv_write, decode_attention.attn_decode, swiglus.gemm_swiglu)


class Scratch:
    """One lane's working memory: named flat buffers, each as large as its largest use. Dead at layer boundaries."""

    def __init__(self, num_elements: dict[str, int], dtypes: dict[str, torch.dtype], device: torch.device):
        self.buffers = {  # zeros, since attention counts arrivals in its buffers and leaves them at zero
            name: torch.zeros(count, dtype=dtypes[name], device=device) for name, count in num_elements.items()
        }


@dataclass
class LaneResources:
    """What a piece of work may use. Two pieces in flight at once never share one."""

    num_sms: int = 1  # of the partition that the lane's stream runs in
    deterministic: bool = False  # one tile shape and no splits: a token's bits depend on its own inputs alone
    scratch: Scratch | None = None  # None: allocate as needed (the CPU, tests)
    use_triton: bool | None = None  # None: on a GPU. Tests set True to run kernels in Triton's interpreter
    pdl: bool = False  # whether kernels start under the one before them; see kernels/pdl.py
    halves: tuple[tuple[torch.cuda.Stream, LaneResources], ...] = ()  # of the device; () = what is here runs in turn

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None):
        """-> memory of this shape for one use, in ``like``'s dtype and device; its content is whatever was there."""
        if self.scratch is None:
            return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        return self.scratch.buffers[name][: math.prod(shape)].view(shape)

    def runs_triton(self, x: torch.Tensor) -> bool:
        return x.is_cuda if self.use_triton is None else self.use_triton

    def is_skinny(self, num_tokens: int) -> bool:
        """True where the split-K products for few tokens are used."""
        return num_tokens <= MAX_SKINNY_TOKENS and not self.deterministic


def side_by_side(lane: LaneResources, *parts: Callable[[LaneResources], None]) -> None:
    """Runs the parts of a pass one after the other, or each on its half of the device where the lane has halves."""
    if not lane.halves:
        for part in parts:
            part(lane)
        return
    here = torch.cuda.current_stream()
    for (stream, half), part in zip(lane.halves, parts, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            part(half)
    for stream, _ in lane.halves:
        here.wait_stream(stream)


def rmsnorm(x, weight, eps, out, lane):
    """x [T, C], weight [C] -> out [T, C]."""
    return _run(lane, norms.rmsnorm, norms.rmsnorm_reference, x, weight, eps, out=out)


def linear_partials(x, w, bias, lane):
    """x [T, C], w [N, C], bias [N] or None -> [S, T, N] whose sum over S is the product; S = 1 for many tokens."""
    num_tokens, width = x.shape[0], w.shape[0]
    if lane.runs_triton(x) and lane.is_skinny(num_tokens):
        return _skinny_partials(x, w, bias, lane)
    out = lane.take("product", (num_tokens, width), x)  # [T, N]
    return _gemm(x, w, bias, None, out, lane).unsqueeze(0)


def linear_add_norm(x, w, residual, norm_weight, eps, out, lane):
    """Project, add to the residual stream, normalise: residual [T, C] += x [T, N] @ w [C, N].T; out = its RMSNorm."""
    if lane.runs_triton(x) and lane.is_skinny(x.shape[0]):
        partials = _skinny_partials(x, w, None, lane)  # [S, T, C]
        return norms.add_rmsnorm(partials, residual, norm_weight, eps, out=out, num_sms=lane.num_sms, pdl=lane.pdl)
    _gemm(x, w, None, residual, residual, lane)
    return rmsnorm(residual, norm_weight, eps, out, lane)


def logits(x, w, out, lane):
    """x [Q, C], head w [V, C] -> out [Q, V] fp32. w may have a few rows more than V, to be a multiple of 16."""
    if w.shape[0] != out.shape[1]:  # an odd vocabulary: not worth memory of its own
        padded = torch.empty(x.shape[0], w.shape[0], dtype=out.dtype, device=out.device)
        return out.copy_(logits(x, w, padded, lane)[:, : out.shape[1]])
    if lane.runs_triton(x) and lane.is_skinny(x.shape[0]):
        skinny_gemms.gemm_skinny(x, w, out=out.unsqueeze(0), num_sms=lane.num_sms, num_splits=1, pdl=lane.pdl)
        return out
    return _gemm(x, w, None, None, out, lane)


def gemm_swiglu(x, w, lane):
    """x [T, C], w [2I, C] (gate rows, then up rows) -> silu(gate) * up [T, I]."""
    out = lane.take("gated", (x.shape[0], w.shape[0] // 2), x)  # [T, I]
    run, reference = swiglus.gemm_swiglu, swiglus.gemm_swiglu_reference
    return _run(lane, run, reference, x, w, out=out, deterministic=lane.deterministic)


def rope_kv_write(qkv, cos_sin, positions, rows, block_table, k_cache, v_cache, num_heads, q_norm, k_norm, eps, lane):
    """Rotates q and k of qkv [S, T, (H + 2K) D], writes k and v into their slots -> q [T, H, D]."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    out = lane.take("query", (qkv.shape[1], num_heads, head_dim), k_cache)  # [T, H, D]
    return _run(
        lane, ropes.rope_kv_write, ropes.rope_kv_write_reference,
        qkv, cos_sin, positions, rows, block_table, k_cache, v_cache,
        num_heads=num_heads, num_kv_heads=num_kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps, out=out,
    )  # fmt: skip


def attn_prefill(q, k_cache, v_cache, block_table, rows, query_starts, context_lens, max_query_len, scale, out, lane):
    """Causal attention of R slices q [T, H, D] over their cached prefixes and themselves -> out [T, H, D]."""
    options = {"max_query_len": max_query_len, "scale": scale, "out": out}
    if lane.runs_triton(q) and lane.scratch:
        options["counter"] = lane.scratch.buffers[f"counter {int(max_query_len == 1)}"]
        options["scratch"] = None if lane.deterministic else lane.scratch.buffers["parts"]
    return _run(
        lane, prefill_attention.attn_prefill, prefill_attention.attn_prefill_reference,
        q, k_cache, v_cache, block_table, rows, query_starts, context_lens, **options,
    )  # fmt: skip


def attn_decode(q, k_cache, v_cache, block_table, rows, context_lens, scale, out, lane):
    """Attention of one query for each of B rows, q [B, H, D], over its whole context -> out [B, H, D]."""
    options = {"scale": scale, "out": out}
    if lane.runs_triton(q) and lane.scratch:
        options["scratch"] = lane.scratch.buffers[f"decode {lane.num_sms}"]
    run, reference = decode_attention.attn_decode, decode_attention.attn_decode_reference
    return _run(lane, run, reference, q, k_cache, v_cache, block_table, rows, context_lens, **options)


def sample(logits, rows, positions, temperature, seed, last_token, next_position, lane):
    """Draws a token from each row of logits [Q, V] -> [Q], and into the rows' tables; see kernels/sample.py."""
    tables = (temperature, seed, last_token, next_position)
    return _run(lane, samplers.sample, samplers.sample_reference, logits, rows, positions, *tables)


def filter_logits(logits, rows, positions, temperature, top_k, top_p, min_p, lane):
    """In place: -inf outside each row's top-k, top-p and min-p; see kernels/filter.py."""
    tables = (temperature, top_k, top_p, min_p)
    return _run(lane, filters.filter_logits, filters.filter_logits_reference, logits, rows, positions, *tables)


def penalize(logits, rows, settings, counts, lane):
    """In place: each row's penalties on the tokens it has used; see kernels/penalties.py."""
    return _run(lane, penalties.penalize, penalties.penalize_reference, logits, rows, settings, counts)


def ban_tokens(logits, rows, positions, banned, min_position, lane):
    """In place: -inf at each row's banned ids while its next position is below min_position."""
    tables = (banned, min_position)
    return _run(lane, filters.ban_tokens, filters.ban_tokens_reference, logits, rows, positions, *tables)


def _run(lane, kernel, reference, x, *args, **options):
    """The Triton kernel on the lane's SMs where x lies on a GPU, else the reference."""
    if lane.runs_triton(x):
        if kernel in _OVERLAPPING:
            options["pdl"] = lane.pdl
        return kernel(x, *args, num_sms=lane.num_sms, **options)
    return reference(x, *args, **options)


def _gemm(x, w, bias, residual, out, lane):
    options = {"bias": bias, "residual": residual, "out": out, "deterministic": lane.deterministic}
    return _run(lane, gemms.gemm, gemms.gemm_reference, x, w, **options)


def _skinny_partials(x, w, bias, lane):
    num_tokens, width = x.shape[0], w.shape[0]
    splits = num_splits(num_tokens, width, x.shape[1], lane.num_sms)
    out = lane.take("partials", (splits, num_tokens, width), x, torch.float32)  # [S, T, N]
    return skinny_gemms.gemm_skinny(x, w, bias=bias, out=out, num_sms=lane.num_sms, num_splits=splits, pdl=lane.pdl)


def prefill_scratch_elements(head_dim: int) -> int:
    """fp32 numbers that ``attn_prefill`` needs for contexts that it cuts in parts."""
    return math.prod(prefill_attention.prefill_scratch_shape(head_dim))


def decode_scratch_elements(num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int) -> int:
    """fp32 numbers that ``attn_decode`` needs to keep between its programs on this many SMs."""
    return math.prod(decode_attention.decode_scratch_shape(num_heads, num_kv_heads, head_dim, num_sms))
