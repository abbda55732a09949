"""Puts a workload on an engine in this process, or on a server behind a URL: ``run_workload``, one record a request.

Open loop: requests come when they are due, whatever the machine does, and their latency counts from then. Closed loop
(a rate of infinity with ``max_concurrency``): the next one comes when another has ended. The times of a record count
from the start of the run. Which figures are made of them is metrics.py's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanodrift.bench import arrivals
from nanodrift.bench.arrivals import Ramp
from nanodrift.bench.workloads import NUM_IDS, PromptMaker, Workload
from nanodrift.config import SLO
from nanodrift.engine import Engine
from nanodrift.metrics import RequestTimes
from nanodrift.request import Request, SamplingParams

INTERRUPTED = "interrupted"  # the run was stopped while this request was under way


@dataclass(frozen=True)
class Record(RequestTimes):
    """What became of one issued request."""

    sent_s: float = 0.0
    end_s: float = 0.0  # when its end was known, whatever end it was
    error: str | None = None  # why it did not complete
    is_refused: bool = False  # the server said no at the door
    counted_by: str = "engine"  # who knew how many tokens there were: engine | usage | chunks
    num_cached_tokens: int | None = None
    num_preemptions: int | None = None

    @property
    def send_lag_s(self) -> float:
        return self.sent_s - self.arrival_s


Advance = Callable[[Record], None]  # told of every request that has ended


def nobody(_: Record) -> None:
    """Progress for nobody."""


def run_workload(
    target,
    workload: Workload,
    rate: float | Ramp | None = None,
    seed: int = 0,
    *,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    prompt_seed: int | str | None = None,
    slo: SLO | None = None,
    num_ids: int = NUM_IDS,
    encode: Callable[[str], list[int]] | None = None,
    advance: Advance = nobody,
) -> list[Record]:
    """Runs all samples once, and returns a record for each that was issued, in order of arrival.

    ``target`` is an Engine, a client.Server or a URL. ``rate`` in requests/s; None: the trace's own pace. A trace with
    a rate keeps its rhythm, stretched to that mean; anything else is drawn (gamma; ``burstiness`` 1 = Poisson). One
    seed gives the same prompts and the same arrivals to every target; another ``prompt_seed`` gives other ids of the
    same lengths, which a prefix cache that outlived the last run does not know. ``encode`` turns texts into ids.
    Interrupted (Ctrl-C), it returns what it has; requests under way then have the error INTERRUPTED.
    """
    if workload.has_arrivals and not isinstance(rate, Ramp):
        due_s = arrivals.of_trace(workload, rate)
    elif rate is None:
        raise ValueError(f"{workload.name} has no arrival times: give a request rate")
    else:
        due_s = arrivals.drawn(len(workload.samples), rate, seed, burstiness)
    if max_concurrency is not None and max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
    is_closed = max_concurrency is not None and rate == math.inf
    prompts = PromptMaker(seed if prompt_seed is None else prompt_seed, num_ids)
    if isinstance(target, str):
        from nanodrift.bench.client import Server

        target = Server(target)
        target.connect()
    run = _run_engine if isinstance(target, Engine) else _run_server
    return run(target, workload, due_s, prompts, slo or SLO(), max_concurrency, is_closed, advance, encode)


def duration_s(records: Sequence[Record]) -> float:
    """From the start of the run until the last end that is known."""
    return max((record.end_s for record in records), default=0.0) or 1e-9


def _run_server(server, workload, due_s, prompts, slo, max_concurrency, is_closed, advance, encode) -> list[Record]:
    bodies = [server.body(sample, prompts) for sample in workload.samples]
    lengths = [sample.num_prompt_tokens for sample in workload.samples]
    return server.run(bodies, lengths, due_s, slo, max_concurrency, is_closed, advance)


def _run_engine(engine, workload, due_s, prompts, slo, max_concurrency, is_closed, advance, encode) -> list[Record]:
    """All requests are made before the start. The engine takes each one when it is due, between two of its steps."""
    requests = []
    for sample in workload.samples:
        params = SamplingParams(temperature=0.0, max_tokens=sample.num_output_tokens, ignore_eos=True)
        requests.append(engine.new_request(prompts.token_ids(sample, encode), params, slo=slo))
    clock = engine.executor.clock
    start_s = clock.now()
    for number, request in enumerate(requests):
        request.arrival_s = start_s + due_s[number]
    refusals: dict[str, str] = {}
    running: dict[str, Request] = {}
    pending, issued = deque(requests), []

    def issue() -> None:
        while pending and (max_concurrency is None or len(running) < max_concurrency):
            request = pending.popleft()
            if is_closed:
                request.arrival_s = clock.now()
            issued.append(request)
            try:
                engine.add(request)
                running[request.request_id] = request
            except ValueError as error:
                refusals[request.request_id] = str(error)
                request.finished_s = request.arrival_s
                advance(_engine_record(request, start_s, refusals))

    try:
        issue()
        while engine.has_work:
            for event in engine.step():
                if event.finish_reason is not None and event.request_id in running:
                    advance(_engine_record(running.pop(event.request_id), start_s, refusals))
            issue()
    except KeyboardInterrupt:
        now_s = clock.now()
        issued = [request for request in issued if request.arrival_s <= now_s]
        for request_id in running:
            engine.abort(request_id)
        while engine.has_work:
            engine.step()
    return [_engine_record(request, start_s, refusals) for request in issued]


def _engine_record(request: Request, start_s: float, refusals: dict[str, str]) -> Record:
    times = RequestTimes.of(request)
    refusal = refusals.get(request.request_id)
    ends = [s for s in (request.finished_s, request.token_s[-1] if request.token_s else None) if s is not None]
    error = refusal if refusal is not None else None if times.is_completed else INTERRUPTED
    return Record(
        arrival_s=request.arrival_s - start_s,
        token_s=tuple(s - start_s for s in request.token_s),
        slo=request.slo,
        is_completed=times.is_completed,
        num_prompt_tokens=times.num_prompt_tokens,
        sent_s=request.arrival_s - start_s,
        end_s=max(ends, default=request.arrival_s) - start_s,
        error=error,
        is_refused=refusal is not None,
        num_cached_tokens=request.num_cached_tokens,
        num_preemptions=request.num_preemptions,
    )
