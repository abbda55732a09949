"""Measures what work costs on this machine, and writes the profile that cost.py predicts from.

    python bench.py calibrate --model llama-3-8b --load-format dummy
    python bench.py calibrate --model llama-3-8b --quick --output profile.json --windows windows.json

At most five minutes for an 8B model on an H200. About 120 steady windows (windows.py): decode alone on every SM count a
partition gives it, by batch and context; prefill alone likewise, by tokens and what came before them; fused steps; then
both lanes side by side on every partition, where each lane's slowdown is what the guard starts from. Clocks and watts
are kept with every window: a window in which the GPU drew little is worth nothing.

``fit`` is arithmetic on the windows' summaries, so a profile can be made again from ``--windows FILE``, without a GPU:

    python bench.py calibrate --model llama-3-8b --from windows.json --output profile.json
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nanodrift.bench.windows import Driver, Shape
from nanodrift.config import ConfigError, ModelConfig
from nanodrift.cost import (
    ATTENTION_ROWS_PER_SM,
    LONE_TILE,
    SHAPE,
    Cell,
    CostModel,
    Curve,
    DecodeLoad,
    Guard,
    Observer,
    PrefillLoad,
    Profile,
    h200_prior,
)
from nanodrift.plan import DECODE_SMS, FUSED_TOKENS, Lane, Partition, padded_tokens

WINDOW_S, QUICK_WINDOW_S = 1.5, 0.5
LIGHT = 0.55  # of a window, where only decode runs: it draws too little for the clock to fall
FASTER = 0.15  # of the slower of two attentions: how long the faster takes at least, to tell what it costs the other
HOST_BOUND = 1.15  # a chunk that takes less than this over its launches was waiting for the host
K = 1024


# ---- what is measured ------------------------------------------------------------------------------------------------


def shapes(partitions: Iterable[Partition], is_quick: bool = False) -> list[Shape]:
    """Every window; ``is_quick`` leaves out sizes between others."""
    whole = next(p for p in partitions if p.is_shared)
    splits = [p for p in partitions if not p.is_shared]
    found = []
    for partition in (whole, *splits):
        found += [Shape(partition, (K,) * batch) for batch in (1, 16, 32, 48, 64, 96, 128, 256)]
        found += [Shape(partition, (8 * K,) * batch) for batch in (16, 64)]
        sizes = (256, 512, K, 2 * K) if is_quick else (256, 512, 768, K, 1536, 2 * K)
        found += [Shape(partition, prompts=((n, 0),)) for n in sizes]
        found += [Shape(partition, prompts=((128, 0),) * 16), Shape(partition, prompts=((2 * K, 6 * K),))]
    found += [Shape(whole, (4 * K,) * 128), Shape(whole, (32 * K,) * 16), Shape(whole, prompts=((512, 6 * K),))]
    found += [Shape(whole, prompts=((128, 6 * K),)), Shape(whole, prompts=((2 * K, 30 * K),))]
    for size in FUSED_TOKENS[1::2] if is_quick else FUSED_TOKENS:  # a graph each: their products take time in steps
        found.append(Shape(whole, (K,) * 16, ((min(size - 16, 2 * K), 0),), is_fused=True))
    for size, context, start in ((128, 8 * K, 6 * K), (320, 8 * K, 6 * K), (256, 2 * K, 3 * K), (512, 2 * K, 3 * K)):
        for partition in (whole, *splits):
            found.append(Shape(partition, (context,) * 64, ((size - 64, start),), is_fused=True))
    for partition in splits:
        for batch, context in ((16, K), (32, K), (64, K), (128, K), (16, 8 * K), (64, 8 * K)):
            found.append(Shape(partition, (context,) * batch, ((2 * K, 0),), layers=4))
        found.append(Shape(partition, (K,) * 64, ((512, 0),), layers=12))
        found.append(Shape(partition, (8 * K,) * 16, ((2 * K, 6 * K),), layers=2))
    return found


def measure(driver: Driver, wanted: list[Shape], window_s: float, console: Console) -> list[dict]:
    columns = TextColumn("[dim]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("windows", total=len(wanted))
        for shape in wanted:
            if driver.has_room(shape):
                window = driver.run(shape, window_s * (LIGHT if shape.lanes == (Lane.DECODE,) else 1))
                if window.is_enough:
                    rows.append(window.summary(driver.num_layers))
            progress.advance(task)
    return rows


# ---- what is made of it ----------------------------------------------------------------------------------------------


def fit(rows: list[dict], config: ModelConfig, num_sms: int, about: dict) -> Profile:
    """The profile whose predictions come nearest to these windows; see cost.py for what its fields mean."""
    alone = [row for row in rows if not row["fused"] and not (row["batch"] and row["prompts"])]
    decode, prefill = [r for r in alone if r["batch"]], [r for r in alone if r["prompts"]]
    itemsize = 2
    model = CostModel(config, h200_prior(), itemsize)  # for what depends on the model's shape alone
    kv_bytes, head_share = config.num_kv_values_per_token * itemsize, model._head_share

    kv_s = {sms: _slope(of, lambda r: (r["batch"], r["context_tokens"], r["step_ms"]["p50"] / 1e3))
            for sms, of in _by(decode, "decode_sms").items()}  # fmt: skip
    passes: dict[int, dict[int, float]] = defaultdict(dict)  # seconds, by tokens and SMs
    for sms, of in _by(decode, "decode_sms").items():
        for row in sorted(of, key=lambda row: -row["context_tokens"]):  # of two windows of a batch the shorter context
            step_s = row["step_ms"]["p50"] / 1e3 - kv_s[sms] * row["context_tokens"]
            passes[row["batch"]][sms] = step_s / (1 + head_share)

    flops_per_pair = 4 * config.num_heads * config.head_dim * config.num_layers
    seen = {  # a chunk's seconds without its head, by SMs and prompts
        (row["prefill_sms"], tuple(map(tuple, row["prompts"]))): row["chunk_ms"]["p50"] / 1e3
        - head_share / _rate(passes[1]).at(row["prefill_sms"])
        for row in prefill
        if row["chunk_ms"]["p50"] > HOST_BOUND * row["host_ms_per_layer"] * row["layers"]  # else the host was timed
    }
    # Attention slows with the clock as products do, so it is one share of their rate: the difference of two windows
    # says little on its own.
    many, whole, late = ((128, 0),) * 16, ((2 * K, 0),), ((2 * K, 6 * K),)
    causal, prefix = [], []
    for sms in sorted({sms for sms, _ in seen}):
        many_s, whole_s, late_s = (seen.get((sms, prompts), 0.0) for prompts in (many, whole, late))
        causal.append(flops_per_pair * (2 * K) ** 2 / 2 * 15 / 16 / max(whole_s - many_s, 1e-9) * many_s)
        prefix.append(flops_per_pair * 2 * K * 6 * K / max(late_s - whole_s, 1e-9) * many_s)
    causal = {sms: median(causal) / s for (sms, prompts), s in seen.items() if prompts == many}
    prefix = {sms: median(prefix) / s for (sms, prompts), s in seen.items() if prompts == many}
    for (sms, prompts), chunk_s in seen.items():
        (n, start), *others = prompts
        if start == 0 and not others and sms not in passes[n]:
            full_tokens = LONE_TILE * sms * ATTENTION_ROWS_PER_SM / config.num_heads
            attention_s = flops_per_pair * n * max(n / 2 / causal[sms], full_tokens / prefix[sms])  # as cost.py has it
            passes[n][sms] = chunk_s - attention_s
    passes[4 * K] = {
        sms: 2 * s for sms, s in passes[2 * K].items()
    }  # not measured: what lies beyond goes in proportion
    passes = {n: of for n, of in sorted(passes.items()) if num_sms in of}
    host_s = [row["host_ms_per_layer"] / 1e3 for row in prefill if row["prompts"][0][0] == 256]
    prior = h200_prior()
    profile = Profile(
        name=f"{about['gpu']}, calibrated",
        num_sms=num_sms,
        weight_bytes_per_s=prior.weight_bytes_per_s,
        flops_per_s=prior.flops_per_s,
        kv_bytes_per_s=_curve({sms: kv_bytes / s for sms, s in kv_s.items()}),
        attention_flops_per_s=_curve(causal),
        prefix_flops_per_s=_curve(prefix),
        step_overhead_s=0.0,
        fork_join_s=prior.fork_join_s,
        host_launch_s=round(median(host_s), 7) if host_s else 0.0,
        passes=tuple((n, _rate(of)) for n, of in passes.items()),
        settled_clock=_settled_clock(rows),
        gpu=about["gpu"],
        dtype=about["dtype"],
        model={key: getattr(config, key) for key in SHAPE},
        conditions=about["conditions"] | _drawn(rows),
    )
    profile = _fit_fused(profile, config, [row for row in rows if row["fused"]])
    return replace(profile, factors=factors(CostModel(config, profile), rows))


def _fit_fused(profile: Profile, config: ModelConfig, rows: list[dict]) -> Profile:
    """What a step costs more for being fused; rows of the table between those known; the price of being side by side.

    Products take time in steps (a few more tokens can cost another wave of tiles), which is why those rows matter.
    Their cells on fewer SMs lie on the straight line between their neighbours.
    """
    missed: dict[int, list[float]] = defaultdict(list)
    model = CostModel(config, profile)
    for row in rows:
        prefill, decode = loads(row)
        num_tokens = padded_tokens(prefill.num_tokens + decode.batch, is_fused=True)
        if row["shared"]:
            missed[num_tokens].append(row["step_ms"]["p50"] / 1e3 - predicted_s(model, row, Lane.DECODE))
    passes, least_s = dict(profile.passes), float("inf")
    over_s = max(0.0, median([s for num_tokens, of in missed.items() if num_tokens in passes for s in of] or [0.0]))
    for num_tokens, seconds in sorted(missed.items(), reverse=True):
        products_s = model.products_s(num_tokens, profile.num_sms)
        least_s = min(least_s, median(seconds) + products_s - over_s)  # fewer tokens never take longer
        known = {sms: model.products_s(num_tokens, sms) for sms, _ in passes[2 * K].points}
        passes.setdefault(num_tokens, _rate(known | {profile.num_sms: least_s}))
    profile = replace(profile, passes=tuple(sorted(passes.items())), fused_overhead_s=round(over_s, 6))
    model, shares = CostModel(config, replace(profile, beside_share=0.0)), []
    for row in rows:
        prefill, decode = loads(row)
        num_tokens = padded_tokens(prefill.num_tokens + decode.batch, is_fused=True)
        prefill_s = model._prefill_attention_s(prefill, num_tokens, row["prefill_sms"])
        faster_s, slower_s = sorted((prefill_s, model._decode_attention_s(decode, row["decode_sms"])))
        if not row["shared"] and faster_s > FASTER * slower_s:
            shares.append((row["step_ms"]["p50"] / 1e3 - predicted_s(model, row, Lane.DECODE)) / faster_s)
    return replace(profile, beside_share=round(min(max(median(shares), 0.0), 1.0), 3)) if shares else profile


def factors(cost: CostModel, rows: list[dict]) -> tuple[tuple, ...]:
    """The guard's cells: mean and worst (P99 of a window's steps) of actual over predicted; the worst window counts."""
    cells: dict[tuple, list[tuple[float, float, int]]] = defaultdict(list)
    for row in rows:
        prefill, decode = loads(row)
        cell = Cell.of(prefill, decode, row["decode_sms"], row["fused"])
        for lane, key in ((Lane.DECODE, "step_ms"), (Lane.PREFILL, "chunk_ms")):
            if key in row:
                solo_ms = 1e3 * predicted_s(cost, row, lane)
                cells[lane, cell].append((row[key]["mean"] / solo_ms, row[key]["p99"] / solo_ms, row[key]["num"]))
    found = []
    for (lane, cell), seen in sorted(cells.items(), key=str):
        mean, worst = fmean(s[0] for s in seen), max(s[1] for s in seen)
        found.append((lane.value, *cell, round(mean, 4), round(worst, 4), sum(s[2] for s in seen)))
    return tuple(found)


def loads(row: dict) -> tuple[PrefillLoad, DecodeLoad]:
    decode = DecodeLoad(row["batch"], row.get("context_tokens", 0))
    return Shape(None, prompts=tuple(map(tuple, row["prompts"]))).chunk, decode


def predicted_s(cost: CostModel, row: dict, lane: Lane) -> float:
    """Solo seconds of a window's step: of the whole chunk for prefill, its head only where it went in one piece."""
    prefill, decode = loads(row)
    if row["fused"]:
        return cost.fused_s(prefill, decode, row["prefill_sms"], row["decode_sms"])
    if lane is Lane.DECODE:
        return cost.decode_s(decode, row["decode_sms"])
    is_whole = row["layers"] == cost.num_layers
    return cost.prefill_s(prefill if is_whole else prefill._replace(num_sampled=0), row["prefill_sms"])


def _by(rows: list[dict], key: str) -> dict[int, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return dict(sorted(found.items()))


def _slope(rows: list[dict], point) -> float:
    """Seconds a token of context: between the shortest and the longest contexts of each batch, long ones weigh more."""
    by_batch = defaultdict(list)
    for row in rows:
        batch, tokens, seconds = point(row)
        by_batch[batch].append((tokens, seconds))
    pairs = [(min(of), max(of)) for of in by_batch.values() if len(of) > 1]
    return sum(b[1] - a[1] for a, b in pairs) / sum(b[0] - a[0] for a, b in pairs)


def _curve(values: dict[int, float]) -> Curve:
    return Curve(tuple((sms, float(f"{value:.5g}")) for sms, value in sorted(values.items())))


def _rate(seconds: dict[int, float]) -> Curve:
    return _curve({sms: 1 / s for sms, s in seconds.items()})


def _settled_clock(rows: list[dict]) -> Curve:
    """Of passes over the whole device, by the next power of two of their prompt tokens."""
    known, seen = [row for row in rows if row["sm_mhz"]], defaultdict(list)
    highest = max((row["sm_mhz"] for row in known), default=0)
    for row in known:
        if row["shared"] and row["prompts"]:
            seen[1 << (loads(row)[0].num_tokens - 1).bit_length()].append(row["sm_mhz"] / highest)
    return _curve({1: 1.0} | {num_tokens: round(median(of), 3) for num_tokens, of in seen.items()})


def _drawn(rows: list[dict]) -> dict:
    known = [row for row in rows if row["watts"]]
    if not known:
        return {}
    watts, clocks = [row["watts"] for row in known], [row["sm_mhz"] for row in known]
    return {
        "watts": [min(watts), median(watts), max(watts)],
        "sm_mhz": [min(clocks), median(clocks), max(clocks)],
    }


def write_profile(profile: Profile, path: Path) -> None:
    """JSON, a row of a table on a line."""
    raw = {key: value.points if isinstance(value, Curve) else value for key, value in vars(profile).items()}
    raw["passes"] = [[num_tokens, curve.points] for num_tokens, curve in profile.passes]
    lines = []
    for key, value in raw.items():
        is_table = isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple)
        text = ",\n  ".join(json.dumps(row) for row in value) if is_table else json.dumps(value)
        lines.append(f' "{key}": [\n  {text}\n ]' if is_table else f' "{key}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


# ---- how good it is, on work it was not fitted on --------------------------------------------------------------------


def check(driver: Driver, profile: Profile, config: ModelConfig, num: int, window_s: float, seed: int = 0) -> dict:
    """Random batches, contexts, prompts, side by side, fused and alone; predicted before each step is seen."""
    draw = random.Random(seed)
    cost, guard = CostModel(config, profile), Guard.of(profile)
    observer, windows = Observer(cost, guard), []
    whole, *splits = driver.executor.partitions
    most = min(driver.executor.num_blocks * 60, 400 * K)
    while len(windows) < num:
        batch = draw.choice((3, 6, 11, 20, 28, 45, 80, 110, 150))
        typical = draw.choice((300, 700, 1500, 3000, 6000))
        contexts = tuple(int(typical * draw.uniform(0.3, 1.8)) + 2 for _ in range(batch))
        prompt = draw.randrange(100, 2000), draw.choice((0, 0, 1000, 3000, 5500))
        prompts = (prompt,) if draw.random() < 0.6 else ((prompt[0] // 3, prompt[1]), (prompt[0] // 2, 0))
        kind, partition = draw.choice(("beside",) * 4 + ("fused",) * 2 + ("decode", "prefill")), draw.choice(splits)
        if kind == "beside":
            chunk = Shape(partition, prompts=prompts).chunk
            piece_s = cost.prefill_s(chunk, partition.prefill_sms) / driver.num_layers
            step_s = cost.decode_s(DecodeLoad(batch, sum(contexts)), partition.decode_sms)
            shape = Shape(partition, contexts, prompts, layers=max(1, min(driver.num_layers, round(step_s / piece_s))))
        elif kind == "fused":
            small = tuple((max(1, n // 2), r) for n, r in prompts)
            shape = Shape(draw.choice((whole, partition)), contexts, small, is_fused=True)
        else:
            shape = Shape(whole, contexts) if kind == "decode" else Shape(whole, prompts=prompts)
        if sum(contexts) > most or not driver.has_room(shape):
            continue
        window = driver.run(shape, window_s)
        for completion in sorted((c for s in window.stretches for c in s), key=lambda c: c.finished_s):
            observer.observe(completion)
        if window.is_enough:
            windows.append(window.summary(driver.num_layers))
    return {"kinds": observer.report(), "num_windows": len(windows), "window_s": window_s, "windows": windows}


# ---- the command line ------------------------------------------------------------------------------------------------


def read_config(model: str) -> ModelConfig:
    """By alias from what is shipped, without torch; else through the hub."""
    shipped = Path(__file__).parent.parent / "configs" / model
    if shipped.is_dir():
        return ModelConfig.from_folder(shipped)
    from nanodrift import hub

    return ModelConfig.from_folder(hub.resolve_model(model, "dummy"))


def open_device(options: argparse.Namespace, green_contexts: bool = True) -> tuple[Driver, ModelConfig, dict]:
    """A driver of the GPU's executor, its KV cache full of noise; the model's shape; what it runs on."""
    import torch

    from nanodrift import hub
    from nanodrift.bench import machine
    from nanodrift.gpu import GpuExecutor
    from nanodrift.model import Model
    from nanodrift.startup import resolve_device
    from nanodrift.weights import dummy_weights, load_weights, resolve_dtype

    device = resolve_device("auto")
    if device.type != "cuda":
        raise ConfigError("there is nothing to calibrate on a CPU: its engine takes turns and needs no costs")
    folder = hub.resolve_model(options.model, options.load_format)
    config = ModelConfig.from_folder(folder, options.max_model_len)
    dtype, max_model_len = resolve_dtype("auto", config, device), options.max_model_len or config.max_position
    is_dummy = options.load_format == "dummy"
    weights = (dummy_weights if is_dummy else functools.partial(load_weights, folder))(config, device, dtype)
    executor = GpuExecutor(
        Model(config, weights, max_model_len),
        num_rows=256,
        max_model_len=max_model_len,
        max_prefill_tokens=2048,
        decode_sms=DECODE_SMS,
        **({} if green_contexts else {"green_contexts": False}),
    )
    kv = executor._runners[Lane.DECODE].kv
    for cache in (*kv.k, *kv.v):
        cache.normal_()
    torch.cuda.synchronize()
    described = machine.describe(device)
    about = {
        "gpu": described["gpu"],
        "dtype": str(dtype).removeprefix("torch."),
        "conditions": {key: described[key] for key in ("driver", "torch", "triton", "git")},
    }
    return Driver(executor, config.vocab_size, functools.partial(machine.PowerLog, device)), config, about


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"bench.py {name}", description=doc.splitlines()[0])
    made.add_argument("--model", required=True, help="alias, hub id or folder")
    made.add_argument("--load-format", default="auto", choices=("auto", "dummy"), help="dummy: random weights")
    made.add_argument("--max-model-len", type=int, metavar="N")
    return made


def main(argv: list[str] | None = None) -> int:
    options = parser("calibrate", __doc__)
    add = options.add_argument
    add("--output", type=Path, metavar="FILE", help="the profile; default: profiles/, where later runs find it")
    add("--windows", type=Path, metavar="FILE", help="keep what was measured")
    add("--from", type=Path, dest="source", metavar="FILE", help="fit what was kept, measure nothing")
    add("--quick", action="store_true", help="shorter windows: about 100 s, less exact")
    add("--check", type=int, default=0, metavar="N", help="then predict N random windows, and print how well")
    add("--check-output", type=Path, metavar="FILE")
    options = options.parse_args(argv)
    console = Console(stderr=True)
    try:
        return _run(options, console)
    except ConfigError as error:
        print(f"bench.py calibrate: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.source:
        kept = json.loads(options.source.read_text())
        driver, config, rows, about = None, read_config(options.model), kept["windows"], kept
    else:
        driver, config, about = open_device(options)
        window_s = QUICK_WINDOW_S if options.quick else WINDOW_S
        rows = measure(driver, shapes(driver.executor.partitions, options.quick), window_s, console)
        if options.windows:
            lines = ",\n  ".join(json.dumps(row) for row in rows)
            head = json.dumps(about | {"num_sms": driver.executor.partitions[0].decode_sms})[1:-1]
            options.windows.write_text(f'{{{head}, "windows": [\n  {lines}\n]}}\n')
    num_sms = kept["num_sms"] if options.source else driver.executor.partitions[0].decode_sms
    profile = fit(rows, config, num_sms, about)
    shape = f"{config.num_layers}x{config.hidden_size}-{config.intermediate_size}-{config.vocab_size}"
    name = f"{about['gpu'].lower().replace(' ', '-')}-{shape}-{about['dtype']}.json"
    path = options.output or Path(__file__).parent.parent / "profiles" / name
    write_profile(profile, path)
    console.print(f"{len(rows)} windows, {path}")
    if options.check and driver:
        found = check(driver, profile, config, options.check, WINDOW_S)
        for kind, figures in found["kinds"].items():
            console.print(kind, {key: round(value, 4) for key, value in figures.items()})
        if options.check_output:
            options.check_output.write_text(json.dumps(about | found, indent=1) + "\n")
    return 0
