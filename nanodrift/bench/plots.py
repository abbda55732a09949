"""Figures from result files: PNG, SVG, and always the CSV behind them.

    cdf          TTFT and TBT of each run, with the SLO
    attainment   share of good requests against rate: both promises, TTFT alone, TBT alone, with the 90 and 99% lines
    scale        the same runs judged by both SLOs times a factor (figures.py)
    pareto       output tokens per second against P99 TBT, a line a policy (figures.py)
    goodput      highest rate with 90% and 99% good, a bar a policy, simulated ones hollow (figures.py)

A file is a result of bench.py, or the folder of a sweep: then a policy is a label. Colours are told apart by
colour-blind eyes (Okabe and Ito), lines also by their dashes; the caption carries what was measured, on what. Needs
matplotlib for the pictures only.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from textwrap import wrap

from rich.console import Console

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), "-")
MARKS = "os^Dv<>"
INK, FAINT = "#2b2f36", "#8a909a"
SHARES = (  # of all issued requests
    ("slo_attainment", "both promises kept"),
    ("slo_attainment_ttft", "TTFT kept"),
    ("slo_attainment_tbt", "TBT kept"),
)
HELP = "no picture without matplotlib: pip install 'nanodrift[plots]' (the CSV is written all the same)"


def style_of(index: int) -> dict:
    """Of a line: colour, dash and mark change together; from the eighth line on the marks are others."""
    which = index % len(COLORS)
    mark = MARKS[(index + index // len(COLORS)) % len(MARKS)]
    return {"color": COLORS[which], "linestyle": DASHES[which], "linewidth": 1.6, "marker": mark, "markersize": 3.5}


def draw(
    kind: str,
    files: list[Path],
    prefix: Path | None,
    console: Console,
    rate: str | None = None,
    tbt_ms: float | None = None,
) -> list[Path]:
    """Writes PREFIX.csv, .png and .svg, and returns what was written. Raises ValueError if data is missing.

    ``rate`` (as it was written) and ``tbt_ms`` pick points out of a sweep.
    """
    from nanodrift.bench import figures

    makers = {"cdf": (cdf_rows, draw_cdf), "attainment": (attainment_rows, draw_attainment), **figures.MAKERS}
    rows_of, draw_rows = makers[kind]
    results = [
        result for path in files for result in read(path, "requests.jsonl" if kind == "scale" else "points.jsonl")
    ]
    results = [r for r in results if (rate is None or r.get("rate", rate) == rate)
               and (tbt_ms is None or r["slo"]["tbt_ms"] == tbt_ms)]  # fmt: skip
    if not results:
        raise ValueError(f"nothing in {', '.join(map(str, files))} is of that rate and TBT")
    prefix = prefix or files[0].with_name(f"{files[0].stem}-{kind}")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rows = rows_of(results, label_of(results))
    written = [prefix.with_name(f"{prefix.name}.csv")]
    with written[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        console.print(HELP, highlight=False)
        return written
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
             "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "svg.hashsalt": "nanodrift", "svg.fonttype": "none", "savefig.dpi": 160}  # fmt: skip
    with pyplot.rc_context(style):
        figure = draw_rows(pyplot, rows, results)
        lines = [
            part for line in caption(results).split("\n") for part in wrap(line, round(19 * figure.get_figwidth()))
        ]
        figure.tight_layout(rect=(0, 0.02 + 0.036 * len(lines), 1, 1))
        figure.text(0.01, 0.01, "\n".join(lines), fontsize=7, color=FAINT, va="bottom")
        for suffix in ("png", "svg"):
            path = prefix.with_name(f"{prefix.name}.{suffix}")
            figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        pyplot.close(figure)
    return written


def read(path: Path, of_sweep: str) -> list[dict]:
    """The results in a file; of a sweep's folder the points in its file ``of_sweep``, each with all conditions."""
    if path.is_dir():
        about = json.loads((path / "sweep.json").read_text())
        shared = {key: about.get(key) for key in ("gpu", "cpu", "model_id", "torch", "git", "workload", "benchmark")}
        shared |= {
            "simulated": about.get("simulated", False),
            "seeds": len({c["seed"] for c in about["missing"]}) or None,
        }
        points = [json.loads(line) for line in (path / of_sweep).read_text().splitlines()]
        return [shared | point | {"label": point["policy"]} for point in points]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    result = json.loads(path.read_text())
    if "policies" not in result:
        return [{"label": path.stem, **{k: v for k, v in result.items() if k != "label" or v}}]
    shared = {key: value for key, value in result.items() if key != "policies"}
    return [shared | found | {"label": found["policy"]} for found in result["policies"]]


def label_of(results: list[dict]) -> list[str]:
    """A result's label; with the TBT behind it where a label's results were promised several."""
    promises = {}
    for result in results:
        promises.setdefault(result["label"], set()).add(result.get("slo", {}).get("tbt_ms"))
    return [
        f"{r['label']}, TBT {r['slo']['tbt_ms']:g} ms" if len(promises[r["label"]]) > 1 else r["label"] for r in results
    ]


def caption(results: list[dict]) -> str:
    """What the figures were measured on, each condition once. Two lines."""

    def once(*keys: str) -> str:
        return ", ".join(dict.fromkeys(str(r[key]) for r in results for key in keys if r.get(key) not in (None, "")))

    where = once("gpu").replace("SIMULATED ", "") or once("cpu")
    simulated = "SIMULATED. " if any(r.get("simulated") for r in results) else ""
    slos = ", ".join(dict.fromkeys(f"TTFT {r['slo']['ttft_ms']:g} ms, TBT {r['slo']['tbt_ms']:g} ms" for r in results))
    asked = f"workload {once('workload')}"
    if counts := once("num_prompts"):
        asked += f", {counts} requests a run"
    elif counts := once("requests_per_point"):
        asked += f", {counts} requests a point over {once('seeds')} seeds (band: their range)"
    rest = (
        ("torch", once("torch")),
        ("commit", once("git")),
        ("seeds" if "," in once("seed") else "seed", once("seed")),
        ("bench.py", once("benchmark")),
    )
    second = "; ".join(f"{name} {value}" for name, value in rest if value)
    return f"{simulated}{once('model_id')} on {where}; {asked}; SLO {slos}\n{second}"


# --- CDFs -------------------------------------------------------------------------------------------------------------


def cdf_rows(results: list[dict], labels: list[str]) -> list[dict]:
    rows = []
    for label, result in zip(labels, results, strict=True):
        if "cdf" not in result:
            raise ValueError(f"{label} holds no distributions: it is not a result of bench.py serve or run")
        cdf, run = result["cdf"], {"label": label} | {key: result.get(key) for key in ("request_rate", "seed")}
        for percent, ttft_ms, tbt_ms in zip(cdf["percent"], cdf["ttft_ms"], cdf["tbt_ms"], strict=True):
            rows.append(run | {"percent": percent, "ttft_ms": ttft_ms, "tbt_ms": tbt_ms})
    return rows


def draw_cdf(pyplot, rows: list[dict], results: list[dict]):
    """A line a run; runs of one label, at other rates or with other seeds, share its style."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.6, 3.9), sharey=True)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for ax, key, slo, title in ((axes[0], "ttft_ms", "ttft_ms", "time to first token"),
                                (axes[1], "tbt_ms", "tbt_ms", "time between tokens (every gap)")):  # fmt: skip
        for index, label in enumerate(labels):
            style = style_of(index) | {"marker": None}
            runs: dict[tuple, list[dict]] = {}
            for row in rows:
                if row["label"] == label and row[key] is not None:
                    runs.setdefault((row["request_rate"], row["seed"]), []).append(row)
            for number, known in enumerate(runs.values()):
                floor = min((row[key] for row in known if row[key] > 0), default=1.0)
                times, name = [max(row[key], floor) for row in known], "_nolegend_" if number else label
                ax.plot(times, [row["percent"] for row in known], label=name, **style)
        for limit in sorted({result["slo"][slo] for result in results}):
            ax.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            ax.annotate(f"SLO {limit:g} ms", (limit, 3), rotation=90, fontsize=7.5, ha="right", va="bottom", color=INK)
        _log_axis(ax)
        ax.set_xlabel(f"{title}, ms")
        ax.grid(color="#e6e8ec", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("percent at or below")
    axes[0].set_ylim(0, 101)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _log_axis(ax) -> None:
    """A logarithmic x axis with plain numbers, also between the decades when there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    is_narrow = high / low < 300
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,), numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


# --- attainment against rate ------------------------------------------------------------------------------------------


def attainment_rows(results: list[dict], labels: list[str]) -> list[dict]:
    """One row for each label and rate: the points of a search or sweep, or one run each; seeds as mean and range."""
    cells: dict[tuple, list[dict]] = {}
    for label, result in zip(labels, results, strict=True):
        for point in result.get("points") or [result]:
            rate = point.get("request_rate")
            if not isinstance(rate, int | float) or "slo_attainment" not in point:
                raise ValueError(f"{label} has no request rate that a point could stand at")
            cells.setdefault((label, rate), []).append(point)
    rows = []
    for (label, rate), points in cells.items():
        row = {"label": label, "request_rate": rate}
        row |= {key: fmean(point[key] for point in points) for key, _ in SHARES}
        for name, end in (("min", min), ("max", max)):
            row[f"slo_attainment_{name}"] = end(p.get(f"slo_attainment_{name}", p["slo_attainment"]) for p in points)
        rows.append(row)
    return sorted(rows, key=lambda row: (labels.index(row["label"]), row["request_rate"]))


def draw_attainment(pyplot, rows: list[dict], results: list[dict]):
    """One label: its three curves in one panel. Several: a panel for each curve, a line for each label."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    num_panels = 1 if len(labels) == 1 else len(SHARES)
    figure, axes = pyplot.subplots(1, num_panels, figsize=(5.6 if num_panels == 1 else 9.6, 3.9), sharey=True,
                                   squeeze=False)  # fmt: skip
    lines = [(panel, share, label) for panel, share in enumerate(SHARES) for label in labels]
    for panel, (key, name), label in lines:
        index = panel if num_panels == 1 else labels.index(label)
        ax, own = axes[0][panel if num_panels > 1 else 0], [row for row in rows if row["label"] == label]
        style = style_of(index)
        rates = [row["request_rate"] for row in own]
        ax.plot(rates, [100 * row[key] for row in own], label=name if num_panels == 1 else label, **style)
        if key == "slo_attainment":
            low, high = ([100 * row[f"slo_attainment_{end}"] for row in own] for end in ("min", "max"))
            ax.fill_between(rates, low, high, color=style["color"], alpha=0.15, linewidth=0)
            ax.vlines(rates, low, high, color=style["color"], alpha=0.5, linewidth=1.0)
    for panel, ax in enumerate(axes[0]):
        for target in (90, 99):
            ax.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        if num_panels > 1:
            ax.set_title(SHARES[panel][1], fontsize=9)
        ax.set_xlabel("requests/s")
        ax.set_xlim(left=0)
        ax.set_ylim(0, 103)
        ax.set_yticks([0, 20, 40, 60, 80, 90, 99])
        ax.grid(color="#e6e8ec", linewidth=0.6)
        ax.set_axisbelow(True)
    has_seeds = any(row["slo_attainment_min"] < row["slo_attainment_max"] for row in rows)
    axes[0][0].set_ylabel(f"percent of all issued requests{' (band: the seeds)' if has_seeds else ''}")
    axes[0][min(1, num_panels - 1)].legend(frameon=False, fontsize=8, loc="lower left")
    return figure
