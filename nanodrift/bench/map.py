"""Where each way of sharing the device wins: prompt tokens per second within a TBT, predicted everywhere.

    python bench.py map --model llama-3.1-8b                            from the shipped profile; no GPU, no torch
    python bench.py map --model llama-3.1-8b --load-format dummy --measure --output map.json --plot map

Four ways: the two lanes on a split chip; one fused batch, its attentions in sequence; the same with its attentions side
by side where that pays; the chip in turns. Each is sized by the dispatcher's own functions to the largest prompt rate
whose guarded gap between tokens keeps the TBT. Prompts arrive without end, so this is throughput, not TTFT.
``--measure`` runs the corners for real, and says what gap and rate came of what was chosen.

    python bench.py map --model llama-3.1-8b --corun-of calibration.json --output corun.json

adds up, from the windows of a calibration, what both lanes do at once, each as a share of what it does alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from nanodrift.bench import calibrate
from nanodrift.bench.windows import Driver, Shape
from nanodrift.config import ConfigError, ModelConfig
from nanodrift.cost import CostModel, DecodeLoad, Guard, Profile, find_profile, h200_prior, read_profile
from nanodrift.decision import Decision, Load, Mode
from nanodrift.dispatch import Dispatcher
from nanodrift.plan import DECODE_SMS, Partition

TBT_MS = (7, 8, 10, 12, 15, 20, 25, 30, 40, 50)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (8, 16, 32, 64, 128)
PROMPTS = (512, 2048, 8192, 32768)
WAYS = ("split", "fused in sequence", "fused side by side", "exclusive")
CORNERS = tuple(itertools.product((10, 25), ((16, 1024), (64, 1024), (16, 8192), (64, 8192), (16, 32768)), (8192,)))
MAX_KV_TOKENS = 850_000  # what an H200 has room for beside an 8B model
CHUNK_TOKENS = 2048  # of a prefill chunk: max_prefill_tokens of the engine


@dataclass(frozen=True)
class Point:
    tbt_ms: float
    batch: int
    context: int
    prompt: int

    def load(self) -> Load:
        """Half-way through its prompt, for a chunk's cost grows with what came before it."""
        chunk = min(self.prompt, CHUNK_TOKENS)
        start = (self.prompt - chunk) // 2 // 64 * 64
        return Load(DecodeLoad(self.batch, self.batch * self.context), self.tbt_ms / 1e3, 1 << 30, start)


class Ways:
    """The dispatcher, restricted to one way at a time."""

    def __init__(self, config: ModelConfig, profile: Profile, partitions: tuple[Partition, ...]):
        cost, guard = CostModel(config, profile), Guard.of(profile)
        whole = tuple(p for p in partitions if p.is_shared)

        def only(mode: Mode, among: tuple[Partition, ...], most: int = CHUNK_TOKENS) -> Dispatcher:
            return Dispatcher(cost, guard, among, max_prefill_tokens=most, modes=(mode,))

        self.cost = cost
        self.dispatchers = {
            "split": only(Mode.SPLIT, partitions),
            "fused in sequence": only(Mode.FUSED, whole),
            "fused side by side": only(Mode.FUSED, partitions),
            "exclusive": only(Mode.EXCLUSIVE, partitions),
        }

    def best(self, way: str, point: Point) -> Decision | None:
        """None where this way cannot keep the TBT."""
        options = self.dispatchers[way].options(point.load())
        return options[0] if options else None


def predict(ways: Ways) -> list[dict]:
    """Prompt tokens per second of every way at every point; 0 where it cannot keep the TBT."""
    rows = []
    for point in itertools.starmap(Point, itertools.product(TBT_MS, BATCHES, CONTEXTS, PROMPTS)):
        if point.batch * point.context > MAX_KV_TOKENS:
            continue
        best = {way: ways.best(way, point) for way in WAYS}
        rates = {way: round(decision.prompt_tokens_per_s) if decision else 0 for way, decision in best.items()}
        rows.append(vars(point) | rates)
    return rows


def measure(driver: Driver, ways: Ways, window_s: float) -> list[dict]:
    """The corners, each way as the dispatcher sizes it there, for real."""
    rows = []
    for tbt_ms, (batch, context), prompt in CORNERS:
        point = Point(tbt_ms, batch, context, prompt)
        start = point.load().prompt_start
        seen: dict[Shape, dict] = {}
        for way in WAYS:
            decision = ways.best(way, point)
            if decision is None:
                continue
            tokens, contexts = decision.token_chunk, (context,) * batch
            num_slices = max(1, min(8, tokens // prompt)) if start == 0 else 1
            prompts = ((tokens // num_slices, start),) * num_slices
            is_fused = decision.mode is Mode.FUSED
            shape = Shape(decision.partition, contexts, prompts, 0 if is_fused else decision.layers, is_fused)
            if not driver.has_room(shape):
                continue
            if shape not in seen:
                seen[shape] = driver.run(shape, window_s).summary(driver.num_layers)
            row = {"way": way, "predicted_gap_ms": 1e3 * decision.step_s, "predicted": decision.prompt_tokens_per_s}
            rows.append(vars(point) | row | seen[shape])
    return rows


def corun(rows: list[dict]) -> list[dict]:
    """Sums of rates: what both lanes do at once, each as a share of what it does alone on the whole chip."""
    alone: dict[tuple, dict] = {}
    for row in rows:
        if row["shared"] and not row["fused"]:
            key = (0, 0) if row["prompts"] else (row["batch"], _context(row))
            alone[(*key, str(row["prompts"]))] = row
    found = []
    for row in rows:
        if not (row["batch"] and row["prompts"]):
            continue
        decode, prefill = alone.get((row["batch"], _context(row), "[]")), alone.get((0, 0, str(row["prompts"])))
        if decode is None or prefill is None:
            continue
        shares = row["steps_per_s"] / decode["steps_per_s"], row["prompt_tokens_per_s"] / prefill["prompt_tokens_per_s"]
        way = "fused" if row["fused"] else "split"
        found.append(
            {"way": way, "decode_sms": row["decode_sms"], "batch": row["batch"], "context": _context(row)}
            | {"prompts": row["prompts"], "decode_share": round(shares[0], 3), "prefill_share": round(shares[1], 3)}
            | {"sum": round(sum(shares), 3), "sm_mhz": row["sm_mhz"], "watts": row["watts"]}
        )
    return found


def _context(row: dict) -> int:
    """Of one request, as the window named it: contexts grow by some tokens while it runs."""
    return 1024 * round(row["context_tokens"] / row["batch"] / 1024)


def winners(rows: list[dict]) -> dict[str, int]:
    """At how many points split, fused or taking turns is best by more than 2%; and where side by side helped fusing."""
    found = dict.fromkeys(("split", "fused", "exclusive", "within 2%", "no way keeps the TBT", "side by side helps"), 0)
    for row in rows:
        rates = {"split": row["split"], "fused": row["fused side by side"], "exclusive": row["exclusive"]}
        second, first = sorted(rates.values())[1:]
        best = max(rates, key=rates.get)
        found["no way keeps the TBT" if first == 0 else best if second < 0.98 * first else "within 2%"] += 1
        found["side by side helps"] += row["fused side by side"] > 1.02 * row["fused in sequence"]
    return found


def write(path: Path, about: dict, profile: Profile, rows: list[dict], measured: list[dict]) -> None:
    head = about | {"profile": profile.name, "ways": WAYS, "winners": winners(rows)}
    lines = ",\n  ".join(map(json.dumps, measured)), ",\n  ".join(map(json.dumps, rows))
    text = f'{{{json.dumps(head)[1:-1]},\n "measured": [\n  {lines[0]}\n ],\n "predicted": [\n  {lines[1]}\n ]}}\n'
    path.write_text(text)


def title_of(profile: Profile) -> str:
    return f"Predicted from the profile {profile.name!r}; rings: measured. Prompts of 8k tokens without end."


def draw(rows: list[dict], measured: list[dict], path: Path, title: str) -> None:
    """Rates over the TBT, one panel for each batch and context; measured corners as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from nanodrift.bench.plots import COLORS, DASHES, FAINT, INK

    panels_of, prompt = ((16, (1024, 8192, 32768)), (64, (1024, 4096, 8192))), 8192
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
             "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "svg.hashsalt": "nanodrift", "svg.fonttype": "none", "savefig.dpi": 140}  # fmt: skip
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True)
        shown = [(batch, context) for batch, contexts in panels_of for context in contexts]
        for (batch, context), panel in zip(shown, panels.flat, strict=True):
            here = [r for r in rows if (r["batch"], r["context"], r["prompt"]) == (batch, context, prompt)]
            for way, color, dash in zip(WAYS, COLORS, DASHES, strict=False):
                points = [(r["tbt_ms"], r[way] / 1e3) for r in here if r[way]]
                panel.plot(*zip(*points, strict=True) if points else ([], []), color=color, ls=dash, lw=1.6, label=way)
                ran = [m for m in measured if (m["way"], m["batch"]) == (way, batch)]
                ran = [m for m in ran if (m["context"], m["prompt"]) == (context, prompt)]
                marks = [(m["tbt_ms"], m["prompt_tokens_per_s"] / 1e3) for m in ran]
                panel.plot(*zip(*marks, strict=True) if marks else ([], []), "o", mfc="none", color=color, ms=6)
            panel.set_title(f"{batch} requests at {context // 1024}k", fontsize=9)
            panel.set_ylim(bottom=0)
        for panel in panels[-1]:
            panel.set_xlabel("TBT promise, ms")
        for panel in panels[:, 0]:
            panel.set_ylabel("prompt tokens/s, thousands")
        panels.flat[0].legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
        figure.tight_layout()
        for suffix in ("png", "svg"):
            target = path.with_name(f"{path.name}.{suffix}")
            figure.savefig(target, metadata={"Date": None} if suffix == "svg" else None)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = calibrate.parser("map", __doc__)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="default: the one shipped for an H200")
    parser.add_argument("--measure", action="store_true", help="run the corners, on this GPU")
    parser.add_argument("--corun-of", type=Path, metavar="WINDOWS", help="of bench.py calibrate --windows")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PREFIX", help="writes PREFIX.png and PREFIX.svg")
    options = parser.parse_args(argv)
    try:
        return _write_corun(options) if options.corun_of else _run(options)
    except ConfigError as error:
        print(f"bench.py map: {error}", file=sys.stderr)
        return 2


def _write_corun(options: argparse.Namespace) -> int:
    kept = json.loads(options.corun_of.read_text())
    sums = corun(kept.pop("windows"))
    for row in sums:
        print(
            f"{row['batch']:>4} x {row['context']:>6}, decode on {row['decode_sms']:>3} SMs, {row['way']:<6} "
            f"{row['decode_share']:.3f} + {row['prefill_share']:.3f} = {row['sum']:.3f}"
        )
    if options.output:
        head = json.dumps(kept | {"what": "rate beside the other lane over the rate alone on the whole chip"})[1:-1]
        lines = ",\n  ".join(map(json.dumps, sums))
        options.output.write_text(f'{{{head}, "sums": [\n  {lines}\n]}}\n')
    return 0


def _run(options: argparse.Namespace) -> int:
    console, measured, about = Console(stderr=True), [], {}
    if options.measure:
        driver, config, about = calibrate.open_device(options)
    else:
        config = calibrate.read_config(options.model)
    gpu = about.get("gpu", "NVIDIA H200")
    profile = (
        read_profile(options.profile) if options.profile else find_profile(gpu, config, "bfloat16") or h200_prior()
    )
    splits = tuple(Partition(profile.num_sms - n, n) for n in DECODE_SMS)
    partitions = (Partition(profile.num_sms, profile.num_sms, is_shared=True), *splits)
    ways = Ways(config, profile, driver.executor.partitions if options.measure else partitions)
    rows = predict(ways)
    if options.measure:
        measured = measure(driver, ways, calibrate.WINDOW_S)
    counts = winners(rows)
    console.print(f"best of {len(rows)} points by profile {profile.name!r}: {counts}")
    for row in measured:
        error = row["prompt_tokens_per_s"] / row["predicted"] - 1
        console.print(
            f"TBT {row['tbt_ms']:g} ms, {row['batch']} x {row['context']}, prompt {row['prompt']}, {row['way']}: "
            f"{row['prompt_tokens_per_s']:,.0f} tokens/s ({100 * error:+.0f}%), gap {row['gap_ms']['p99']:.1f} ms"
        )
    if measured:
        errors = [abs(row["prompt_tokens_per_s"] / row["predicted"] - 1) for row in measured]
        console.print(f"median error of the predicted rate {100 * median(errors):.1f}%")
    if options.output:
        write(options.output, about, profile, rows, measured)
    if options.plot:
        draw(rows, measured, options.plot, title_of(profile))
    return 0
