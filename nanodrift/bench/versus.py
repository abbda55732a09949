"""One policy of a sweep against the others, request by request: differences with paired 95% intervals.

    python bench.py versus DIR               mux against every other policy at each rate and promise
    python bench.py versus DIR --of mux:fused+exclusive

Every policy met the same requests at the same times, so a resample draws the same requests on both sides and what the
workload did to both cancels out; the seeds that both met are pooled. Attainment is compared as a difference in points
of percent, times as ratios. A request that did not complete counts as infinitely late. A held batch is left out: its
requests differ.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

NUM_RESAMPLES = 2000
COLUMNS = "rate       TBT  against          seeds  " + "".join(
    f"{name:<24}" for name in ("good, points", "TTFT P50 ratio", "TTFT P99 ratio", "P99 gap ratio")
)


def load(folder: Path) -> dict[tuple, dict[int, dict[str, torch.Tensor]]]:
    """(rate, TBT, policy) -> seed -> a number a request for each figure. Raises ValueError without lists."""
    path = folder / "requests.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a sweep: there is no requests.jsonl")
    found: dict[tuple, dict[int, dict[str, torch.Tensor]]] = {}
    for entry in map(json.loads, path.read_text().splitlines()):
        own = [i for i, is_background in enumerate(entry["background"]) if not is_background]

        def column(key: str, missing: float, entry=entry, own=own) -> torch.Tensor:
            values = [entry[key][i] if entry["completed"][i] else None for i in own]
            return torch.tensor([missing if value is None else float(value) for value in values])

        ttft, gap, done = column("ttft_ms", math.inf), column("p99_gap_ms", 0.0), column("completed", 0.0)
        in_time = (ttft <= entry["slo"]["ttft_ms"]) & (gap <= entry["slo"]["tbt_ms"])
        good = column("good", 0.0) if "good" in entry else in_time.float() * done
        gap[done == 0] = math.inf
        key = (entry["rate"], entry["slo"]["tbt_ms"], entry["policy"])
        found.setdefault(key, {})[entry["seed"]] = {"good": good, "ttft": ttft, "gap": gap}
    return found


def nearest_rank(values: torch.Tensor, percent: float) -> torch.Tensor:
    """Of each row. [resamples, requests] -> [resamples]"""
    rank = max(0, math.ceil(percent / 100 * values.shape[1]) - 1)
    return values.sort(dim=1).values[:, rank]


FIGURES = (  # (name, over requests, compared as a ratio, of)
    ("good", "good", False, lambda v: 100 * v.mean(dim=1)),
    ("ttft_p50", "ttft", True, lambda v: nearest_rank(v, 50)),
    ("ttft_p99", "ttft", True, lambda v: nearest_rank(v, 99)),
    ("gap_p99", "gap", True, lambda v: nearest_rank(v, 99)),
)


def compare(ours: dict, theirs: dict, seed: int = 0) -> dict[str, tuple[float, float, float] | None]:
    """(value, low, high) of each figure, ours against theirs on the seeds of both; None where it does not exist."""
    seeds = sorted(ours.keys() & theirs.keys())
    ours, theirs = ({key: torch.cat([one[s][key] for s in seeds]) for key in ours[seeds[0]]} for one in (ours, theirs))
    count = len(ours["good"])
    if count != len(theirs["good"]):
        raise ValueError(f"{count} requests against {len(theirs['good'])}: not the same ones")
    drawn = torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    drawn = torch.cat([torch.arange(count)[None], drawn])  # the first row is what happened
    result = {}
    for name, key, is_ratio, measure in FIGURES:
        a, b = measure(ours[key][drawn]), measure(theirs[key][drawn])
        values = torch.where(torch.isfinite(a) & torch.isfinite(b), a / b, math.nan) if is_ratio else a - b
        known = values[torch.isfinite(values)]
        if not torch.isfinite(values[0]) or len(known) < 0.95 * len(values):
            result[name] = None
            continue
        low, high = (known[1:].quantile(q).item() for q in (0.025, 0.975))
        result[name] = (values[0].item(), low, high)
    return result


def rows_of(folder: Path, policy: str) -> list[dict]:
    lists = load(folder)
    rows = []
    for rate, tbt_ms, other in lists:
        if other != policy and (rate, tbt_ms, policy) in lists:
            ours, theirs = lists[rate, tbt_ms, policy], lists[rate, tbt_ms, other]
            if seeds := sorted(ours.keys() & theirs.keys()):
                about = {"policy": policy, "rate": rate, "tbt_ms": tbt_ms, "against": other, "seeds": seeds}
                rows.append(about | compare(ours, theirs))
    if not rows:
        raise ValueError(f"{folder} holds nothing to compare {policy!r} with")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py versus", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a sweep")
    parser.add_argument("--of", default="mux", metavar="POLICY")
    options = parser.parse_args(argv)
    try:
        rows = rows_of(options.folder, options.of)
    except ValueError as error:
        print(f"bench.py versus: {error}", file=sys.stderr)
        return 2
    print(f"{options.of} against the others; good: more is better, ratios: less is better\n\n{COLUMNS}")
    for row in rows:
        cells = []
        for name, _, is_ratio, _ in FIGURES:
            if row[name] is None:
                cells.append(f"{'n/a':<24}")
                continue
            text = "{:.3f} [{:.3f}, {:.3f}]" if is_ratio else "{:+.1f} [{:+.1f}, {:+.1f}]"
            cells.append(f"{text.format(*row[name]):<24}")
        where = f"{row['rate']:<8} {row['tbt_ms']:5g}  {row['against']:<15}  {len(row['seeds']):5}"
        print(f"{where}  {''.join(cells)}".rstrip())
    print(json.dumps({"folder": options.folder.name, "rows": rows}))
    return 0
