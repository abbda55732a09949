"""Attention: the torch references against a naive sum, the kernels against the references, bits against chunking.

Runs in Triton's interpreter (fp32, fp16) without a GPU; the tests marked `gpu` check bf16 at Llama-8B sizes.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nanodrift import ops
from nanodrift.kernels import attn_decode as decode
from nanodrift.kernels import attn_prefill as prefill

BLOCK = 64
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}


def paged(contexts, num_kv_heads, head_dim, dtype, device="cpu", spare_rows=1):
    """Random K and V over shuffled blocks. Slots that no token owns hold NaN; unused table entries are absurd.

    Returns the caches [N, K, 64, D], the table [num_rows, max_blocks] and the row of each request.
    """
    counts = [-(-c // BLOCK) for c in contexts]
    num_blocks = sum(counts) + 1
    order = torch.randperm(num_blocks).tolist()
    caches = [torch.randn(num_blocks, num_kv_heads, BLOCK, head_dim, device=device).to(dtype) for _ in range(2)]
    table = torch.full((len(contexts) + spare_rows, max(counts, default=0) + 1), 1 << 30, dtype=torch.int32)
    rows = torch.randperm(len(contexts) + spare_rows)[: len(contexts)].to(torch.int32)
    for row, context, count in zip(rows.tolist(), contexts, counts, strict=True):
        blocks = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        if context % BLOCK:
            for cache in caches:
                cache[blocks[-1], :, context % BLOCK :] = float("nan")
    for cache in caches:
        cache[order] = float("nan")
    return *caches, table.to(device), rows.to(device)


def naive(q, k_cache, v_cache, table, row, num_keys, scale):
    """One query [H, D] in float64, straight from the definition: each key and value looked up through the table."""
    num_heads, head_dim = q.shape
    group = num_heads // k_cache.shape[1]
    where = [(int(table[row, p // BLOCK]), p % BLOCK) for p in range(num_keys)]
    out = torch.zeros(num_heads, head_dim, dtype=torch.float64)
    for h in range(num_heads):
        keys = torch.stack([k_cache[b, h // group, s] for b, s in where]).double()
        values = torch.stack([v_cache[b, h // group, s] for b, s in where]).double()
        out[h] = torch.softmax(keys @ q[h].double() * scale, 0) @ values
    return out


def prefill_case(queries, cached, num_heads, num_kv_heads, head_dim, dtype, device="cpu"):
    """Arguments of attn_prefill for requests with so many new and cached tokens."""
    contexts = [n + c for n, c in zip(queries, cached, strict=True)]
    k_cache, v_cache, table, rows = paged(contexts, num_kv_heads, head_dim, dtype, device)
    starts = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    q = torch.randn(sum(queries), num_heads, head_dim, device=device).to(dtype)
    return (q, k_cache, v_cache, table, rows, starts, lens), {"max_query_len": max(queries), "scale": head_dim**-0.5}


def decode_case(contexts, num_heads, num_kv_heads, head_dim, dtype, device="cpu"):
    k_cache, v_cache, table, rows = paged(contexts, num_kv_heads, head_dim, dtype, device)
    q = torch.randn(len(contexts), num_heads, head_dim, device=device).to(dtype)
    lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    return (q, k_cache, v_cache, table, rows, lens), {"scale": head_dim**-0.5}


def relative(result, exact):
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


# --- references against the definition ---


def test_prefill_reference_is_the_definition():
    torch.manual_seed(0)
    args, options = prefill_case([5, 70, 0, 1], [0, 0, 3, 130], 6, 2, 64, torch.float32)
    q, k_cache, v_cache, table, rows, starts, lens = args
    result = prefill.attn_prefill_reference(*args, **options)
    for r in (0, 1, 3):
        first, last = int(starts[r]), int(starts[r + 1])
        for token in {first, (first + last) // 2, last - 1}:
            num_keys = int(lens[r]) - (last - 1 - token)
            exact = naive(q[token], k_cache, v_cache, table, int(rows[r]), num_keys, options["scale"])
            assert relative(result[token], exact) < 1e-6


def test_decode_reference_is_the_definition():
    torch.manual_seed(0)
    contexts = [1, 64, 0, 65, 150]
    args, options = decode_case(contexts, 10, 2, 64, torch.float32)
    q, k_cache, v_cache, table, rows, _ = args
    rows[3] = -1
    result = decode.attn_decode_reference(*args, **options, out=torch.full_like(q, 777.0))
    for b in (0, 1, 4):
        exact = naive(q[b], k_cache, v_cache, table, int(rows[b]), contexts[b], options["scale"])
        assert relative(result[b], exact) < 1e-6
    assert (result[2] == 0).all() and (result[3] == 777.0).all()


# --- prefill kernel ---

SHAPES = [  # H, K, D
    (4, 1, 64),
    (2, 2, 128),
    (6, 2, 64),
    (5, 1, 64),
    (7, 1, 128),
    (8, 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", SHAPES)
def test_prefill_matches_reference(num_heads, num_kv_heads, head_dim, dtype):
    """Whole prompts, a chunk on a prefix that ends inside a block, a single token, an empty request, a padding row."""
    torch.manual_seed(num_heads)
    args, options = prefill_case([70, 37, 1, 0, 3], [0, 91, 128, 7, 0], num_heads, num_kv_heads, head_dim, dtype)
    args[4][4] = -1
    result = prefill.attn_prefill(*args, **options, out=torch.full_like(args[0], 777.0), num_sms=3)
    expected = prefill.attn_prefill_reference(*args, **options, out=torch.full_like(args[0], 777.0))
    assert (result[108:] == 777.0).all()
    assert relative(result[:108], expected[:108]) < TOLERANCE[dtype]


def test_prefill_bits_do_not_depend_on_chunking_or_sm_count():
    """Tokens of a prompt in one launch, in ragged chunks beside another request, and one by one: equal bits."""
    torch.manual_seed(1)
    args, options = prefill_case([100], [0], 6, 2, 64, torch.float32)
    q, k_cache, v_cache, table, rows, _, _ = args
    whole = prefill.attn_prefill(*args, **options, num_sms=1)

    def chunk(first, last, num_sms):
        """Queries first..last of the request between two others that share its row and end elsewhere."""
        starts = torch.tensor([0, 9, 9 + last - first, 10 + last - first], dtype=torch.int32)
        lens = torch.tensor([20, last, 64], dtype=torch.int32)
        padded = torch.cat([torch.randn(9, 6, 64), q[first:last], torch.randn(1, 6, 64)])
        result = prefill.attn_prefill(
            padded, k_cache, v_cache, table, rows.repeat(3), starts, lens, **options, num_sms=num_sms
        )
        return result[9 : 9 + last - first]

    pieces = [chunk(0, 37, 1), chunk(37, 64, 2), chunk(64, 65, 5), chunk(65, 99, 7), chunk(99, 100, 3)]
    assert torch.equal(torch.cat(pieces), whole)


def test_prefill_finds_requests_beyond_the_first_search_window():
    torch.manual_seed(2)
    num_requests = 259
    args, options = prefill_case([1] * num_requests, [0] * num_requests, 1, 1, 64, torch.float32)
    result = prefill.attn_prefill(*args, **options, num_sms=2)
    assert relative(result, prefill.attn_prefill_reference(*args, **options)) < 1e-5


@pytest.mark.parametrize("num_sms", [1, 3, 200])
def test_prefill_counter_serves_launch_after_launch(num_sms):
    torch.manual_seed(5)
    args, options = prefill_case([70, 5], [0, 90], 4, 2, 64, torch.float32)
    expected, counter = prefill.attn_prefill_reference(*args, **options), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        assert relative(prefill.attn_prefill(*args, **options, counter=counter, num_sms=num_sms), expected) < 1e-5
        assert counter.item() == 0


# --- prefill kernel: tiles cut along the keys ---


@pytest.fixture
def small_parts(monkeypatch):
    """Cut on any number of SMs, at contexts that an interpreter can walk through: three parts from 1,152 keys on."""
    for name, value in {"PART_BLOCKS": 6, "MOST_PARTS": 3}.items():
        monkeypatch.setattr(prefill, name, value)
    monkeypatch.setattr(prefill, "choose_cut", lambda *_: 3 * prefill.PART_BLOCKS)


class Parts:
    """What a launch leaves behind in its scratch."""

    def __init__(self, head_dim):
        self.scratch = torch.zeros(prefill.prefill_scratch_shape(head_dim))
        self.counter = torch.zeros(1, dtype=torch.int32)
        self.memory = {"scratch": self.scratch, "counter": self.counter}
        self.arrivals = self.scratch[-prefill.MAX_PARTS :]

    def num_written(self):
        """Parts written since the last call. Each has a sum of exponentials in its first row."""
        sums = self.scratch[-prefill.MAX_PARTS * (prefill.BLOCK_M + 1) : -prefill.MAX_PARTS]
        block_m = prefill.BLOCK_M if prefill.has_bulk_copies() else prefill.BLOCK_M // 2
        count = int((sums[: len(sums) // block_m * block_m].view(-1, block_m)[:, 0] > 0).sum())
        self.scratch[: -prefill.MAX_PARTS] = 0
        return count

    def is_ready(self):
        return not self.counter.any() and not self.arrivals.any()


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", SHAPES)
def test_prefill_in_parts_matches_reference(small_parts, num_heads, num_kv_heads, head_dim):
    """Two long contexts that end inside blocks, among a short one, an empty one and padding."""
    torch.manual_seed(num_heads)
    queries, cached = [10, 5, 0, 17, 3], [1152, 90, 1200, 1251, 1300]
    args, options = prefill_case(queries, cached, num_heads, num_kv_heads, head_dim, torch.float32)
    args[4][4] = -1
    expected, parts = prefill.attn_prefill_reference(*args, **options), Parts(head_dim)
    tiles = [-(-n // (prefill.BLOCK_M // (num_heads // num_kv_heads))) * num_kv_heads for n in queries]
    results = []
    for num_sms in (3, 200) if head_dim == 64 else (3,):  # the wide ones are slow to interpret
        out = torch.full_like(args[0], 777.0)
        results.append(prefill.attn_prefill(*args, **options, **parts.memory, out=out, num_sms=num_sms))
        assert parts.is_ready()
        assert parts.num_written() == 3 * (tiles[0] + tiles[3])
        assert (out[32:] == 777.0).all()
        assert relative(out[:32], expected[:32]) < 2e-6
    assert torch.equal(results[0], results[-1])


def test_prefill_in_three_and_four_parts_in_half_precision(small_parts, monkeypatch):
    monkeypatch.setattr(prefill, "PART_BLOCKS", 8)
    monkeypatch.setattr(prefill, "MOST_PARTS", 4)
    torch.manual_seed(0)
    args, options = prefill_case([5, 9], [2047, 2048], 7, 1, 128, torch.float16)
    parts = Parts(128)
    result = prefill.attn_prefill(*args, **options, **parts.memory, num_sms=200)
    assert relative(result, prefill.attn_prefill_reference(*args, **options)) < TOLERANCE[torch.float16]
    assert parts.num_written() == 3 + 4 and parts.is_ready()


@pytest.mark.parametrize("queries, cached, num_sms, num_parts", [
    ([4], [2500], 200, 5),  # alone: as many as may be
    ([4, 4], [2500, 2500], 2, 3 + 3),  # equals on four programs: a share is half of one
    ([4, 200], [2500, 60], 2, 4),  # long beside the rest: a share is 0.36 of it
    ([4, 8], [2500, 60], 3, 5),  # and here 0.17
])  # fmt: skip
def test_prefill_parts_follow_what_each_program_has_to_do(
    small_parts, monkeypatch, queries, cached, num_sms, num_parts
):
    monkeypatch.setattr(prefill, "MOST_PARTS", 5)
    torch.manual_seed(0)
    args, options = prefill_case(queries, cached, 2, 1, 64, torch.float32)
    parts = Parts(64)
    result = prefill.attn_prefill(*args, **options, **parts.memory, num_sms=num_sms)
    assert relative(result, prefill.attn_prefill_reference(*args, **options)) < 2e-6
    assert parts.num_written() == num_parts and parts.is_ready()


def test_prefill_parts_survive_large_scores(small_parts):
    """One part's maximum is far above the others': their weights vanish and nothing overflows."""
    torch.manual_seed(0)
    args, options = prefill_case([10], [1300], 4, 1, 64, torch.float32)
    args[0].mul_(100.0)
    result = prefill.attn_prefill(*args, **options, **Parts(64).memory, num_sms=2)
    assert relative(result, prefill.attn_prefill_reference(*args, **options)) < 1e-4


@pytest.mark.parametrize("max_parts, num_cut", [(5, 0), (6, 1), (17, 2), (1536, 3)])
def test_prefill_cuts_no_more_tiles_than_scratch_holds(small_parts, monkeypatch, max_parts, num_cut):
    """Three tiles of two requests and two KV heads; with room for few parts the last tiles stay whole."""
    monkeypatch.setattr(prefill, "MAX_PARTS", max_parts)
    torch.manual_seed(0)
    args, options = prefill_case([3, 15], [1250, 1200], 16, 2, 64, torch.float32)
    expected, parts = prefill.attn_prefill_reference(*args, **options), Parts(64)
    results = [prefill.attn_prefill(*args, **options, **parts.memory, num_sms=n) for n in (1, 5)]
    assert parts.is_ready()
    assert parts.num_written() == 3 * 2 * num_cut <= max_parts
    assert torch.equal(*results)
    assert relative(results[0], expected) < 2e-6


@pytest.mark.parametrize("num_sms, num_written", [(2, 3), (1, 0)])
def test_prefill_cuts_what_is_long_beside_the_rest(small_parts, monkeypatch, num_sms, num_written):
    """1,203 + 3 x 44 keys are 333 for each of four programs and 667 for each of two: more than twice that is long."""
    monkeypatch.setattr(prefill, "choose_cut", lambda *_: prefill.NEVER)  # the rounds give no reason
    monkeypatch.setattr(prefill, "FEWEST_PARTS", 3)
    torch.manual_seed(0)
    args, options = prefill_case([5, 9, 9, 9], [1200, 40, 40, 40], 2, 1, 64, torch.float32)
    parts = Parts(64)
    result = prefill.attn_prefill(*args, **options, **parts.memory, num_sms=num_sms)
    assert relative(result, prefill.attn_prefill_reference(*args, **options)) < 2e-6
    assert parts.num_written() == num_written and parts.is_ready()


@pytest.mark.parametrize("why", ["short", "many tiles", "many requests"])
def test_prefill_leaves_whole_what_need_not_be_cut(small_parts, monkeypatch, why):
    """Then memory for parts changes no bit and is not written."""
    torch.manual_seed(0)
    args, options = prefill_case([20, 9], [1151 if why == "short" else 1152, 40], 2, 1, 64, torch.float32)
    if why == "many tiles":
        monkeypatch.setattr(prefill, "MAX_TILES", 1)
    if why == "many requests":
        monkeypatch.setattr(prefill, "MAX_REQUESTS", 1)
    parts = Parts(64)
    result = prefill.attn_prefill(*args, **options, **parts.memory, num_sms=3)
    assert torch.equal(result, prefill.attn_prefill(*args, **options, num_sms=2))
    assert parts.is_ready() and parts.num_written() == 0


def test_prefill_parts_shrink_and_leave_every_row_a_key():
    """As shipped: each for PART_BLOCKS cached blocks; a tile's rows lie in its last two blocks."""
    assert prefill.PART_BLOCKS >= 2 * prefill.MOST_PARTS and prefill.FEWEST_PARTS >= 3
    for num_parts in range(3, prefill.MOST_PARTS + 1):
        for num_blocks in range(num_parts * prefill.PART_BLOCKS, num_parts * prefill.PART_BLOCKS + 300):
            edges = [prefill._cut.fn(num_blocks, part, num_parts) for part in range(num_parts + 1)]
            sizes = [end - first for first, end in itertools.pairwise(edges)]
            assert edges[0] == 0 and edges[-1] == num_blocks and sizes[-1] >= 2
            assert all(after <= before + 1 for before, after in itertools.pairwise(sizes))
    assert prefill._cut.fn(1 << 16, prefill.MOST_PARTS, prefill.MOST_PARTS) == 1 << 16  # 4M tokens, in 32 bits
    assert (1 << 16) * prefill.MOST_PARTS**2 < 1 << 31
    assert prefill.prefill_scratch_shape(128)[0] * 4 <= 64 << 20


def test_prefill_tiles_are_cut_where_the_last_round_leaves_programs_idle():
    assert prefill.choose_cut(32, 264) == prefill.choose_cut(160, 264) == prefill.choose_cut(0, 264) == 48
    assert {prefill.choose_cut(num_tiles, 264) for num_tiles in (200, 240, 264, 528)} == {prefill.NEVER}
    assert prefill.choose_cut(256, 200) == 54, "a quarter of the second round is in use"
    assert prefill.choose_cut(256, 136) == 480, "most of it is: what is left pays for parts at 31k keys"
    assert prefill.choose_cut(1024, 264) > prefill.choose_cut(1024, 232) == 226
    assert all(prefill.choose_cut(num_tiles, 264) >= 3 * prefill.PART_BLOCKS for num_tiles in range(1, 1281))


def test_prefill_in_parts_only_where_a_lane_is_not_deterministic(small_parts):
    torch.manual_seed(0)
    args, options = prefill_case([20], [1200], 2, 1, 64, torch.float32)
    whole = prefill.attn_prefill(*args, **options, num_sms=2)
    for deterministic in (True, False):
        counts = {"counter 0": 1, "counter 1": 1, "parts": ops.prefill_scratch_elements(64)}
        kinds = dict.fromkeys(("counter 0", "counter 1"), torch.int32) | {"parts": torch.float32}
        scratch = ops.Scratch(counts, kinds, torch.device("cpu"))
        lane = ops.LaneResources(2, deterministic, scratch, use_triton=True)
        result = ops.attn_prefill(*args, 20, options["scale"], None, lane)
        assert torch.equal(result, whole) == deterministic
        assert scratch.buffers["parts"].any() != deterministic


# --- decode kernel ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", SHAPES)
def test_decode_matches_reference(num_heads, num_kv_heads, head_dim, dtype):
    torch.manual_seed(num_heads)
    args, options = decode_case([1, 64, 0, 65, 700, 30, 129], num_heads, num_kv_heads, head_dim, dtype)
    args[4][5] = -1
    result = decode.attn_decode(*args, **options, out=torch.full_like(args[0], 777.0), num_sms=2)
    expected = decode.attn_decode_reference(*args, **options, out=torch.full_like(args[0], 777.0))
    assert (result[2] == 0).all() and (result[5] == 777.0).all()
    assert relative(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_sms", [1, 2, 5, 16])
@pytest.mark.parametrize("contexts", [[1500], [64] * 9, [900, *[3] * 12]], ids=["one", "even", "long-among-short"])
def test_decode_splits_and_merges(contexts, num_sms):
    """Heads cut once, many times, never; the scratch serves launch after launch without being cleared."""
    torch.manual_seed(num_sms)
    args, options = decode_case(contexts, 4, 2, 64, torch.float32)
    expected = decode.attn_decode_reference(*args, **options)
    scratch = torch.zeros(decode.decode_scratch_shape(4, 2, 64, num_sms))
    first = decode.attn_decode(*args, **options, scratch=scratch, num_sms=num_sms)
    second = decode.attn_decode(*args, **options, scratch=scratch, num_sms=num_sms)
    assert relative(first, expected) < 1e-5
    assert torch.equal(first, second)


def test_decode_scratch_serves_any_smaller_sm_count():
    torch.manual_seed(4)
    args, options = decode_case([500, 64, 200], 4, 2, 64, torch.float32)
    expected = decode.attn_decode_reference(*args, **options)
    scratch = torch.zeros(decode.decode_scratch_shape(4, 2, 64, 9))
    for num_sms in (9, 2, 5, 1, 9):
        result = decode.attn_decode(*args, **options, scratch=scratch, num_sms=num_sms)
        assert relative(result, expected) < 1e-5


def test_decode_large_scores_do_not_overflow():
    torch.manual_seed(3)
    args, options = decode_case([300, 70], 2, 1, 64, torch.float32)
    args[0].mul_(300.0)
    result = decode.attn_decode(*args, **options, num_sms=1)
    assert relative(result, decode.attn_decode_reference(*args, **options)) < 1e-4


def test_unsupported_shapes_are_refused():
    args, options = decode_case([5], 2, 1, 64, torch.float32)
    with pytest.raises(ValueError, match="scratch"):
        decode.attn_decode(*args, **options, scratch=torch.zeros(3), num_sms=1)
    with pytest.raises(ValueError, match="unsupported"):
        decode.attn_decode(args[0], args[1][:, :, :32], args[2][:, :, :32], *args[3:], **options, num_sms=1)
    with pytest.raises(ValueError, match="batch"):
        decode.attn_decode(torch.zeros(513, 2, 64), *args[1:], **options, num_sms=1)


# --- bf16 on a GPU ---


def gathered(cache, table, row, context, group):
    """K or V of one request as torch's own attention wants it: [1, H, context, D]."""
    blocks = table[row, : -(-context // BLOCK)].long()
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :context].repeat_interleave(group, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "queries, cached",
    [([2048], [0]), ([1000, 513, 1], [0, 777, 4095]), ([512], [7680]), ([300, 100, 16], [9000, 100, 20000])],
)
def test_prefill_error_is_that_of_torch_bf16(queries, cached):
    torch.manual_seed(0)
    args, options = prefill_case(queries, cached, 32, 8, 128, torch.bfloat16, "cuda")
    q, k_cache, v_cache, table, rows, starts, lens = args
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    options["scratch"] = torch.zeros(prefill.prefill_scratch_shape(128), device="cuda")
    result = prefill.attn_prefill(*args, **options, num_sms=sms)
    assert torch.equal(prefill.attn_prefill(*args, **options, num_sms=sms), result)
    for num_sms in (sms // 3, 1 + sms // 2):  # cut elsewhere
        other = prefill.attn_prefill(*args, **options, num_sms=num_sms)
        assert relative(other.float(), result.float()) < 5e-3
    assert not options["scratch"][-prefill.MAX_PARTS :].any()
    for r, (n, context) in enumerate(zip(queries, lens.tolist(), strict=True)):
        first = int(starts[r])
        k, v = (gathered(c, table, int(rows[r]), context, 4) for c in (k_cache, v_cache))
        queries_r = q[first : first + n].transpose(0, 1)[None]
        mask = torch.arange(context, device="cuda") <= torch.arange(context - n, context, device="cuda")[:, None]
        exact = F.scaled_dot_product_attention(queries_r.float(), k.float(), v.float(), attn_mask=mask)
        torch_bf16 = F.scaled_dot_product_attention(queries_r, k, v, attn_mask=mask)
        ours = result[first : first + n].transpose(0, 1)[None]
        assert relative(ours, exact) <= 1.5 * relative(torch_bf16, exact)


@pytest.mark.gpu
def test_prefill_bits_on_the_gpu():
    """One prompt whole, in chunks and token by token (its last ones), under different SM counts."""
    torch.manual_seed(0)
    args, options = prefill_case([1500], [0], 32, 8, 128, torch.bfloat16, "cuda")
    q, k_cache, v_cache, table, rows, _, _ = args
    whole = prefill.attn_prefill(*args, **options, num_sms=132)
    edges = [0, 301, 1024, 1400, *range(1450, 1501)]
    for first, last in itertools.pairwise(edges):
        starts, lens = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, last - first], [last]))
        part = prefill.attn_prefill(
            q[first:last].contiguous(), k_cache, v_cache, table, rows, starts, lens, **options, num_sms=7 + first % 90
        )
        assert torch.equal(part, whole[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [[8192], [1024] * 64, [131072, *[100] * 255], [777, 0, 64, 65, 1]])
def test_decode_error_is_that_of_torch_bf16(contexts):
    torch.manual_seed(0)
    args, options = decode_case(contexts, 32, 8, 128, torch.bfloat16, "cuda")
    q, k_cache, v_cache, table, rows, _ = args
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    result = decode.attn_decode(*args, **options, num_sms=sms)
    exact, torch_bf16 = torch.zeros_like(q, dtype=torch.float32), torch.zeros_like(q)
    for b, context in enumerate(contexts):
        if context:
            k, v = (gathered(c, table, int(rows[b]), context, 4) for c in (k_cache, v_cache))
            query = q[b][None, :, None]
            exact[b] = F.scaled_dot_product_attention(query.float(), k.float(), v.float())[0, :, 0]
            torch_bf16[b] = F.scaled_dot_product_attention(query, k, v)[0, :, 0]
    assert relative(result, exact) <= 1.5 * relative(torch_bf16, exact)
