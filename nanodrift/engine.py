"""The loop: ask the scheduler for work, launch it, hand completions back. One thread drives both lanes.

Works on token ids only; text is the caller's business. The executor (GPU, CPU, simulated) arrives as an argument, and
its clock is the only time.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque

from nanodrift.config import SLO
from nanodrift.cost import Observer
from nanodrift.executor import Executor
from nanodrift.plan import Lane
from nanodrift.request import Request, SamplingParams
from nanodrift.scheduler import Scheduler, TokenEvent
from nanodrift.telemetry import Telemetry

LANES = (Lane.DECODE, Lane.PREFILL)  # the decode step is launched first: it is short, and others wait for it


class Engine:
    """One model on one device. ``step`` until ``has_work`` is false, or forever."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        slo: SLO | None = None,
        seed: int = 0,
        observer: Observer | None = None,
    ):
        self.scheduler, self.executor, self.observer = scheduler, executor, observer
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)
        self.slo, self.seed = slo or SLO(), seed
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_finished = {"stop": 0, "length": 0, "abort": 0}
        self.telemetry = Telemetry(scheduler.requests, executor.partitions)
        self.power = None  # a log of clock and watts with a stats() of its own, where somebody keeps one
        self._num_requests = 0
        self._arrivals: deque[Request] = deque()  # still to come, the first one first

    def new_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        arrival_s: float | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Makes a request with the model's stop ids and a seed. Raises ValueError for ids outside the vocabulary."""
        named_ids = (*prompt_token_ids, *(token for token, _ in params.biases))
        ends = min(named_ids, default=0), max(named_ids, default=0)
        bad = next((i for i in ends if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size} tokens")
        self._num_requests += 1
        stop_token_ids = frozenset(params.stop_token_ids or ())
        return Request(
            request_id=request_id if request_id is not None else f"request-{self._num_requests}",
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            arrival_s=self.executor.clock.now() if arrival_s is None else arrival_s,
            slo=slo or self.slo,
            cache_salt=cache_salt,
            priority=priority,
            stop_token_ids=stop_token_ids if params.ignore_eos else stop_token_ids | self.eos_token_ids,
            seed=params.seed if params.seed is not None else (self.seed * 1_000_003 + self._num_requests) % 2**63,
        )

    def add(self, request: Request) -> None:
        """Takes a request in, now or when its ``arrival_s`` is due. Raises ValueError if it can never be served."""
        self.scheduler.check(request)
        self.num_prompt_tokens += len(request.prompt_token_ids)
        if request.arrival_s > self.executor.clock.now():
            insort(self._arrivals, request, key=lambda one: one.arrival_s)  # of two due at once the one added first
        else:
            self.scheduler.add(request)

    def abort(self, request_id: str, reason: str = "abort", stop_reason: str | None = None) -> None:
        """Ends a request early (client gone, stop string seen). Unknown ids are ignored: it may just have finished."""
        if self.scheduler.finish(request_id, reason, stop_reason):
            self.num_finished[reason] += 1

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals) or self.scheduler.has_work

    def step(self, until_s: float | None = None) -> list[TokenEvent]:
        """One turn: launch what the lanes have room for, then wait for something to finish (at most to ``until_s``)."""
        now_s = self.executor.clock.now()
        while self._arrivals and self._arrivals[0].arrival_s <= now_s:
            self.scheduler.add(self._arrivals.popleft())
        has_launched = True
        while has_launched:  # the lanes take turns, so that where they share a stream their work alternates
            has_launched = False
            for lane in LANES:
                if (found := self.scheduler.next_work(lane, now_s)) is not None:
                    ticket = self.executor.launch(*found)
                    self.scheduler.on_launch(ticket)
                    self.telemetry.on_launch(ticket, self.scheduler.decision)
                    has_launched = True
        due_s = min(self._arrivals[0].arrival_s if self._arrivals else math.inf, self.scheduler.wake_s)
        if due_s < math.inf:
            until_s = due_s if until_s is None else min(until_s, due_s)
        events = []
        for completion in self.executor.wait(until_s):
            events += self.scheduler.on_complete(completion)
            self.telemetry.on_complete(completion)
            if self.observer is not None:
                self.observer.observe(completion)
        for event in events:
            self.num_output_tokens += len(event.token_ids)
            if event.finish_reason is not None:
                self.num_finished[event.finish_reason] += 1
        return events

    def stats(self) -> dict:
        """Counts for people and dashboards; telemetry.py explains those of what ran."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return {
            "num_requests_running": len(scheduler.running) + len(scheduler.prefilling),
            "num_requests_waiting": len(scheduler.waiting) + len(self._arrivals),
            "num_kv_blocks": pool.num_blocks,
            "num_free_kv_blocks": pool.num_available_blocks,
            "num_cached_kv_blocks": pool.num_cached_blocks,  # of these, what a prompt may find again
            "kv_blocks_leaked": scheduler.num_leaked_blocks,
            "prefix_cache_queries_total": pool.num_queried_tokens,
            "prefix_cache_hits_total": pool.num_hit_tokens,
            "kv_cache_usage_perc": pool.num_used_blocks / pool.num_blocks,
            "num_preemptions_total": scheduler.num_preemptions,
            "prompt_tokens_total": self.num_prompt_tokens,
            "generation_tokens_total": self.num_output_tokens,
            **self.telemetry.stats(),
            **(self.power.stats() if self.power is not None else {}),
            **{f"num_finished_{reason}_total": count for reason, count in self.num_finished.items()},
        }

    def predictions(self) -> dict[str, dict[str, float]]:
        """How good the predictions of late were, by kind of step: see cost.Observer. Takes milliseconds: ask seldom."""
        return self.observer.report() if self.observer is not None else {}

    def close(self) -> None:
        self.executor.close()
