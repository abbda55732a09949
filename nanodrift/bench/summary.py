"""One run's figures in the keys of vLLM's result files; metrics.py says what each of them means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from nanodrift.metrics import RequestTimes, attainment, percentile, percentile_of_sorted


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
        "median": percentile_of_sorted(ordered, 50) * 1e3,
        "std": math.sqrt(fmean([(value - mean) ** 2 for value in ordered])) * 1e3,
        "p99": percentile_of_sorted(ordered, 99) * 1e3,
    }
