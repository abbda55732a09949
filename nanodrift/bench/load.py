"""Puts a workload on an engine in this process, or on a server behind a URL: ``run_workload``, one record a request.

Open loop: requests come when they are due, whatever the machine does, and their latency counts from then. Closed loop
(a rate of infinity with ``max_concurrency``): the next one comes when another has ended. The times of a record count
from the start of the run. Which figures are made of them is metrics.py's business.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from nanodrift.bench import arrivals
from nanodrift.bench.arrivals import Ramp
from nanodrift.bench.workloads import NUM_IDS, PromptMaker, Workload
from nanodrift.config import SLO
from nanodrift.engine import Engine
from nanodrift.metrics import RequestTimes
from nanodrift.request import Request, SamplingParams

INTERRUPTED = "interrupted"  # the run was stopped while this request was under way
CUT_OFF = "timed out: not done when the run's time was over"  # counts as a miss
LEAD_S = 2.0  # a background decodes alone before the first request comes


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
    is_background: bool = False  # of a batch that is held beside the workload; ended by the run, not by its length

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
    drain_s: float = math.inf,
    ttft_per_token_ms: float = 0.0,
    advance: Advance = nobody,
) -> list[Record]:
    """Runs all samples once, and returns a record for each that was issued, in order of arrival.

    ``target`` is an Engine, a client.Server or a URL. ``rate`` in requests/s; None: the trace's own pace. A trace with
    a rate keeps its rhythm, stretched to that mean; anything else is drawn (gamma; ``burstiness`` 1 = Poisson). One
    seed gives the same prompts and the same arrivals to every target; another ``prompt_seed`` gives other ids of the
    same lengths, which a prefix cache that outlived the last run does not know. ``encode`` turns texts into ids.
    An engine gets ``drain_s`` seconds after the last arrival: what is not done then is cut off, and is a miss; and it
    promises each request a TTFT of the SLO's plus ``ttft_per_token_ms`` for each token of its prompt.
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
    prompts = _prompts(seed if prompt_seed is None else prompt_seed, num_ids)
    if isinstance(target, str):
        from nanodrift.bench.client import Server

        target = Server(target)
        target.connect()
    if isinstance(target, Engine):
        run = _EngineRun(target, slo or SLO(), ttft_per_token_ms, prompts, advance)
        return run(workload, due_s, max_concurrency, is_closed, encode, drain_s)
    if workload.background is not None:
        raise ValueError(f"{workload.name} holds a batch beside its requests: it needs the engine in this process")
    return _run_server(target, workload, due_s, prompts, slo or SLO(), max_concurrency, is_closed, advance)


@lru_cache(maxsize=2)
def _prompts(seed: int | str, num_ids: int) -> PromptMaker:
    """Kept from run to run: the next policy of a sweep asks for the same prompts."""
    return PromptMaker(seed, num_ids)


def duration_s(records: Sequence[Record]) -> float:
    """From the start of the run until the last end that is known."""
    return max((record.end_s for record in records), default=0.0) or 1e-9


def _run_server(server, workload, due_s, prompts, slo, max_concurrency, is_closed, advance) -> list[Record]:
    bodies = [server.body(sample, prompts) for sample in workload.samples]
    lengths = [sample.num_prompt_tokens for sample in workload.samples]
    return server.run(bodies, lengths, due_s, slo, max_concurrency, is_closed, advance)


class _EngineRun:
    """One run on an engine. All of the workload's requests are made before the start; each is taken when it is due."""

    def __init__(self, engine: Engine, slo: SLO, ttft_per_token_ms: float, prompts: PromptMaker, advance: Advance):
        self.engine, self.prompts, self.advance = engine, prompts, advance
        self.slo, self.ttft_per_token_ms = slo, ttft_per_token_ms
        self.clock = engine.executor.clock
        self.start_s = 0.0
        self.issued: list[Request] = []
        self.running: dict[str, Request] = {}
        self.errors: dict[str, str] = {}  # by request id: why it was refused or cut off
        self.refused: set[str] = set()
        self.background: dict[str, Request] = {}  # under way
        self.background_ids: set[str] = set()

    def __call__(self, workload, due_s, max_concurrency, is_closed, encode, drain_s) -> list[Record]:
        pending = deque(self._request(sample, encode) for sample in workload.samples)
        gc.collect()
        gc.freeze()
        is_collecting = gc.isenabled()
        gc.disable()  # as in the server's engine process: a collection walks through all prompts' tokens, up to 19 ms
        self.start_s = self.clock.now()
        lead_s = LEAD_S if workload.background else 0.0
        for request, due in zip(pending, due_s, strict=True):
            request.arrival_s = self.start_s + lead_s + due
        deadline_s = self.start_s + lead_s + max(due_s, default=0.0) + drain_s
        fillers = map(workload.background.sample, itertools.count()) if workload.background else iter(())
        try:
            while pending or self.running:
                has_room = max_concurrency is None or len(self.running) < max_concurrency
                while pending and has_room and (is_closed or pending[0].arrival_s <= self.clock.now()):
                    self._issue(pending.popleft(), is_closed)
                    has_room = max_concurrency is None or len(self.running) < max_concurrency
                while workload.background and len(self.background) < workload.background.batch:
                    self._fill(next(fillers))
                if self.clock.now() >= deadline_s:
                    self.errors |= dict.fromkeys(self.running, CUT_OFF)
                    break
                self._step(min(pending[0].arrival_s if pending and has_room else math.inf, deadline_s))
        except KeyboardInterrupt:
            pass  # what is under way is aborted; nobody was told of what is still to come
        finally:
            if is_collecting:
                gc.enable()
        for request_id in [*self.running, *self.background]:
            self.engine.abort(request_id)
        while self.engine.has_work:
            self.engine.step()
        return [self._record(request) for request in self.issued]

    def _request(self, sample, encode) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=sample.num_output_tokens, ignore_eos=True)
        prompt, slo = self.prompts.token_ids(sample, encode), self.slo
        if self.ttft_per_token_ms:
            slo = replace(slo, ttft_ms=slo.ttft_ms + self.ttft_per_token_ms * len(prompt))
        return self.engine.new_request(prompt, params, slo=slo)

    def _issue(self, request: Request, is_now: bool) -> None:
        if is_now:
            request.arrival_s = self.clock.now()
        self.issued.append(request)
        try:
            self.engine.add(request)
            self.running[request.request_id] = request
        except ValueError as error:
            self.errors[request.request_id] = str(error)
            self.refused.add(request.request_id)
            request.finished_s = request.arrival_s
            self.advance(self._record(request))

    def _fill(self, sample) -> None:
        request = self._request(sample, None)
        self.engine.add(request)
        self.issued.append(request)
        self.background[request.request_id] = request
        self.background_ids.add(request.request_id)

    def _step(self, until_s: float) -> None:
        for event in self.engine.step(until_s if until_s < math.inf else None):
            if event.finish_reason is None:
                continue
            self.background.pop(event.request_id, None)
            if (request := self.running.pop(event.request_id, None)) is not None:
                self.advance(self._record(request))

    def _record(self, request: Request) -> Record:
        times = RequestTimes.of(request)
        is_background = request.request_id in self.background_ids
        is_completed = times.is_completed or (is_background and bool(request.token_s))
        error = self.errors.get(request.request_id)
        ends = [s for s in (request.finished_s, request.token_s[-1] if request.token_s else None) if s is not None]
        return Record(
            arrival_s=request.arrival_s - self.start_s,
            token_s=tuple(s - self.start_s for s in request.token_s),
            slo=request.slo,
            is_completed=is_completed,
            num_prompt_tokens=times.num_prompt_tokens,
            sent_s=request.arrival_s - self.start_s,
            end_s=max(ends, default=request.arrival_s) - self.start_s,
            error=error if error is not None else None if is_completed else INTERRUPTED,
            is_refused=request.request_id in self.refused,
            num_cached_tokens=request.num_cached_tokens,
            num_preemptions=request.num_preemptions,
            is_background=is_background,
        )
