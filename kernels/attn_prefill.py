"""Causal attention of new tokens over a paged KV cache: whole prompts, chunks of prompts, or one token each.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h // G]) v[j, h // G],   j <= position of query i,   G = H / K

FLOPs: 4 D for every (query head, query, visible key). Bytes: q and out once; K and V of a request once per query tile
and KV head, nearly always out of L2, because the heads that read the same blocks run side by side.

Program to tile: a tile is one KV head and BLOCK_M // G consecutive queries of one request, all G query heads of the
group packed into its rows, so K and V are read once per group. It walks the request's blocks from 0 up, one block (64
tokens, one table entry) a step: first the blocks that every row sees whole, then those that need the causal mask. The
softmax runs online, in fp32, in powers of two. num_sms * PROGRAMS_PER_SM programs draw tiles from a counter,
the longest of a request first; two small programs on an SM hide each other's waits better than one of twice the size.

Each step multiplies the previous block's probabilities with V while it computes the softmax of its own scores: the
product needs no result of this step, so the tensor cores work through the exponentials.

A row's result depends on its own query and its request's keys alone: blocks that only other rows of the tile need
multiply its sum by one and add zero. So the bits are the same for any chunking, batch and SM count, and a decode step
run through here gives the bits that prefill would give.

The file refuses to know where the blocks came from and who else reads them. Tests: tests/test_kernels_attention.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_SIZE = 64
LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 2  # what registers and shared memory hold at once


def has_bulk_copies():
    """Whether the target of compilation copies whole tiles by descriptor: Hopper and later (and the interpreter)."""
    return triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().arch >= 90


# --- reference ---


def attn_prefill_reference(
    q, k_cache, v_cache, block_table, rows, query_starts, context_lens, *, max_query_len=None, scale, out=None
):
    """The same function in plain torch, in fp32; arguments as in `attn_prefill`. Loops over requests, not tokens."""
    _, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    starts, lens = query_starts.tolist(), context_lens.tolist()
    for r, row in enumerate(rows.tolist()):
        first, last, context = starts[r], starts[r + 1], lens[r]
        num_queries = last - first
        if row < 0 or num_queries <= 0:
            continue
        blocks = block_table[row, : -(-context // BLOCK_SIZE)].long()
        k, v = (
            cache[blocks].transpose(0, 1).reshape(num_kv_heads, 1, -1, head_dim)[:, :, :context].float()
            for cache in (k_cache, v_cache)
        )  # [K, 1, context, D]
        group = num_heads // num_kv_heads
        queries = q[first:last].float().view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        if num_queries == context:  # without a mask torch skips the half that causality hides
            mask, is_causal = None, num_queries > 1
        else:
            positions = torch.arange(context - num_queries, context, device=q.device)
            mask, is_causal = torch.arange(context, device=q.device) <= positions[:, None], False  # [queries, context]
        k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
        result = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        out[first:last] = result.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim).to(out.dtype)
    return out


# --- kernel ---


@triton.jit
def load_tile(
    cache, block, kv_head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BULK: tl.constexpr
):
    """K or V of one block and KV head [BLOCK, D]: by one bulk copy through a descriptor, or by pointers."""
    tile = block.to(tl.int64) * KV_HEADS + kv_head
    if BULK:
        return cache.load([(tile * BLOCK).to(tl.int32), 0])
    else:
        offsets = tl.arange(0, BLOCK)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        return tl.load(cache + tile * (BLOCK * HEAD_DIM) + offsets)


@triton.jit
def _softmax_step(scores, row_max, row_sum, qk_scale):
    """Folds one block's scores into the running maximum and sum; rescale is what older sums must be multiplied by."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
    p = tl.math.exp2(scores * qk_scale - new_max[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@triton.jit
def _attend_blocks(
    first, last, p, rescale, row_max, row_sum, acc, q, k_cache, v_cache, table, kv_head, q_positions, qk_scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BULK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Blocks first..last: each step adds block j - 1 to acc and leaves block j as p, not yet multiplied with V."""
    slots = tl.arange(0, BLOCK)
    # Table entries are read a step ahead, each by a load of its own: Triton pipelines K and V only if no value that a
    # step loads is an address in the same step, and none is handed on for more than one step.
    k_block = tl.load(table + first, mask=first < last, other=0)
    v_block = tl.load(table + first - 1)
    for j in range(first, last):
        k = load_tile(k_cache, k_block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
        v = load_tile(v_cache, v_block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
        k_block = tl.load(table + j + 1, mask=j + 1 < last, other=0)
        v_block = tl.load(table + j)
        scores = tl.dot(q, k.T)  # [M, BLOCK]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])  # [M, D]
        if MASKED:
            scores = tl.where(j * BLOCK + slots[None, :] <= q_positions[:, None], scores, -float("inf"))
        p, rescale, row_max, row_sum = _softmax_step(scores, row_max, row_sum, qk_scale)
    return p, rescale, row_max, row_sum, acc


@triton.jit(do_not_specialize=["num_requests", "num_tiles", "max_blocks"])
def _attn_prefill_kernel(
    q_ptr, k_cache, v_cache, block_table, rows, query_starts, context_lens, out_ptr, tiles_taken,
    num_requests, num_tiles, max_blocks, qk_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, SEARCH: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile_rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, BLOCK)
    candidates = tl.arange(0, SEARCH)

    step = tl.program_id(0)
    while step < num_tiles:
        taken = tl.atomic_add(tiles_taken, 1, sem="relaxed")
        if taken == num_tiles - 1:  # one draw a tile, so this was the launch's last: ready for the next launch
            tl.store(tiles_taken, 0)
        next_step = tl.num_programs(0) + taken

        # Map: request r owns the tile numbers from query_starts[r] // TILE_QUERIES + r on, which is never too few.
        kv_head = step % KV_HEADS
        tile = (num_tiles - 1 - step) // KV_HEADS
        request = -1
        for base in range(0, num_requests, SEARCH):
            index = base + candidates
            starts = tl.load(query_starts + index, mask=index < num_requests, other=0)
            request += tl.sum(((starts // TILE_QUERIES + index <= tile) & (index < num_requests)).to(tl.int32))
        first_token = tl.load(query_starts + request)
        num_queries = tl.load(query_starts + request + 1) - first_token
        first_query = (tile - first_token // TILE_QUERIES - request) * TILE_QUERIES
        row = tl.load(rows + request)
        if (row >= 0) & (first_query < num_queries):
            # Load the queries: row i of the tile is query i // G, head i % G of the group.
            context_len = tl.load(context_lens + request)
            cached = context_len - num_queries
            query = first_query + tile_rows // GROUP
            is_row = (tile_rows < TILE_QUERIES * GROUP) & (query < num_queries)
            head = kv_head * GROUP + tile_rows % GROUP
            offsets = ((first_token + query).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
            q = tl.load(q_ptr + offsets, mask=is_row[:, None], other=0.0)  # [M, D]
            last_query = tl.minimum(first_query + TILE_QUERIES, num_queries) - 1
            q_positions = cached + tl.minimum(query, last_query)

            # Compute: scores of block 0; the blocks that every row sees whole; the blocks on the diagonal.
            table = block_table + row.to(tl.int64) * max_blocks
            num_full = (cached + first_query + 1) // BLOCK
            num_seen = (cached + last_query) // BLOCK + 1
            acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
            row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            k = load_tile(k_cache, tl.load(table), kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            scores = tl.where(slots[None, :] <= q_positions[:, None], tl.dot(q, k.T), -float("inf"))  # [M, BLOCK]
            p, rescale, row_max, row_sum = _softmax_step(scores, row_max, row_sum, qk_scale)
            p, rescale, row_max, row_sum, acc = _attend_blocks(
                1, num_full, p, rescale, row_max, row_sum, acc, q, k_cache, v_cache, table, kv_head, q_positions,
                qk_scale, KV_HEADS, HEAD_DIM, BLOCK, BULK, False,
            )  # fmt: skip
            p, rescale, row_max, row_sum, acc = _attend_blocks(
                tl.maximum(num_full, 1), num_seen, p, rescale, row_max, row_sum, acc, q, k_cache, v_cache, table,
                kv_head, q_positions, qk_scale, KV_HEADS, HEAD_DIM, BLOCK, BULK, True,
            )  # fmt: skip
            # The last block's slots past the context were never written: whatever lies there must not meet p = 0.
            last_block = tl.load(table + num_seen - 1)
            v = load_tile(v_cache, last_block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            v = tl.where(((num_seen - 1) * BLOCK + slots)[:, None] < context_len, v, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])

            # Store.
            result = acc / row_sum[:, None]
            tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
        step = next_step


# --- wrapper ---


def attn_prefill(
    q, k_cache, v_cache, block_table, rows, query_starts, context_lens,
    *, max_query_len, scale, out=None, counter=None, num_sms,
):  # fmt: skip
    """Causal attention of each request's new tokens over its cached prefix and themselves.

    q [T, H, D]; k_cache and v_cache [N, K, 64, D]; block_table [num_rows, max_blocks], rows [R], query_starts [R + 1]
    (cumulative, query_starts[R] <= T) and context_lens [R] (cached plus new tokens) int32. Query j of request r stands
    at position context_lens[r] - num_queries[r] + j. Where rows[r] is -1 nothing is written. Writes and returns out
    [T, H, D]. counter: one int32, 0, which every launch leaves at 0 again; launches that may run at the same time must
    not share it; allocated and cleared here when None. The launch depends on shapes and num_sms only, so it can be
    captured in a CUDA graph; max_query_len, an upper bound of the query counts, is there for callers that share one
    signature: tiles are counted from T and R.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    if block_size != BLOCK_SIZE or head_dim not in (64, 128) or num_heads % num_kv_heads or group > 16:
        raise ValueError(f"unsupported attention shape: q {tuple(q.shape)}, cache {tuple(k_cache.shape)}")
    out = torch.empty_like(q) if out is None else out
    if not (q.is_contiguous() and out.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("q, out and the caches must be contiguous")
    num_requests = rows.shape[0]
    if num_tokens == 0 or num_requests == 0:
        return out
    bulk = has_bulk_copies()
    if bulk:
        block_m, num_stages = 64, 2
        box = [BLOCK_SIZE, head_dim]
        k_cache, v_cache = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k_cache, v_cache))
    else:  # no bulk copies before Hopper, and fewer registers to spare beside mma.sync operands
        block_m, num_stages = 32, 3
    num_tiles = (num_tokens // (block_m // group) + num_requests) * num_kv_heads
    if counter is None:
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _attn_prefill_kernel[(min(num_sms * PROGRAMS_PER_SM, num_tiles),)](
        q, k_cache, v_cache, block_table, rows, query_starts, context_lens, out, counter,
        num_requests, num_tiles, block_table.stride(0), scale * LOG2_E,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK=BLOCK_SIZE,
        BLOCK_M=block_m, SEARCH=256, BULK=bulk, num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    return out
