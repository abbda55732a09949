"""What ran when, on how many SMs, as a picture: from the trace of a server or of a run, measured or simulated.

    python bench.py timeline TRACE.json                                 beside it: TRACE.png, TRACE.svg
    python bench.py timeline TRACE.json --from-ms 1000 --to-ms 1100 --to figures/split

Height is SMs, width is time: decode stands at the bottom, prefill on top of it, a fused step or a lane that has the
whole chip fills both. Numbers are the rows of a decode step, a dot is a first token, white seams are the ends of steps
and pieces. Needs matplotlib (``nanodrift[plots]``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

DECODE, PREFILL, FUSED = "#0072B2", "#E69F00", "#009E73"  # Okabe and Ito: told apart by colour-blind eyes
MIN_LABEL_SHARE = 0.012  # of the figure's width
INK, FAINT, LATE = "#2b2f36", "#8a909a", "#C8102E"
STYLE = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
         "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "svg.hashsalt": "nanodrift", "svg.fonttype": "none", "savefig.dpi": 160}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A piece of work: milliseconds, and the SMs it held as a band of the chip."""

    color: str
    start_ms: float
    length_ms: float
    low_sms: int
    num_sms: int
    label: str = ""  # of a decode or fused step: its rows
    num_first_tokens: int = 0  # of prompts that end with it


def bars(events: Iterable[dict], num_sms: int) -> list[Bar]:
    """Of a trace's slices. A fused step stands on both tracks and is one bar."""
    found, num_first = [], 0
    for event in events:
        if event["ph"] != "X":
            continue
        if event["cat"] == "fused" and not event["name"].startswith("decode"):
            num_first = event["args"].get("first_tokens", 0)  # its other half comes next
            continue
        sms, is_decode = event["args"]["sms"], event["name"].startswith("decode")
        if event["cat"] == "fused":
            color, low, height = FUSED, 0, num_sms
        elif event["cat"] == "exclusive":
            color, low, height = DECODE if is_decode else PREFILL, 0, num_sms
        else:
            color, low, height = (DECODE, 0, sms) if is_decode else (PREFILL, num_sms - sms, sms)
        label = str(event["args"].get("batch", "")) if is_decode else ""
        num_first = num_first if event["cat"] == "fused" else event["args"].get("first_tokens", 0)
        found.append(Bar(color, event["ts"] / 1e3, event["dur"] / 1e3, low, height, label, num_first))
        num_first = 0
    return found


def draw_bars(ax, found: list[Bar], num_sms: int) -> None:
    """One strip: the chip's SMs upward, time to the right."""
    for key in dict.fromkeys((bar.color, bar.low_sms, bar.num_sms) for bar in found):
        color, low, height = key
        spans = [(b.start_ms, b.length_ms) for b in found if (b.color, b.low_sms, b.num_sms) == key]
        ax.broken_barh(spans, (low, height), facecolors=color, edgecolors="white", linewidth=0.25)
    ax.set_ylim(0, num_sms)
    ax.set_yticks([0, num_sms])
    ax.tick_params(length=2)


def annotate(ax, found: list[Bar], length_ms: float) -> None:
    """Batch sizes where they fit in, a dot where prompts end."""
    for bar in found:
        if bar.label and bar.length_ms > MIN_LABEL_SHARE * length_ms:
            where = (bar.start_ms + bar.length_ms / 2, bar.low_sms + bar.num_sms / 2)
            ax.annotate(bar.label, where, color="white", fontsize=7, ha="center", va="center", annotation_clip=True)
        if bar.num_first_tokens:
            ax.scatter(bar.start_ms + bar.length_ms, ax.get_ylim()[1] * 1.04, s=10, color=INK, clip_on=False)


def legend(figure, more=(), **where) -> None:
    from matplotlib.patches import Patch

    names = (("decode", DECODE), ("prefill", PREFILL), ("both, fused", FUSED))
    handles = [*(Patch(color=color, label=name) for name, color in names), *more]
    figure.legend(handles=handles, frameon=False, ncols=4, **where)


def counter(events: Iterable[dict], name: str) -> list[tuple[float, float]]:
    """(ms, value) of a counter with one value."""
    return [(e["ts"] / 1e3, next(iter(e["args"].values()))) for e in events if e["ph"] == "C" and e["name"] == name]


def draw(trace: dict, from_ms: float, to_ms: float):
    """The figure of a trace between two times, counted from its first slice; clock and watts below where known."""
    from matplotlib import pyplot

    events, about = trace["traceEvents"], trace["otherData"]
    slices = [event for event in events if event["ph"] == "X"]
    if not slices:
        raise ValueError("the trace holds no work")
    origin_ms = min(event["ts"] for event in slices) / 1e3
    moved = (replace(bar, start_ms=bar.start_ms - origin_ms) for bar in bars(slices, about["num_sms"]))
    shown = [bar for bar in moved if from_ms - bar.length_ms <= bar.start_ms <= to_ms]
    if not shown:
        raise ValueError(f"nothing ran between {from_ms:g} and {to_ms:g} ms")
    to_ms = min(to_ms, max(bar.start_ms + bar.length_ms for bar in shown))
    power = [(name, unit, counter(events, name)) for name, unit in (("SM MHz", "MHz"), ("watts", "W"))]
    power = [(name, unit, [(t - origin_ms, v) for t, v in samples if from_ms <= t - origin_ms <= to_ms])
             for name, unit, samples in power]  # fmt: skip
    power = [(unit, samples) for _, unit, samples in power if samples]
    figure, axes = pyplot.subplots(1 + len(power), 1, figsize=(11, 2.6 + 0.9 * len(power)), sharex=True, squeeze=False,
                                   height_ratios=[2.4] + [1] * len(power))  # fmt: skip
    draw_bars(axes[0][0], shown, about["num_sms"])
    annotate(axes[0][0], shown, to_ms - from_ms)
    axes[0][0].set_ylabel("SMs")
    for (ax,), (unit, samples) in zip(axes[1:], power, strict=True):
        ax.plot(*zip(*samples, strict=True), color=INK, linewidth=1)
        ax.set_ylabel(unit)
    axes[-1][0].set_xlim(from_ms, to_ms)
    axes[-1][0].set_xlabel("ms")
    simulated = "SIMULATED: " if about.get("simulated") else ""
    figure.suptitle(f"{simulated}{about['device']}", fontsize=9, x=0.01, ha="left")
    legend(figure, loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    return figure


def save(figure, prefix: Path) -> list[Path]:
    """Writes PREFIX.png and PREFIX.svg, the same bytes each time."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def plotting():
    """matplotlib without a screen, in this house's style. Raises ValueError where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("no picture without matplotlib: pip install 'nanodrift[plots]'") from None
    matplotlib.use("Agg")
    return matplotlib.rc_context(STYLE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py timeline", description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, metavar="TRACE.json")
    parser.add_argument("--from-ms", type=float, default=0.0, metavar="MS", help="since the first piece of work")
    parser.add_argument("--to-ms", type=float, default=float("inf"), metavar="MS")
    parser.add_argument("--to", type=Path, metavar="PREFIX", help="PREFIX.png, .svg; default: beside the trace")
    options = parser.parse_args(argv)
    try:
        with plotting():
            figure = draw(json.loads(options.trace.read_text()), options.from_ms, options.to_ms)
            for path in save(figure, options.to or options.trace.with_suffix("")):
                print(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.py timeline: {error}", file=sys.stderr)
        return 2
    return 0
