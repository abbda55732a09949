"""Gate and up products of an MLP with their activation: ``silu(x @ gate.T) * (x @ up.T)`` in one kernel.

Formula     h[m, i] = silu(sum over k of x[m, k] * w[i, k]) * (sum over k of x[m, k] * w[I + i, k]); with
            silu(a) = a·sigmoid(a). Both sums stay in fp32 registers until the one rounding at the end. The
            [M, 2I] intermediate never exists in memory.
Cost        4·M·I·K FLOPs; (M·K + 2·I·K + M·I) elements of memory traffic.
Program     Two accumulators per program: the gate tile and the up tile of the same columns, so w keeps its natural
to tile     order (gate rows, then up rows). Many rows: persistent TMA tiles in grouped order, as in gemm.py. Few rows:
            column tiles only, transposed (w @ x.T) as in gemm_skinny.py, several programs per SM; no split-K, as
            silu needs whole sums.

It does not know what a layer is, nor which SMs it runs on.

Run the tests: ``pytest tests/test_kernels_gemm.py`` (interpreter), ``pytest -m gpu tests/test_kernels_gemm.py`` (GPU).
"""

import torch
import triton
import triton.language as tl

from .gemm import GROUP_M, Tile, _map_tile, ceil_div, descriptor
from .gemm_skinny import MAX_SKINNY_TOKENS, SkinnyTile


def gemm_swiglu_reference(x, w, *, out=None, deterministic=False):
    """``silu(x [M, K] @ gate.T) * (x @ up.T)`` -> [M, I] in fp32, rounded once; w [2I, K] = gate, up rows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = torch.nn.functional.linear(x.to(wide), w.to(wide)).chunk(2, dim=-1)  # [M, I] each
    y = torch.nn.functional.silu(gate) * up  # [M, I]
    return y.to(x.dtype) if out is None else out.copy_(y)


@triton.jit
def _silu_mul(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["M"])
def _swiglu_kernel(
    x_desc,
    w_desc,
    out_desc,
    M,
    width,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # map program
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    num_blocks_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _map_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N

        # load and compute; where width is no multiple of BLOCK_N the last gate tile runs into rows of up, never stored
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
        for block in range(num_blocks_k):
            k = block * BLOCK_K
            x_tile = x_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
            gate_tile = w_desc.load([column, k])  # [BLOCK_N, BLOCK_K]
            up_tile = w_desc.load([width + column, k])  # [BLOCK_N, BLOCK_K]
            gate = tl.dot(x_tile, gate_tile.T, gate)
            up = tl.dot(x_tile, up_tile.T, up)

        # store
        out_desc.store([row, column], _silu_mul(gate, up).to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _swiglu_skinny_kernel(
    x_desc,
    w_desc,
    out_ptr,
    M,
    width,
    K,
    out_stride_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # map program
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    num_blocks_k = tl.cdiv(K, BLOCK_K)
    for unit in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0), flatten=True):
        row = (unit % num_tiles_m) * BLOCK_M
        column = (unit // num_tiles_m) * BLOCK_N

        # load and compute, transposed
        gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [BLOCK_N, BLOCK_M]
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [BLOCK_N, BLOCK_M]
        for block in range(num_blocks_k):
            k = block * BLOCK_K
            gate_tile = w_desc.load([column, k])  # [BLOCK_N, BLOCK_K]
            up_tile = w_desc.load([width + column, k])  # [BLOCK_N, BLOCK_K]
            x_tile = x_desc.load([row, k]).T  # [BLOCK_K, BLOCK_M]
            gate = tl.dot(gate_tile, x_tile, gate)
            up = tl.dot(up_tile, x_tile, up)

        # store
        columns = column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        rows = row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_stride_m + columns[:, None]  # [BLOCK_N, BLOCK_M]
        value = _silu_mul(gate, up).to(out_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_M]
        tl.store(out_ptrs, value, mask=(rows < M)[None, :] & (columns < width)[:, None])


TILES = (Tile(128, 128, 64, 8, 4, 1, 1.0), Tile(128, 64, 64, 8, 4, 1, 0.58))
DETERMINISTIC_TILE = TILES[0]
SKINNY_BLOCK_K = 128
SKINNY_TILES = (  # by block_m: the first that holds M, else the last with several row tiles
    SkinnyTile(16, 64, 4, 3, 2),
    SkinnyTile(32, 64, 4, 2, 2),
    SkinnyTile(64, 64, 4, 4, 1),
    SkinnyTile(128, 64, 8, 3, 1),
)


def choose_tile(M, width, num_sms):
    """The tile whose waves over num_sms SMs cost least."""
    return min(TILES, key=lambda t: ceil_div(ceil_div(M, t.block_m) * ceil_div(width, t.block_n), num_sms) * t.cost)


def choose_skinny_tile(M):
    """The narrowest tile that holds M rows; the widest one for more."""
    for tile in SKINNY_TILES:
        if tile.block_m >= M:
            return tile
    return SKINNY_TILES[-1]


def gemm_swiglu(x, w, *, out=None, num_sms, deterministic=False, tile=None):
    """``silu(x @ gate.T) * (x @ up.T)`` -> [M, I], fp32 sums, rounded once.

    x [M, K]; w [2I, K]: I gate rows, then I up rows, of x's dtype (bf16 or fp16 on a GPU); out [M, I] of any float
    dtype. Any M >= 1; I and K multiples of 16; rows contiguous and 16-byte aligned (else ValueError). num_sms: SM count
    of the stream's partition. deterministic: the persistent kernel with one tile shape whatever M and num_sms.
    tile: a Tile (persistent) or SkinnyTile to use instead of the choice by M, for tuning and warm-up.
    """
    M, K = x.shape
    width = w.shape[0] // 2
    if w.shape[1] != K or w.shape[0] % 32 or K % 16:
        raise ValueError(f"gemm_swiglu needs x [M, K], w [2I, K], I and K multiples of 16, got {x.shape} and {w.shape}")
    if out is None:
        out = torch.empty(M, width, dtype=x.dtype, device=x.device)  # [M, I]
    if tile is None:
        if deterministic:
            tile = DETERMINISTIC_TILE
        else:
            tile = choose_skinny_tile(M) if M <= MAX_SKINNY_TOKENS else choose_tile(M, width, num_sms)
    num_tiles = ceil_div(M, tile.block_m) * ceil_div(width, tile.block_n)
    if isinstance(tile, SkinnyTile):
        _swiglu_skinny_kernel[(min(num_sms * tile.programs_per_sm, num_tiles),)](
            descriptor(x, tile.block_m, SKINNY_BLOCK_K),
            descriptor(w, tile.block_n, SKINNY_BLOCK_K),
            out,
            M,
            width,
            K,
            out.stride(0),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=SKINNY_BLOCK_K,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    else:
        _swiglu_kernel[(min(num_sms, num_tiles),)](
            descriptor(x, tile.block_m, tile.block_k),
            descriptor(w, tile.block_n, tile.block_k),
            descriptor(out, tile.block_m, tile.block_n),
            M,
            width,
            K,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.max_stages,
        )
    return out
