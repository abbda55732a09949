"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one launch.

For a token at position p and a head x of D numbers, with angle a_i = p * f_i for i < D/2 (rotate-half convention):

    y_i       = x_i * cos a_i - x_{i + D/2} * sin a_i
    y_{i+D/2} = x_{i + D/2} * cos a_i + x_i * sin a_i

The kernel sums the S split-K partials of the qkv product in index order, optionally normalises every query and key head
over D (Qwen3's qk-norm, rounded as in rmsnorm.py), rotates queries and keys, writes queries to ``out`` and scatters
keys and values into block ``block_table[row, p // 64]``, slot ``p % 64``. The angles come from an fp32 table made once
by the model (it holds any rope scaling), so nothing here knows about frequencies.

Cost: reads S T (H + 2K) D partials, writes T (H + 2K) D elements; the table row (4 D bytes a token) comes from cache.
Map: one step of a program = one token x BLOCK_HEADS heads of the row [q heads | k heads | v heads]; masks decide which
of the three destinations a head goes to. A token whose row is -1 is padding: nothing is written for it.

Tests: ``pytest tests/test_kernels_small.py``.
"""

import torch
import triton
import triton.language as tl

from .pdl import launch_options, wait_for_inputs

BLOCK_SIZE = 64  # tokens per cache block, as everywhere in the engine


def _normalise_heads(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """fp32 heads [T, heads, D] -> RMSNorm over D with transformers' two roundings to ``dtype``, back in fp32."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normed.to(dtype) * weight.to(dtype)).float()


def rope_kv_write_reference(
    qkv: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, block_table: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor,
    *, num_heads: int, num_kv_heads: int, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
    eps: float = 0.0, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What ``rope_kv_write`` does, in plain torch (same arguments)."""
    num_tokens, head_dim, dtype = qkv.shape[1], k_cache.shape[-1], k_cache.dtype
    out = qkv.new_empty((num_tokens, num_heads, head_dim), dtype=dtype) if out is None else out
    valid = torch.nonzero(rows >= 0).flatten()  # [n]
    total = qkv[0, valid].float()  # [n, (H + 2K) D]
    for partial in qkv[1:]:
        total = total + partial[valid].float()
    heads = total.view(len(valid), num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # [n, heads, D]
    if q_norm is not None:
        q, k = _normalise_heads(q, q_norm, eps, dtype), _normalise_heads(k, k_norm, eps, dtype)
    position = positions[valid].long()  # [n]
    cos, sin = cos_sin[position].float().unsqueeze(1).chunk(2, dim=-1)  # [n, 1, D/2] each
    rotated = []
    for x in (q, k):
        first, second = x.chunk(2, dim=-1)
        rotated.append(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype))
    block = block_table[rows[valid].long(), position // BLOCK_SIZE].long()  # [n]
    k_cache[block, :, position % BLOCK_SIZE] = rotated[1]
    v_cache[block, :, position % BLOCK_SIZE] = v.to(dtype)
    out[valid] = rotated[0]
    return out


@triton.jit(do_not_specialize=["num_tokens", "stride_table"])
def _rope_kv_write_kernel(
    qkv_ptr, cos_sin_ptr, positions_ptr, rows_ptr, block_table_ptr, q_norm_ptr, k_norm_ptr, out_ptr, k_cache_ptr,
    v_cache_ptr,
    num_tokens, eps,
    stride_table,
    NUM_PARTIALS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = (H + 2 * K) * D
    NUM_TILES: tl.constexpr = (H + 2 * K + BLOCK_HEADS - 1) // BLOCK_HEADS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    dims = tl.arange(0, HALF)[None, :]
    for step in range(tl.program_id(0), num_tokens * NUM_TILES, tl.num_programs(0)):
        # map step -> token, heads
        token = step // NUM_TILES
        heads = (step % NUM_TILES) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        # load: where the token goes; then both halves of every head, partials summed in order
        row = tl.load(rows_ptr + token)
        position = tl.where(row >= 0, tl.load(positions_ptr + token), 0)
        cos = tl.load(cos_sin_ptr + position * D + dims)
        sin = tl.load(cos_sin_ptr + position * D + HALF + dims)
        block = tl.load(block_table_ptr + tl.maximum(row, 0) * stride_table + position // BLOCK_SIZE).to(tl.int64)
        wait_for_inputs(PDL)
        inside = (heads < H + 2 * K) & (dims < HALF)
        offsets = token * WIDTH + heads * D + dims
        first = tl.load(qkv_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(qkv_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
        for s in tl.static_range(1, NUM_PARTIALS):
            partial_ptr = qkv_ptr + s * num_tokens * WIDTH
            first += tl.load(partial_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            second += tl.load(partial_ptr + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
        # padding is not branched around, so that all loads start at once: its heads go nowhere instead
        heads = tl.where(row >= 0, heads, H + 2 * K)
        is_query = heads < H
        is_key = (heads >= H) & (heads < H + K)
        is_value = (heads >= H + K) & (heads < H + 2 * K)
        # compute: qk-norm, then the rotation; values pass through with cos 1, sin 0
        if HAS_NORM:
            square_sum = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            scale = tl.rsqrt(square_sum / D + eps)[:, None]
            weight_1 = tl.where(is_query, tl.load(q_norm_ptr + dims), tl.load(k_norm_ptr + dims)).to(tl.float32)
            weight_2 = tl.where(is_query, tl.load(q_norm_ptr + HALF + dims), tl.load(k_norm_ptr + HALF + dims))
            normed_1 = ((first * scale).to(dtype).to(tl.float32) * weight_1).to(dtype).to(tl.float32)
            normed_2 = ((second * scale).to(dtype).to(tl.float32) * weight_2.to(tl.float32)).to(dtype)
            first = tl.where(is_query | is_key, normed_1, first)
            second = tl.where(is_query | is_key, normed_2.to(tl.float32), second)
        cos = tl.where(is_query | is_key, cos, 1.0)
        sin = tl.where(is_query | is_key, sin, 0.0)
        rotated_1 = (first * cos - second * sin).to(dtype)
        rotated_2 = (second * cos + first * sin).to(dtype)
        # store: cache offsets are int64, pools exceed 2^31 elements
        q_offsets = (token * H + heads) * D + dims
        tl.store(out_ptr + q_offsets, rotated_1, mask=is_query)
        tl.store(out_ptr + q_offsets + HALF, rotated_2, mask=is_query)
        slot = position % BLOCK_SIZE
        k_offsets = ((block * K + heads - H) * BLOCK_SIZE + slot) * D + dims
        tl.store(k_cache_ptr + k_offsets, rotated_1, mask=is_key)
        tl.store(k_cache_ptr + k_offsets + HALF, rotated_2, mask=is_key)
        v_offsets = ((block * K + heads - H - K) * BLOCK_SIZE + slot) * D + dims
        tl.store(v_cache_ptr + v_offsets, rotated_1, mask=is_value)
        tl.store(v_cache_ptr + v_offsets + HALF, rotated_2, mask=is_value)


def rope_kv_write(
    qkv: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, block_table: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor,
    *, num_heads: int, num_kv_heads: int, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
    eps: float = 0.0, out: torch.Tensor | None = None, num_sms: int, pdl=False,
) -> torch.Tensor:  # fmt: skip
    """Rotate q and k, store k and v in the cache.

    qkv [S, T, (H + 2K) D] (fp32 partials, or one result of any dtype), cos_sin [max_positions, D] fp32 (first half cos,
    second half sin), positions [T], rows [T] and block_table [num_rows, max_blocks] int32, k_cache and v_cache
    [N, K, 64, D] (written), q_norm and k_norm [D] both or neither -> q [T, H, D] in the cache's dtype. D is a power of
    two. Tokens of row -1 leave ``out`` and the caches untouched. pdl: see pdl.py: the wait comes
    after positions, rows and the table are read.
    """
    num_partials, num_tokens, width = qkv.shape
    head_dim = k_cache.shape[-1]
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=k_cache.dtype, device=qkv.device)
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and cos_sin.shape[1] == head_dim
    assert k_cache.shape == v_cache.shape and k_cache.shape[1:3] == (num_kv_heads, BLOCK_SIZE)
    assert all(t.is_contiguous() for t in (qkv, cos_sin, k_cache, v_cache, out)) and block_table.stride(1) == 1
    if num_tokens > 0:
        block_heads = 8  # one shape for any T: the bits of a token must not depend on how many there are
        num_steps = num_tokens * triton.cdiv(num_heads + 2 * num_kv_heads, block_heads)
        _rope_kv_write_kernel[(min(num_steps, num_sms * 64),)](
            qkv, cos_sin, positions, rows, block_table, q_norm, k_norm, out, k_cache, v_cache,
            num_tokens, eps,
            block_table.stride(0),
            NUM_PARTIALS=num_partials, H=num_heads, K=num_kv_heads, D=head_dim, BLOCK_SIZE=BLOCK_SIZE,
            BLOCK_HEADS=block_heads, HAS_NORM=q_norm is not None, num_warps=4, **launch_options(pdl),
        )  # fmt: skip
    return out
