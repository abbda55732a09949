"""Drives one engine in this process, no HTTP, no text: token ids in, counts and times out.

All prompts are random token ids and nothing stops early, so the work is fixed by the lengths and a run can be repeated.
Times come from the engine's own stamps (when the host saw a token). Knows nothing about devices or ceilings.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from nanodrift.bench.summary import summarize
from nanodrift.engine import Engine
from nanodrift.metrics import RequestTimes
from nanodrift.request import Request, SamplingParams

Advance = Callable[[int], None]  # told after every step how many requests it finished


def quiet(_: int) -> None:
    """Progress for nobody."""


def add_random(engine: Engine, count: int, prompt_len: int, num_new_tokens: int, draw: random.Random) -> list[Request]:
    """Gives the engine ``count`` greedy requests of fresh random ids that run to exactly ``num_new_tokens``."""
    params = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True)
    requests = [engine.new_request(draw.choices(range(engine.vocab_size), k=prompt_len), params) for _ in range(count)]
    for request in requests:
        engine.add(request)
    return requests


def run_out(engine: Engine, advance: Advance = quiet) -> None:
    while engine.has_work:
        advance(sum(event.finish_reason is not None for event in engine.step()))


def throughput(
    engine: Engine, *, num_prompts: int, input_len: int, output_len: int, seed: int = 0, advance: Advance = quiet
) -> dict:
    """Everything arrives at once: how many tokens a second come out, in vLLM's keys."""
    requests = add_random(engine, num_prompts, input_len, output_len, random.Random(seed))
    run_out(engine, advance)
    duration_s = max(r.token_s[-1] for r in requests) - requests[0].arrival_s
    return {
        "num_prompts": num_prompts,
        "input_len": input_len,
        "output_len": output_len,
        "request_rate": "inf",
        "max_concurrency": None,
        **summarize([RequestTimes.of(r) for r in requests], duration_s),
        "preemptions": sum(r.num_preemptions for r in requests),
    }


def prefill_s(engine: Engine, count: int, prompt_len: int, seed: int) -> float:
    """Seconds from adding ``count`` prompts to an idle engine until the first token of the last one is seen."""
    requests = add_random(engine, count, prompt_len, 1, random.Random(seed))
    start_s = requests[0].arrival_s
    run_out(engine)
    return max(r.token_s[0] for r in requests) - start_s


@dataclass(frozen=True)
class SteadyDecode:
    """A window in which all requests of a batch did nothing but decode."""

    gaps_s: list[float]  # between consecutive steps, as the host saw them
    mean_context: float  # tokens a row attended to, over rows and steps of the window
    num_preemptions: int


def steady_decode(
    engine: Engine, batch: int, context: int, num_steps: int, seed: int, on_steady: Callable[[], None] = lambda: None
) -> SteadyDecode:
    """Prefills ``batch`` prompts of ``context`` tokens, then times ``num_steps`` steps once every one of them decodes.

    ``on_steady`` is called when the prefills are over.
    Raises ValueError if a request ran out of room before the window was over.
    """
    room = engine.scheduler.max_model_len - context
    requests = add_random(engine, batch, context, room, random.Random(seed))
    while any(not r.token_s for r in requests) and not any(r.is_finished for r in requests):
        engine.step()  # the early ones already decode while the last are prefilled
    on_steady()
    leader = max(requests, key=lambda r: r.num_tokens)  # will be the first to run out of room
    last = max(requests, key=lambda r: r.token_s[0] if r.token_s else 0.0)
    skip = 1 + max(2, num_steps // 16)  # the merge itself, and the steps that were launched before it
    first = len(last.token_s) - 1 + skip
    while len(last.token_s) <= first + num_steps and not leader.is_finished:
        engine.step()
    if leader.is_finished:
        raise ValueError(
            f"{batch} requests of {context} tokens do not fit {num_steps} steps beside each other: each has room for "
            f"{room} more tokens, and there are {engine.scheduler.pool.num_blocks} KV blocks"
        )
    window = slice(first, first + num_steps + 1)
    spread = [r.num_tokens - last.num_tokens for r in requests]  # how far each request is ahead of the last
    mean_context = context + (window.start + num_steps / 2) + sum(spread) / batch
    for request in requests:
        engine.abort(request.request_id)
    run_out(engine)
    gaps = RequestTimes(0.0, last.token_s[window]).tbt_s
    return SteadyDecode(gaps, mean_context, sum(r.num_preemptions for r in requests))
