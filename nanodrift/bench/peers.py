"""Our runs of the arrival lists that other engines were measured on, row by row beside theirs.

    python bench.py peers DIR [DIR ...] --to results/h200/peers-online.json

A DIR is the folder of a sweep over one of the lists (its rates written as time scales, x0.4):

    python bench.py sweep --trace peer_azure500.jsonl --rates x0.4,x0.2,x0.13 --no-prefix-caching --model llama-3-8b \\
        --load-format dummy --dummy-draw uniform --policy mux,chunked:512,chunked:2048 --slo-tbt-ms 20,50 --output DIR

Their figures and conditions are in results/peers.json. Prints a table; the file holds the rows and what they were
measured on. Reads files, measures nothing, imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEADER = [
    "engine",
    "list, scale",
    "offered/s",
    "done/s",
    "TTFT P50 / P99 ms",
    "TBT P50 / P90 / P99 / max ms",
    "in time",
]
KEPT = ("gpu", "driver", "torch", "triton", "git", "argv", "model_id", "dtype", "engine", "simulated", "date", "cpu")


def rows_of(folder: Path) -> list[dict]:
    """A row for each point of a sweep, in the form of results/peers.json."""
    about = json.loads((folder / "sweep.json").read_text())
    rows = []
    for line in (folder / "points.jsonl").read_text().splitlines():
        point = json.loads(line)
        if not point["rate"].startswith("x"):
            raise ValueError(f"{folder} is no sweep over time scales: give its rates as x0.4,x0.2")
        tbt_ms = [point[key] for key in ("median_itl_ms", "p90_tbt_ms", "p99_tbt_ms", "max_tbt_ms")]
        rows.append({
            "policy": point["policy"], "trace": about["workload"], "scale": float(point["rate"][1:]),
            "seed": point["seed"], "offered": point["request_rate"], "done": point["request_throughput"],
            "ttft_ms": [point["median_ttft_ms"], point["p99_ttft_ms"]], "tbt_ms": tbt_ms,
            "within_ms": point["slo"]["tbt_ms"], "within": point["tokens_within_tbt_frac"],
            "good": point["slo_attainment"], "completed": point["completed"], "issued": point["issued"],
            "watts": point.get("watts"), "tokens_per_joule": point.get("tokens_per_joule"),
            "note": "saturated" if point["saturated"] else None, "simulated": point["simulated"],
        })  # fmt: skip
    return rows


def collect(folders: list[Path]) -> dict:
    """All rows, and what each folder was measured on. Raises ValueError for a folder that is no such sweep."""
    for folder in folders:
        if not (folder / "points.jsonl").is_file():
            raise ValueError(f"{folder} is not the folder of a sweep")
    abouts = [json.loads((folder / "sweep.json").read_text()) for folder in folders]
    runs = [{key: about.get(key) for key in KEPT} for about in abouts]
    return {"runs": runs, "rows": [row for folder in folders for row in rows_of(folder)]}


def table(ours: dict, peers: dict) -> list[list[str]]:
    """Cells under HEADER: for each list and scale the peers first, then ours, the tighter promise first."""
    lines = []
    for name, engine in peers["engines"].items():
        for row in engine.get("online", ()):
            budget = f", budget {row['budget']}" if "budget" in row else ""
            lines.append(((row["trace"], -row["scale"], 0, name), f"{name}{budget}", row))
    for number, row in enumerate(ours["rows"]):
        told = ", TBT SLO" if row["policy"].startswith(("mux", "chunked-auto")) else ", judged at"
        name = f"nanodrift {row['policy']}{told} {row['within_ms']:g} ms{', SIMULATED' if row['simulated'] else ''}"
        lines.append(((row["trace"], -row["scale"], 1, f"{number:06}"), name, row))
    return [cells(name, row) for _, name, row in sorted(lines, key=lambda line: line[0])]


def cells(name: str, row: dict) -> list[str]:
    done = f"{row['done']:.2f}" + (", saturated" if row.get("note") else "")
    ttft, tbt = ([f"{v:,.0f}" for v in row["ttft_ms"]], [f"{v:.1f}" for v in row["tbt_ms"]])
    share = row["within"] if row["within"] == 1 else min(row["within"], 0.999)  # 99.97% are not all
    within = f"{share:.1%} in {row['within_ms']:g} ms"
    trace = f"{row['trace'].removeprefix('peer_').removesuffix('.jsonl')}, {row['scale']:g}"
    return [name, trace, f"{row['offered']:.1f}", done, " / ".join(ttft), " / ".join(tbt), within]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py peers", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of a sweep over a peer's arrival list")
    parser.add_argument("--peers", type=Path, default=ROOT / "results" / "peers.json", metavar="FILE")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write our rows there")
    options = parser.parse_args(argv)
    try:
        ours = collect(options.folders)
    except ValueError as error:
        print(f"bench.py peers: {error}", file=sys.stderr)
        return 2
    lines = [HEADER, *table(ours, json.loads(options.peers.read_text()))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    if options.to:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in ours["rows"])
        runs = ",\n".join(f"  {json.dumps(run)}" for run in ours["runs"])
        options.to.write_text(f'{{\n "runs": [\n{runs}\n ],\n "rows": [\n{rows}\n ]\n}}\n')
    return 0
