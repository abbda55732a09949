"""RMSNorm, alone and fused with the residual addition in front of it.

    out = round(x / sqrt(mean(x^2) + eps)) * weight                       # [T, C]
    add_rmsnorm: residual <- round(residual + sum_s partials[s]); out = rmsnorm(residual)

Statistics are fp32. Rounding follows transformers: the normalised value is rounded to the activation's dtype before it
meets the weight, and the product is rounded again. The S partials (split-K results of a matrix product) are summed in
index order, so the same inputs always give the same bits.

Cost (bf16): rmsnorm moves 4 T C bytes; add_rmsnorm moves (6 + 4 S) T C with fp32 partials, 8 T C with one bf16 partial;
a few FLOPs per element, so the memory system is the only limit.
Map: program p takes rows p, p + P, p + 2P, ...; a whole row and the weight stay in registers. P is the number of rows,
at most 64 ``num_sms``, so a partition of the chip gets a grid of its own size.

Knows nothing about models or where x came from. Tests: ``pytest tests/test_kernels_small.py``.
"""

import torch
import triton
import triton.language as tl

from .pdl import launch_options, wait_for_inputs

MAX_WIDTH = 8192  # the row must fit into the registers of one program


def rmsnorm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None):
    """What ``rmsnorm`` computes, in plain torch: x [T, C], weight [C] -> [T, C] in x's dtype."""
    wide = x.float()  # [T, C]
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [T, 1]
    normed = (wide * scale).to(x.dtype) * weight  # [T, C]
    return normed if out is None else out.copy_(normed)


def add_rmsnorm_reference(
    partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    *, out: torch.Tensor | None = None,
):  # fmt: skip
    """What ``add_rmsnorm`` computes: partials [S, T, C], residual [T, C] (updated in place) -> [T, C]."""
    total = partials[0].float()  # [T, C]
    for partial in partials[1:]:  # in order: floating-point sums depend on it
        total = total + partial.float()
    residual.copy_(residual.float() + total)
    return rmsnorm_reference(residual, weight, eps, out=out)


@triton.jit
def _normalise(row, weight, eps, C: tl.constexpr, dtype: tl.constexpr):
    """fp32 row [BLOCK_C] (zero beyond C) -> its RMSNorm in ``dtype``, rounded as transformers rounds."""
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / C + eps)
    return ((row * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _rmsnorm_kernel(
    x_ptr, weight_ptr, out_ptr,
    num_tokens, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # map program -> rows; the weight is read once
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        # load
        row = tl.load(x_ptr + token * C + columns, mask=inside, other=0.0).to(tl.float32)
        # compute, store
        normed = _normalise(row, weight, eps, C, out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * C + columns, normed, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_rmsnorm_kernel(
    partials_ptr, residual_ptr, weight_ptr, out_ptr,
    num_tokens, eps,
    NUM_PARTIALS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # map program -> rows; the weight is read once
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        # load: the loop over partials unrolls, so their loads are all in flight at once
        offsets = token * C + columns
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(partials_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        for s in tl.static_range(1, NUM_PARTIALS):
            total += tl.load(partials_ptr + s * num_tokens * C + offsets, mask=inside, other=0.0).to(tl.float32)
        # compute: everything after this line sees the rounded sum, as the next layer's addition will
        rounded = (residual + total).to(residual_ptr.dtype.element_ty)
        normed = _normalise(rounded.to(tl.float32), weight, eps, C, out_ptr.dtype.element_ty)
        # store
        tl.store(residual_ptr + offsets, rounded, mask=inside)
        tl.store(out_ptr + offsets, normed, mask=inside)


def _launch_shape(num_tokens: int, width: int, num_sms: int) -> tuple[int, int, int]:
    """-> (programs, BLOCK_C, warps). A program for each row of 64 num_sms rows, then they share."""
    assert width <= MAX_WIDTH, f"rows of {width} do not fit into registers (at most {MAX_WIDTH})"
    block = triton.next_power_of_2(width)
    return min(num_tokens, num_sms * 64), block, min(max(block // 512, 1), 8)


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None, num_sms: int, pdl=False
) -> torch.Tensor:
    """RMSNorm of each row: x [T, C], weight [C] -> [T, C] in x's dtype. Tensors contiguous; C <= 8192, T * C < 2^31."""
    num_tokens, width = x.shape
    out = torch.empty_like(x) if out is None else out
    assert x.is_contiguous() and out.is_contiguous() and weight.shape == (width,) and out.shape == x.shape
    if num_tokens > 0:
        programs, block, warps = _launch_shape(num_tokens, width, num_sms)
        _rmsnorm_kernel[(programs,)](
            x, weight, out, num_tokens, eps, C=width, BLOCK_C=block, num_warps=warps, **launch_options(pdl)
        )
    return out


def add_rmsnorm(
    partials: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    *, out: torch.Tensor | None = None, num_sms: int, pdl=False,
) -> torch.Tensor:  # fmt: skip
    """Residual addition, then RMSNorm.

    partials [S, T, C] (fp32 split-K results, or one bf16 result as S = 1), residual [T, C], weight [C] -> [T, C] in
    residual's dtype. ``residual`` becomes residual + sum of partials, rounded once to its own dtype; the norm is taken
    of the rounded value. Tensors contiguous; C <= 8192, S * T * C < 2^31. pdl: see pdl.py.
    """
    num_partials, num_tokens, width = partials.shape
    out = torch.empty_like(residual) if out is None else out
    assert partials.is_contiguous() and residual.is_contiguous() and out.is_contiguous()
    assert residual.shape == out.shape == (num_tokens, width) and weight.shape == (width,)
    if num_tokens > 0:
        programs, block, warps = _launch_shape(num_tokens, width, num_sms)
        _add_rmsnorm_kernel[(programs,)](
            partials, residual, weight, out,
            num_tokens, eps,
            NUM_PARTIALS=num_partials, C=width, BLOCK_C=block, num_warps=warps, **launch_options(pdl),
        )  # fmt: skip
    return out
