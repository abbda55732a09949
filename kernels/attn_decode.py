"""Attention of one new token per request over a paged KV cache, the work split evenly over the SMs.

    out[b, h] = sum_j softmax_j(scale * q[b, h] . k[j, h // G]) v[j, h // G],   j < context_lens[b],   G = H / K

Bytes: 4 K D context_lens[b] per request in bf16, each read once: the G query heads of a KV head share one tile of 16
rows. FLOPs: 4 H D per key, far below what the bytes cost.

Program to tile: the unit of work is one block (64 tokens) of one KV head of one request; units are numbered request by
request, head by head, block by block. Each of num_sms * PROGRAMS_PER_SM programs takes an equal contiguous share of
the numbers, found from the lengths on the device, so one launch serves any mix of lengths and can be captured in a CUDA
graph. Starting on a head costs about as much as LEAD blocks, so each head leads with that many empty units. A program
that meets a head whole writes the output. A head cut by a share's edge leaves partial sums (o, m, l) in scratch; the
last of its programs to finish adds them up in the order of the blocks, whichever program that is, so equal inputs and
num_sms give equal bits.

The file refuses to know what a request is beyond a row of the block table. Tests: tests/test_kernels_attention.py.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attn_prefill import BLOCK_SIZE, LOG2_E, has_bulk_copies, load_tile
from .pdl import launch_options, wait_for_inputs

MAX_BATCH = 512
PROGRAMS_PER_SM = {64: 3, 128: 2}  # by head size: what registers and shared memory hold at once
MIN_SHARE = 2  # fewer units than this are not worth a program
LEAD = 4  # empty units in front of each head: starting on one costs about as much as so many blocks
MERGE = 8  # parts whose loads are in flight together


# --- reference ---


def attn_decode_reference(q, k_cache, v_cache, block_table, rows, context_lens, *, scale, out=None):
    """The same function in plain torch, in fp32, padded to the longest context; arguments as in `attn_decode`."""
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.empty_like(q) if out is None else out
    lens = torch.where(rows >= 0, context_lens, 0)  # [B]
    max_blocks = -(-int(lens.max()) // BLOCK_SIZE) if batch else 0
    if max_blocks == 0:
        return out.masked_fill_((rows >= 0)[:, None, None], 0.0)
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
    return out.copy_(torch.where((rows >= 0)[:, None, None], result.view(batch, num_heads, head_dim), out))


# --- kernel ---


@triton.jit
def _add_block(acc, p_sum, row_max, scores, v, qk_scale):
    """One step of the online softmax. acc [D, ROWS]; p_sum [BLOCK, ROWS], summed over slots only at the end."""
    new_max = tl.maximum(row_max, tl.max(scores, 0) * qk_scale)
    p = tl.math.exp2(scores * qk_scale - new_max[None, :])
    rescale = tl.math.exp2(row_max - new_max)
    p_sum = p_sum * rescale[None, :] + p
    acc = tl.dot(v.T, p.to(v.dtype), acc * rescale[None, :])
    return acc, p_sum, new_max


@triton.jit
def _arrive(
    head, first_program, last_program, partial_o, partial_m, partial_l, arrivals, out_ptr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Counts this program in at a cut head; the last to come merges the parts in their order."""
    arrived = tl.atomic_add(arrivals + first_program, 1, sem="acq_rel")
    if arrived == last_program - first_program:
        dims = tl.arange(0, HEAD_DIM)
        heads = tl.arange(0, MERGE_ROWS)
        is_head = heads < GROUP
        total_max = tl.full([MERGE_ROWS], -1e30, dtype=tl.float32)
        total_sum = tl.zeros([MERGE_ROWS], dtype=tl.float32)
        total = tl.zeros([MERGE_ROWS, HEAD_DIM], dtype=tl.float32)
        for base in range(first_program, last_program + 1, MERGE):
            for i in tl.static_range(MERGE):  # unrolled, so that the loads of MERGE parts are in flight together
                part = base + i
                is_part = heads < tl.where(part <= last_program, GROUP, 0)
                part_rows = (2 * part + (part == first_program).to(tl.int32)) * GROUP + heads
                # .cg: other SMs wrote these during this launch, so not from this SM's L1
                part_max = tl.load(partial_m + part_rows, mask=is_part, other=-1e30, cache_modifier=".cg")
                part_sum = tl.load(partial_l + part_rows, mask=is_part, other=0.0, cache_modifier=".cg")
                o_offsets = part_rows[:, None] * HEAD_DIM + dims[None, :]
                o = tl.load(partial_o + o_offsets, mask=is_part[:, None], other=0.0, cache_modifier=".cg")  # [G, D]
                new_max = tl.maximum(total_max, part_max)
                weight = tl.math.exp2(part_max - new_max)
                rescale = tl.math.exp2(total_max - new_max)
                total_sum = total_sum * rescale + part_sum * weight
                total = total * rescale[:, None] + o * weight[:, None]
                total_max = new_max
        result = total / tl.where(is_head, total_sum, 1.0)[:, None]
        out_offsets = (head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
        tl.store(arrivals + first_program, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["batch", "max_blocks"])
def _attn_decode_kernel(
    q_ptr, k_cache, v_cache, block_table, rows, context_lens, out_ptr, partial_o, partial_m, partial_l, arrivals,
    batch, max_blocks, qk_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE: tl.constexpr, MAX_BATCH: tl.constexpr, MIN_SHARE: tl.constexpr, LEAD: tl.constexpr,
    BULK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    program = tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, BLOCK)
    heads = tl.arange(0, ROWS)

    # Map: every program numbers all units by the same prefix sum: per head LEAD empty units, then its blocks. A request
    # without context has one empty block.
    index = tl.arange(0, MAX_BATCH)
    all_rows = tl.load(rows + index, mask=index < batch, other=-1)
    all_lens = tl.load(context_lens + index, mask=index < batch, other=0)
    all_lens = tl.where(all_rows >= 0, all_lens, 0)
    all_units = tl.where(index < batch, tl.maximum((all_lens + BLOCK - 1) // BLOCK, 1) + LEAD, 0)
    ends = tl.cumsum(all_units, 0) * KV_HEADS
    num_units = tl.max(ends, 0)
    share = tl.maximum((num_units + tl.num_programs(0) - 1) // tl.num_programs(0), MIN_SHARE)
    first_unit = program * share
    last_unit = tl.minimum(first_unit + share, num_units)
    request = tl.sum((ends <= first_unit).to(tl.int32), 0)
    request_start = tl.max(tl.where(ends <= first_unit, ends, 0), 0)

    wait_for_inputs(PDL)
    unit = first_unit
    cut_in = -1  # the head that an earlier program began, and the programs it is spread over; cut_out: that goes on
    cut_in_first = 0
    cut_in_last = 0
    cut_out = -1
    cut_out_last = 0
    while unit < last_unit:
        row = tl.load(rows + request)
        context_len = tl.load(context_lens + request) * (row >= 0).to(tl.int32)
        num_full = context_len // BLOCK
        num_blocks = tl.maximum((context_len + BLOCK - 1) // BLOCK, 1)
        kv_head = (unit - request_start) // (LEAD + num_blocks)
        block_0 = request_start + kv_head * (LEAD + num_blocks) + LEAD  # the unit of this head's first block
        first_block = tl.maximum(unit - block_0, 0)
        end_block = tl.minimum(last_unit - block_0, num_blocks)
        head = request * KV_HEADS + kv_head

        # Load the queries: the heads of the group, padded to ROWS.
        head_offsets = (head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(q_ptr + head_offsets, mask=(heads < GROUP)[:, None], other=0.0)  # [ROWS, D]

        # Compute, transposed: keys and values are the wide operand, which tensor cores take from shared memory.
        table = block_table + row.to(tl.int64) * max_blocks
        acc = tl.zeros([HEAD_DIM, ROWS], dtype=tl.float32)
        p_sum = tl.zeros([BLOCK, ROWS], dtype=tl.float32)
        row_max = tl.full([ROWS], -1e30, dtype=tl.float32)
        end_full = tl.minimum(end_block, num_full)
        block = tl.load(table + first_block, mask=first_block < end_full, other=0)  # one step ahead: see attn_prefill
        for j in range(first_block, end_full):
            k = load_tile(k_cache, block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            v = load_tile(v_cache, block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            block = tl.load(table + j + 1, mask=j + 1 < end_full, other=0)
            acc, p_sum, row_max = _add_block(acc, p_sum, row_max, tl.dot(k, q.T), v, qk_scale)
        if end_block * BLOCK > context_len:  # the last block, unwritten in part: what lies there must not meet p = 0
            block = tl.load(table + num_full, mask=context_len > 0, other=0)
            is_seen = num_full * BLOCK + slots < context_len
            k = load_tile(k_cache, block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            v = load_tile(v_cache, block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            scores = tl.where(is_seen[:, None], tl.dot(k, q.T), -float("inf"))  # [BLOCK, ROWS]
            v = tl.where(is_seen[:, None], v, 0.0)
            acc, p_sum, row_max = _add_block(acc, p_sum, row_max, scores, v, qk_scale)
        row_sum = tl.sum(p_sum, 0)
        o = acc.T  # [ROWS, D]

        # Store: a whole head is done; of a cut one, leave the partial sums.
        if end_block - first_block == num_blocks:
            result = o / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
            is_stored = heads < tl.where(row >= 0, GROUP, 0)
            tl.store(out_ptr + head_offsets, result.to(out_ptr.dtype.element_ty), mask=is_stored[:, None])
        elif end_block > first_block:
            part_rows = (2 * program + (first_block == 0).to(tl.int32)) * GROUP + heads
            tl.store(partial_o + part_rows[:, None] * HEAD_DIM + dims[None, :], o, mask=(heads < GROUP)[:, None])
            tl.store(partial_m + part_rows, row_max, mask=heads < GROUP)
            tl.store(partial_l + part_rows, row_sum, mask=heads < GROUP)
            if first_block > 0:
                cut_in = head
                cut_in_first = block_0 // share
                cut_in_last = (block_0 + num_blocks - 1) // share
            else:
                cut_out = head
                cut_out_last = (block_0 + num_blocks - 1) // share

        unit = tl.minimum(block_0 + num_blocks, last_unit)
        is_done = unit - request_start == (LEAD + num_blocks) * KV_HEADS
        request_start = tl.where(is_done, unit, request_start)
        request += is_done.to(tl.int32)

    # Merge: the head that was cut on the way in, and the one cut on the way out.
    tl.debug_barrier()  # every thread's partial sums before this program's arrivals
    if cut_in >= 0:
        _arrive(
            cut_in, cut_in_first, cut_in_last, partial_o, partial_m, partial_l, arrivals, out_ptr,
            GROUP, HEAD_DIM, MERGE_ROWS, MERGE,
        )  # fmt: skip
    if cut_out >= 0:
        _arrive(
            cut_out, program, cut_out_last, partial_o, partial_m, partial_l, arrivals, out_ptr,
            GROUP, HEAD_DIM, MERGE_ROWS, MERGE,
        )  # fmt: skip


# --- wrapper ---


def decode_scratch_shape(num_heads, num_kv_heads, head_dim, num_sms):
    """Shape of the fp32 scratch that `attn_decode` needs at this head layout and num_sms or fewer, whatever the batch.

    Allocate it with torch.zeros, once per lane: two launches that may run at the same time must not share it.
    """
    num_programs = num_sms * PROGRAMS_PER_SM[head_dim]
    return (triton.cdiv(num_programs, 4) * 4 + 2 * num_programs * (num_heads // num_kv_heads) * (head_dim + 2),)


def attn_decode(
    q, k_cache, v_cache, block_table, rows, context_lens, *, scale, out=None, scratch=None, num_sms, pdl=False
):
    """Attention of one query per request over its whole context.

    q [B, H, D], B <= 512; k_cache and v_cache [N, K, 64, D]; block_table [num_rows, max_blocks], rows [B] and
    context_lens [B] (the new token counted) int32. Context 0 gives zeros; where rows[b] is -1 nothing is
    written. scratch: see `decode_scratch_shape`; each launch leaves it ready for the next. Writes and returns out
    [B, H, D]. Reads no length on the host, so it can be captured in a CUDA graph. pdl: see pdl.py: rows and lengths are
    read before the wait.
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
    num_programs = num_sms * PROGRAMS_PER_SM[head_dim]
    # Counters at the front and partial sums at the back: never over each other, also after launches with other num_sms.
    scratch = scratch.view(-1)
    arrivals = scratch.view(torch.int32)
    partial_rows = 2 * num_programs * group
    partial_o, partial_m, partial_l = scratch[-partial_rows * (head_dim + 2) :].split(
        [partial_rows * head_dim, partial_rows, partial_rows]
    )
    bulk = has_bulk_copies()
    if bulk:
        box = [BLOCK_SIZE, head_dim]
        k_cache, v_cache = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k_cache, v_cache))
    _attn_decode_kernel[(num_programs,)](
        q, k_cache, v_cache, block_table, rows, context_lens, out, partial_o, partial_m, partial_l,
        arrivals, batch, block_table.stride(0), scale * LOG2_E,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK=BLOCK_SIZE, ROWS=16,
        MERGE_ROWS=triton.next_power_of_2(group), MERGE=MERGE, MAX_BATCH=MAX_BATCH, MIN_SHARE=MIN_SHARE, LEAD=LEAD,
        BULK=bulk, num_warps=4, num_stages=3 if bulk else 2, **launch_options(pdl),
    )  # fmt: skip
    return out
