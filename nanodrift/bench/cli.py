"""The command line of bench.py: loads an engine, measures, prints tables to stderr and one JSON line to stdout.

    python bench.py                      no GPU: the embedded model on this CPU, then five policies on a simulated H200;
                                         a GPU: both measured there, on dummy Llama-3-8B weights
    python bench.py throughput           offline: all prompts at once, fixed lengths
    python bench.py latency              prefill by length and decode step by batch, each beside its roofline
    python bench.py sweep | sim          policies x rates x promises in one process; the same on a simulated H200
    python bench.py campaign | versus    several sweeps on one engine; a policy of a sweep against the others
    python bench.py explain              the scheduler on a simulated H200: each decision as a line
    python bench.py serve | run          a workload or trace on a server, or on the engine in this process
    python bench.py goodput              the highest request rate with the latency promises kept
    python bench.py compare | plot       two runs side by side; figures
    python bench.py timeline             what ran when on how many SMs: draws the file of run --timeline
    python bench.py tables               writes README.md's tables and figure anew from results/*.json

Engine options (``--device``, ``--load-format``, ...) are the fields of nanodrift/config.py's EngineConfig.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from statistics import fmean, median
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanodrift.bench import first_look, load_cli, machine, offline, tables
from nanodrift.bench.options import about_options, add_engine_options
from nanodrift.bench.roofline import Ceilings, Load, decode_load, prefill_load
from nanodrift.bench.targets import SimTarget
from nanodrift.config import SLO, ConfigError, EngineConfig
from nanodrift.metrics import percentile
from nanodrift.startup import LoadedEngine, load_engine, resolve_device

PLAN = {  # what is measured when no flag says otherwise; lengths that do not fit the model's window are left out
    "cuda": {
        "num_prompts": 512,
        "input_len": 1024,
        "output_len": 128,
        "prefill": ["512", "2048", "8000", "4x2048"],
        "batches": [1, 16, 64, 128, 256],
        "context": 1024,
        "decode_steps": 128,
        "repeats": 7,
        "window_s": 1.5,
    },
    "cpu": {
        "num_prompts": 16,
        "input_len": 128,
        "output_len": 64,
        "prefill": ["128", "512", "4x128"],
        "batches": [1, 4, 16],
        "context": 256,
        "decode_steps": 32,
        "repeats": 5,
        "window_s": 0.0,
    },
}
PLAN["sim"] = PLAN["cuda"] | {"repeats": 1, "window_s": 0.0}  # nothing varies  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    about = about_options()
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=[about])
    add_engine_options(common)
    offline_load = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("num-prompts", "input-len", "output-len"):
        offline_load.add_argument(f"--{name}", type=int, metavar="N")
    shapes = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shapes.add_argument("--prefill", nargs="*", metavar="RxN", help="prompt lengths, e.g. 512 4x2048")
    shapes.add_argument("--batches", nargs="*", type=int, metavar="B", help="decode batches")
    shapes.add_argument("--context", type=int, metavar="N", help="prompt tokens of every decoding request")
    shapes.add_argument("--decode-steps", type=int, metavar="N", help="steps in the timed window")
    shapes.add_argument("--repeats", type=int, metavar="N", help="prefills of each length; the median counts")

    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, parents=[common, offline_load, shapes],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    modes = parser.add_subparsers(dest="mode", metavar=" | ".join(("throughput", "latency", *load_cli.MODES, "tables")))
    modes.add_parser("throughput", parents=[common, offline_load], help="offline tokens per second")
    modes.add_parser("latency", parents=[common, shapes], help="prefill and decode step times")
    load_cli.add_modes(modes, about, common)
    parser.add_argument("--no-sweep", action="store_true", default=argparse.SUPPRESS, help="no policies")
    check = modes.add_parser("tables", help="README.md from results/")
    check.add_argument("--check", action="store_true", help="change nothing; fail if README.md is out of date")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    mode = options.pop("mode") or "smoke"
    if mode == "tables":
        return tables.main(check=options["check"])
    console = Console(stderr=True)
    try:
        if mode in load_cli.MODES:
            return load_cli.main(mode, options, console)
        if mode == "smoke" and "no_sweep" not in options and options.get("device") != "sim":
            result = first_look.main(options, console)
        else:
            result = measure(mode, options, console)
    except (ConfigError, ValueError) as error:
        console.print(f"[red]bench.py:[/] {error}", highlight=False)
        return 2
    if "output" in options:
        options["output"].parent.mkdir(parents=True, exist_ok=True)
        options["output"].write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if "error" in result else 0


def measure(mode: str, options: dict, console: Console, then: Callable[[LoadedEngine], dict] | None = None) -> dict:
    """Loads the engine, runs one mode and returns the result; prints tables on the way.

    What ``then`` makes of the engine before it is closed joins the result.
    """
    names = {field.name for field in fields(EngineConfig)}
    is_simulated = options.get("device") == "sim"
    given = {k: v for k, v in options.items() if k in names and not (is_simulated and k == "device")}
    usual = {"prefix_caching": False}  # every token asked for is computed
    if mode == "latency":
        usual["policy"] = "prefill-first"  # no row decodes while others are prefilled: contexts stay of one length
    config = EngineConfig.from_options(**(usual | given))
    device = SIM_DEVICE if is_simulated else resolve_device(config.device)
    with Display(console) as display:
        if is_simulated:
            loaded, ceilings, ceiling_figures = simulated(options)
        else:
            loaded, ceilings, ceiling_figures = load(options.get("model"), config, device, display)
        plan = PLAN[device.type] | {k: v for k, v in options.items() if k in PLAN[device.type]}
        plan = fit(plan, loaded.max_model_len, config.max_num_seqs, given=options)
        result = {
            **(loaded.about if is_simulated else machine.describe(device)),
            "benchmark": mode,
            "label": options.get("label"),
            "model_id": loaded.about["model_id"] if is_simulated else options.get("model", "embedded"),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "max_model_len": loaded.max_model_len,
            "num_kv_tokens": loaded.num_kv_tokens,
            "seed": config.seed,
            "engine": asdict(config),
            "start_s": loaded.phases_s,
            "ceilings": ceiling_figures,
        }
        try:
            if mode in ("smoke", "throughput"):
                result |= run_throughput(loaded, plan, config.seed, device, display)
            if mode in ("smoke", "latency"):
                result |= {"prefill": [], "decode": []}
                run_prefill(loaded, plan, config.seed, device, ceilings, display, result["prefill"])
                run_decode(loaded, plan, config.seed, device, ceilings, display, result["decode"])
        except Exception as error:  # device time is dear: what was measured before is shown and kept
            result["error"] = f"{type(error).__name__}: {error}"
            if not isinstance(error, ValueError):
                console.print_exception()
        result["stats"] = loaded.engine.stats()
    show(result, console)
    try:
        result |= then(loaded) if then is not None and "error" not in result else {}
    finally:
        loaded.engine.close()
    if "error" in result:
        console.print(f"[red]bench.py: stopped early:[/] {result['error']}", highlight=False)
    return result | dict(options.get("metadata", ()))


class Display:
    """What is being measured, as a bar on stderr. Drawn only when told to: a drawing thread would cost timed steps."""

    def __init__(self, console: Console):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show(self, text: str, total: int | None = None, done: int = 0) -> None:
        self._bar.update(self._task, description=text, total=total, completed=done, refresh=True)


def load(model: str | None, config: EngineConfig, device, display: Display) -> tuple[LoadedEngine, Ceilings, dict]:
    """The engine, warm, and the device's ceilings.

    On a GPU they are measured first, while its memory is free; on a CPU afterwards, with the threads the engine uses.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    display.show("measuring the device's ceilings")
    measured = machine.measure_ceilings(device, dtype) if device.type == "cuda" else None
    loaded = load_engine(model, config, lambda phase, done: display.show(f"loading: {phase}", 100, round(100 * done)))
    display.show("warming up")
    offline.throughput(loaded.engine, num_prompts=2, input_len=32, output_len=4, seed=config.seed + 1)
    measured = measured or machine.measure_ceilings(device, dtype)
    return loaded, *measured


SIM_DEVICE, SIM_DTYPE = SimpleNamespace(type="sim"), torch.bfloat16


def simulated(options: dict) -> tuple[SimpleNamespace, Ceilings, dict]:
    """The simulated engine with what the modes ask of a loaded one, and the peaks of its profile."""
    target = SimTarget({k: v for k, v in options.items() if k != "max_prefill_tokens"} | {"prefix_caching": False})
    engine = target.engine_for(target.default_policy, SLO())
    profile, num_sms = target.machine.cost.profile, target.machine.cost.profile.num_sms
    peaks = Ceilings(profile.weight_bytes_per_s.at(num_sms), profile.flops_per_s.at(num_sms))
    loaded = SimpleNamespace(
        engine=engine, about=target.about, model_config=target.machine.model_config, dtype=SIM_DTYPE,
        max_model_len=target.max_model_len, num_kv_tokens=target.about["num_kv_tokens"], phases_s={},
    )  # fmt: skip
    return loaded, peaks, {"read_gb_per_s": peaks.bytes_per_s / 1e9, "matmul_tflops": peaks.flops_per_s / 1e12}


def fit(plan: dict, max_model_len: int, max_num_seqs: int, given: dict) -> dict:
    """The plan without the default lengths and batches that this model or engine has no room for; given ones stay."""
    fitted = {
        "context": min(plan["context"], max_model_len // 2),
        "input_len": min(plan["input_len"], max_model_len // 2),
        "output_len": min(plan["output_len"], max_model_len // 4),
        "prefill": [shape for shape in plan["prefill"] if parse_shape(shape)[1] < max_model_len],
        "batches": [batch for batch in plan["batches"] if batch <= max_num_seqs],
    }
    return plan | {k: v for k, v in fitted.items() if k not in given}


def parse_shape(shape: str) -> tuple[int, int]:
    """'4x2048' is four prompts of 2,048 tokens, '512' one of 512."""
    count, _, length = shape.rpartition("x")
    if not length.isdigit() or (count and not count.isdigit()):
        raise ValueError(f"a prefill shape is N or RxN, such as 512 or 4x2048; got {shape!r}")
    return int(count or 1), int(length)


def run_throughput(loaded: LoadedEngine, plan: dict, seed: int, device: torch.device, display: Display) -> dict:
    load = {key: plan[key] for key in ("num_prompts", "input_len", "output_len")}
    num_done = 0

    def advance(num_finished: int) -> None:
        nonlocal num_done
        num_done += num_finished
        if num_finished:
            display.show("throughput: requests", plan["num_prompts"], num_done)

    display.show("throughput: requests", plan["num_prompts"])
    with machine.PowerLog(device) as power:
        result = offline.throughput(loaded.engine, **load, seed=seed, advance=advance)
    return result | power.medians()


def run_prefill(loaded: LoadedEngine, plan: dict, seed: int, device, ceilings: Ceilings, display: Display, rows: list):
    """Appends a row for each shape of the plan."""
    for shape in plan["prefill"]:
        count, length = parse_shape(shape)
        times = []
        with machine.PowerLog(device) as power:
            while len(times) <= plan["repeats"] or sum(times) < plan["window_s"]:  # as hot as under steady load
                display.show(f"prefill {shape}", plan["repeats"] + 1, len(times))
                times.append(offline.prefill_s(loaded.engine, count, length, seed=seed + 1000 * len(times) + length))
        times = times[1:]  # the first one warms up
        row = {"shape": shape, "num_tokens": count * length, "repeats": len(times),
               "ms": median(times) * 1e3, "min_ms": min(times) * 1e3,
               "max_ms": max(times) * 1e3, "tokens_per_s": count * length / median(times)}  # fmt: skip
        floor = prefill_load(loaded.model_config, loaded.dtype.itemsize, [length] * count)
        rows.append(row | beside_roofline(row["ms"], floor, ceilings) | power.medians())


def run_decode(loaded: LoadedEngine, plan: dict, seed: int, device, ceilings: Ceilings, display: Display, rows: list):
    """Appends a row for each batch of the plan."""
    for done, batch in enumerate(plan["batches"]):
        display.show(f"decode, batch {batch}", len(plan["batches"]), done)
        with machine.PowerLog(device) as power:
            steady = offline.steady_decode(loaded.engine, batch, plan["context"], plan["decode_steps"], seed + batch,
                                           on_steady=power.samples.clear)  # fmt: skip
        row = {"batch": batch, "context": plan["context"], "mean_context": round(steady.mean_context, 1),
               "steps": len(steady.gaps_s), "ms": median(steady.gaps_s) * 1e3, "mean_ms": fmean(steady.gaps_s) * 1e3,
               "p99_ms": percentile(steady.gaps_s, 99) * 1e3, "tokens_per_s": batch / fmean(steady.gaps_s),
               "preemptions": steady.num_preemptions}  # fmt: skip
        floor = decode_load(loaded.model_config, loaded.dtype.itemsize, batch, steady.mean_context)
        rows.append(row | beside_roofline(row["ms"], floor, ceilings) | power.medians())


def beside_roofline(ms: float, load: Load, ceilings: Ceilings) -> dict:
    floor_ms = load.floor_s(ceilings) * 1e3
    return {"roofline_ms": floor_ms, "roofline_share": floor_ms / ms, "bound_by": load.bound_by(ceilings)}


def show(result: dict, console: Console) -> None:
    """The tables for people."""
    where = result["gpu"] or result["cpu"]
    torch_version = f", torch {result['torch']}" if "torch" in result else ""
    console.print(f"\n[bold]{result['model_id']}[/] on {where}{torch_version}", highlight=False)
    if "output_throughput" in result:
        console.print(
            f"throughput: {result['num_prompts']} requests of {result['input_len']} tokens in, {result['output_len']} "
            f"out: [bold]{result['output_throughput']:,.0f}[/] output tokens/s, "
            f"{result['total_token_throughput']:,.0f} in all, {result['duration']:.2f} s",
            highlight=False,
        )
    for title, key, worst, rows in (
        ("prefill of an idle engine", "shape", "max_ms", result.get("prefill", ())),
        ("decode step", "batch", "p99_ms", result.get("decode", ())),
    ):
        table = Table(title=title, title_justify="left")
        for column in (key, "ms", worst.replace("_", " "), "tokens/s", "roofline ms", "of it", "bound", "MHz", "W"):
            table.add_column(column, justify="right")
        for row in rows:
            figures = (
                f"{row['ms']:.2f}",
                f"{row[worst]:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['roofline_ms']:.2f}",
            )
            power = [f"{row[name]:.0f}" if row[name] is not None else "" for name in ("sm_mhz", "watts")]
            table.add_row(str(row[key]), *figures, f"{row['roofline_share']:.0%}", row["bound_by"], *power)
        if rows:
            console.print(table)


if __name__ == "__main__":
    sys.exit(main())
