"""Three more figures of plots.py: judged by scaled SLOs, throughput against P99 TBT, goodput bars.

Each has a function that makes the rows of its CSV and one that draws them.
"""

from __future__ import annotations

from statistics import fmean

from nanodrift.bench.plots import COLORS, INK, style_of

SCALES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0)
GRID = {"color": "#e6e8ec", "linewidth": 0.6}


# --- one run, judged by tighter and looser promises -------------------------------------------------------------------


def scale_rows(results: list[dict], labels: list[str]) -> list[dict]:
    """Share of all issued requests that would have been good, had both SLOs been so many times what they were."""
    rows = []
    for label, result in zip(labels, results, strict=True):
        if "p99_gap_ms" not in result:
            raise ValueError(f"{label} has no lists over requests: give the folder of a sweep")
        issued = list(zip(result["ttft_ms"], result["p99_gap_ms"], result["completed"], strict=True))
        for scale in SCALES:
            ttft_ms, tbt_ms = (scale * result["slo"][f"{side}_ms"] for side in ("ttft", "tbt"))
            good = sum(done and ttft <= ttft_ms and (gap or 0.0) <= tbt_ms for ttft, gap, done in issued if done)
            row = {"label": label, "rate": result["rate"], "seed": result["seed"], "scale": scale}
            rows.append(row | {"slo_attainment": good / len(issued)})
    return rows


def draw_scale(pyplot, rows: list[dict], results: list[dict]):
    figure, ax = pyplot.subplots(figsize=(5.6, 3.9))
    rates = sorted({row["rate"] for row in rows})
    names = [(label, rate) for rate in rates for label in dict.fromkeys(row["label"] for row in rows)]
    for index, (label, rate) in enumerate(names):
        own = [row for row in rows if (row["label"], row["rate"]) == (label, rate)]
        if not own:
            continue
        means = {scale: [row["slo_attainment"] for row in own if row["scale"] == scale] for scale in SCALES}
        shares = [100 * sum(values) / len(values) for values in means.values()]
        ax.plot(SCALES, shares, label=f"{label}, {rate}/s" if len(rates) > 1 else label, **style_of(index))
    for target in (90, 99):
        ax.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    ax.axvline(1.0, color=INK, linewidth=0.8)
    ax.invert_xaxis()
    ax.set_xlabel(f"both SLOs times (the runs at {', '.join(rates)} requests/s, judged again)")
    ax.set_ylabel("percent of all issued requests good")
    ax.set_ylim(0, 103)
    ax.set_yticks([0, 20, 40, 60, 80, 90, 99])
    _finish(ax, "lower left")
    return figure


# --- throughput against P99 TBT ---------------------------------------------------------------------------------------


def pareto_rows(results: list[dict], labels: list[str]) -> list[dict]:
    """A line a policy, whatever it was promised; a sweep's seeds as their mean.

    A run that was judged by several promises counts once.
    """
    cells: dict[tuple, list[dict]] = {}
    for number, result in enumerate(results):
        if result.get("p99_tbt_ms") is None or "output_throughput" not in result:
            raise ValueError(f"{result['label']} has no throughput or no P99 TBT")
        run = None if "policy" in result else number
        cells.setdefault((result["label"], result.get("request_rate"), result["slo"]["tbt_ms"], run), []).append(result)
    rows, keys = [], ("output_throughput", "total_token_throughput", "p99_tbt_ms", "slo_attainment")
    for (label, rate, *_), seeds in cells.items():
        row = {"label": label, "request_rate": rate}
        row |= {key: fmean(seed[key] for seed in seeds) if key in seeds[0] else None for key in keys}
        if not any(row["label"] == r["label"] and row["p99_tbt_ms"] == r["p99_tbt_ms"] for r in rows):
            rows.append(row)
    labels = [result["label"] for result in results]
    return sorted(rows, key=lambda row: (labels.index(row["label"]), row["p99_tbt_ms"]))


def draw_pareto(pyplot, rows: list[dict], results: list[dict]):
    figure, ax = pyplot.subplots(figsize=(5.6, 3.9))
    for index, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
        own = [row for row in rows if row["label"] == label]
        ax.plot([r["p99_tbt_ms"] for r in own], [r["output_throughput"] for r in own], label=label, **style_of(index))
    _mark_slos(ax, results)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [x for x in (2, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500) if low <= x <= high]
    step = (high - low) / 5
    ax.set_xticks(ticks if len(ticks) > 2 else [round(low + step * number, 1) for number in range(1, 5)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(lambda value, _: "")
    ax.set_xlabel("P99 of all gaps between tokens, ms (left is better)")
    ax.set_ylabel("output tokens/s (up is better)")
    ax.set_ylim(bottom=0)
    _finish(ax, "lower right")
    return figure


def _mark_slos(ax, results: list[dict]) -> None:
    for limit in sorted({result["slo"]["tbt_ms"] for result in results}):
        ax.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        where = {"xy": (limit, 0.99), "xycoords": ("data", "axes fraction"), "ha": "right", "va": "top"}
        ax.annotate(f"SLO {limit:g} ms", **where, rotation=90, fontsize=7.5, color=INK)


# --- goodput bars -----------------------------------------------------------------------------------------------------


def goodput_rows(results: list[dict], labels: list[str]) -> list[dict]:
    """From goodput searches; or from points of a sweep: the highest rate measured with none below it that failed."""
    rows: dict[str, dict] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    for label, result in zip(labels, results, strict=True):
        row = {"label": label, "simulated": bool(result.get("simulated"))}
        if "max_rate_at_90" in result:
            rows[label] = row | {key: result[key] for key in ("max_rate_at_90", "max_rate_at_99")}
        elif isinstance(result.get("request_rate"), int | float) and "slo_attainment" in result:
            points.setdefault(label, []).append((result["request_rate"], result["slo_attainment"]))
            rows[label] = row
        else:
            raise ValueError(f"{label} is no goodput search and no point of a sweep")
    for label, measured in points.items():
        for target in (90, 99):
            miss = min((rate for rate, share in measured if share < target / 100), default=float("inf"))
            rows[label][f"max_rate_at_{target}"] = max((rate for rate, _ in measured if rate < miss), default=0.0)
    return list(rows.values())


def draw_goodput(pyplot, rows: list[dict], results: list[dict]):
    figure, ax = pyplot.subplots(figsize=(max(5.6, 1.0 + 0.85 * len(rows)), 3.9))
    for side, (target, color) in enumerate(((90, COLORS[0]), (99, COLORS[1]))):
        for index, row in enumerate(rows):
            look = {"facecolor": "none" if row["simulated"] else color, "edgecolor": color, "linewidth": 1.4}
            look |= {"hatch": "///"} if target == 99 and row["simulated"] else {}
            rate = row[f"max_rate_at_{target}"]
            name = f"{target}% good" if index == 0 else None
            ax.bar(index + (side - 0.5) * 0.38, rate, width=0.34, label=name, **look)
            ax.annotate(f"{rate:.2f}", (index + (side - 0.5) * 0.38, rate), ha="center", va="bottom", fontsize=7)
    ax.set_xticks(range(len(rows)), [row["label"].replace(", ", "\n") for row in rows], fontsize=8)
    ax.set_ylabel("requests/s")
    if any(row["simulated"] for row in rows):
        ax.set_title("hollow: SIMULATED", fontsize=8, loc="right")
    ax.margins(y=0.15)
    _finish(ax, "upper right")
    return figure


def _finish(ax, where: str) -> None:
    ax.legend(frameon=False, fontsize=8, loc=where)
    ax.grid(**GRID)
    ax.set_axisbelow(True)


MAKERS = {
    "scale": (scale_rows, draw_scale),
    "pareto": (pareto_rows, draw_pareto),
    "goodput": (goodput_rows, draw_goodput),
}
