"""``python bench.py`` without a mode: how fast this machine is, what five policies make of it, and what to run next.

No GPU: throughput and latency of the embedded model on the CPU, measured; then a sweep of five policies over request
rates for Llama-3-8B on an H200, simulated and saying so in every row; under a minute. With a GPU: both measured, on
Llama-3-8B shapes with dummy weights if they fit, else on the embedded model; under five minutes. Everything is kept in
``bench-out/``.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nanodrift.bench import plots, sweep
from nanodrift.bench.targets import EngineTarget
from nanodrift.hub import free_memory_bytes
from nanodrift.startup import LoadedEngine, resolve_device

FOLDER = Path("bench-out")
SLO_MS = (2000, 20)  # TTFT, TBT
ROOM_BYTES = 24 << 30  # Llama-3-8B in bf16, its graphs and a cache worth measuring with
SIMULATED = ("--device", "sim", "--model", "llama-3-8b", "--rates", "2,4,6,8,10", "--num-prompts", "150")
MEASURED = ("--rates", "4,8", "--duration-s", "10", "--drain-s", "8", "--time-limit-s", "170")
NEXT = """
next:
  python bench.py goodput --device sim --slo-ttft-ms 2000 --slo-tbt-ms 20     the highest rate that keeps your promises
  python bench.py explain                                                     why the scheduler decides as it does
  python serve.py, then python bench.py serve --workload chat --request-rate 4     a server, from outside
"""


def main(options: dict, console: Console) -> dict:
    """The measured result, with the sweep under ``sweep``; prints tables and names the plot."""
    from nanodrift.bench import cli

    device = resolve_device(options.get("device", "auto"))
    if device.type == "cuda" and "model" not in options and free_memory_bytes(device) > ROOM_BYTES:
        options = options | {"model": "llama-3-8b", "load_format": "dummy"}
    has_policies = device.type == "cuda"
    result = cli.measure(
        "smoke", options, console, lambda loaded: measured_sweep(loaded, options, console) if has_policies else {}
    )
    if not has_policies and "error" not in result:
        result |= run_sweep(SIMULATED, console, None)
    console.print(NEXT, highlight=False, soft_wrap=True)
    return result


def measured_sweep(loaded: LoadedEngine, options: dict, console: Console) -> dict:
    return run_sweep(MEASURED, console, EngineTarget(options, loaded=loaded))


def run_sweep(arguments: tuple[str, ...], console: Console, target: EngineTarget | None) -> dict:
    """Five policies over some rates, drawn as attainment against rate; the points in short."""
    for name in ("points.jsonl", "requests.jsonl", "sweep.json"):
        (FOLDER / name).unlink(missing_ok=True)
    promises = ("--slo-ttft-ms", str(SLO_MS[0]), "--slo-tbt-ms", str(SLO_MS[1]))
    parser = sweep.build_parser()
    campaign = sweep.Sweep(vars(parser.parse_args([*arguments, *promises, "--output", str(FOLDER)])), console)
    print()
    _, summary = campaign.measure(target)
    if not campaign.points:
        return {"sweep": {"points": [], "missing": summary["missing"]}}
    written = plots.draw("attainment", [FOLDER], FOLDER / "attainment", console)
    console.print(f"\nplot: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    short = {key: summary[key] for key in ("simulated", "gpu", "model_id", "workload", "missing")}
    return {"sweep": short | {"points": [sweep.brief(point) for point in campaign.points]}, "plot": str(written[-1])}
