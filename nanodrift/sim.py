"""The executor without a machine: work takes the time cost.py predicts, on a clock that jumps from end to end.

Runs the very scheduler and engine that serve, so a simulated policy cannot drift from the real one. Deterministic: the
same requests give the same launches and the same times. Every sampled token is ``TOKEN_ID``; lengths come from
max_tokens. No torch.

The one subtle thing is time in flight. A piece of work carries the seconds it still needs alone. While both lanes run,
each is slowed by its contention factor; whenever a lane starts or ends, the clock first credits what has been done at
the old speed, and what remains goes on at the new one.

Profiles are measured on a device whose clock has come down as far as its power makes it. Here the clock follows what
runs within CLOCK_S: a short burst of prompt tokens among decode steps is over before it has settled, and is quicker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanodrift.cost import Cell, CostModel, DecodeLoad, Guard, PrefillLoad
from nanodrift.executor import VirtualClock
from nanodrift.plan import Completion, FusedWork, Lane, Partition, Ticket, Work

TOKEN_ID = 0
CLOCK_S = 0.025  # time constant of the clock, as steps behind a change of load show it on an H200
CLOCK_SHARE = 0.85  # of the time of a pass with prompt tokens that goes with the clock; the rest waits for memory


@dataclass(frozen=True)
class Span:
    """When a piece of work held its SMs."""

    ticket: Ticket
    started_s: float
    finished_s: float


@dataclass
class _InFlight:
    ticket: Ticket
    remaining_s: float  # of work alone on its SMs
    started_s: float | None = None


class SimExecutor:
    """A machine of ``cost``'s profile. ``guard`` holds the true contention factors of this machine.

    An Observer that is to learn must be given another CostModel and another Guard: these are the truth.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        partitions: tuple[Partition, ...] = (),
        num_blocks: int,
        num_rows: int,
        max_prefill_tokens: int,
        guard: Guard | None = None,
    ):
        num_sms = cost.profile.num_sms
        self.clock = VirtualClock()
        self.partitions = (Partition(num_sms, num_sms, is_shared=True), *partitions)
        self.num_layers, self.num_blocks, self.num_rows = cost.num_layers, num_blocks, num_rows
        self.max_prefill_tokens = max_prefill_tokens
        self.device_name = f"simulated {cost.profile.name}"
        self.busy_s = {Lane.PREFILL: 0.0, Lane.DECODE: 0.0}  # time each lane had work running
        self.timeline: list[Span] = []
        self._cost, self._guard = cost, guard or Guard.of(cost.profile)
        self._clock, self._clock_at_s = 1.0, 0.0  # over the highest, and when it was so
        self._num_tickets = 0
        self._queue: list[_InFlight] = []  # in launch order; what runs is decided by _running

    def launch(self, work: Work, partition: Partition) -> Ticket:
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets, work, partition, self.clock.now())
        solo_s = self._cost.work_s(work, partition.prefill_sms, partition.decode_sms)
        self._queue.append(_InFlight(ticket, solo_s))
        return ticket

    def wait(self, until_s: float | None) -> list[Completion]:
        limit_s = float("inf") if until_s is None else until_s
        done: list[Completion] = []
        while self._queue and not done and self.clock.now() < limit_s:
            running = self._running()
            for entry in running:
                entry.started_s = self.clock.now() if entry.started_s is None else entry.started_s
            self._move_clock(1.0)  # it was idle
            slowdowns = [self._slowdown(entry, running) for entry in running]
            step_s = min(e.remaining_s * s for e, s in zip(running, slowdowns, strict=True))
            step_s = min(step_s, limit_s - self.clock.now())
            for entry, slowdown in zip(running, slowdowns, strict=True):
                entry.remaining_s -= step_s / slowdown
                for lane in entry.ticket.work.lanes:
                    self.busy_s[lane] += step_s
            self.clock.advance_to(self.clock.now() + step_s)
            self._move_clock(self._settled_clock(running))
            for entry in running:
                if entry.remaining_s <= 1e-12:  # rounding of the subtraction above
                    self._queue.remove(entry)
                    self.timeline.append(Span(entry.ticket, entry.started_s, self.clock.now()))
                    tokens = tuple((request_id, TOKEN_ID) for request_id in entry.ticket.work.sampled_ids)
                    done.append(Completion(entry.ticket, self.clock.now(), tokens, self.clock.now() - entry.started_s))
        if not done and until_s is not None:
            self.clock.advance_to(until_s)
        return done

    def counters(self) -> dict[str, int | float]:
        return {}

    def close(self) -> None:
        self._queue.clear()

    def _running(self) -> list[_InFlight]:
        """What is not behind anything: lanes run in launch order, and no two pieces of work hold the same SMs."""
        queue = self._queue
        return [e for i, e in enumerate(queue) if not any(self._must_follow(e, earlier) for earlier in queue[:i])]

    def _must_follow(self, entry: _InFlight, earlier: _InFlight) -> bool:
        lanes, other_lanes = entry.ticket.work.lanes, earlier.ticket.work.lanes
        if set(lanes) & set(other_lanes):
            return True
        num_sms = entry.ticket.partition.sms_of(lanes[0]) + earlier.ticket.partition.sms_of(other_lanes[0])
        return num_sms > self._cost.profile.num_sms

    def _slowdown(self, entry: _InFlight, running: list[_InFlight]) -> float:
        """Of a step by what runs beside it (a fused step is both lanes' alone) and by a clock that has not settled."""
        works = {part.lanes[0]: part for e in running for part in e.ticket.work.parts}
        prefill = PrefillLoad.of(works[Lane.PREFILL].slices) if Lane.PREFILL in works else PrefillLoad()
        decode = DecodeLoad.of(works[Lane.DECODE]) if Lane.DECODE in works else DecodeLoad()
        work, is_fused = entry.ticket.work, isinstance(entry.ticket.work, FusedWork)
        cell = Cell.of(prefill, decode, entry.ticket.partition.decode_sms, is_fused)
        slowdown = self._guard.factor(work.lanes[-1], cell).mean
        if work.lanes[0] is Lane.PREFILL:
            settled = self._settled_clock(running)
            mean_gap = (self._clock - settled) * -math.expm1(-entry.remaining_s / CLOCK_S) * CLOCK_S / entry.remaining_s
            slowdown *= 1 - CLOCK_SHARE + CLOCK_SHARE * settled / (settled + mean_gap)
        return slowdown

    def _settled_clock(self, running: list[_InFlight]) -> float:
        parts = (part for entry in running for part in entry.ticket.work.parts if part.lanes[0] is Lane.PREFILL)
        return self._cost.profile.settled_clock.at(max(1, sum(part.num_tokens for part in parts)))

    def _move_clock(self, settled: float) -> None:
        """Since it was last looked at, towards where it settles."""
        self._clock += (settled - self._clock) * -math.expm1((self._clock_at_s - self.clock.now()) / CLOCK_S)
        self._clock_at_s = self.clock.now()
