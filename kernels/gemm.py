"""Matrix product for prefill: ``out = x @ w.T (+ bias) (+ residual)``, persistent, all tiles moved by TMA.

Formula     out[m, n] = sum over k of x[m, k] * w[n, k], plus bias[n], plus residual[m, n]; fp32 sums, one rounding.
Cost        2·M·N·K FLOPs; at least (M·K + N·K + M·N) elements of memory traffic, and per output tile
            (BLOCK_M + BLOCK_N)·K elements through L2, which is why tiles are as large as registers allow.
Program     One program per SM it may use. Program p computes tiles p, p + programs, p + 2·programs, ... of a list that
to tile     walks GROUP_M row tiles before it moves to the next column, so that programs running at the same time share
            rows of x and rows of w in L2. The grid follows ``num_sms``, so a partition of the chip gets a full machine.

It does not know what a layer or a request is, nor which SMs it runs on: a stream decides that. Bits of an output row
depend on the tile shape only through the order of its sums; ``deterministic=True`` pins the shape.

Run the tests: ``pytest tests/test_kernels_gemm.py`` (interpreter), ``pytest -m gpu tests/test_kernels_gemm.py`` (GPU).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def gemm_reference(x, w, *, bias=None, residual=None, out=None, deterministic=False):
    """``x [M, K] @ w.T [K, N] (+ bias [N]) (+ residual [M, N])`` in fp32, rounded once to out's dtype (x's)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.nn.functional.linear(x.to(wide), w.to(wide), None if bias is None else bias.to(wide))  # [M, N]
    if residual is not None:
        y += residual
    return y.to(x.dtype) if out is None else out.copy_(y)


@triton.jit
def _map_tile(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of the tile-th piece of work: down GROUP_M row tiles, then one column to the right."""
    tiles_per_group = GROUP_M * num_tiles_n
    first_m = (tile // tiles_per_group) * GROUP_M
    group_m = min(num_tiles_m - first_m, GROUP_M)
    within = tile % tiles_per_group
    return first_m + within % group_m, within // group_m


@triton.jit
def _finish_tile(acc, row, column, N, bias_ptr, residual_desc, out_desc, WIDTH: tl.constexpr):
    """Add bias and residual to an accumulator tile, round it and store it. What lies beyond the edge is dropped."""
    if bias_ptr is not None:
        columns = column + tl.arange(0, WIDTH)  # [WIDTH]
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual_desc is not None:
        acc += residual_desc.load([row, column]).to(tl.float32)
    out_desc.store([row, column], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    x_desc, w_desc, w_tail_desc, out_desc, residual_desc, bias_ptr,
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, STORE_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    # map program: this program's share of the tiles, BLOCK_N + TAIL_N columns wide
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(N, BLOCK_N + TAIL_N)
    num_blocks_k = tl.cdiv(K, BLOCK_K)
    # flatten joins the tile loop and the k loop, so the next tile's loads run under this tile's epilogue. With a second
    # accumulator it must be off: clearing two of them in one loop makes the compiler wait for every single wgmma.
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0), flatten=TAIL_N == 0):
        tile_m, tile_n = _map_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * (BLOCK_N + TAIL_N)

        # load and compute; what lies beyond M, N or K arrives as zeros
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
        if TAIL_N > 0:
            tail = tl.zeros([BLOCK_M, TAIL_N], tl.float32)  # [BLOCK_M, TAIL_N]
        for k in range(num_blocks_k):
            x_tile = x_desc.load([row, k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w_tile = w_desc.load([column, k * BLOCK_K])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x_tile, w_tile.T, acc)
            if TAIL_N > 0:
                w_tail = w_tail_desc.load([column + BLOCK_N, k * BLOCK_K])  # [TAIL_N, BLOCK_K]
                tail = tl.dot(x_tile, w_tail.T, tail)

        # store, STORE_N columns at a time: a small staging buffer leaves room for one more pipeline stage
        if STORE_N < BLOCK_N:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, STORE_N)), (0, 2, 1))  # [BLOCK_M, STORE_N, 2]
            left, right = tl.split(halves)  # [BLOCK_M, STORE_N] each
            _finish_tile(left, row, column, N, bias_ptr, residual_desc, out_desc, STORE_N)
            _finish_tile(right, row, column + STORE_N, N, bias_ptr, residual_desc, out_desc, STORE_N)
        else:
            _finish_tile(acc, row, column, N, bias_ptr, residual_desc, out_desc, STORE_N)
        if TAIL_N > 0:
            _finish_tile(tail, row, column + BLOCK_N, N, bias_ptr, residual_desc, out_desc, STORE_N)


class Tile(NamedTuple):
    """Shape of one program's output tile, how it is pipelined, how many programs share an SM.

    block_n is a power of two, or one and a half times one. epilogue_parts: column parts in which the tile is stored.
    cost: time that a full wave of such tiles takes, relative to the first tile of its table (H200, K = 4096).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    max_stages: int
    epilogue_parts: int
    cost: float
    programs_per_sm: int = 1


TILES = (
    Tile(128, 256, 64, 8, 4, 2, 1.00),
    Tile(128, 192, 64, 8, 5, 3, 0.87),
    Tile(128, 128, 64, 8, 6, 2, 0.565),
    Tile(64, 192, 64, 4, 6, 3, 0.515),
    Tile(64, 128, 128, 4, 4, 1, 0.325),
)
DETERMINISTIC_TILE = TILES[4]
GROUP_M = 8
SHARED_BYTES = 232448 - 1024  # of one SM of compute capability 9.0, less room for barriers


def ceil_div(a, b):
    return (a + b - 1) // b


def choose_tile(M, N, num_sms, tiles=TILES):
    """The tile whose waves over num_sms SMs cost least: large tiles are efficient, small ones waste less of a wave."""

    def time(tile):
        num_tiles = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n)
        return ceil_div(num_tiles, num_sms * tile.programs_per_sm) * tile.cost

    return min(tiles, key=time)


def descriptor(tensor, block_rows, block_columns):
    """TMA descriptor of a 2-D tensor, loaded or stored as [block_rows, block_columns] tiles.

    Raises ValueError unless the last dimension is contiguous and base and row stride are multiples of 16 bytes.
    """
    num_rows, num_columns = tensor.shape
    row_stride, column_stride = tensor.stride()
    if column_stride != 1 or tensor.data_ptr() % 16 or row_stride * tensor.element_size() % 16:
        raise ValueError(
            f"TMA needs a contiguous last dimension and 16-byte aligned rows, got shape {tuple(tensor.shape)}, "
            f"stride {tensor.stride()}, {tensor.dtype}, address {tensor.data_ptr():#x}"
        )
    return TensorDescriptor(tensor, [num_rows, num_columns], [row_stride, 1], [block_rows, block_columns])


def gemm(x, w, *, bias=None, residual=None, out=None, num_sms, deterministic=False, tile=None):
    """``out = x @ w.T (+ bias) (+ residual)``, fp32 sums, rounded once.

    x [M, K] and w [N, K] of one dtype (bf16 or fp16 on a GPU); bias [N]; residual [M, N], may be the same memory as
    out; out [M, N] of any float dtype, x's when it is allocated here. Any M >= 1; N and K multiples of 16; rows
    contiguous and 16-byte aligned (ValueError otherwise). num_sms: programs to run at most, the SM count of the
    stream's partition. deterministic: one tile shape whatever M and num_sms, so a row's bits depend on that
    row alone. tile: override of the choice, for tuning and warm-up.
    """
    M, K = x.shape
    N = w.shape[0]
    if w.shape[1] != K or N % 16 or K % 16:
        raise ValueError(f"gemm needs x [M, K] and w [N, K] with N and K multiples of 16, got {x.shape} and {w.shape}")
    if out is None:
        out = torch.empty(M, N, dtype=x.dtype, device=x.device)  # [M, N]
    tile = tile or (DETERMINISTIC_TILE if deterministic else choose_tile(M, N, num_sms))
    block_m, block_n, block_k, num_warps, max_stages, epilogue_parts, _, programs_per_sm = tile
    store_n = block_n // epilogue_parts
    staging_bytes = block_m * store_n * out.element_size()
    if residual is not None:
        staging_bytes += block_m * store_n * residual.element_size()
    stage_bytes = (block_m + block_n) * block_k * x.element_size()
    num_stages = max(2, min(max_stages, (SHARED_BYTES // programs_per_sm - staging_bytes) // stage_bytes))
    num_tiles = ceil_div(M, block_m) * ceil_div(N, block_n)
    main_n = 1 << (block_n.bit_length() - 1)  # the power of two in block_n; what is left is the tail
    tail_n = block_n - main_n
    _gemm_kernel[(min(num_sms * programs_per_sm, num_tiles),)](
        descriptor(x, block_m, block_k), descriptor(w, main_n, block_k),
        descriptor(w, tail_n, block_k) if tail_n else None, descriptor(out, block_m, store_n),
        None if residual is None else descriptor(residual, block_m, store_n), bias,
        M, N, K,
        BLOCK_M=block_m, BLOCK_N=main_n, TAIL_N=tail_n, STORE_N=store_n, BLOCK_K=block_k, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
