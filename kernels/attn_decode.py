"""Attention of one new token per request over a paged KV cache, the work split evenly over the SMs.

    out[b, h] = sum_j softmax_j(scale * q[b, h] . k[j, h // G]) v[j, h // G],   j < context_lens[b],   G = H / K

Bytes: 4 K D context_lens[b] per request in bf16, each read once: the G query heads of a KV head share one tile of 16
rows. FLOPs: 4 H D per key, far below what the bytes cost.

Program to tile: the unit of work is one block (64 tokens) of one KV head of one request; units are numbered request by
request, head by head, block by block. Each of num_sms * PROGRAMS_PER_SM programs takes an equal contiguous share of
the numbers, found from the lengths on the device, so one launch serves any mix of lengths and can be captured in a CUDA
graph. A program that meets a head whole writes the output. A head cut by a share's edge leaves partial sums (o, m, l)
in scratch; the last of its programs to finish adds them up in the order of the blocks, whichever program that is, so
equal inputs and num_sms give equal bits.

The file refuses to know what a request is beyond a row of the block table. Tests: tests/test_kernels_attention.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK_SIZE = 64
LOG2_E = 1.4426950408889634
MAX_BATCH = 512
PROGRAMS_PER_SM = 4
MIN_SHARE_BLOCKS = 2


# --- reference ---


def attn_decode_reference(q, k_cache, v_cache, block_table, rows, context_lens, *, scale, out=None):
    """The same function in plain torch, in fp32, padded to the longest context; arguments as in `attn_decode`."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    lens = torch.where(rows >= 0, context_lens, 0)  # [B]
    max_blocks = -(-int(lens.max()) // BLOCK_SIZE) if batch else 0
    if max_blocks == 0:
        return out.zero_()
    first = torch.arange(max_blocks, device=q.device) * BLOCK_SIZE
    blocks = block_table[rows.clamp(min=0).long(), :max_blocks].long()
    blocks = blocks.where(first < lens[:, None], 0)  # [B, max_blocks]: entries past the context may be anything
    is_seen = torch.arange(max_blocks * BLOCK_SIZE, device=q.device) < lens[:, None]  # [B, S]
    k, v = (
        cache[blocks].transpose(1, 2).reshape(batch, num_kv_heads, -1, head_dim).float() for cache in (k_cache, v_cache)
    )  # [B, K, S, D]
    for x in (k, v):  # copies by now; unwritten slots may hold NaN
        x.masked_fill_(~is_seen[:, None, :, None], 0.0)
    queries = q.float().view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    result = F.scaled_dot_product_attention(queries, k, v, attn_mask=is_seen[:, None, None, :], scale=scale)
    result = result.masked_fill((lens == 0)[:, None, None, None], 0.0)
    return out.copy_(result.view(batch, num_heads, head_dim))


# --- kernel ---


@triton.jit(do_not_specialize=["batch", "max_blocks"])
def _attn_decode_kernel(
    q_ptr, k_cache, v_cache, block_table, rows, context_lens, out_ptr, partial_o, partial_m, partial_l, arrivals,
    batch, max_blocks, qk_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE: tl.constexpr, MAX_BATCH: tl.constexpr, MIN_SHARE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, BLOCK)
    heads = tl.arange(0, ROWS)
    tile_offsets = slots[:, None] * HEAD_DIM + dims[None, :]  # [BLOCK, D]

    # Map: every program numbers all units by the same prefix sum. A request without context counts as one empty block.
    index = tl.arange(0, MAX_BATCH)
    all_rows = tl.load(rows + index, mask=index < batch, other=-1)
    all_lens = tl.load(context_lens + index, mask=(index < batch) & (all_rows >= 0), other=0)
    all_blocks = tl.where(index < batch, tl.maximum((all_lens + BLOCK - 1) // BLOCK, 1), 0)
    ends = tl.cumsum(all_blocks, 0) * KV_HEADS
    num_units = tl.sum(all_blocks, 0) * KV_HEADS
    share = tl.maximum((num_units + tl.num_programs(0) - 1) // tl.num_programs(0), MIN_SHARE)
    unit = program * share
    last_unit = tl.minimum(unit + share, num_units)
    request = tl.sum((ends <= unit).to(tl.int32), 0)
    request_start = tl.max(tl.where(ends <= unit, ends, 0), 0)

    while unit < last_unit:
        row = tl.load(rows + request)
        context_len = tl.load(context_lens + request) * (row >= 0).to(tl.int32)
        num_used = (context_len + BLOCK - 1) // BLOCK
        num_blocks = tl.maximum(num_used, 1)
        kv_head = (unit - request_start) // num_blocks
        first_block = unit - request_start - kv_head * num_blocks
        end_block = tl.minimum(num_blocks, first_block + last_unit - unit)

        # Load the queries: the heads of the group, padded to ROWS.
        head_offsets = (request * HEADS + kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(q_ptr + head_offsets, mask=(heads < GROUP)[:, None], other=0.0)  # [ROWS, D]

        # Compute.
        table = block_table + row.to(tl.int64) * max_blocks
        acc = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
        row_max = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        row_sum = tl.zeros([ROWS], dtype=tl.float32)
        for j in range(first_block, tl.minimum(end_block, num_used)):
            tile = (tl.load(table + j).to(tl.int64) * KV_HEADS + kv_head) * (BLOCK * HEAD_DIM)
            is_seen = j * BLOCK + slots < context_len
            k = tl.load(k_cache + tile + tile_offsets, mask=is_seen[:, None], other=0.0)  # [BLOCK, D]
            scores = tl.where(is_seen[None, :], tl.dot(q, k.T) * qk_scale, -float("inf"))  # [ROWS, BLOCK]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.math.exp2(scores - new_max[:, None])
            rescale = tl.math.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v = tl.load(v_cache + tile + tile_offsets, mask=is_seen[:, None], other=0.0)  # [BLOCK, D]
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
            row_max = new_max

        # Store: a whole head is done; a cut one leaves its partial sums, and the last program there merges them.
        if end_block - first_block == num_blocks:
            result = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
            tl.store(out_ptr + head_offsets, result.to(out_ptr.dtype.element_ty), mask=(heads < GROUP)[:, None])
        else:
            slot = 2 * program + (first_block == 0).to(
                tl.int32
            )  # at most one head enters a share cut, and one leaves it
            row_offsets = slot * GROUP + heads
            tl.store(partial_o + row_offsets[:, None] * HEAD_DIM + dims[None, :], acc, mask=(heads < GROUP)[:, None])
            tl.store(partial_m + row_offsets, row_max, mask=heads < GROUP)
            tl.store(partial_l + row_offsets, row_sum, mask=heads < GROUP)
            first_program = (unit - first_block) // share
            last_program = (unit - first_block + num_blocks - 1) // share
            tl.debug_barrier()  # every thread's partial sums before this program's arrival
            arrived = tl.atomic_add(arrivals + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                merge_heads = tl.arange(0, MERGE_ROWS)
                is_head = merge_heads < GROUP
                total_max = tl.full([MERGE_ROWS], -float("inf"), dtype=tl.float32)
                total_sum = tl.zeros([MERGE_ROWS], dtype=tl.float32)
                total = tl.zeros([MERGE_ROWS, HEAD_DIM], dtype=tl.float32)
                for base in range(first_program, last_program + 1, MERGE):
                    parts = base + tl.arange(0, MERGE)
                    is_part = (parts <= last_program)[:, None] & is_head[None, :]
                    part_rows = (2 * parts + (parts == first_program).to(tl.int32))[:, None] * GROUP + merge_heads[
                        None, :
                    ]
                    part_max = tl.load(partial_m + part_rows, mask=is_part, other=-float("inf"), cache_modifier=".cg")
                    part_sum = tl.load(
                        partial_l + part_rows, mask=is_part, other=0.0, cache_modifier=".cg"
                    )  # [MERGE, G]
                    o = tl.load(
                        partial_o + part_rows[:, :, None] * HEAD_DIM + dims[None, None, :],
                        mask=is_part[:, :, None], other=0.0, cache_modifier=".cg",
                    )  # [MERGE, G, D]  # fmt: skip
                    new_max = tl.maximum(total_max, tl.max(tl.where(is_head[None, :], part_max, 0.0), 0))
                    weight = tl.math.exp2(part_max - new_max[None, :])
                    rescale = tl.math.exp2(total_max - new_max)
                    total_sum = total_sum * rescale + tl.sum(weight * part_sum, 0)
                    total = total * rescale[:, None] + tl.sum(weight[:, :, None] * o, 0)
                    total_max = new_max
                result = total / tl.where(is_head, total_sum, 1.0)[:, None]
                merged_offsets = (request * HEADS + kv_head * GROUP + merge_heads)[:, None] * HEAD_DIM + dims[None, :]
                tl.store(out_ptr + merged_offsets, result.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
                tl.store(arrivals + first_program, 0)  # ready for the next launch

        unit += end_block - first_block
        is_done = unit - request_start == num_blocks * KV_HEADS
        request_start = tl.where(is_done, unit, request_start)
        request += is_done.to(tl.int32)


# --- wrapper ---


def decode_scratch_shape(num_heads, num_kv_heads, head_dim, num_sms):
    """Shape of the fp32 scratch that `attn_decode` needs at this head layout, whatever the batch.

    Allocate it with torch.zeros, once per lane: two launches that may run at the same time must not share it.
    """
    num_programs = num_sms * PROGRAMS_PER_SM
    return (num_programs * (2 * (num_heads // num_kv_heads) * (head_dim + 2) + 1),)


def attn_decode(q, k_cache, v_cache, block_table, rows, context_lens, *, scale, out=None, scratch=None, num_sms):
    """Attention of one query per request over its whole context.

    q [B, H, D], B <= 512; k_cache and v_cache [N, K, 64, D]; block_table [num_rows, max_blocks], rows [B] and
    context_lens [B] (the new token counted) int32. rows[b] == -1 or context 0 gives zeros. scratch: see
    `decode_scratch_shape`; each launch leaves it ready for the next. Writes and returns out [B, H, D]. Reads no length
    on the host, so it can be captured in a CUDA graph.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    if block_size != BLOCK_SIZE or head_dim not in (64, 128) or num_heads % num_kv_heads or group > 16:
        raise ValueError(f"unsupported attention shape: q {tuple(q.shape)}, cache {tuple(k_cache.shape)}")
    if batch > MAX_BATCH:
        raise ValueError(f"batch {batch} is larger than {MAX_BATCH}")
    out = torch.empty_like(q) if out is None else out
    if not (q.is_contiguous() and out.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("q, out and the caches must be contiguous")
    (needed,) = decode_scratch_shape(num_heads, num_kv_heads, head_dim, num_sms)
    if scratch is None:
        scratch = torch.zeros(needed, dtype=torch.float32, device=q.device)
    elif scratch.numel() < needed or scratch.dtype != torch.float32:
        raise ValueError(f"scratch must hold {needed} fp32 values")
    if batch == 0:
        return out
    num_programs = num_sms * PROGRAMS_PER_SM
    partial_rows = 2 * num_programs * group
    partial_o, partial_m, partial_l, arrivals, _ = scratch.view(-1).split(
        [partial_rows * head_dim, partial_rows, partial_rows, num_programs, scratch.numel() - needed]
    )
    _attn_decode_kernel[(num_programs,)](
        q, k_cache, v_cache, block_table, rows, context_lens, out,
        partial_o, partial_m, partial_l, arrivals.view(torch.int32),
        batch, block_table.stride(0), scale * LOG2_E,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK=BLOCK_SIZE,
        ROWS=16, MERGE_ROWS=triton.next_power_of_2(group), MERGE=8, MAX_BATCH=MAX_BATCH, MIN_SHARE=MIN_SHARE_BLOCKS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
