"""Causal attention of new tokens over a paged KV cache: whole prompts, chunks of prompts, or one token each.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h // G]) v[j, h // G],   j <= position of query i,   G = H / K

FLOPs: 4 D for every (query head, query, visible key). Bytes: q and out once; K and V of a request once per query tile
and KV head, nearly always out of L2, because the heads that read the same blocks run side by side.

Program to tile: a tile is one KV head and BLOCK_M // G consecutive queries of one request, all G query heads of the
group packed into its rows, so K and V are read once per group. It walks the request's blocks from 0 up, one block (64
tokens, one table entry) a step: first the blocks that every row sees whole, then those that need the causal mask. The
softmax runs online, in fp32, in powers of two. num_sms * PROGRAMS_PER_SM programs draw tiles from a counter, each when
it has finished one, the longest of a request first; two small programs on an SM hide each other's waits better than one
of twice the size.

Few tiles, each over a long context, would fill a last round of programs in part: 256 tiles take as long on 200 programs
as 400. So, given scratch, a launch of at most MAX_TILES tiles may cut them along the keys. `choose_cut` says from how
many cached blocks on that pays; which requests have as many is found on the device, where a tile also counts as long if
it has more than twice as many keys as there are for each program: the end of a long prompt beside the head of another.
A tile that is cut gets parts of two thirds of a program's share. The k-th part from the end begins at 1 - (k / n) ** 2
of the tile's blocks: four are 7, 5, 3 and 1 sixteenths. First all tiles left whole are drawn, then the first parts of
all others, then their second parts; what comes last is small, so programs end together.
A part leaves its sums (o, m, l) in scratch, 32.5 KiB at D = 128, and the program that brings a tile's last part adds
them up in the order of the keys: a launch on as many SMs gives the same bits.

Each step multiplies the previous block's probabilities with V while it computes the softmax of its own scores: the
product needs no result of this step, so the tensor cores work through the exponentials.

In a tile left whole a row's result depends on its own query and its request's keys alone: blocks that only other rows
of the tile need multiply its sum by one and add zero. So without scratch the bits are the same for any chunking, batch
and SM count, and a decode step run through here gives the bits that prefill would give.

The file refuses to know where the blocks came from and who else reads them. Tests: tests/test_kernels_attention.py.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_SIZE = 64
LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 2  # what registers and shared memory hold at once
BLOCK_M = 64  # rows of a tile; half of it without bulk copies

# Where tiles are cut along the keys. PART_BLOCKS >= 2 * MOST_PARTS, which makes the smallest part two blocks at least:
# so every row of a tile sees a key in each part.
PART_BLOCKS = 16  # cached for each part, on average; with fewer than FEWEST_PARTS a tile is left whole
FEWEST_PARTS, MOST_PARTS = 3, 8  # of a tile
PART_COST = 10  # of a part to its program: as long as so many blocks take
CUT_ROUND = 0.7  # of a round: so few tiles are always cut
MAX_PARTS = 1536  # of all tiles of a launch: what scratch holds
MAX_TILES = 1280  # of a launch that cuts any, 2,048 tokens of most models; with more, one round lost is little
NEVER = 1 << 24  # cached blocks
MAX_REQUESTS = 64  # of a launch that cuts any


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


@triton.jit
def _measure(query_starts, context_lens, num_requests, TILE_QUERIES: tl.constexpr, SEARCH: tl.constexpr):
    """Of each request: its tiles, new tokens and cached tokens, [SEARCH] each."""
    index = tl.arange(0, SEARCH)
    starts = tl.load(query_starts + index, mask=index < num_requests, other=0)
    num_queries = tl.load(query_starts + index + 1, mask=index < num_requests, other=0) - starts
    cached = tl.load(context_lens + index, mask=index < num_requests, other=0) - num_queries
    return (num_queries + TILE_QUERIES - 1) // TILE_QUERIES, num_queries, cached


@triton.jit
def _count_parts(cached, share, PART_KEYS: tl.constexpr, FEWEST: tl.constexpr, MOST: tl.constexpr):
    """Of a tile that is cut: two thirds of a program's share each, if that is long enough to be worth it."""
    return tl.minimum(tl.minimum(cached // PART_KEYS, tl.maximum(cached * 3 // (2 * share), FEWEST)), MOST)


@triton.jit
def _lay_out(
    query_starts, context_lens, num_requests, share, least_keys,
    TILE_QUERIES: tl.constexpr, SEARCH: tl.constexpr, PART_KEYS: tl.constexpr, FEWEST: tl.constexpr,
    MOST: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Where each request's tiles end among those left whole, and among those that are cut, and where its parts begin;
    the most parts of any tile. Of one KV head; what MAX_PARTS has no room for is left whole."""
    tiles, _, cached = _measure(query_starts, context_lens, num_requests, TILE_QUERIES, SEARCH)
    parts = tl.where(cached >= least_keys, _count_parts(cached, share, PART_KEYS, FEWEST, MOST), 0)
    first_parts = tl.cumsum(tiles * parts, 0) - tiles * parts
    room = tl.maximum(MAX_PARTS - first_parts, 0) // tl.maximum(parts, 1)
    split_ends = tl.cumsum(tl.where(parts > 0, tl.minimum(tiles, room), 0), 0)
    return tl.cumsum(tiles, 0) - split_ends, split_ends, first_parts, tl.max(parts, 0)


@triton.jit
def _cut(num_blocks, part, num_parts):
    """The block that a part begins with: each is smaller than the one before, so that the work drawn last is little."""
    return num_blocks * part * (2 * num_parts - part) // (num_parts * num_parts)


@triton.jit
def _merge(first, num_parts, partial_o, partial_m, partial_l, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile's result [M, D] from its parts, in the order of their keys."""
    total_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    total_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    for part in range(first, first + num_parts):
        part_rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
        # .cg: other SMs wrote these during this launch, so not from this SM's L1
        part_max = tl.load(partial_m + part_rows, cache_modifier=".cg")
        part_sum = tl.load(partial_l + part_rows, cache_modifier=".cg")
        offsets = part_rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        o = tl.load(partial_o + offsets, cache_modifier=".cg")  # [M, D]
        new_max = tl.maximum(total_max, part_max)
        weight = tl.math.exp2(part_max - new_max)
        rescale = tl.math.exp2(total_max - new_max)
        total_sum = total_sum * rescale + part_sum * weight
        total = total * rescale[:, None] + o * weight[:, None]
        total_max = new_max
    return total / total_sum[:, None]


@triton.jit(do_not_specialize=["num_requests", "num_tiles", "max_blocks", "least_keys"])
def _attn_prefill_kernel(
    q_ptr, k_cache, v_cache, block_table, rows, query_starts, context_lens, out_ptr, tiles_taken,
    partial_o, partial_m, partial_l, arrivals,
    num_requests, num_tiles, max_blocks, least_keys, qk_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, SEARCH: tl.constexpr, BULK: tl.constexpr, SPLIT: tl.constexpr, PART_KEYS: tl.constexpr,
    FEWEST: tl.constexpr, MOST: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile_rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, BLOCK)
    candidates = tl.arange(0, SEARCH)

    if SPLIT:  # steps: tiles left whole, then the first parts of all others, then their second parts, ...
        all_tiles, all_queries, all_cached = _measure(query_starts, context_lens, num_requests, TILE_QUERIES, SEARCH)
        keys = tl.sum(all_tiles * (all_cached + all_queries // 2), 0) * KV_HEADS
        share = tl.maximum(keys // tl.num_programs(0), 1)  # of each program, were they spread evenly: twice it is long
        least_keys = tl.minimum(least_keys, tl.maximum(2 * share, FEWEST * PART_KEYS))
        whole_ends, split_ends, first_parts, num_rounds = _lay_out(
            query_starts, context_lens, num_requests, share, least_keys, TILE_QUERIES, SEARCH, PART_KEYS, FEWEST, MOST,
            MAX_PARTS,
        )  # fmt: skip
        num_tiles = (tl.max(whole_ends, 0) + tl.max(split_ends, 0) * num_rounds) * KV_HEADS

    step = tl.program_id(0)
    while step < num_tiles:
        kv_head = step % KV_HEADS
        if SPLIT:  # Map: laid out again for each, since there are no registers to keep it in
            whole_ends, split_ends, first_parts, num_rounds = _lay_out(
                query_starts, context_lens, num_requests, share, least_keys, TILE_QUERIES, SEARCH, PART_KEYS, FEWEST,
                MOST, MAX_PARTS,
            )  # fmt: skip
            num_whole, num_split = tl.max(whole_ends, 0), tl.maximum(tl.max(split_ends, 0), 1)
            tile = step // KV_HEADS
            is_split = tile >= num_whole
            part = tl.where(is_split, (tile - num_whole) // num_split, 0)
            tile = tl.where(is_split, (tile - num_whole) % num_split, tile)
            ends = tl.where(is_split, split_ends, whole_ends)
            request = tl.sum((ends <= tile).to(tl.int32))
            before = tl.max(tl.where(candidates < request, ends, 0))
            after = tl.max(tl.where(candidates <= request, ends, 0))
            num_cut = tl.max(tl.where(candidates <= request, split_ends, 0))
            num_cut -= tl.max(tl.where(candidates < request, split_ends, 0))
            own_tile = tl.where(is_split, tile - before, num_cut + after - 1 - tile)  # the longest of a request first
            first_token = tl.load(query_starts + request)
            num_queries = tl.load(query_starts + request + 1) - first_token
            own_cached = tl.load(context_lens + request) - num_queries
            num_parts = tl.where(is_split, _count_parts(own_cached, share, PART_KEYS, FEWEST, MOST), 1)
            slot = tl.sum(tl.where(candidates == request, first_parts, 0)) + own_tile * num_parts
            slot = slot * KV_HEADS + kv_head * num_parts  # of the tile's first part
            first_query = tl.where(part < num_parts, own_tile * TILE_QUERIES, num_queries)
        else:  # Map: request r owns the tiles from query_starts[r] // TILE_QUERIES + r on, which is never too few
            is_split: tl.constexpr = False
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
            last_query = tl.minimum(first_query + TILE_QUERIES, num_queries) - 1
            is_row = tile_rows < (last_query + 1 - first_query) * GROUP
            q_positions = cached + tl.minimum(first_query + tile_rows // GROUP, last_query)
            first_head = (first_token + first_query).to(tl.int64) * HEADS + kv_head * GROUP
            offsets = (tile_rows + tile_rows // GROUP * (HEADS - GROUP))[:, None] * HEAD_DIM + dims[None, :]
            q = tl.load(q_ptr + first_head * HEAD_DIM + offsets, mask=is_row[:, None], other=0.0)  # [M, D]

            # Compute: scores of the first block; the blocks that every row sees whole; the blocks on the diagonal.
            table = block_table + row.to(tl.int64) * max_blocks
            num_full = (cached + first_query + 1) // BLOCK
            end = (cached + last_query) // BLOCK + 1
            first = 0
            if SPLIT:
                first = _cut(end, part, num_parts)
                end = _cut(end, part + 1, num_parts)
                num_full = tl.minimum(num_full, end)
            acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
            row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            k = load_tile(k_cache, tl.load(table + first), kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            scores = tl.where(first * BLOCK + slots[None, :] <= q_positions[:, None], tl.dot(q, k.T), -float("inf"))
            p, rescale, row_max, row_sum = _softmax_step(scores, row_max, row_sum, qk_scale)
            p, rescale, row_max, row_sum, acc = _attend_blocks(
                first + 1, num_full, p, rescale, row_max, row_sum, acc, q, k_cache, v_cache, table, kv_head,
                q_positions, qk_scale, KV_HEADS, HEAD_DIM, BLOCK, BULK, False,
            )  # fmt: skip
            p, rescale, row_max, row_sum, acc = _attend_blocks(
                tl.maximum(num_full, first + 1), end, p, rescale, row_max, row_sum, acc, q, k_cache, v_cache, table,
                kv_head, q_positions, qk_scale, KV_HEADS, HEAD_DIM, BLOCK, BULK, True,
            )  # fmt: skip
            taken = tl.atomic_add(tiles_taken, 1, sem="relaxed")  # late: who works on a long tile holds back no other
            # The last block's slots past the context were never written: whatever lies there must not meet p = 0.
            last_block = tl.load(table + end - 1)
            v = load_tile(v_cache, last_block, kv_head, KV_HEADS, HEAD_DIM, BLOCK, BULK)  # [BLOCK, D]
            v = tl.where(((end - 1) * BLOCK + slots)[:, None] < context_len, v, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])

            # Store: the result; or a part of it, and who brings the last part merges all.
            if is_split:
                part_rows = (slot + part) * BLOCK_M + tile_rows
                tl.store(partial_o + part_rows[:, None] * HEAD_DIM + dims[None, :], acc)
                tl.store(partial_m + part_rows, row_max)
                tl.store(partial_l + part_rows, row_sum)
                tl.debug_barrier()  # every thread's part before this program's arrival
                if tl.atomic_add(arrivals + slot, 1.0, sem="acq_rel") == num_parts - 1:
                    result = _merge(slot, num_parts, partial_o, partial_m, partial_l, BLOCK_M, HEAD_DIM)
                    tl.store(out_ptr + first_head * HEAD_DIM + offsets, result, mask=is_row[:, None])
                    tl.store(arrivals + slot, 0.0)  # ready for the next launch
            else:
                tl.store(out_ptr + first_head * HEAD_DIM + offsets, acc / row_sum[:, None], mask=is_row[:, None])
        else:
            taken = tl.atomic_add(tiles_taken, 1, sem="relaxed")
        if taken == num_tiles - 1:  # one draw a tile, so this was the launch's last: ready for the next launch
            tl.store(tiles_taken, 0)
        step = tl.num_programs(0) + taken


# --- wrapper ---


def prefill_scratch_shape(head_dim):
    """Shape of the fp32 scratch for parts of tiles, whatever the launch: 48.75 MiB at D = 128.

    Allocate it with torch.zeros, once per lane: two launches that may run at the same time must not share it.
    """
    return (MAX_PARTS * (BLOCK_M * (head_dim + 2) + 1),)


def choose_cut(num_tiles, num_programs):
    """-> cached blocks from which on tiles are cut, for so many tiles of equal length.

    Where they leave much of one round idle, all that are long enough. In the last of several rounds it must gain more
    than the parts cost. What fills most of one round is left whole.
    """
    num_rounds = num_tiles / num_programs
    if num_rounds <= CUT_ROUND:
        return FEWEST_PARTS * PART_BLOCKS
    idle = math.ceil(num_rounds) - num_rounds  # of the last round
    if num_rounds <= 1 or idle == 0:
        return NEVER
    cost = math.ceil(num_rounds * FEWEST_PARTS * PART_COST / idle)
    return min(max(cost, FEWEST_PARTS * PART_BLOCKS), NEVER)


def attn_prefill(
    q, k_cache, v_cache, block_table, rows, query_starts, context_lens,
    *, max_query_len, scale, out=None, counter=None, scratch=None, num_sms,
):  # fmt: skip
    """Causal attention of each request's new tokens over its cached prefix and themselves.

    q [T, H, D]; k_cache and v_cache [N, K, 64, D]; block_table [num_rows, max_blocks], rows [R], query_starts [R + 1]
    (cumulative, query_starts[R] <= T) and context_lens [R] (cached plus new tokens) int32. Query j of request r stands
    at position context_lens[r] - num_queries[r] + j. Where rows[r] is -1 nothing is written. Writes and returns out
    [T, H, D]. counter: one int32, 0, which every launch leaves at 0 again; launches that may run at the same time must
    not share it; allocated and cleared here when None. scratch: see `prefill_scratch_shape`; each launch leaves it
    ready for the next. When None no tile is cut, and a row's bits depend on its own query and keys alone; otherwise
    also on num_sms, on how the prompt is chunked and on what else is in the launch. The launch depends on
    shapes and num_sms only, so it can be captured in a CUDA graph; max_query_len, an upper bound of the query counts,
    is there for callers that share one signature: tiles are counted from T and R.
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
        block_m, num_stages = BLOCK_M, 2
        box = [BLOCK_SIZE, head_dim]
        k_cache, v_cache = (TensorDescriptor.from_tensor(x.view(-1, head_dim), box) for x in (k_cache, v_cache))
    else:  # no bulk copies before Hopper, and fewer registers to spare beside mma.sync operands
        block_m, num_stages = BLOCK_M // 2, 3
    num_tiles = (num_tokens // (block_m // group) + num_requests) * num_kv_heads
    if counter is None:
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    is_split = scratch is not None and num_tiles <= MAX_TILES and num_requests <= MAX_REQUESTS
    parts, least_blocks, num_programs = (None,) * 4, NEVER, num_sms * PROGRAMS_PER_SM
    if is_split:
        parts = scratch.split([MAX_PARTS * size for size in (BLOCK_M * head_dim, BLOCK_M, BLOCK_M, 1)])
        least_blocks = choose_cut(num_tiles - num_requests * num_kv_heads, num_programs)
    _attn_prefill_kernel[(min(num_programs, num_tiles * (MOST_PARTS if is_split else 1)),)](
        q, k_cache, v_cache, block_table, rows, query_starts, context_lens, out, counter, *parts,
        num_requests, num_tiles, block_table.stride(0), least_blocks * BLOCK_SIZE, scale * LOG2_E,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK=BLOCK_SIZE, BLOCK_M=block_m,
        SEARCH=MAX_REQUESTS if is_split else 256, BULK=bulk, SPLIT=is_split, PART_KEYS=PART_BLOCKS * BLOCK_SIZE,
        FEWEST=FEWEST_PARTS, MOST=MOST_PARTS, MAX_PARTS=MAX_PARTS // num_kv_heads,
        num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    return out
