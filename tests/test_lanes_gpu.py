"""Two lanes at once on a real GPU: the same bits as one after the other, and less time than the sum.

The executor is driven by hand: 16 requests decode while two long prompts go through the layers four at a time, and the
partition changes every few steps.
"""

import time

import pytest
import torch

from nanodrift import hub
from nanodrift.config import ModelConfig
from nanodrift.gpu import GpuExecutor
from nanodrift.kvcache import blocks_for
from nanodrift.model import Model
from nanodrift.plan import DecodeWork, FusedWork, Lane, NewBlocks, PrefillSlice, PrefillWork, RowParams
from nanodrift.weights import dummy_weights

pytestmark = pytest.mark.gpu

NUM_DECODING, NUM_STEPS, LAYERS = 16, 48, 4
CONTEXT, PROMPT = 600, 1500
GREEDY = RowParams(temperature=0.0)


@pytest.fixture(scope="module")
def executor():
    config = ModelConfig.from_folder(hub.resolve_model("llama-3-8b", "dummy"))
    weights = dummy_weights(config, torch.device("cuda", 0), torch.bfloat16)
    executor = GpuExecutor(
        Model(config, weights, 2048),
        num_rows=32,
        max_model_len=2048,
        max_prefill_tokens=2048,
        num_blocks=32 * 20,
        deterministic=True,
        decode_sms=(16, 32, 64),
    )
    assert executor.split.reason == ""
    yield executor
    executor.close()


def prompt(seed, length):
    return tuple((i * 7919 + seed * 104729) % 100_000 for i in range(length))


def slice_of(row, length, params=GREEDY):
    return PrefillSlice(f"r{row}", row, 0, prompt(row, length), params)


def blocks_of(row, length):
    return NewBlocks(row, 0, tuple(range(1 + row * 20, 1 + row * 20 + blocks_for(length))))


def chunk(batch_id, rows, length, first, last):
    new_blocks = tuple(blocks_of(row, length + NUM_STEPS + 1) for row in rows) if first == 0 else ()
    return PrefillWork(batch_id, tuple(slice_of(r, length) for r in rows), first, last, last == 32, new_blocks)


def step(number, rows=range(NUM_DECODING), context=CONTEXT):
    return DecodeWork(tuple(f"r{r}" for r in rows), tuple(rows), (context + number,) * len(rows))


def drain(executor):
    done = []
    while completions := executor.wait(None):
        done += completions
    return done


def start_decoding(executor):
    """Prompts of the decoding requests, three at a time, on the whole chip."""
    wipe_cache(executor)
    tokens = {}
    for batch_id, first in enumerate(range(0, NUM_DECODING, 3)):
        rows = range(first, min(first + 3, NUM_DECODING))
        executor.launch(chunk(batch_id, rows, CONTEXT, 0, 32), executor.partitions[0])
        for completion in drain(executor):
            tokens |= dict(completion.tokens)
    return tokens


def wipe_cache(executor):
    """So that what a run did not write cannot look right because an earlier one did."""
    kv = executor._runners[Lane.PREFILL].kv
    for cache in (kv.k, kv.v):
        cache.fill_(1.0)
    torch.cuda.current_stream().synchronize()


def cache_sums(executor):
    """Of the bits of every layer's keys and values: they differ if anything did in any layer of any pass."""
    kv = executor._runners[Lane.PREFILL].kv
    sums = [cache[:, 1:].flatten(1).view(torch.int64).sum(1) for cache in (kv.k, kv.v)]  # block 0 is nobody's
    return torch.cat(sums).tolist()


def collect(completions):
    """Sampled tokens in launch order: a list per request."""
    tokens = {}
    for completion in sorted(completions, key=lambda c: c.ticket.number):
        for request_id, token in completion.tokens:
            tokens.setdefault(request_id, []).append(token)
    return tokens


def one_after_the_other(executor):
    start_decoding(executor)
    whole, done = executor.partitions[0], []
    for number in range(NUM_STEPS):
        executor.launch(step(number), whole)
        done += drain(executor)
    executor.launch(chunk(100, (20, 21), PROMPT // 2, 0, 32), whole)
    return collect(done + drain(executor)), cache_sums(executor)


def both_at_once(executor, choose):
    """Decode two steps ahead of the host, prefill two layer chunks ahead; ``choose(number)`` names the partition."""
    start_decoding(executor)
    number, layer, done, in_flight = 0, 0, [], {"decode": 0, "prefill": 0}
    while number < NUM_STEPS or layer < 32 or any(in_flight.values()):
        partition = choose(number)
        while number < NUM_STEPS and in_flight["decode"] < 2:
            executor.launch(step(number), partition)
            number, in_flight["decode"] = number + 1, in_flight["decode"] + 1
        while layer < 32 and in_flight["prefill"] < 2:
            executor.launch(chunk(100, (20, 21), PROMPT // 2, layer, layer + LAYERS), partition)
            layer, in_flight["prefill"] = layer + LAYERS, in_flight["prefill"] + 1
        for completion in executor.wait(None):
            in_flight[completion.ticket.work.lanes[0].value] -= 1
            done.append(completion)
    return collect(done), cache_sums(executor)


def test_multiplexed_tokens_equal_serial_ones_bit_for_bit(executor):
    serial = one_after_the_other(executor)
    assert len(serial[0]["r0"]) == NUM_STEPS
    assert len(serial[0]["r20"]) == 1
    for partition in executor.partitions:
        assert both_at_once(executor, lambda number, p=partition: p) == serial, partition
    changing = both_at_once(executor, lambda number: executor.partitions[number // 3 % len(executor.partitions)])
    assert changing == serial


def test_a_fused_step_gives_the_same_bits(executor):
    serial, _ = one_after_the_other(executor)
    start_decoding(executor)
    whole = executor.partitions[0]
    executor.launch(FusedWork(chunk(100, (20, 21), PROMPT // 2, 0, 32), step(0)), whole)
    (fused,) = drain(executor)
    executor.launch(step(1), executor.partitions[1])
    (after,) = drain(executor)
    tokens = collect([fused, after])
    assert tokens["r20"] == serial["r20"]
    assert tokens["r3"] == serial["r3"][:2]


PIECES = (  # batch id, rows, prompt tokens, first layer, last layer; None: a fused step
    (100, (20, 21), PROMPT // 2, 0, 9),
    (101, (22,), 200, 0, 5),  # passes the long one ...
    (101, (22,), 200, 5, 32),
    (100, (20, 21), PROMPT // 2, 9, 10),  # ... which goes on
    (100, (20, 21), PROMPT // 2, 10, 31),
    (102, (23, 24), 30, 0, 32),  # so does a chunk in its last layer
    (100, (20, 21), PROMPT // 2, 31, 32),
    (103, (25, 26, 27), 40, None, None),
    (104, (28,), 500, 0, 16),
    (105, (29,), 60, None, None),  # a fused step beside a chunk that waits
    (104, (28,), 500, 16, 32),
    (106, (30,), 1100, None, None),  # larger than any graph
)


def serial_pieces(executor):
    start_decoding(executor)
    whole, done, number = executor.partitions[0], [], 0
    for batch_id, rows, length in dict.fromkeys((p[0], p[1], p[2]) for p in PIECES):
        executor.launch(chunk(batch_id, rows, length, 0, 32), whole)
        done += drain(executor)
    for number in range(2 * len(PIECES)):
        executor.launch(step(number), whole)
        done += drain(executor)
    return collect(done), cache_sums(executor)


def pieces_beside_decode(executor, choose):
    """Every piece beside two decode steps, in the partition that ``choose(piece number)`` names.

    Each lane is two launches ahead of the host, as the scheduler has it.
    """
    start_decoding(executor)
    number, done = 0, []
    for i, (batch_id, rows, length, first, last) in enumerate(PIECES):
        partition = choose(i)
        executor.launch(step(number), partition)
        if first is None:
            executor.launch(FusedWork(chunk(batch_id, rows, length, 0, 32), step(number + 1)), partition)
        else:
            executor.launch(chunk(batch_id, rows, length, first, last), partition)
            executor.launch(step(number + 1), partition)
        number += 2
        while max(map(len, executor._in_flight.values())) > 2:
            done += executor.wait(None)
    return collect(done + drain(executor)), cache_sums(executor)


def test_modes_partitions_and_waiting_chunks_change_no_bit(executor):
    """Both phases in every partition, chunks that pass each other, fused steps in sequence and side by side."""
    serial = serial_pieces(executor)
    assert len(serial[0]["r0"]) == 2 * len(PIECES)
    assert all(len(serial[0][f"r{row}"]) == 1 for row in range(20, 31))
    for partition in executor.partitions:
        assert pieces_beside_decode(executor, lambda i, p=partition: p) == serial, partition
    for stride in (1, 3):
        changing = pieces_beside_decode(executor, lambda i, s=stride: executor.partitions[(i * s + 1) % 4])
        assert changing == serial


def test_a_missing_wait_is_noticed(executor, monkeypatch):
    """A chunk whose second half does not wait for its first, in another partition, leaves other bits in the cache."""

    def halves():
        wipe_cache(executor)
        for first, partition in ((0, executor.partitions[1]), (16, executor.partitions[3])):
            executor.launch(chunk(100, (20, 21), PROMPT // 2, first, first + 16), partition)
        return collect(drain(executor)), cache_sums(executor)

    expected = halves()
    assert halves() == expected
    with monkeypatch.context() as patch:
        patch.setattr(executor, "_wait_for_sms", lambda *args: None)
        assert halves()[1] != expected[1]
    for place in executor._places.values():  # two at once have spoilt the count that each leaves for the next
        place.resources.scratch.buffers["counter 0"].zero_()
    torch.cuda.current_stream().synchronize()
    assert halves() == expected


def test_completions_say_how_long_the_device_worked(executor):
    start_decoding(executor)
    started_s, done = time.perf_counter(), []
    for number in range(20):
        executor.launch(step(number), executor.partitions[0])
        while len(executor._in_flight[Lane.DECODE]) > 2:
            done += executor.wait(None)
    done += drain(executor)
    wall_s = time.perf_counter() - started_s
    assert len(done) == 20
    assert all(0 < completion.busy_s < wall_s for completion in done)
    assert sum(completion.busy_s for completion in done) < wall_s, "one stream works on one step at a time"
    assert sum(completion.busy_s for completion in done) > 0.8 * wall_s, "it works all the time"


def test_nothing_is_compiled_or_allocated_once_the_executor_is_ready(executor):
    pieces_beside_decode(executor, lambda i: executor.partitions[i % 4])  # the test's own memory is there after that
    before = executor.counters()
    pieces_beside_decode(executor, lambda i: executor.partitions[(i + 2) % 4])
    assert executor.counters() == before
    assert before["num_compilations"] == 0
    print(before)


def test_two_lanes_overlap_in_time(executor):
    """Alone and together on the same SMs: together must take clearly less than one after the other."""

    def seconds(num_chunks, num_steps, partition):
        started_s = time.perf_counter()
        for i in range(max(num_chunks, num_steps)):
            if i < num_steps:
                executor.launch(step(i % NUM_STEPS), partition)
            if i < num_chunks:
                first = i * LAYERS % 32
                executor.launch(chunk(200 + i // 8, (20, 21), PROMPT // 2, first, first + LAYERS), partition)
            while sum(map(len, executor._in_flight.values())) > 3:
                executor.wait(None)
        drain(executor)
        return time.perf_counter() - started_s

    start_decoding(executor)
    partition = executor.partitions[2]
    assert partition.decode_sms == 32
    seconds(8, 8, partition)
    decode_s, prefill_s = seconds(0, 24, partition), seconds(32, 0, partition)
    together_s = seconds(32, 24, partition)
    print(f"decode {decode_s:.3f} s, prefill {prefill_s:.3f} s, together {together_s:.3f} s on {partition}")
    assert together_s < 0.85 * (decode_s + prefill_s)
