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
from nanodrift.plan import DecodeWork, FusedWork, NewBlocks, PrefillSlice, PrefillWork, RowParams
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
    tokens = {}
    for batch_id, first in enumerate(range(0, NUM_DECODING, 3)):
        rows = range(first, min(first + 3, NUM_DECODING))
        executor.launch(chunk(batch_id, rows, CONTEXT, 0, 32), executor.partitions[0])
        for completion in drain(executor):
            tokens |= dict(completion.tokens)
    return tokens


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
    return collect(done + drain(executor))


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
    return collect(done)


def test_multiplexed_tokens_equal_serial_ones_bit_for_bit(executor):
    serial = one_after_the_other(executor)
    assert len(serial["r0"]) == NUM_STEPS
    assert len(serial["r20"]) == 1
    for partition in executor.partitions:
        assert both_at_once(executor, lambda number, p=partition: p) == serial, partition
    changing = both_at_once(executor, lambda number: executor.partitions[number // 3 % len(executor.partitions)])
    assert changing == serial


def test_a_fused_step_gives_the_same_bits(executor):
    serial = one_after_the_other(executor)
    start_decoding(executor)
    whole = executor.partitions[0]
    executor.launch(FusedWork(chunk(100, (20, 21), PROMPT // 2, 0, 32), step(0)), whole)
    (fused,) = drain(executor)
    executor.launch(step(1), executor.partitions[1])
    (after,) = drain(executor)
    tokens = collect([fused, after])
    assert tokens["r20"] == serial["r20"]
    assert tokens["r3"] == serial["r3"][:2]


def test_two_lanes_overlap_in_time(executor):
    """Alone and together on the same SMs: together must take clearly less than one after the other."""

    def seconds(num_chunks, num_steps, partition):
        torch.cuda.synchronize()
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
