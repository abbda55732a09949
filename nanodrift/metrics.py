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
from statistics import fmean

from nanodrift.config import SLO
from nanodrift.request import Request


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of the values do not exceed (nearest rank).

    The rank is computed exactly, so that P99 of 100 values is the 99th. Raises ValueError for no values or a percent
    outside (0, 100].
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a percentile of no values")
    if not 0 < percent <= 100:
        raise ValueError(f"percent must lie in (0, 100], got {percent}")
    rank = math.ceil(Fraction(str(percent)) * len(ordered) / 100)
    return ordered[rank - 1]


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

    @property
    def tbt_s(self) -> list[float]:
        """Every gap between consecutive tokens; empty for fewer than two tokens."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

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
        gaps = self.tbt_s
        return not gaps or percentile(gaps, 100 if strict else 99) * 1e3 <= self.slo.tbt_ms

    def is_good(self, strict: bool = False) -> bool:
        return self.meets_ttft and self.meets_tbt(strict)


def attainment(requests: Sequence[RequestTimes], strict: bool = False) -> float:
    """Share of all issued requests that were good; 0 when none was issued."""
    return sum(r.is_good(strict) for r in requests) / len(requests) if requests else 0.0


def goodput(rate_attainment: Iterable[tuple[float, float]], target: float = 0.99) -> float:
    """Highest rate (requests/s) among the measured (rate, attainment) pairs that reaches ``target``; 0 if none does."""
    return max((rate for rate, share in rate_attainment if share >= target), default=0.0)


def summarize(requests: Sequence[RequestTimes], duration_s: float) -> dict:
    """One run's figures as a flat dict that goes into JSON.

    The keys are those of vLLM's result files (their ``itl`` is TBT: every gap, pooled) plus the SLO's. Latencies in
    milliseconds over the requests that have the quantity; None where no request has it.
    """
    if duration_s <= 0:
        raise ValueError(f"duration_s must be positive, got {duration_s}")
    completed = [r for r in requests if r.is_completed]
    num_input_tokens = sum(r.num_prompt_tokens for r in completed)
    num_output_tokens = sum(len(r.token_s) for r in completed)
    gaps = [gap for r in completed for gap in r.tbt_s]
    worst_gaps = [max(r.tbt_s) for r in completed if len(r.token_s) > 1]
    series = {
        "ttft": [r.ttft_s for r in completed if r.token_s],
        "tpot": [r.tpot_s for r in completed if len(r.token_s) > 1],
        "itl": gaps,
        "e2el": [r.end_to_end_s for r in completed if r.token_s],
    }
    result = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(requests) - len(completed),
        "total_input_tokens": num_input_tokens,
        "total_output_tokens": num_output_tokens,
        "request_throughput": len(completed) / duration_s,
        "request_goodput": sum(r.is_good() for r in requests) / duration_s,
        "output_throughput": num_output_tokens / duration_s,
        "total_token_throughput": (num_input_tokens + num_output_tokens) / duration_s,
    }
    for name, seconds in series.items():
        result |= {f"{statistic}_{name}_ms": value for statistic, value in _statistics_ms(seconds).items()}
    within = sum(gap * 1e3 <= r.slo.tbt_ms for r in completed for gap in r.tbt_s)
    return result | {
        "p99_tbt_ms": result["p99_itl_ms"],
        "p99_max_tbt_ms": percentile(worst_gaps, 99) * 1e3 if worst_gaps else None,
        "tokens_within_tbt_frac": within / len(gaps) if gaps else None,
        "slo_attainment": attainment(requests),
        "slo_attainment_strict": attainment(requests, strict=True),
        "slo_attainment_ttft": sum(r.meets_ttft for r in requests) / len(requests) if requests else 0.0,
        "slo_attainment_tbt": sum(r.meets_tbt() for r in requests) / len(requests) if requests else 0.0,
    }


def _statistics_ms(seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return dict.fromkeys(("mean", "median", "std", "p99"))
    ordered, mean = sorted(seconds), fmean(seconds)
    return {
        "mean": mean * 1e3,
        "median": percentile(ordered, 50) * 1e3,
        "std": math.sqrt(fmean([(value - mean) ** 2 for value in ordered])) * 1e3,
        "p99": percentile(ordered, 99) * 1e3,
    }
