"""The queue: whose turn it is among the requests that hold nothing yet. Knows times, not devices; reads no clock.

First those that were preempted, for their tokens are awaited. Then by priority (lower first), and among equals by
slack: who must begin soonest to keep its TTFT. Who cannot keep it any more stands behind those who can, so a promise
that is lost costs nobody else's. Yet nobody starves: every few admissions it is the turn of the one that has waited
longest, once that is well beyond its TTFT.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Iterator

from nanodrift.request import Request

AGEING = 4  # every so many admissions go to the request that has waited longest, if that is more than ...
PATIENCE = 2.0  # ... so many times its TTFT
MAX_OVERTAKEN = 3  # times a prompt whose TTFT is lost lets others go first, for each chunk that it gets


class Waiting:
    """Requests in order of ``Request.turn``."""

    def __init__(self):
        self._requests: list[Request] = []
        self._num_taken = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request, prefill_s: float) -> None:
        """``prefill_s``: what its prefill is predicted to take."""
        request.start_by_s = request.due_s - prefill_s
        request.turn = (request.priority, request.start_by_s)
        if request.num_preemptions:
            request.start_by_s, request.turn = math.inf, (-math.inf, request.number)
        insort(self._requests, request, key=lambda one: one.turn)

    def take(self, request: Request) -> None:
        """It is admitted."""
        self._num_taken += 1
        self.remove(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def in_turn(self, now_s: float) -> Iterator[Request]:
        """All of them; one may be taken out meanwhile."""
        waiting, aged = list(self._requests), None
        if self._num_taken % AGEING == AGEING - 1:
            old = [r for r in waiting if now_s - r.arrival_s > PATIENCE * (r.due_s - r.arrival_s)]
            if old:
                yield (aged := min(old, key=lambda request: request.arrival_s))
        for _, equals in itertools.groupby(waiting, key=lambda request: request.turn[0]):
            late = []
            for request in equals:
                if request.start_by_s < now_s:
                    late.append(request)
                elif request is not aged:
                    yield request
            yield from (request for request in late if request is not aged)


def overtake(
    request: Request, num_tokens: int, victims: list[Request], num_ahead: float, token_s: float, now_s: float
) -> bool:
    """Lets a request go before the prompts under way, if behind ``num_ahead`` tokens of theirs it would lose its TTFT.

    Each of them must be able to wait for its ``num_tokens``, at ``token_s`` a token: once if that does not cost its own
    TTFT, or a few times a chunk if that is lost already. Who has overtaken is not overtaken.
    """
    if not 0 <= request.start_by_s - now_s < num_ahead * token_s:
        return False
    for victim in victims:
        spare_s = victim.due_s - now_s - (victim.num_tokens - victim.num_written_tokens) * token_s
        is_once = victim.num_overtaken == 0 and num_tokens * token_s <= spare_s
        is_lost = spare_s < 0 and victim.num_overtaken < MAX_OVERTAKEN * victim.num_slices
        if victim.has_overtaken or victim.output_token_ids or not (is_once or is_lost):
            return False
    for victim in victims:
        victim.num_overtaken += 1
    request.has_overtaken = True
    return True
