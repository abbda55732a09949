"""One figure an operator: rate against SM count, ours, the best library's, the limit; a panel a shape. PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nanodrift.bench.plots import COLORS, FAINT, HELP, INK

OURS, LIBRARY = COLORS[0], COLORS[1]
COLUMNS = 4


def draw(result: dict, prefix: Path, console: Console) -> list[Path]:
    """Writes PREFIX-<operator>.png and .svg for each operator measured on more than one SM count."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        console.print(HELP, highlight=False)
        return []
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
             "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "svg.hashsalt": "nanodrift", "svg.fonttype": "none", "savefig.dpi": 110}  # fmt: skip
    written = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        if len({row["sms"] for row in rows}) < 2:
            continue
        with pyplot.rc_context(style):
            figure = _figure(pyplot, op, rows, result)
            for suffix in ("png", "svg"):
                written.append(prefix.with_name(f"{prefix.name}-{op}.{suffix}"))
                figure.savefig(written[-1], metadata={"Date": None} if suffix == "svg" else None)
            pyplot.close(figure)
    return written


def _figure(pyplot, op: str, rows: list[dict], result: dict):
    names = list(dict.fromkeys(row["case"] for row in rows))
    across = min(COLUMNS, len(names))
    down = -(-len(names) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(2.9 * across, 2.2 * down + 0.7), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        mine = sorted((row for row in rows if row["case"] == name), key=lambda row: row["sms"])
        at_bytes = mine[0]["num_flops"] / mine[0]["num_bytes"] < 150  # below the ridge: bytes are what counts
        amount, unit = ("num_bytes", "TB/s") if at_bytes else ("num_flops", "TFLOP/s")

        def rates(us, mine=mine, amount=amount):
            return [row[amount] / value / 1e6 for row, value in zip(mine, us, strict=True) if value]

        sms = [row["sms"] for row in mine]
        axis.plot(sms, rates([row["limit_us"] for row in mine]), color=INK, lw=0.9, ls=(0, (1, 1.5)), label="limit")
        with_library = [row for row in mine if row["library_us"]]
        library = [row[amount] / min(row["library_us"].values()) / 1e6 for row in with_library]
        axis.plot([row["sms"] for row in with_library], library, color=LIBRARY, lw=1.2, ls=(0, (5, 2)), marker="s",
                  ms=3, label="best library")  # fmt: skip
        axis.plot(sms, rates([row["us"] for row in mine]), color=OURS, lw=1.5, marker="o", ms=3.5, label="nanodrift")
        axis.set_title(name, fontsize=8, loc="left")
        axis.set_ylim(0)
        axis.set_xlim(max(0, min(sms) - 16), max(sms) + 4)
        axis.set_ylabel(unit, fontsize=7)
        axis.set_xticks([n for n in sms if n not in (36, 96, 116)])
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("SMs", fontsize=7)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(op, x=0.01, ha="left", fontsize=10)
    where = f"{result['gpu']}, {result['model_id']} shapes, bf16, torch {result['torch']}, triton {result['triton']}, "
    figure.text(0.01, 0.008, f"{where}{result['date'][:8]}, commit {result['git']}", fontsize=6.5, color=FAINT)
    figure.tight_layout(rect=(0, 0.02, 1, 0.99))
    return figure
