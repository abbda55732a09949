"""Finds the highest request rate at which 90% and 99% of all issued requests are good, and knows a queue without end.

Works on any ``measure(rate, seed) -> records``: an engine, a server, a model of a queue. Reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from nanodrift.metrics import RequestTimes, attainment, goodput, percentile

TARGETS = (0.9, 0.99)
LOWEST = 1e-3  # of the first rate: where a search downwards ends with a goodput of 0
NUM_BATCHES, FEWEST = 10, 50
T_99 = 2.9  # one-sided 99% point of Student's t at NUM_BATCHES - 2 degrees of freedom

Measure = Callable[[float, int], Sequence[RequestTimes]]


def is_saturated(records: Sequence[RequestTimes]) -> bool:
    """True if both the requests under way and TTFT rose significantly from the first arrival to the last.

    Means over ten stretches of arrivals, so that one burst is one point; the time in which the machine fills up, a
    median request long, is left out. False for too few requests to tell.
    """
    records = sorted((r for r in records if r.token_s), key=lambda r: r.arrival_s)
    if records:
        filled_s = records[0].arrival_s + percentile([r.end_to_end_s for r in records], 50)
        records = [r for r in records if r.arrival_s >= filled_s]
    if len(records) < FEWEST or records[0].arrival_s == records[-1].arrival_s:
        return False
    changes = sorted([(r.arrival_s, 1) for r in records] + [(r.token_s[-1], -1) for r in records])
    under_way, now = [], 0
    for _, change in changes:
        now += change
        if change > 0:
            under_way.append(now)
    return _rises(under_way) and _rises([r.ttft_s for r in records])


def _rises(values: Sequence[float]) -> bool:
    """A straight line through the batch means climbs: significantly, and by more than half their mean."""
    size = len(values) / NUM_BATCHES
    means = [fmean(values[round(i * size) : round((i + 1) * size)]) for i in range(NUM_BATCHES)]
    middle, mean = (NUM_BATCHES - 1) / 2, fmean(means)
    spread = sum((i - middle) ** 2 for i in range(NUM_BATCHES))
    slope = sum((i - middle) * value for i, value in enumerate(means)) / spread
    if slope * (NUM_BATCHES - 1) <= 0.5 * mean:
        return False
    rest = sum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(means))
    error = math.sqrt(rest / (NUM_BATCHES - 2) / spread)
    return slope > T_99 * error


def point(rate: float, runs: Sequence[Sequence[RequestTimes]]) -> dict:
    """One rate's figures over the runs of all seeds: pooled, and the spread between seeds."""
    pooled = [record for run in runs for record in run]
    shares = [attainment(run) for run in runs]
    ttfts = [r.ttft_s for r in pooled if r.is_completed and r.token_s]
    gaps = [gap for r in pooled if r.is_completed for gap in r.tbt_s]
    count = max(1, len(pooled))
    return {
        "request_rate": rate,
        "seeds": len(runs),
        "issued": len(pooled),
        "slo_attainment": attainment(pooled),
        "slo_attainment_min": min(shares),
        "slo_attainment_max": max(shares),
        "slo_attainment_strict": attainment(pooled, strict=True),
        "slo_attainment_ttft": sum(r.meets_ttft for r in pooled) / count,
        "slo_attainment_tbt": sum(r.meets_tbt() for r in pooled) / count,
        "p99_ttft_ms": percentile(ttfts, 99) * 1e3 if ttfts else None,
        "p99_tbt_ms": percentile(gaps, 99) * 1e3 if gaps else None,
        "saturated": sum(is_saturated(run) for run in runs) * 2 > len(runs),
    }


def search(
    measure: Measure,
    start_rate: float,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    targets: Sequence[float] = TARGETS,
    tolerance: float = 0.05,
    max_points: int = 24,
    on_point: Callable[[dict], None] = lambda point: None,
) -> dict:
    """Brackets each target's rate by doubling or halving, then narrows it down to ``tolerance``.

    Returns ``points`` (sorted by rate), ``max_rate_at_N`` = the highest measured rate that reached N% with none below
    it that failed, ``first_miss_at_N`` = the next measured rate above it, and ``is_complete`` = no bracket stayed wide
    because ``max_points`` was reached. A rate is measured once, for all seeds.
    """
    if not start_rate > 0 or start_rate == math.inf:
        raise ValueError(f"the search needs a positive rate to start from, got {start_rate}")
    points: dict[float, dict] = {}

    def share(rate: float) -> float:
        if rate not in points:
            points[rate] = point(rate, [measure(rate, seed) for seed in seeds])
            on_point(points[rate])
        return points[rate]["slo_attainment"]

    def bracket(target: float) -> tuple[float, float]:
        """(highest rate below the first miss, first miss), as far as measured."""
        rates = sorted(points)
        miss = next((rate for rate in rates if share(rate) < target), math.inf)
        return max((rate for rate in rates if rate < miss), default=0.0), miss

    share(start_rate)
    is_complete = True
    for target in sorted(targets):
        while len(points) < max_points:
            low, high = bracket(target)
            if high == math.inf:
                share(low * 2)
            elif low == 0.0:
                if high < start_rate * LOWEST:
                    break
                share(high / 2)
            elif high / low > 1 + tolerance:
                share(math.sqrt(low * high))
            else:
                break
        low, high = bracket(target)
        is_narrow = high / low <= 1 + tolerance if low else high < start_rate * LOWEST
        is_complete = is_complete and is_narrow
    result = {"points": [points[rate] for rate in sorted(points)], "is_complete": is_complete}
    for target in targets:
        low, high = bracket(target)
        passed = [(rate, points[rate]["slo_attainment"]) for rate in points if rate <= low]
        result[f"max_rate_at_{target * 100:g}"] = goodput(passed, target)
        result[f"first_miss_at_{target * 100:g}"] = high if high < math.inf else None
    return result
