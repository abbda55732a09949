"""When requests are sent: seconds from the start of a run, in order. Pure and seeded; reads no clock.

A rate of infinity sends everything at once. ``burstiness`` is vLLM's: the shape of the gamma distribution of the gaps,
1 = Poisson, below it bursts, infinity = a steady beat (the gaps' coefficient of variation is 1 / sqrt of it). Gaps are
rescaled so that n requests take n / rate seconds exactly: two seeds then offer the same load.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from nanodrift.bench.workloads import Workload


@dataclass(frozen=True)
class Ramp:
    """A rate that grows from ``start`` to ``end`` requests/s over the run: by steps, or by factors."""

    strategy: str  # linear | exponential
    start: float
    end: float

    def __post_init__(self):
        if self.strategy not in ("linear", "exponential"):
            raise ValueError(f"a ramp is linear or exponential, not {self.strategy!r}")
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ValueError(f"a ramp needs two positive rates, got {self.start} and {self.end}")

    def rate(self, progress: float) -> float:
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


def drawn(count: int, rate: float | Ramp, seed: int, burstiness: float = 1.0) -> list[float]:
    """``count`` arrival times. Raises ValueError for a rate or burstiness that is not positive."""
    if not burstiness > 0:
        raise ValueError(f"burstiness must be positive, got {burstiness}")
    if rate == math.inf or not count:
        return [0.0] * count
    if not isinstance(rate, Ramp) and not rate > 0:
        raise ValueError(f"the request rate must be positive, got {rate}")
    rates = [rate.rate(i / max(1, count - 1)) if isinstance(rate, Ramp) else rate for i in range(count)]
    draw = random.Random(f"{seed}/arrivals")
    units = [draw.gammavariate(burstiness, 1 / burstiness) if burstiness < math.inf else 1.0 for _ in rates]
    gaps = [unit / r for unit, r in zip(units, rates, strict=True)]
    factor = sum(1 / r for r in rates) / sum(gaps)
    return [gap * factor for gap in itertools.accumulate(gaps)]


def of_trace(workload: Workload, rate: float | None = None) -> list[float]:
    """The workload's own arrivals from its first one on; with ``rate``, stretched so that this is their mean rate."""
    if not workload.has_arrivals:
        raise ValueError(f"{workload.name} has no arrival times: give a request rate")
    start_s, end_s = workload.samples[0].arrival_s, workload.samples[-1].arrival_s
    factor = 1.0
    if rate is not None and end_s > start_s:
        factor = 0.0 if rate == math.inf else len(workload.samples) / rate / (end_s - start_s)
    return [(sample.arrival_s - start_s) * factor for sample in workload.samples]
