"""From the records of a run to what people read: one flat dict (JSON), vLLM's result frame, a line of CSV.

The keys are vLLM's where it has one, so that its readers find their way; metrics.py says what each figure means. What
makes a figure doubtful (too few requests, a late sender, a queue without end) is said beside it, in ``warnings``.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from nanodrift.bench.goodput import is_saturated
from nanodrift.bench.load import INTERRUPTED, Record, duration_s
from nanodrift.bench.summary import summarize
from nanodrift.bench.workloads import Workload
from nanodrift.config import SLO
from nanodrift.metrics import RequestTimes, attainment, percentile, percentile_of_sorted

CDF_PERCENTS = (*range(1, 100), 99.5, 99.9, 100)
FEW_REQUESTS = 500  # below it, a P99 over requests is one of the four or five slowest
MAX_LAG_SHARE = 0.1  # of the TTFT SLO: a sender that is later than this measured itself


def result_of(records: Sequence[Record], slo: SLO, workload: Workload, is_detailed: bool = False) -> dict:
    """The figures of one run of the workload. Requests cut off by an interrupt do not count."""
    counted = [record for record in records if record.error != INTERRUPTED]
    seconds = duration_s(counted)
    own = [record for record in counted if not record.is_background]  # a held batch has no TTFT that anybody waits for
    by_request = [r.tbt_s for r in counted if r.is_completed]
    gaps = sorted(gap for request_gaps in by_request for gap in request_gaps)
    first_gaps = sorted(request_gaps[0] for request_gaps in by_request if request_gaps)
    ttfts = sorted(r.ttft_s for r in own if r.is_completed and r.token_s)
    lag_ms = percentile([r.send_lag_s for r in counted], 99) * 1e3 if counted else 0.0
    result = {
        "num_prompts": len(workload.samples),
        **summarize(counted, seconds),
        "slo": {"ttft_ms": slo.ttft_ms, "tbt_ms": slo.tbt_ms},
        "median_ttft_ms": _ms(ttfts, 50),
        "p90_ttft_ms": _ms(ttfts, 90),
        "p99_ttft_ms": _ms(ttfts, 99),
        "max_ttft_ms": _ms(ttfts, 100),
        "p90_tbt_ms": _ms(gaps, 90),
        "p999_tbt_ms": _ms(gaps, 99.9),
        "max_tbt_ms": _ms(gaps, 100),
        "median_first_gap_ms": _ms(first_gaps, 50),  # from the first token to the second: across the merge
        "p99_first_gap_ms": _ms(first_gaps, 99),
        "max_first_gap_ms": _ms(first_gaps, 100),
        "issued": len(counted),
        "unfinished": len(records) - len(counted),
        "shed": sum(r.is_refused for r in counted),
        "timeouts": sum((r.error or "").startswith("timed out") for r in counted),
        "offered_rate": len(own) / own[-1].arrival_s if own and own[-1].arrival_s > 0 else None,
        "max_concurrent_requests": _most_at_once(counted),
        "max_output_tokens_per_s": max(Counter(int(s) for r in counted for s in r.token_s).values(), default=0),
        "send_lag_p99_ms": lag_ms,
        "asked_input_tokens": sum(sample.num_prompt_tokens for sample in workload.samples),
        "asked_output_tokens": sum(sample.num_output_tokens for sample in workload.samples),
        "shared_input_tokens": workload.num_shared_tokens,
        "cached_tokens": _sum(r.num_cached_tokens for r in counted),
        "preemptions": _sum(r.num_preemptions for r in counted),
        "tokens_counted_by": sorted({r.counted_by for r in counted}),
        "saturated": is_saturated(own),
        "interrupted": len(counted) < len(workload.samples),
        "error_counts": dict(Counter(r.error for r in counted if r.error).most_common(5)),
        "cdf": {
            "percent": CDF_PERCENTS,
            "ttft_ms": [_ms(ttfts, p) for p in CDF_PERCENTS],
            "tbt_ms": [_ms(gaps, p) for p in CDF_PERCENTS],
        },
    }
    if workload.background is not None:
        result |= {
            "background_requests": len(counted) - len(own),
            "slo_attainment_own": attainment(own),  # without the batch that was held beside
            "interrupted": len(own) < len(workload.samples),
            "mean_ttft_ms": fmean(ttfts) * 1e3 if ttfts else None,
        }
    late = lag_ms > MAX_LAG_SHARE * slo.ttft_ms
    result["void"] = f"the client sent late: P99 {lag_ms:.0f} ms, over a tenth of the TTFT SLO" if late else None
    result["warnings"] = _warnings(result)
    if is_detailed:
        result |= _details(counted)
    return result


def _warnings(result: dict) -> list[str]:
    warnings = [f"void: {result['void']}"] if result["void"] else []
    if result["issued"] < FEW_REQUESTS:
        warnings.append(f"{result['issued']} requests: a P99 over fewer than {FEW_REQUESTS} is mostly chance")
    if result["interrupted"]:
        warnings.append(f"stopped early: {result['num_prompts'] - result['issued']} requests left out of all figures")
    elif not result["failed"]:
        for side, word in (("input", "in"), ("output", "out")):
            asked, got = result[f"asked_{side}_tokens"], result[f"total_{side}_tokens"]
            if abs(got - asked) > 0.05 * asked and asked:
                warnings.append(
                    f"asked for {asked} tokens {word} and got {got}: the server's doing, not the workload's"
                )
    if (result["cached_tokens"] or 0) > result["shared_input_tokens"]:
        warnings.append("more tokens were cached than this workload shares: the server remembers an earlier run")
    if result["saturated"]:
        warnings.append("over-saturated: queue and TTFT grew all along, so latencies depend on how long the run was")
    if "chunks" in result["tokens_counted_by"]:
        warnings.append("the server sent no usage: tokens were counted by chunks, which may carry several or none")
    return warnings


def _details(records: Sequence[Record]) -> dict:
    """vLLM's per-request lists (seconds), arrivals from the start of the run; rounded to microseconds."""
    return {
        "start_times": [round(r.arrival_s, 6) for r in records],
        "input_lens": [r.num_prompt_tokens for r in records],
        "output_lens": [len(r.token_s) for r in records],
        "ttfts": [round(r.ttft_s, 6) if r.token_s else None for r in records],
        "itls": [[round(gap, 6) for gap in r.tbt_s] for r in records],
        "latencies": [round(r.end_s - r.arrival_s, 6) for r in records],
        "errors": [r.error or "" for r in records],
    }


def records_of(result: dict) -> list[RequestTimes]:
    """Requests out of a detailed result, ours or vLLM's. Raises ValueError for one without details."""
    if "itls" not in result:
        raise ValueError("this result has no per-request lists: run it with --save-detailed")
    slo, records = SLO(**result.get("slo", {})), []
    starts = result.get("start_times") or [0.0] * len(result["itls"])
    rows = zip(starts, result["ttfts"], result["itls"], result["errors"], result["input_lens"], strict=True)
    for start_s, ttft_s, gaps, error, num_prompt in rows:
        times = [start_s + ttft_s] if ttft_s is not None and not (error and not ttft_s) else []
        for gap in gaps if times else ():
            times.append(times[-1] + gap)
        records.append(RequestTimes(start_s, times, slo, not error, num_prompt))
    return records


def _ms(ordered_s: Sequence[float], percent: float) -> float | None:
    return percentile_of_sorted(ordered_s, percent) * 1e3 if ordered_s else None


def _sum(counts) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _most_at_once(records: Sequence[Record]) -> int:
    changes = sorted([(r.arrival_s, 1) for r in records] + [(r.end_s, -1) for r in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


# --- for the eye ------------------------------------------------------------------------------------------------------

WIDTH = 50
FRAME = (  # (section, rows of (label, key, format))
    ("Serving Benchmark Result", (
        ("Successful requests", "completed", "d"), ("Failed requests", "failed", "d"),
        ("  of them refused (429, 503)", "shed", "d"), ("  of them timed out", "timeouts", "d"),
        ("Maximum request concurrency", "max_concurrency", "d"), ("Request rate configured (RPS)", "request_rate", "s"),
        ("Benchmark duration (s)", "duration", ".2f"), ("Total input tokens", "total_input_tokens", "d"),
        ("  of them cached", "cached_tokens", "d"), ("  shared within the workload", "shared_input_tokens", "d"),
        ("Total generated tokens", "total_output_tokens", "d"),
        ("Request throughput (req/s)", "request_throughput", ".2f"),
        ("Request goodput (req/s)", "request_goodput", ".2f"),
        ("Output token throughput (tok/s)", "output_throughput", ".2f"),
        ("Peak output token throughput (tok/s)", "max_output_tokens_per_s", ".2f"),
        ("Peak concurrent requests", "max_concurrent_requests", ".2f"),
        ("Total token throughput (tok/s)", "total_token_throughput", ".2f"),
        ("Send lag P99 (ms)", "send_lag_p99_ms", ".2f"), ("Preemptions", "preemptions", "d"),
    )),
    ("Time to First Token", (
        ("Mean TTFT (ms)", "mean_ttft_ms", ".2f"), ("Median TTFT (ms)", "median_ttft_ms", ".2f"),
        ("P99 TTFT (ms)", "p99_ttft_ms", ".2f"),
    )),
    ("Time per Output Token (excl. 1st token)", (
        ("Mean TPOT (ms)", "mean_tpot_ms", ".2f"), ("Median TPOT (ms)", "median_tpot_ms", ".2f"),
        ("P99 TPOT (ms)", "p99_tpot_ms", ".2f"),
    )),
    ("Time between Tokens (every gap)", (
        ("Mean TBT (ms)", "mean_itl_ms", ".2f"), ("Median TBT (ms)", "median_itl_ms", ".2f"),
        ("P90 TBT (ms)", "p90_tbt_ms", ".2f"), ("P99 TBT (ms)", "p99_tbt_ms", ".2f"),
        ("P99.9 TBT (ms)", "p999_tbt_ms", ".2f"), ("Max TBT (ms)", "max_tbt_ms", ".2f"),
        ("P99 of the requests' worst gap (ms)", "p99_max_tbt_ms", ".2f"),
    )),
    ("End-to-end Latency", (
        ("Mean E2EL (ms)", "mean_e2el_ms", ".2f"), ("P99 E2EL (ms)", "p99_e2el_ms", ".2f"),
    )),
    ("SLO", (
        ("Good requests, of all issued", "slo_attainment", ".2%"), ("  TTFT kept", "slo_attainment_ttft", ".2%"),
        ("  TBT kept (P99 of own gaps)", "slo_attainment_tbt", ".2%"),
        ("  strict (every gap)", "slo_attainment_strict", ".2%"), ("Gaps within TBT", "tokens_within_tbt_frac", ".2%"),
    )),
)  # fmt: skip


def frame(result: dict, more: Sequence[str] = ()) -> str:
    """The result as vLLM prints it, our sections and ``more`` added; a figure that does not exist is left out."""
    lines = []
    for index, (title, rows) in enumerate(FRAME):
        if title == "SLO":
            title += f" (TTFT <= {result['slo']['ttft_ms']:g} ms, TBT <= {result['slo']['tbt_ms']:g} ms)"
        lines.append(f" {title} ".center(WIDTH, "=") if index == 0 else title.center(WIDTH, "-"))
        lines += [
            f"{label + ':':<40} {result[key]:<10{kind}}".rstrip()
            for label, key, kind in rows
            if result.get(key) is not None
        ]
    lines += [*more, "=" * WIDTH, *result["warnings"]]
    if result["error_counts"]:
        lines += [f"{count} x {error}" for error, count in result["error_counts"].items()]
    return "\n".join(lines)


def append_csv(path: Path, result: dict) -> None:
    """Adds the run as a line: plain figures only. A file with other columns is an error, not a mess."""
    row = {key: value for key, value in result.items() if isinstance(value, int | float | str | None)}
    is_new = not path.exists() or not path.read_text().strip()
    if not is_new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path} has other columns than this run: choose another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def rate_key(rate) -> float | str | None:
    """vLLM writes an unlimited rate as the string inf, which JSON can hold."""
    return "inf" if rate == math.inf else rate
