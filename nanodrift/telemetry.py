"""What a run did, from its launches and completions alone: reads no clock, knows no tensors, no text, no HTTP.

The engine feeds it and hands its ``stats()`` out with its own; /metrics, the page, the dashboard and the tables of
bench.py read these names, and this is where they are explained:

=================================  =================================================================================
mode                               of the newest launch: split, fused or exclusive; "" before the first
prefill_sms, decode_sms            SMs of each lane in the newest launch; both have them all when they take turns
num_sms                            SMs of the device: 1 on a CPU
has_partitions                     whether the device can be divided at all
decode_batch, chunk_tokens         rows of the newest decode step, prompt tokens of the newest token chunk
tbt_predicted_seconds              the guard's promise for the gap between tokens in force; 0 where nothing is predicted
repartitions_total                 changes of mode or partition between one launch and the next
unmeetable_steps_total             decode steps launched although no mode could keep the TBT
prefill_busy_seconds_total         time the lane had work on its SMs; the same for decode_
prefill_bubble_seconds_total       time the lane had work it could run, the SMs to run it on, and ran nothing;
                                   its share of busy + bubble is the bubble ratio; the same for decode_
merges_total                       requests that went from the prefill lane to the decode batch
merge_gap_seconds_total, _max      their first gap: from the first token to the second
residency                          [mode, prefill SMs, decode SMs, seconds the device worked so], longest first
sm_mhz, watts, joules_total        clock and board power just now, energy since the start; missing where unknown
predictions                        by kind of step, from cost.Observer: num_steps, error_p50, error_p95, violations,
                                   guarded_over_actual; not in every answer, for it takes milliseconds
=================================  =================================================================================

A lane *had work it could run* if its next piece goes on with a chunk, a prompt or a request of its last one, or a
prompt that had arrived by then. It had no SMs while the other lane had the whole chip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nanodrift.decision import Decision, Mode
from nanodrift.plan import Completion, DecodeWork, FusedWork, Lane, Partition, PrefillWork, Ticket, Work
from nanodrift.request import Request

OTHER = {Lane.PREFILL: Lane.DECODE, Lane.DECODE: Lane.PREFILL}


def mode_of(work: Work, partition: Partition) -> Mode:
    """How the device was shared while this ran."""
    return Mode.FUSED if isinstance(work, FusedWork) else Mode.EXCLUSIVE if partition.is_shared else Mode.SPLIT


@dataclass
class _Side:
    """One lane's books."""

    busy_s: float = 0.0
    bubble_s: float = 0.0
    whole_chip_s: float = 0.0  # of busy_s: with all SMs to itself
    end_s: float = -math.inf  # of its last piece of work ...
    request_ids: frozenset[str] = frozenset()  # ... which was for these
    other_whole_chip_s: float = 0.0  # the other lane's at that time


class Telemetry:
    """Books of one engine. ``requests`` is the scheduler's table: it says when a prompt had arrived."""

    def __init__(self, requests: Mapping[str, Request], partitions: tuple[Partition, ...]):
        self.listeners: list[Callable[[Completion, float], None]] = []  # learn what is done, and when it began
        self._requests, self._partitions = requests, partitions
        self._sides = {lane: _Side() for lane in Lane}
        self._shape: tuple[Mode, Partition] | None = None  # of the newest launch
        self._figures = {"decode_batch": 0, "chunk_tokens": 0, "tbt_predicted_seconds": 0.0}
        self._figures |= {"repartitions_total": 0, "unmeetable_steps_total": 0, "merges_total": 0}
        self._figures |= {"merge_gap_seconds_total": 0.0, "merge_gap_seconds_max": 0.0}
        self._residency: dict[tuple[Mode, Partition], float] = {}
        self._seen_s, self._hole = -math.inf, (0.0, 0.0)  # booked up to here, except for the newest idle stretch
        self._first_token_s: dict[str, float] = {}  # of requests whose second token has not come yet

    def on_launch(self, ticket: Ticket, decision: Decision) -> None:
        work, shape = ticket.work, (mode_of(ticket.work, ticket.partition), ticket.partition)
        if shape != self._shape:
            self._figures["repartitions_total"] += self._shape is not None
            self._shape = shape
        for part in work.parts:
            if isinstance(part, DecodeWork):
                self._figures |= {"decode_batch": len(part.rows), "tbt_predicted_seconds": decision.step_s}
                self._figures["unmeetable_steps_total"] += decision.is_unmeetable
            else:
                self._figures["chunk_tokens"] = part.num_tokens

    def on_complete(self, completion: Completion) -> None:
        """Completions come in about the order of their ends, which are when the host saw them: a little late."""
        ticket, end_s = completion.ticket, completion.finished_s
        lanes = tuple(Lane) if ticket.partition.is_shared else ticket.work.lanes  # which it cannot have run beside
        earliest_s = max(ticket.launched_s, *(self._sides[lane].end_s for lane in lanes))
        busy_s = completion.busy_s or max(0.0, end_s - earliest_s)
        shape = (mode_of(ticket.work, ticket.partition), ticket.partition)
        for part in ticket.work.parts:
            self._book(part, shape[0], busy_s, end_s)
        for lane in ticket.work.lanes:
            self._sides[lane].other_whole_chip_s = self._sides[OTHER[lane]].whole_chip_s
        unseen_s = self._unseen_s(end_s - busy_s, end_s)
        seconds = unseen_s if shape[0] is Mode.SPLIT else busy_s  # the other modes run one thing at a time
        self._residency[shape] = self._residency.get(shape, 0.0) + seconds
        self._note_merges(completion)
        for listener in self.listeners:
            listener(completion, min(end_s, max(earliest_s, end_s - busy_s)))

    def stats(self) -> dict:
        mode, partition = self._shape or (None, self._partitions[0])
        residency = sorted(self._residency.items(), key=lambda item: -item[1])
        lanes = {
            f"{lane.value}_{name}_seconds_total": seconds
            for lane, side in self._sides.items()
            for name, seconds in (("busy", side.busy_s), ("bubble", side.bubble_s))
        }
        return {
            "mode": mode.value if mode else "",
            "prefill_sms": partition.prefill_sms,
            "decode_sms": partition.decode_sms,
            "num_sms": self._partitions[0].decode_sms,
            "has_partitions": len(self._partitions) > 1,
            "residency": [[m.value, p.prefill_sms, p.decode_sms, seconds] for (m, p), seconds in residency],
            **self._figures,
            **lanes,
        }

    def _book(self, part: PrefillWork | DecodeWork, mode: Mode, busy_s: float, end_s: float) -> None:
        side, other = self._sides[part.lanes[0]], self._sides[OTHER[part.lanes[0]]]
        request_ids, has_waited = frozenset(part.request_ids), False
        if isinstance(part, PrefillWork):
            has_waited = any(i in self._requests and self._requests[i].arrival_s <= side.end_s for i in request_ids)
        if has_waited or not request_ids.isdisjoint(side.request_ids):
            side.bubble_s += max(0.0, end_s - busy_s - side.end_s - (other.whole_chip_s - side.other_whole_chip_s))
        side.busy_s += busy_s
        side.whole_chip_s += busy_s if mode is Mode.EXCLUSIVE else 0.0
        side.end_s, side.request_ids = end_s, request_ids

    def _unseen_s(self, start_s: float, end_s: float) -> float:
        """Seconds of this span that no earlier one covers: behind all of them, or in the newest idle stretch."""
        low, high = self._hole
        late_s = max(0.0, min(high, end_s) - max(low, start_s))
        if start_s > self._seen_s:
            self._hole = (self._seen_s, start_s)
        elif late_s:
            self._hole = (low, max(low, start_s))
        new_s = max(0.0, end_s - max(start_s, self._seen_s))
        self._seen_s = max(self._seen_s, end_s)
        return late_s + new_s

    def _note_merges(self, completion: Completion) -> None:
        first = [i for part in completion.ticket.work.parts if isinstance(part, PrefillWork) for i in part.sampled_ids]
        for request_id, _ in completion.tokens:
            if (first_s := self._first_token_s.pop(request_id, None)) is not None:
                gap_s = completion.finished_s - first_s
                self._figures["merges_total"] += 1
                self._figures["merge_gap_seconds_total"] += gap_s
                self._figures["merge_gap_seconds_max"] = max(self._figures["merge_gap_seconds_max"], gap_s)
        if first:  # and who has ended in between is forgotten
            waiting = {i: s for i, s in self._first_token_s.items() if i in self._requests}
            self._first_token_s = waiting | dict.fromkeys(first, completion.finished_s)
