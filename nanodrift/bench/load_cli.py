"""The modes of bench.py that put a load on something: serve, run, goodput, compare, plot.

python bench.py serve --base-url http://127.0.0.1:8000 --workload chat --request-rate 4      any OpenAI-like server
python bench.py run --workload chat --request-rate 4                                         the engine, no HTTP
python bench.py goodput --workload chat --slo-ttft-ms 500 --slo-tbt-ms 50                    the highest rate
python bench.py compare A.json B.json                                                        ratios, intervals
python bench.py plot cdf RUN.json ... | plot attainment GOODPUT.json ...                     PNG, SVG, CSV
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from nanodrift.bench import machine, report, residency, workloads
from nanodrift.bench.client import Server
from nanodrift.bench.goodput import search
from nanodrift.bench.load import Record, run_workload
from nanodrift.bench.options import (
    Progress,
    load_options,
    positive,
    rate_of,
    run_options,
    server_options,
    workload_of,
)
from nanodrift.bench.policies import parse_all
from nanodrift.bench.targets import EngineTarget, SimTarget
from nanodrift.config import SLO
from nanodrift.decision import Mode
from nanodrift.server.trace import Trace

SEARCH_DRAIN_S = 60.0  # of a goodput search: what is not done a minute after the last arrival is a miss
MODES = ("serve", "run", "goodput", "compare", "plot")
TO_FILE_ONLY = ("start_times", "input_lens", "output_lens", "ttfts", "itls", "latencies", "errors", "cdf")


def add_modes(modes, about: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """``about``: model, output, label, metadata. ``common``: these and the engine's options."""
    load, server = load_options(), server_options()
    serve = modes.add_parser("serve", parents=[about, server, load], help="load on a server, by URL")
    serve.add_argument("--seed", type=int, default=0)
    run = modes.add_parser("run", parents=[common, load], help="the same load on the engine in this process")
    run.add_argument(
        "--timeline", type=Path, metavar="FILE", help="what ran when, for ui.perfetto.dev and for timeline"
    )
    find = modes.add_parser("goodput", parents=[common, server, load], help="highest rate with the promises kept")
    find.add_argument("--seeds", type=int, default=3, metavar="N", help="runs at each rate")
    find.add_argument("--tolerance", type=positive, default=0.05, metavar="X", help="width of the final bracket")
    find.add_argument("--max-points", type=int, default=24, metavar="N", help="rates at most")
    find.add_argument("--duration", type=float, default=0.0, metavar="S", help="more requests where a run were shorter")
    compare = modes.add_parser("compare", help="ratios of two runs, with 95%% intervals")
    compare.add_argument("a", metavar="A.json", help="one file, or several seeds: A1.json,A2.json")
    compare.add_argument("b", metavar="B.json")
    plot = modes.add_parser("plot", help="figures from result files")
    plot.add_argument("kind", choices=("cdf", "attainment", "scale", "pareto", "goodput"))
    plot.add_argument("files", nargs="+", type=Path, metavar="RUN.json|DIR", help="a result, or the folder of a sweep")
    plot.add_argument("--rate", metavar="R", help="of a sweep: its points at this rate")
    plot.add_argument("--tbt-ms", type=positive, metavar="MS", help="of a sweep: its points under this promise")
    plot.add_argument("--to", type=Path, metavar="PREFIX", help="PREFIX.png, .svg, .csv; default: beside the file")


def main(mode: str, options: dict, console: Console) -> int:
    """Runs one mode: tables to stderr, the JSON to stdout and to ``--output``. Raises ValueError for a mistake.

    Returns 0, 1 for a run that is void, 130 for one that was interrupted.
    """
    if mode == "compare":
        from nanodrift.bench import compare

        result = compare.compare(*(compare.load(options[side]) for side in "ab"))
        console.print(compare.table(result))
    elif mode == "plot":
        from nanodrift.bench import plots

        written = plots.draw(
            *(options[key] for key in ("kind", "files", "to")), console, options["rate"], options["tbt_ms"]
        )
        result = {"written": [str(path) for path in written]}
    else:
        result = put_load(mode, options, console) | dict(options.get("metadata", ()))
    if "output" in options:
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
        options["output"].parent.mkdir(parents=True, exist_ok=True)
        options["output"].write_text(f"{{\n{lines}\n}}\n")
        result = {key: value for key, value in result.items() if key not in TO_FILE_ONLY}
    print(json.dumps(result))
    return 130 if result.get("interrupted") else 1 if result.get("void") else 0


def put_load(mode: str, options: dict, console: Console) -> dict:
    slo = SLO(options["slo_ttft_ms"], options["slo_tbt_ms"])
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to stop, it writes what it has
    is_server = mode == "serve" or (mode == "goodput" and options["base_url"])
    target = ServerTarget(options, slo) if is_server else InProcess(options, slo, console)
    try:
        result = target.about | conditions(mode, options, slo)
        if mode != "goodput":
            return result | once(target, options, slo, console)
        if not is_server:
            return result | find_all(target, options, console)
        found = find(target, options, console)
        show_goodput(found, console)
        return result | found
    finally:
        signal.signal(signal.SIGTERM, before)
        target.close()


def conditions(mode: str, options: dict, slo: SLO) -> dict:
    rate = options.get("request_rate")
    ramp = {k: options[k] for k in options if k.startswith("ramp_up") and options[k] is not None}
    return {
        "benchmark": mode,
        "label": options.get("label"),
        "workload": options["trace"].name if options["trace"] else options["workload"],
        "request_rate": report.rate_key(rate),
        "burstiness": report.rate_key(options["burstiness"]),
        "max_concurrency": options["max_concurrency"],
        "length_scale": options["length_scale"],
        "slo": asdict(slo),
        **ramp,
    }


class ServerTarget:
    """A server by URL, asked for the first time: it answers, and this is what it takes."""

    def __init__(self, options: dict, slo: SLO):
        names = {"endpoint", "model", "extra_body", "ignore_eos"}
        self.server = Server(
            (options["base_url"] or f"http://{options['host']}:{options['port']}").rstrip("/").removesuffix("/v1"),
            headers=dict(options["header"]),
            timeout_s=options["timeout"],
            **{k: v for k, v in options.items() if k in names},
        )
        self.server.connect(options["ready_check_timeout_sec"])
        self.seed, self.max_model_len, self.slo = options.get("seed", 0), self.server.max_model_len, slo
        self.about = machine.describe(torch.device("cpu")) | {
            "backend": "openai-chat" if self.server.is_chat else "openai",
            "base_url": self.server.base_url,
            "model_id": self.server.model,
            "seed": self.seed,
            "request_form": self.server.form,
        }
        for number in range(options["num_warmups"]):
            warmup = workloads.named("random", 1, input_len=32, output_len=4)
            run_workload(self.server, warmup, math.inf, seed=-1 - number)

    def measure(self, workload, rate, seed: int, options: dict, **more) -> list[Record]:
        return run_workload(self.server, workload, rate, seed, **run_options(options), slo=self.slo, **more)

    def telemetry(self) -> dict:
        return {}

    def close(self) -> None:
        pass


class InProcess:
    """The engine of this process, or the simulated one, under one policy at a time."""

    def __init__(self, options: dict, slo: SLO, console: Console):
        self.specs = parse_all(options["policy"]) if options.get("policy", "auto") != "auto" else []
        if options.get("device") == "sim":
            self.target = SimTarget(options)
        else:
            with console.status("loading and warming up"):
                self.target = EngineTarget(options, self.specs)
        self.specs = self.specs or [self.target.default_policy]
        settings = {"budget_tokens": options.get("chunk_tokens"), "decode_sms": options.get("decode_sms")}
        if "modes" in options:
            settings["modes"] = tuple(Mode(mode) for mode in options["modes"].split(","))
        given = {key: value for key, value in settings.items() if value is not None}
        self.specs = [replace(spec, **given) if ":" not in spec.text else spec for spec in self.specs]
        self.spec, self.slo = self.specs[0], slo
        for spec in self.specs:
            self.engine = self.target.engine_for(spec, slo)  # mistakes come first
        self.seed, self.max_model_len = self.target.seed, self.target.max_model_len
        self.about = self.target.about
        self.power: dict = {}

    def measure(self, workload, rate, seed: int, options: dict, **more) -> list[Record]:
        settings = run_options(options) | {"num_ids": min(options["vocab_size"], self.target.vocab_size)}
        settings["drain_s"] = options["drain_s"] if options["drain_s"] is not None else math.inf
        self.engine = self.target.engine_for(self.spec, self.slo)
        trace = Trace(self.engine) if options.get("timeline") else None
        with self.target.power() as power:
            records = run_workload(
                self.engine, workload, rate, seed, **settings, slo=self.slo, encode=self.target.encode, **more
            )
        if trace is not None:
            samples = () if self.target.is_simulated else power.timed()
            trace.write(options["timeline"], samples, simulated=self.target.is_simulated, policy=self.spec.text)
        tokens = sum(record.num_prompt_tokens + len(record.token_s) for record in records)
        self.power = power.figures(tokens)
        return records

    def telemetry(self) -> dict:
        stats, predictions = self.engine.stats(), self.engine.predictions()
        return {
            "policy": self.spec.text,
            "stats": stats,
            "policy_figures": residency.figures(stats, predictions=predictions, power=self.power),
            "policy_block": residency.block(stats, predictions=predictions, power=self.power),
        }

    def close(self) -> None:
        self.target.close()


def once(target, options: dict, slo: SLO, console: Console) -> dict:
    workload = workload_of(options, target.max_model_len, target.seed)
    for note in workload.notes:
        console.print(f"{workload.name}: {note}", highlight=False, soft_wrap=True)
    progress = Progress(console, len(workload.samples), workload.name)
    records = target.measure(workload, rate_of(options, workload), target.seed, options, advance=progress)
    result = report.result_of(records, slo, workload, options["save_detailed"])
    telemetry = target.telemetry()
    result |= {"notes": workload.notes, **telemetry}
    shown = result | {k: options[k] for k in ("max_concurrency",)}
    rate = options["request_rate"] or ("trace" if workload.has_arrivals else "inf")
    frame = report.frame(shown | {"request_rate": str(rate)}, telemetry.pop("policy_block", ()))
    console.print(f"\r{frame}", highlight=False, markup=False)
    result.pop("policy_block", None)
    if options["csv"]:
        report.append_csv(options["csv"], target.about | conditions("", options, slo) | result)
    return result


def find_all(target: InProcess, options: dict, console: Console) -> dict:
    """The search for each policy; with one of them its result, with several a list and a table."""
    is_simulated, specs = target.target.is_simulated, target.specs
    options = options | {"drain_s": options["drain_s"] or SEARCH_DRAIN_S}
    found = []
    if is_simulated and len(specs) > 1:
        settings = {key: value for key, value in options.items() if key not in ("output", "csv")}
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(specs)), get_context("spawn")) as pool:
            for result in pool.map(find_simulated, [settings | {"policy": spec.text} for spec in specs]):
                show_goodput(result, console)
                found.append(result)
    else:
        for spec in specs:
            target.spec = spec
            found.append({"policy": spec.text} | find(target, options, console))
            show_goodput(found[-1], console)
            if found[-1].get("interrupted"):
                break
    if len(specs) == 1:
        return found[0]
    return {"policies": found, "interrupted": len(found) < len(specs) or found[-1].get("interrupted", False)}


def find_simulated(options: dict) -> dict:
    """One policy's search, in a process of its own."""
    quiet = Console(stderr=True, quiet=True)
    slo = SLO(options["slo_ttft_ms"], options["slo_tbt_ms"])
    target = InProcess(options, slo, quiet)
    return {"policy": target.spec.text} | find(target, options, quiet)


def show_goodput(result: dict, console: Console) -> None:
    for percent in (90, 99):
        if f"max_rate_at_{percent}" not in result:
            continue
        miss = result[f"first_miss_at_{percent}"]
        name = f"{result['policy']}: " if result.get("policy") else ""
        console.print(
            f"{name}goodput at {percent}%: [bold]{result[f'max_rate_at_{percent}']:.3f}[/] requests/s"
            + (f" (first miss at {miss:.3f})" if miss else " (no miss was found)")
            + (", SIMULATED" if result.get("simulated") else ""),
            highlight=False,
            soft_wrap=True,
        )


def find(target, options: dict, console: Console) -> dict:
    notes: dict[str, None] = {}

    def measure(rate: float, seed: int) -> list[Record]:
        count = max(options["num_prompts"] or 200, math.ceil(rate * options["duration"]))
        workload = workload_of(options, target.max_model_len, seed, None if options["trace"] else count)
        notes.update(dict.fromkeys(workload.notes))
        progress = Progress(console, len(workload.samples), f"{rate:.3g} requests/s, seed {seed}")
        fresh = f"{seed}/{rate}"  # a cache that knows the last rate's prompts would flatter this one
        records = target.measure(workload, rate, seed, options, advance=progress, prompt_seed=fresh)
        if len(records) < len(workload.samples):
            raise KeyboardInterrupt
        return records

    def show(point: dict) -> None:
        ttft, tbt = (f"{point[key]:.0f}" if point[key] is not None else "-" for key in ("p99_ttft_ms", "p99_tbt_ms"))
        console.print(
            f"\r{point['request_rate']:8.3f} requests/s: {point['slo_attainment']:7.2%} good "
            f"({point['slo_attainment_min']:.1%} to {point['slo_attainment_max']:.1%}), P99 TTFT {ttft} ms, "
            f"P99 TBT {tbt} ms{', over-saturated' if point['saturated'] else ''}",
            highlight=False,
            soft_wrap=True,
        )

    told = {"simulated": True} if target.about.get("simulated") else {}
    start = options["request_rate"] or 1.0
    seeds = range(target.seed, target.seed + options["seeds"])
    points: list[dict] = []

    def on_point(point: dict) -> None:
        points.append(point)
        show(point)

    limits = {"tolerance": options["tolerance"], "max_points": options["max_points"]}
    try:
        result = search(measure, start, seeds=seeds, **limits, on_point=on_point)
    except KeyboardInterrupt:
        return {"points": points, "is_complete": False, "interrupted": True, "notes": list(notes)} | told
    counts = sorted({point["issued"] for point in result["points"]})
    size = {"requests_per_point": "-".join(map(str, sorted({counts[0], counts[-1]}))), "seeds": len(seeds)}
    telemetry = {key: value for key, value in target.telemetry().items() if key not in ("policy", "policy_block")}
    return result | size | {"notes": list(notes), **telemetry} | told
