"""The queue: whose turn it is among the requests that hold nothing yet. Knows times, not devices; reads no clock.

First those that were preempted, for their tokens are awaited. Then by priority (lower first), and among equals the
shortest first, as long as everybody keeps the TTFT that way. Who cannot keep it any more stands behind those who can,
so a promise that is lost costs nobody else's. Yet nobody starves: every few admissions it is the turn of the one that
has waited longest, once that is well beyond its TTFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heappop, heappush

from nanodrift.request import Request

AGEING = 4  # every so many admissions go to the request that has waited longest, if that is more than ...
PATIENCE = 2.0  # ... so many times its TTFT
SOON = 0.5  # of its TTFT: by then a prompt ends that lets later and shorter ones go first, ...
MARGIN = 1.5  # ... its time and theirs being so many times what is predicted
PLAN_S = 0.1  # how long an order holds while nobody comes
MAX_OVERTAKEN = 3  # times a prompt lets others go first, for each chunk that it gets


class Waiting:
    """Requests that hold nothing yet. Their times are their tokens at the pace of late, with a margin."""

    def __init__(self):
        self._requests: list[Request] = []  # in order of turns, as last planned
        self._plan_s = -math.inf  # when to plan again
        self._num_taken = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        self._requests.append(request)
        self._plan_s = -math.inf

    def take(self, request: Request) -> None:
        """It is admitted."""
        self._num_taken += 1
        self.remove(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def in_turn(self, now_s: float, token_s: float) -> Iterator[Request]:
        """All of them; one may be taken out meanwhile. ``token_s``: prefill seconds per prompt token, 0 if unknown."""
        if now_s >= self._plan_s:
            self._requests = plan(self._requests, now_s, token_s)
            self._plan_s = now_s + PLAN_S
        waiting, aged = list(self._requests), None
        if self._num_taken % AGEING == AGEING - 1:
            old = [r for r in waiting if now_s - r.arrival_s > PATIENCE * (r.due_s - r.arrival_s)]
            if old:
                yield (aged := min(old, key=lambda request: request.arrival_s))
        yield from (request for request in waiting if request is not aged)


def plan(requests: list[Request], now_s: float, token_s: float) -> list[Request]:
    """Their order: the preempted, then by priority; among equals first those who can keep their TTFT, the others after.

    Who can: as many as possible (Moore and Hodgson: by due time, without the longest so far where one would be late).
    Among these the sum of their times is least if, from the end on, the longest goes last of all who may end so late
    (Smith); where nobody may, who is due last. Of equal length, who is due first goes first.
    """
    order: list[Request] = []
    turns: dict[tuple, list[Request]] = {}
    for request in requests:
        turns.setdefault((request.num_preemptions == 0, request.priority), []).append(request)
    for _, equals in sorted(turns.items()):
        equals.sort(key=lambda request: (request.due_s, request.number))
        kept, lost, end_s = [], [], now_s  # kept, may_end: (-seconds, -index), so the longest first, then the last due
        for index, request in enumerate(equals):
            seconds = request.num_new_tokens * token_s
            if request.due_s - now_s < seconds:
                lost.append(index)
                continue
            heappush(kept, (-MARGIN * seconds, -index))
            end_s += MARGIN * seconds
            if end_s > request.due_s + (MARGIN - 1) * seconds:  # alone, it needs no margin
                seconds, dropped = heappop(kept)
                end_s += seconds
                lost.append(-dropped)
        kept.sort(key=lambda one: -one[1])  # by due time
        last, may_end = [], []  # from the end on; who may end so late
        while kept or may_end:
            while kept and soon_s(equals[-kept[-1][1]]) >= end_s:
                heappush(may_end, kept.pop())
            seconds, index = heappop(may_end) if may_end else kept.pop()
            end_s += seconds
            last.append(-index)
        order += [equals[index] for index in (*reversed(last), *sorted(lost))]
    return order


def soon_s(request: Request) -> float:
    """When a prompt that others pass is to end."""
    return request.arrival_s + SOON * (request.due_s - request.arrival_s)


def may_overtake(
    request: Request, victims: list[Request], num_ahead: float, token_s: float, now_s: float, is_chunk_open: bool
) -> bool:
    """Whether a request goes before the prompts under way, of which ``num_ahead`` tokens would be computed before it.

    It may between two chunks if it is shorter and they end soon even so, a few times a chunk. It may at any layer if it
    would lose its TTFT behind them, and each can wait: once if that does not cost its own TTFT, or a few times a chunk
    if that is lost already. Who has overtaken is not overtaken.
    """
    own_s = request.num_new_tokens * token_s
    is_short = not is_chunk_open and request.num_new_tokens < num_ahead
    is_urgent = 0 <= request.due_s - now_s - own_s < num_ahead * token_s
    for victim in victims:
        left_s = (victim.num_tokens - victim.num_written_tokens) * token_s
        spare_s = victim.due_s - now_s - left_s
        is_seldom = victim.num_overtaken < MAX_OVERTAKEN * victim.num_slices
        may_wait = is_short and is_seldom and now_s + MARGIN * (own_s + left_s) <= soon_s(victim)
        must_wait = is_urgent and ((victim.num_overtaken == 0 and own_s <= spare_s) or (is_seldom and spare_s < 0))
        if victim.has_overtaken or victim.output_token_ids or not (may_wait or must_wait):
            return False
    return True
