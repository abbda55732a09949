"""Matrix product for decode: few rows of x, so the time is that of reading w once. Split-K without atomics.

Formula     out[s, m, n] = sum over the s-th range of k of x[m, k] * w[n, k]; split 0 adds bias[n]. Whoever consumes the
            result adds the S partials in the order 0, 1, ...: no atomics, no second launch, the same bits every time.
Cost        2·N·K bytes of w from memory (bf16) and 4·S·M·N bytes of partials written; 2·M·N·K FLOPs.
Program     A unit of work is (split, column tile, row tile), row tiles fastest so that the second one finds w in L2.
to tile     Each program takes units p, p + programs, ...; a unit streams its [BLOCK_N, K / S] piece of w through TMA.

The tile is computed transposed, w @ x.T: the tensor cores of sm_90 take 64 rows or more on the left, which w has and x
has not, and the right side may be as narrow as 16. It does not know what comes after it, nor which SMs it runs on.

Run the tests: ``pytest tests/test_kernels_gemm.py`` (interpreter), ``pytest -m gpu tests/test_kernels_gemm.py`` (GPU).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gemm import ceil_div, descriptor
from .pdl import launch_options, wait_for_inputs

MAX_SKINNY_TOKENS = 128


def gemm_skinny_reference(x, w, *, bias=None, out=None, num_splits=1):
    """Partials [S, M, N] fp32 of ``x [M, K] @ w.T [K, N] (+ bias [N])``: each sums a share of K's 128-wide blocks."""
    K = x.shape[1]
    width = ceil_div(ceil_div(K, 128), num_splits) * 128  # columns of K in a split
    if out is None:
        out = torch.empty(num_splits, x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)  # [S, M, N]
    for split in range(num_splits):
        columns = slice(split * width, (split + 1) * width)
        torch.mm(x[:, columns].float(), w[:, columns].float().T, out=out[split])
    if bias is not None:
        out[0] += bias
    return out


@triton.jit(do_not_specialize=["M", "num_splits", "blocks_per_split"])
def _skinny_kernel(
    x_desc, w_desc, bias_ptr, out_ptr,
    M, N, num_splits, blocks_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # map program
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(N, BLOCK_N)
    num_units = num_splits * num_tiles_n * num_tiles_m
    wait_for_inputs(PDL)
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0), flatten=True):
        row = (unit % num_tiles_m) * BLOCK_M
        column = (unit // num_tiles_m % num_tiles_n) * BLOCK_N
        split = unit // (num_tiles_m * num_tiles_n)

        # load and compute; what lies beyond M, N or K arrives as zeros
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [BLOCK_N, BLOCK_M]
        for block in range(blocks_per_split):
            k = (split * blocks_per_split + block) * BLOCK_K
            w_tile = w_desc.load([column, k])  # [BLOCK_N, BLOCK_K]
            x_tile = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot(w_tile, x_tile.T, acc)

        # store
        columns = column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        rows = row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < tl.where(split == 0, N, 0), other=0.0)  # [BLOCK_N]
            acc += bias.to(tl.float32)[:, None]
        out_rows = out_ptr + split.to(tl.int64) * M * N + rows.to(tl.int64) * N  # [BLOCK_M]
        tl.store(out_rows[None, :] + columns[:, None], acc, mask=(rows < M)[None, :] & (columns < N)[:, None])


class SkinnyTile(NamedTuple):
    """Tile of one program for M up to block_m, its pipeline, how many programs share an SM.

    The rings of an SM's programs hold 120 KB or more together: what a latency of ~1 us at 100 GB/s and more needs.
    cost: time that a full wave of such tiles takes over the same K, relative to the others of the same block_m. Wide
    tiles read x less often, which counts from 64 rows on: x then moves as many bytes through L2 as w does.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    cost: float = 1.0


TILES = (
    SkinnyTile(16, 64, 128, 4, 5, 2),
    SkinnyTile(32, 64, 128, 4, 4, 2),
    SkinnyTile(64, 64, 128, 4, 3, 2, 0.6),
    SkinnyTile(64, 128, 64, 4, 4, 2, 1.0),
    SkinnyTile(128, 64, 128, 4, 4, 1, 0.6),
    SkinnyTile(128, 128, 64, 8, 6, 1, 1.0),
)
SPLITS = (1, 2, 3, 4)
SPLIT_COST = 0.15  # of a wave: every further partial is written here and read again by the consumer


def choose(M, N, K, num_sms, splits=SPLITS):
    """(tile, number of splits) whose waves cost least among the tiles of the narrowest block_m that holds M rows."""
    block_m = min((tile.block_m for tile in TILES if tile.block_m >= M), default=TILES[-1].block_m)

    def time(candidate):
        tile, num_splits = candidate
        num_units = num_splits * ceil_div(M, block_m) * ceil_div(N, tile.block_n)
        waves = ceil_div(num_units, num_sms * tile.programs_per_sm) / num_splits
        return waves * tile.cost * (1 + SPLIT_COST * num_splits)

    tiles = [tile for tile in TILES if tile.block_m == block_m]
    return min(((tile, s) for tile in tiles for s in splits if s == splits[0] or s * tile.block_k <= K), key=time)


def num_splits(M, N, K, num_sms):
    """How many partials gemm_skinny makes of x [M, K] and w [N, K] on num_sms SMs."""
    return choose(M, N, K, num_sms)[1]


def gemm_skinny(x, w, *, bias=None, out=None, num_sms, num_splits=None, tile=None, pdl=False):
    """Split-K partials of ``x @ w.T (+ bias)``: fp32 [S, M, N], whose sum over S is the product.

    x [M, K] and w [N, K] of one dtype (bf16 or fp16 on a GPU); bias [N]; out [S, M, N] fp32, contiguous. Any M >= 1,
    made for M <= MAX_SKINNY_TOKENS; N and K multiples of 16; rows contiguous and 16-byte aligned (else ValueError).
    num_sms: SM count of the stream's partition. num_splits: S, else the function of that name decides (1 for logits).
    tile: override of the choice, for tuning. pdl: see pdl.py.
    """
    M, K = x.shape
    N = w.shape[0]
    if w.shape[1] != K or N % 16 or K % 16:
        raise ValueError(f"gemm_skinny needs x [M, K], w [N, K], N and K multiples of 16, got {x.shape} and {w.shape}")
    chosen, splits = choose(M, N, K, num_sms, (num_splits,) if num_splits else SPLITS)
    if out is None:
        out = torch.empty(splits, M, N, dtype=torch.float32, device=x.device)  # [S, M, N]
    elif out.shape != (splits, M, N) or not out.is_contiguous():
        raise ValueError(f"gemm_skinny's out must be contiguous {(splits, M, N)}, got {out.shape} {out.stride()}")
    block_m, block_n, block_k, num_warps, num_stages, programs_per_sm, _ = tile or chosen
    num_units = splits * ceil_div(M, block_m) * ceil_div(N, block_n)
    _skinny_kernel[(min(num_sms * programs_per_sm, num_units),)](
        descriptor(x, block_m, block_k), descriptor(w, block_n, block_k), bias, out,
        M, N, splits, ceil_div(ceil_div(K, block_k), splits),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
        **launch_options(pdl),
    )  # fmt: skip
    return out
