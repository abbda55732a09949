"""Two runs side by side: each figure, the ratio B / A, and a bootstrap 95% interval of the ratio.

Runs over the same requests (same prompt lengths, in the same order) are paired: a resample draws the same requests on
both sides, so that what the workload did to both cancels out. Works on detailed results, ours or vLLM's.

    python bench.py compare A.json B.json            or several seeds a side: A1.json,A2.json B1.json,B2.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from nanodrift.bench.report import records_of
from nanodrift.metrics import RequestTimes

NUM_RESAMPLES, CHUNK = 500, 25


@dataclass(frozen=True)
class Side:
    """All requests of one side's runs, pooled; ``groups`` are its runs: requests are drawn again within each."""

    names: list[str]
    results: list[dict]
    runs: list[list[RequestTimes]]

    @property
    def records(self) -> list[RequestTimes]:
        return [record for run in self.runs for record in run]


def load(names: str) -> Side:
    paths = [Path(name) for name in names.split(",")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    results = [json.loads(path.read_text()) for path in paths]
    return Side([path.name for path in paths], results, [records_of(result) for result in results])


def compare(a: Side, b: Side, seed: int = 0) -> dict:
    """Figures of both sides, their ratio and its 95% interval; None where a ratio does not exist."""
    sides = (a, b)
    is_paired = [[r.num_prompt_tokens for r in run] for run in a.runs] == [
        [r.num_prompt_tokens for r in run] for run in b.runs
    ]
    generator = torch.Generator().manual_seed(seed)
    draws = [resamples(a, generator)]
    draws.append(draws[0] if is_paired else resamples(b, generator))
    rows = []
    for name, is_higher_better, measure in MEASURES:
        figures = [measure(side.records) for side in sides]
        point = [figure(torch.ones(1, len(s.records))).item() for figure, s in zip(figures, sides, strict=True)]
        spread = [
            torch.cat([figure(w) for w in draw.split(CHUNK)]) for figure, draw in zip(figures, draws, strict=True)
        ]
        ratios = spread[1] / spread[0]
        ratio = point[1] / point[0] if point[0] else None
        known = ratios[torch.isfinite(ratios)]
        is_known = ratio is not None and len(known) >= 0.95 * NUM_RESAMPLES
        low, high = (known.quantile(q).item() for q in (0.025, 0.975)) if is_known else (None, None)
        verdict = "n/a" if not is_known else "same" if low <= 1 <= high else VERDICT[(ratio > 1) == is_higher_better]
        values = [value if value == value else None for value in point]
        row = {"figure": name, "a": values[0], "b": values[1], "ratio": ratio if is_known else None}
        rows.append(row | {"low": low, "high": high, "verdict": verdict})
    for name in ("output_throughput", "request_throughput"):  # of a whole run: there is nothing to resample
        means = [sum(r.get(name, 0.0) for r in side.results) / len(side.results) for side in sides]
        ratio = means[1] / means[0] if means[0] else None
        rows.append({"figure": name, "a": means[0], "b": means[1], "ratio": ratio, "low": None, "high": None,
                     "verdict": "one run" if len(a.runs) == 1 else f"{len(a.runs)} runs"})  # fmt: skip
    return {"a": a.names, "b": b.names, "paired": is_paired, "requests": [len(s.records) for s in sides], "rows": rows}


VERDICT = {True: "B is better", False: "B is worse"}


def resamples(side: Side, generator: torch.Generator) -> torch.Tensor:
    """How often each request occurs in each resample. [NUM_RESAMPLES, requests]"""
    parts = []
    for run in side.runs:
        count = len(run)
        drawn = torch.randint(count, (NUM_RESAMPLES, count), generator=generator)
        parts.append(
            torch.zeros(NUM_RESAMPLES, count).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float))
        )
    return torch.cat(parts, 1)


Figure = Callable[[torch.Tensor], torch.Tensor]  # weights [resamples, requests] -> figures [resamples]


def percentile_of(percent: float, values_of: Callable[[RequestTimes], list[float]]) -> Callable[..., Figure]:
    """Nearest rank over the values of all requests, each counted as often as its request was drawn."""

    def of(records: list[RequestTimes]) -> Figure:
        pairs = sorted((value, i) for i, r in enumerate(records) if r.is_completed for value in values_of(r))
        values = torch.tensor([value for value, _ in pairs] or [float("nan")], dtype=torch.double)
        owner = torch.tensor([i for _, i in pairs] or [0])

        def figure(weights: torch.Tensor) -> torch.Tensor:
            reached = weights[:, owner].double().cumsum(1)
            rank = torch.ceil(reached[:, -1:] * percent / 100).clamp(min=1)
            return values[torch.searchsorted(reached, rank).clamp(max=len(values) - 1)].squeeze(1) * 1e3

        return figure

    return of


def share_of(is_counted: Callable[[RequestTimes], bool]) -> Callable[..., Figure]:
    def of(records: list[RequestTimes]) -> Figure:
        flags = torch.tensor([float(is_counted(r)) for r in records])
        return lambda weights: (weights @ flags) / weights.sum(1)

    return of


def mean_ms_of(value_of: Callable[[RequestTimes], float | None]) -> Callable[..., Figure]:
    def of(records: list[RequestTimes]) -> Figure:
        values = [value_of(r) if r.is_completed else None for r in records]
        known = torch.tensor([float(value is not None) for value in values])
        numbers = torch.tensor([value or 0.0 for value in values])
        return lambda weights: (weights @ numbers) / (weights @ known) * 1e3

    return of


def _ttft(record: RequestTimes) -> list[float]:
    return [record.ttft_s] if record.token_s else []


MEASURES = (  # (name, whether more is better, measure)
    ("median_ttft_ms", False, percentile_of(50, _ttft)),
    ("p99_ttft_ms", False, percentile_of(99, _ttft)),
    ("median_tbt_ms", False, percentile_of(50, lambda r: r.tbt_s)),
    ("p99_tbt_ms", False, percentile_of(99, lambda r: r.tbt_s)),
    ("mean_tpot_ms", False, mean_ms_of(lambda r: r.tpot_s)),
    ("mean_e2el_ms", False, mean_ms_of(lambda r: r.end_to_end_s)),
    ("slo_attainment", True, share_of(lambda r: r.is_good())),
    ("slo_attainment_ttft", True, share_of(lambda r: r.meets_ttft)),
    ("slo_attainment_tbt", True, share_of(lambda r: r.meets_tbt())),
)


def table(result: dict) -> Table:
    paired = "the same requests, paired" if result["paired"] else "[red]not the same requests[/]: unpaired"
    table = Table(title=f"A = {','.join(result['a'])}, B = {','.join(result['b'])}: {paired}", title_justify="left")
    for column in ("figure", "A", "B", "B / A", "95% interval", ""):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in result["rows"]:
        a, b = (f"{row[side]:.4g}" if row[side] is not None else "n/a" for side in "ab")
        ratio = f"{row['ratio']:.3f}" if row["ratio"] is not None else "n/a"
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] is not None else ""
        table.add_row(row["figure"], a, b, ratio, interval, row["verdict"])
    return table
