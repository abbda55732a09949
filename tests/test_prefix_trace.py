"""What the prefix cache finds in a recorded load, beside what an ideal cache of the same size would find. Simulated.

The scheduler and the engine's loop are the real ones; the machine below only counts, under a virtual clock. The traces
lie beside the checkout (see README.md of ``../shared/traces``); they hold lengths and block ids, no text.
"""

import json
from collections import OrderedDict, deque
from pathlib import Path
from random import Random

import pytest
from paged_machine import check_pool

from nanodrift.baselines import Turns
from nanodrift.config import BLOCK_SIZE
from nanodrift.engine import Engine
from nanodrift.executor import VirtualClock
from nanodrift.plan import Completion, Partition, PrefillWork, Ticket
from nanodrift.request import SamplingParams
from nanodrift.scheduler import Scheduler

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake_conversation_sess8.jsonl"
TRACE_BLOCK = 512  # tokens that one of its ids stands for
MAX_OUTPUT = 32  # answers are cut, since they are made up and nothing in the trace refers to them
WINDOW = 131_072


class CountingMachine:
    """A prompt token takes 25 us, a decode step 25 ms; one piece of work at a time."""

    def __init__(self):
        self.clock, self.in_flight, self.num_prefill_tokens = VirtualClock(), deque(), 0
        self.num_launched = 0
        self.partitions = (Partition(1, 1, is_shared=True),)

    def launch(self, work, partition):
        self.num_launched += 1
        self.in_flight.append(Ticket(self.num_launched, work, partition, self.clock.now()))
        return self.in_flight[-1]

    def wait(self, until_s):
        if not self.in_flight:
            self.clock.advance_to(until_s)
            return []
        ticket = self.in_flight.popleft()
        num_tokens = ticket.work.num_tokens if isinstance(ticket.work, PrefillWork) else 0
        self.num_prefill_tokens += num_tokens
        self.clock.advance_to(self.clock.now() + (25e-6 * num_tokens if num_tokens else 25e-3))
        return [Completion(ticket, self.clock.now(), tuple((name, 0) for name in ticket.work.sampled_ids))]


def load_trace():
    """[(arrival_s, prompt token ids, output tokens)]; arrivals spread inside the trace's 3 s ticks, seed 0."""
    random, rows = Random(0), [json.loads(line) for line in TRACE.read_text().splitlines()]
    load = [
        (
            row["timestamp"] / 1000 + 3 * random.random(),
            [i + 1 for i in row["hash_ids"] for _ in range(TRACE_BLOCK)][: row["input_length"]],
            min(row["output_length"], MAX_OUTPUT),
        )
        for row in rows
    ]
    return sorted(load, key=lambda entry: entry[0])


def ideal_hit_tokens(load, num_blocks):
    """Least recently used blocks under their whole prefix; answers take no room and every prompt is known at once."""
    cached, num_hit_tokens = OrderedDict(), 0
    for _, prompt, _ in load:
        path, keys = 0, []
        for start in range(0, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
            path = hash((path, *prompt[start : start + BLOCK_SIZE]))
            keys.append(path)
        num_hits = next((i for i, key in enumerate(keys) if key not in cached), len(keys))
        num_hit_tokens += min(num_hits * BLOCK_SIZE, len(prompt) - 1)
        for key in reversed(keys):
            cached[key] = None
            cached.move_to_end(key)
        while len(cached) > num_blocks:
            cached.popitem(last=False)
    return num_hit_tokens


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.exists(), reason=f"{TRACE.name} is data of others and does not come with the project")
@pytest.mark.parametrize("num_blocks", [6_400, 12_800, 51_200, 409_600])  # 50, 100, 400 GiB at 128 KiB a token, and all
def test_hit_rate_against_the_ideal(num_blocks):
    load, machine = load_trace(), CountingMachine()
    scheduler = Scheduler(
        num_blocks=num_blocks,
        num_rows=256,
        num_layers=1,
        max_model_len=WINDOW,
        max_prefill_tokens=8192,
        policy=Turns(machine.partitions[0], 8192, 1),
    )
    engine = Engine(scheduler, machine, vocab_size=1 << 31)
    requests = []
    for arrival_s, prompt, num_output in load:
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        requests.append(engine.new_request(prompt, params, arrival_s=arrival_s))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    num_tokens = sum(len(prompt) for _, prompt, _ in load)
    hit, ideal = scheduler.pool.num_hit_tokens, ideal_hit_tokens(load, num_blocks)
    print(
        f"{num_blocks} blocks: hit rate {hit / num_tokens:.4f}, ideal {ideal / num_tokens:.4f}, "
        f"{scheduler.num_preemptions} preemptions, {machine.clock.now():.0f} s simulated"
    )
    assert all(
        len(request.output_token_ids) == num_output for request, (_, _, num_output) in zip(requests, load, strict=True)
    )
    assert hit + machine.num_prefill_tokens >= num_tokens, "what was not found was computed"
    assert hit >= 0.97 * ideal
    check_pool(scheduler.pool, [])
    assert scheduler.num_leaked_blocks == 0
