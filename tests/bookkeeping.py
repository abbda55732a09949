"""What the scheduler, and in it the KV cache, cost the host a step: 256 requests decode beside each other.

    PYTHONPATH=. python tests/bookkeeping.py --output results/bookkeeping.json

The scheduler is the real one, time passes on the simulated H200; what is measured is this processor's time in the calls
that the engine makes of the scheduler, and in those that the scheduler makes of the block pool.
"""

import argparse
import json
import time
from collections import Counter
from functools import wraps
from pathlib import Path
from random import Random

import torch

from nanodrift.bench.machine import describe
from nanodrift.bench.policies import parse
from nanodrift.bench.simulate import machine
from nanodrift.config import SLO
from nanodrift.request import SamplingParams

CALLS = ("next_work", "on_launch", "on_complete")
POOL_CALLS = ("match", "is_about_to_write", "admit", "allocate", "enter", "release")
STEP_MS = 16.4  # a decode step of 256 rows at 1k context on an H200 (results/h200/latency-uniform.json)


def timed(owner, name: str, spent_s: Counter, key: str) -> None:
    call = getattr(owner, name)

    @wraps(call)
    def clocked(*args, **options):
        start_s = time.thread_time()
        try:
            return call(*args, **options)
        finally:
            spent_s[key] += time.thread_time() - start_s

    setattr(owner, name, clocked)


def measure(batch: int, num_steps: int, prefix_caching: bool) -> dict:
    """-> us a step, in the scheduler and in its pool, once all requests decode."""
    engine = machine(prefix_caching=prefix_caching).engine(parse("mux"), SLO(tbt_ms=50.0))
    draw, spent_s = Random(0), Counter()
    for _ in range(batch):
        prompt = [draw.randrange(128_000) for _ in range(1024)]
        engine.add(engine.new_request(prompt, SamplingParams(max_tokens=num_steps + 200, ignore_eos=True)))
    while len(engine.scheduler.running) < batch:
        engine.step()
    for name in CALLS:
        timed(engine.scheduler, name, spent_s, "scheduler")
    for name in POOL_CALLS:
        timed(engine.scheduler.pool, name, spent_s, "pool")
    start = engine.num_output_tokens
    while engine.num_output_tokens < start + batch * num_steps:
        engine.step()
    return {key: round(1e6 * seconds / num_steps, 1) for key, seconds in sorted(spent_s.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for batch in (16, 64, 256):
        for prefix_caching in (True, False):
            us = measure(batch, args.steps, prefix_caching)
            rows.append({"batch": batch, "prefix_caching": prefix_caching, "us_a_step": us})
            print(rows[-1], flush=True)
    largest = rows[-2]["us_a_step"]
    result = {
        **describe(torch.device("cpu")),
        "command": "PYTHONPATH=. python tests/bookkeeping.py --output results/bookkeeping.json",
        "steps": args.steps, "rows": rows, "decode_step_ms_at_256": STEP_MS,
        "pool_share_of_a_step_at_256": round(largest["pool"] / 1e3 / STEP_MS, 5),
        "scheduler_share_of_a_step_at_256": round(largest["scheduler"] / 1e3 / STEP_MS, 5),
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if "share" in key}))


if __name__ == "__main__":
    main()
