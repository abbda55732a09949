"""What TTFT, TBT, TPOT, attainment and goodput mean here: the one place where they are defined.

Works on timestamps that others took; reads no clock and knows nothing about devices or policy.

======================  ====================================================================================
TTFT                    first token seen minus arrival: the wait in the queue counts
TBT                     every gap between consecutive tokens of one request (others write ITL)
TPOT                    (last token - first token) / (tokens - 1), one number a request: a mean, it hides stalls
end to end              last token seen minus arrival
percentile              nearest rank: always one of the values, never between two
good request            it completed, TTFT <= its SLO, and the P99 of its own gaps <= its TBT SLO
strictly good request   the same with every gap in place of their P99
attainment              good requests / all requests issued: refused, failed and timed-out ones count against it
goodput                 the highest measured rate whose attainment reaches the target
======================  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from nanodrift.config import SLO
from nanodrift.request import Request


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values do not exceed (nearest rank).

    The rank is computed exactly, so that P99 of 100 values is the 99th. Raises ValueError for no values or a percent
    outside (0, 100].
    """
    return percentile_of_sorted(sorted(values), percent)


def percentile_of_sorted(ordered: Sequence[float], percent: float) -> float:
    """The same of values that are in order already."""
    if not ordered:
        raise ValueError("a percentile of no values")
    if not 0 < percent <= 100:
        raise ValueError(f"percent must lie in (0, 100], got {percent}")
    return ordered[math.ceil(Fraction(str(percent)) * len(ordered) / 100) - 1]


@dataclass(frozen=True)
class RequestTimes:
    """One issued request as whoever timed it saw it. Seconds, all on one clock."""

    arrival_s: float  # when it was due, not when a late sender got to it
    token_s: Sequence[float] = ()  # when each output token was seen, in order
    slo: SLO = field(default_factory=SLO)
    is_completed: bool = True  # False: refused, failed, aborted or timed out
    num_prompt_tokens: int = 0

    @classmethod
    def of(cls, request: Request) -> RequestTimes:
        return cls(
            arrival_s=request.arrival_s,
            token_s=tuple(request.token_s),
            slo=request.slo,
            is_completed=request.is_finished and request.finish_reason in ("stop", "length"),
            num_prompt_tokens=len(request.prompt_token_ids),
        )

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.arrival_s if self.token_s else None

    @cached_property
    def tbt_s(self) -> list[float]:
        """Every gap between consecutive tokens; empty for fewer than two tokens."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    @property
    def end_to_end_s(self) -> float | None:
        return self.token_s[-1] - self.arrival_s if self.token_s else None

    @property
    def meets_ttft(self) -> bool:
        return self.is_completed and self.ttft_s is not None and self.ttft_s * 1e3 <= self.slo.ttft_ms

    def meets_tbt(self, strict: bool = False) -> bool:
        """True if the P99 of the gaps (``strict``: every gap) keeps the SLO; a request without a gap keeps it."""
        if not self.is_completed:
            return False
        return not self.tbt_s or percentile(self.tbt_s, 100 if strict else 99) * 1e3 <= self.slo.tbt_ms

    def is_good(self, strict: bool = False) -> bool:
        return self.meets_ttft and self.meets_tbt(strict)


def attainment(requests: Sequence[RequestTimes], strict: bool = False) -> float:
    """Share of all issued requests that were good; 0 when none was issued."""
    return sum(r.is_good(strict) for r in requests) / len(requests) if requests else 0.0


def goodput(rate_attainment: Iterable[tuple[float, float]], target: float = 0.99) -> float:
    """Highest rate (requests/s) among the measured (rate, attainment) pairs that reaches ``target``; 0 if none does."""
    return max((rate for rate, share in rate_attainment if share >= target), default=0.0)
