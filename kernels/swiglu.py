"""Gate and up products of an MLP with their activation: ``silu(x @ gate.T) * (x @ up.T)`` in one kernel.

Formula     h[m, i] = silu(sum over k of x[m, k] * w[i, k]) * (sum over k of x[m, k] * w[I + i, k]); with
            silu(a) = a·sigmoid(a). Both sums stay in fp32 registers until the one rounding at the end. The
            [M, 2I] intermediate never exists in memory.
Cost        4·M·I·K FLOPs; (M·K + 2·I·K + M·I) elements of memory traffic.
Program     A tile is the same columns of gate and up. w keeps its natural order (gate rows, then up rows); seen as
to tile     [2, I, K], one TMA box brings both row ranges side by side. Many rows: persistent tiles, grouped as in
            gemm.py. Few rows: column tiles only, transposed (w @ x.T) as in gemm_skinny.py, several programs per SM;
            no split-K, as silu needs whole sums.

It does not know what a layer is, nor which SMs it runs on.

Run the tests: ``pytest tests/test_kernels_gemm.py`` (interpreter), ``pytest -m gpu tests/test_kernels_gemm.py`` (GPU).
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm import GROUP_M, Tile, _map_tile, ceil_div, choose_tile, descriptor
from .gemm_skinny import SkinnyTile
from .pdl import launch_options, wait_for_inputs


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
    x_desc, w_desc, out_desc,
    M, width, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # map program
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    num_blocks_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _map_tile(tile, num_tiles_m, num_tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N

        # load and compute: one dot with one accumulator. Two of them in a flattened loop make the compiler wait for
        # every wgmma (it may not prove that clearing one leaves the other alone), which costs a quarter of the speed.
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)  # [BLOCK_M, 2 * BLOCK_N]
        for block in range(num_blocks_k):
            x_tile = x_desc.load([row, block * BLOCK_K])  # [BLOCK_M, BLOCK_K]
            w_pair = w_desc.load([0, column, block * BLOCK_K])  # [2, BLOCK_N, BLOCK_K]
            acc = tl.dot(x_tile, tl.reshape(w_pair, (2 * BLOCK_N, BLOCK_K)).T, acc)

        # store; a thread holds both halves of its rows, so the split moves nothing
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))  # [BLOCK_M, BLOCK_N] each
        out_desc.store([row, column], _silu_mul(gate, up).to(out_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _swiglu_skinny_kernel(
    x_desc, w_desc, out_ptr,
    M, width, K,
    out_stride_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # map program
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles_n = tl.cdiv(width, BLOCK_N)
    num_blocks_k = tl.cdiv(K, BLOCK_K)
    wait_for_inputs(PDL)
    # two accumulators, so not flattened: see above
    for unit in range(tl.program_id(0), num_tiles_m * num_tiles_n, tl.num_programs(0)):
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


TILES = (  # persistent, for many rows
    Tile(128, 128, 64, 8, 3, 1, 1.0),
    Tile(128, 64, 64, 4, 3, 1, 1.01, programs_per_sm=2),
    Tile(64, 128, 64, 4, 5, 1, 0.51),
)
DETERMINISTIC_TILE = TILES[0]
FEW_ROWS_TILES = (  # the first whose block_m holds M
    SkinnyTile(16, 64, 128, 4, 3, 2),
    SkinnyTile(32, 128, 128, 8, 3, 1),
    Tile(64, 64, 128, 4, 4, 1, 1.0),
    Tile(128, 64, 64, 4, 3, 1, 1.0, programs_per_sm=2),
)
FEW_ROWS_FEW_SMS_TILES = (  # shallower blocks keep the ring fuller where one SM needs 100 GB/s and more
    SkinnyTile(16, 64, 64, 4, 6, 2),
    SkinnyTile(32, 64, 64, 4, 5, 2),
    Tile(64, 128, 64, 4, 5, 1, 1.0),
    Tile(128, 64, 64, 4, 3, 1, 1.0, programs_per_sm=2),
)
FEW_SMS = 64


def choose_swiglu_tile(M, width, num_sms):
    """One row tile's shape by M while all rows fit one, beyond that the persistent tile whose waves cost least."""
    for tile in FEW_ROWS_TILES if num_sms > FEW_SMS else FEW_ROWS_FEW_SMS_TILES:
        if tile.block_m >= M:
            return tile
    return choose_tile(M, width, num_sms, TILES)


def _pair_descriptor(w, block_rows, block_columns):
    """TMA descriptor of w [2I, K] seen as [2, I, K], loaded as [2, block_rows, block_columns]: gate, then up."""
    whole = descriptor(w, block_rows, block_columns)
    width, row_stride = w.shape[0] // 2, whole.strides[0]
    shape, strides = [2, width, w.shape[1]], [width * row_stride, row_stride, 1]
    return TensorDescriptor(w, shape, strides, [2, block_rows, block_columns])


def gemm_swiglu(x, w, *, out=None, num_sms, deterministic=False, tile=None, pdl=False):
    """``silu(x @ gate.T) * (x @ up.T)`` -> [M, I], fp32 sums, rounded once.

    x [M, K]; w [2I, K], I gate rows, then I up rows; out [M, I]; all of one dtype (bf16 or fp16 on a GPU: the rings of
    the tiles leave no room to stage wider results). Any M >= 1; I and K multiples of 16; rows contiguous and 16-byte
    aligned (else ValueError). num_sms: SM count of the stream's partition. deterministic: the persistent kernel with
    one tile shape whatever M and num_sms.
    tile: a Tile (persistent) or SkinnyTile to use instead of the choice by M, for tuning and warm-up. pdl: see pdl.py;
    it says nothing to the persistent kernel.
    """
    M, K = x.shape
    width = w.shape[0] // 2
    if w.shape[1] != K or w.shape[0] % 32 or K % 16:
        raise ValueError(f"gemm_swiglu needs x [M, K], w [2I, K], I and K multiples of 16, got {x.shape} and {w.shape}")
    if out is None:
        out = torch.empty(M, width, dtype=x.dtype, device=x.device)  # [M, I]
    tile = tile or (DETERMINISTIC_TILE if deterministic else choose_swiglu_tile(M, width, num_sms))
    num_tiles = ceil_div(M, tile.block_m) * ceil_div(width, tile.block_n)
    grid = (min(num_sms * tile.programs_per_sm, num_tiles),)
    if isinstance(tile, SkinnyTile):
        _swiglu_skinny_kernel[grid](
            descriptor(x, tile.block_m, tile.block_k), descriptor(w, tile.block_n, tile.block_k), out,
            M, width, K,
            out.stride(0),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
            num_stages=tile.num_stages, **launch_options(pdl),
        )  # fmt: skip
    else:
        _swiglu_kernel[grid](
            descriptor(x, tile.block_m, tile.block_k), _pair_descriptor(w, tile.block_n, tile.block_k),
            descriptor(out, tile.block_m, tile.block_n),
            M, width, K,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, num_warps=tile.num_warps,
            num_stages=tile.max_stages,
        )  # fmt: skip
    return out
