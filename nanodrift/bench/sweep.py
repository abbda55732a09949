"""Policies x rates x promises in one process, each point a JSON line that stays when the run is cut.

    python bench.py sweep --model llama-3-8b --load-format dummy --policy mux,chunked-auto,chunked:512,prefill-first \\
        --workload steady8k --rates 80% --slo-tbt-ms 10,20,50 --num-prompts 120 --output DIR
    python bench.py sweep --resume DIR ...       goes on where it stopped
    python bench.py sweep --device sim ...       the same on the simulated H200; ``bench.py sim`` is short for it

The model is loaded once and policies are exchanged between points, in turn within a rate. One seed gives the same
arrivals and the same prompts to every policy. A rate is requests/s; 80% of what prefill-first serves when all prompts
wait at once (``--knee-of`` names another policy); or x0.4: a trace's own pace, arrival times times 0.4. A policy that
does not look at the TBT promise runs once and is judged by each. DIR gets points.jsonl (a line a point), sweep.json
(conditions, cells that are missing, the earlier runs that it went on with) and requests.jsonl (a line a point, lists
over requests: for paired comparisons).

Tables and JSON lines go to stdout, progress to stderr. Simulated rows say so and hold no date and no host: the same
seed prints the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from nanodrift.bench import arrivals, report, residency, two_devices
from nanodrift.bench.load import Record, run_workload
from nanodrift.bench.options import (
    Progress,
    about_options,
    add_engine_options,
    load_options,
    positive,
    workload_of,
)
from nanodrift.bench.policies import PolicySpec, parse, parse_all
from nanodrift.bench.targets import SimTarget, target_of
from nanodrift.bench.workloads import Workload
from nanodrift.config import SLO, ConfigError
from nanodrift.metrics import percentile

FIVE_POLICIES = "mux,chunked-auto,chunked:512,prefill-first,static"
KNEE_PROMPTS = 24  # all at once: enough to fill the prefill lane for seconds
ORIGIN = ("date", "gpu", "driver", "torch", "triton", "git", "argv")  # of a run that another one goes on with
TO_POINTS = ("cdf", "notes", "warnings", "error_counts")  # kept in points.jsonl, not printed


@dataclass(frozen=True)
class Cell:
    """One run: a policy at a rate with a seed. ``tbt_ms`` None: it serves every promise at once."""

    policy: str
    rate: str
    seed: int
    tbt_ms: float | None

    @property
    def title(self) -> str:
        promise = f", TBT {self.tbt_ms:g} ms" if self.tbt_ms is not None else ""
        return f"{self.policy} at {self.rate}/s, seed {self.seed}{promise}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py sweep", description=__doc__, parents=[about_options(), load_options()],
        formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve",
    )  # fmt: skip
    add_engine_options(parser, but=("policy", "modes", "chunk_tokens", "decode_sms"))
    add = parser.add_argument_group("sweep").add_argument
    add("--policy", default=FIVE_POLICIES, metavar="P,P", help=f"default {FIVE_POLICIES}")
    add("--rates", default="2,4,8", metavar="R,R", help="requests/s, or 80%%, or x0.4")
    add("--knee-of", default="prefill-first", metavar="P", help="whose highest stable rate is 100%%")
    add("--slo-tbt-ms", default="20", metavar="MS,MS", help="promises; default 20")
    add("--slo-ttft-per-token-ms", type=float, default=0.0, metavar="MS", help="more TTFT for each prompt token")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each point")
    add("--duration-s", type=positive, metavar="S", help="arrivals for so long at most")
    add(
        "--drain-s",
        type=positive,
        default=60.0,
        metavar="S",
        help="after the last arrival, then what is left is a miss",
    )
    add("--time-limit-s", type=positive, default=math.inf, metavar="S", help="begin no point after so long")
    add("--workers", type=int, metavar="N", help="processes of a simulated sweep; default: the cores")
    parser.set_defaults(workload="sharegpt", drain_s=60.0)
    add("--output", type=Path, metavar="DIR", help="keep every point there")
    add("--resume", type=Path, metavar="DIR", help="go on with a sweep of the same conditions")
    return parser


def main(argv: list[str] | None = None, device: str | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    if device is not None:
        options["device"] = device
    console = Console(stderr=True)
    try:
        sweep = Sweep(options, console)
        return sweep.run()
    except (ConfigError, ValueError) as error:
        print(f"bench.py sweep: {error}", file=sys.stderr)
        return 2


class Sweep:
    """One campaign: its cells, the points that are there, and what is missing."""

    def __init__(self, options: dict, console: Console):
        self.options, self.console = options, console
        self.specs = parse_all(options["policy"])
        self.tbts_ms = [positive(text) for text in options["slo_tbt_ms"].split(",")]
        self.rates = [_checked_rate(text) for text in options["rates"].split(",")]
        self.is_simulated = options.get("device") == "sim"
        self.folder = options["resume"] or options.get("output")
        self.points: list[dict] = []
        self.failures: list[dict] = []
        self.knee: float | None = None
        self.earlier: list[dict] = []  # where points that were there already come from
        seed = options.get("seed", 0)
        self.cells = [
            Cell(spec.text, rate, seed + number, tbt_ms)
            for rate in self.rates
            for number in range(options["seeds"])
            for spec in (self.specs if number % 2 == 0 else self.specs[::-1])
            for tbt_ms in (self.tbts_ms if spec.sees_tbt else [None])
        ]
        self.conditions = {
            key: str(options.get(key))
            for key in ("model", "workload", "trace", "num_prompts", "input_len", "output_len", "length_scale",
                        "decode_batch", "decode_input_len", "decode_output_len", "time_scale", "burstiness",
                        "slo_ttft_ms", "slo_ttft_per_token_ms", "duration_s", "drain_s", "dummy_draw",
                        "prefix_caching", "device")
        }  # fmt: skip
        self._open_folder()

    def _open_folder(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "points.jsonl"
        if not path.exists() or not path.read_text().strip():
            return
        if not self.options["resume"]:
            raise ValueError(f"{path} holds a sweep already: --resume {self.folder} goes on with it")
        old = json.loads((self.folder / "sweep.json").read_text())
        if old["conditions"] != self.conditions:
            other = [key for key in self.conditions if old["conditions"].get(key) != self.conditions[key]]
            raise ValueError(f"{self.folder} holds a sweep of another {', '.join(other)}: choose another folder")
        self.points = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        self.knee = old.get("knee")
        origin = [{key: old[key] for key in ORIGIN}] if "git" in old else []  # simulated: bytes say it all
        self.earlier = old.get("earlier", []) + origin

    @property
    def missing(self) -> list[Cell]:
        there = {_key(point["policy"], point["rate"], point["seed"], point["slo"]["tbt_ms"]) for point in self.points}

        def is_there(cell: Cell) -> bool:
            tbts_ms = self.tbts_ms if cell.tbt_ms is None else [cell.tbt_ms]
            return all(_key(cell.policy, cell.rate, cell.seed, tbt_ms) in there for tbt_ms in tbts_ms)

        return [cell for cell in self.cells if not is_there(cell)]

    def run(self, target=None) -> int:
        """Measures what is missing, on ``target`` or on what the options name; prints rows and a JSON line.

        Returns 0, 1 if a cell failed, 130 if it was interrupted.
        """
        code, result = self.measure(target)
        self._print_end(result)
        return code

    def measure(self, target=None) -> tuple[int, dict]:
        """(exit code, summary), with the rows printed. Closes a target that it made itself."""
        started_s = time.monotonic()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to stop, it keeps what it has
        is_interrupted = False
        with nullcontext() if self.is_simulated else self.console.status("loading and warming up"):
            self.target = target or target_of(self.options, self.specs)
        try:
            for spec in self.specs:
                self.target.engine_for(spec, SLO(tbt_ms=self.tbts_ms[0]))  # mistakes come before the first line
            self._find_knee()
            self._print_head()
            for point in self.points:
                print(row(point), flush=True)
            todo = self.missing
            for number, points in enumerate(self._measured(todo, started_s)):
                if self.console.is_terminal:
                    self.console.file.write(f"\r{'':79}\r{number + 1} of {len(todo)} cells\r")
                for point, lists in points:
                    self._keep(point, lists)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            signal.signal(signal.SIGTERM, before)
            if target is None:
                self.target.close()
        return 130 if is_interrupted else 1 if self.failures else 0, self._write_summary(is_interrupted)

    def _measured(self, todo: list[Cell], started_s: float):
        """The points of each cell in turn, with their lists over requests."""
        workers = self.options["workers"] or os.cpu_count() or 1
        if self.is_simulated and workers > 1 and len(todo) > 1:
            settings = {key: value for key, value in self.options.items() if key not in ("output", "resume")}
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
                yield from pool.map(_simulate_cell, [(settings, cell, self.tbts_ms, self.knee) for cell in todo])
            return
        for cell in todo:
            if time.monotonic() - started_s > self.options["time_limit_s"]:
                self.console.print(f"time is over: {len(self.missing)} cells are missing", highlight=False)
                return
            try:
                yield measure_cell(self.target, cell, self.options, self.tbts_ms, self.knee, self.console)
            except (RuntimeError, KeyError, IndexError, AssertionError, TypeError) as error:
                self.failures.append({"cell": vars(cell), "error": f"{type(error).__name__}: {error}"})
                self.console.print_exception()
                return  # whatever is in flight there, the next policy must not inherit it

    def _find_knee(self) -> None:
        if self.knee is not None or not any(rate.endswith("%") for rate in self.rates):
            return
        self.knee = knee(self.target, parse(self.options["knee_of"]), self.options, self.console)

    def _keep(self, point: dict, lists: dict) -> None:
        self.points.append(point)
        print(row(point), flush=True)
        if self.folder is None:
            return
        for name, data in (("points.jsonl", point), ("requests.jsonl", lists)):
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(data) + "\n")
        self._write_summary(is_interrupted=False)

    def _write_summary(self, is_interrupted: bool) -> dict:
        result = self.target.about | {
            "benchmark": "sweep",
            "label": self.options.get("label"),
            "workload": self._workload_name,
            "conditions": self.conditions,
            "knee": self.knee,
            "knee_of": self.options["knee_of"] if self.knee else None,
            "slo_ttft_ms": self.options["slo_ttft_ms"],
            "slo_tbt_ms": self.tbts_ms,
            "num_points": len(self.points),
            "earlier": self.earlier,
            "missing": [vars(cell) for cell in self.missing],
            "failures": self.failures,
            "interrupted": is_interrupted,
        }
        result |= dict(self.options.get("metadata", ()))
        if self.folder is not None:
            lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
            scratch = self.folder / "sweep.json.new"
            scratch.write_text(f"{{\n{lines}\n}}\n")
            scratch.replace(self.folder / "sweep.json")
        return result

    @property
    def _workload_name(self) -> str:
        return self.options["trace"].name if self.options["trace"] else self.options["workload"]

    def _print_head(self) -> None:
        about = self.target.about
        where = about["gpu"] or about["cpu"]
        simulated = "SIMULATED: " if self.is_simulated else ""
        promise = f"TTFT {self.options['slo_ttft_ms']:g} ms"
        print(f"{simulated}{about['model_id']} on {where.removeprefix('SIMULATED ')}, {self._workload_name}, {promise}")
        if self.knee is not None:
            print(f"100% is {self.knee:.3f} requests/s: what {self.options['knee_of']} serves when all prompts wait")
        print(f"\n{COLUMNS}", flush=True)

    def _print_end(self, result: dict) -> None:
        for failure in self.failures:
            print(f"failed: {Cell(**failure['cell']).title}: {failure['error']}")
        for cell in self.missing:
            print(f"missing: {cell.title}")
        small = {key: value for key, value in result.items() if key not in ("engine", "conditions", "start_s")}
        print(json.dumps(small | {"points": [brief(point) for point in self.points]}))


# ---- one cell --------------------------------------------------------------------------------------------------------


def measure_cell(
    target, cell: Cell, options: dict, tbts_ms: list[float], knee_rate: float | None, console: Console | None = None
) -> list[tuple[dict, dict]]:
    """Runs the cell and returns (point, lists over its requests) for each promise it is judged by.

    Raises KeyboardInterrupt if it was cut short: half a point is none.
    """
    spec = parse(cell.policy)
    slo = SLO(options["slo_ttft_ms"], cell.tbt_ms if cell.tbt_ms is not None else min(tbts_ms))
    rate, workload = rate_and_workload(target, cell, options, knee_rate)
    if spec.num_devices > 1:
        due_s = (
            arrivals.of_trace(workload, rate)
            if workload.has_arrivals
            else arrivals.drawn(len(workload.samples), rate, cell.seed, options["burstiness"])
        )
        records = two_devices.run(target.machine, spec, workload, due_s, slo, cell.seed, options["drain_s"])
        return [
            (point | {"simulated": True, "devices": 2}, lists_of(point, records))
            for point in judged_points(cell, spec, rate, records, slo, workload, tbts_ms)
        ]
    engine = target.engine_for(spec, slo)
    progress = Progress(console, len(workload.samples), cell.title) if console else None
    with target.power() as power:
        records = run_workload(
            engine,
            workload,
            rate,
            cell.seed,
            burstiness=options["burstiness"],
            max_concurrency=options["max_concurrency"],
            num_ids=min(options["vocab_size"], target.vocab_size),
            encode=target.encode,
            slo=slo,
            drain_s=options["drain_s"],
            ttft_per_token_ms=options["slo_ttft_per_token_ms"],
            **({"advance": progress} if progress else {}),
        )
    if sum(not record.is_background for record in records) < len(workload.samples):
        raise KeyboardInterrupt
    policy_figures = residency.figures(engine.stats(), predictions=engine.predictions()) | engine.executor.counters()
    points = []
    for point in judged_points(cell, spec, rate, records, slo, workload, tbts_ms):
        point |= {"simulated": target.is_simulated, **policy_figures}
        point |= power.figures(point["total_input_tokens"] + point["total_output_tokens"])
        points.append((point, lists_of(point, records)))
    return points


def judged_points(cell: Cell, spec: PolicySpec, rate, records, slo: SLO, workload: Workload, tbts_ms) -> list[dict]:
    """The point of the cell's promise; of a cell that serves all promises, one for each."""
    return [
        point_of(cell, spec, rate, [judge(record, tbt_ms) for record in records], replace(slo, tbt_ms=tbt_ms), workload)
        for tbt_ms in ([cell.tbt_ms] if cell.tbt_ms is not None else tbts_ms)
    ]


def judge(record: Record, tbt_ms: float) -> Record:
    """The record under another TBT promise; its TTFT promise may be its own."""
    return replace(record, slo=replace(record.slo, tbt_ms=tbt_ms))


def point_of(
    cell: Cell, spec: PolicySpec, rate: float | None, records: list[Record], slo: SLO, workload: Workload
) -> dict:
    """The figures of one run under one promise, flat; ``report.result_of`` names them."""
    result = report.result_of(records, slo, workload)
    own = [record for record in records if not record.is_background]
    start_s, end_s = own[0].arrival_s, max(record.end_s for record in own)
    if rate is None and own[-1].arrival_s > start_s:  # at a trace's own pace
        rate = len(own) / (own[-1].arrival_s - start_s)
    in_time = [r for r in records if r.token_s and start_s <= r.token_s[0] <= end_s]
    num_tokens = sum(start_s <= token_s <= end_s for record in records for token_s in record.token_s)
    seconds = max(end_s - start_s, 1e-9)
    return {
        "policy": cell.policy,
        "rate": cell.rate,
        "request_rate": rate,
        "seed": cell.seed,
        "judged_only": not spec.sees_tbt,  # the policy did not know of this promise
        "prefill_tokens_per_s": sum(record.num_prompt_tokens for record in in_time) / seconds,
        "decode_tokens_per_s": num_tokens / seconds,
        "own_throughput": sum(record.is_completed for record in own) / seconds,  # without a batch held beside
        **result,
    }


def lists_of(point: dict, records: list[Record]) -> dict:
    """A number a request, in order of arrival, so that two policies can be compared request by request."""
    gaps = [sorted(record.tbt_s) for record in records]

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e3, 3)

    return {
        "policy": point["policy"],
        "rate": point["rate"],
        "seed": point["seed"],
        "slo": point["slo"],
        "start_s": [round(record.arrival_s, 6) for record in records],
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [len(record.token_s) for record in records],
        "ttft_ms": [ms(record.ttft_s) for record in records],
        "mean_gap_ms": [ms(record.tpot_s) for record in records],
        "p99_gap_ms": [ms(percentile(own, 99)) if own else None for own in gaps],
        "max_gap_ms": [ms(own[-1]) if own else None for own in gaps],
        "completed": [int(record.is_completed) for record in records],
        "good": [int(judge(record, point["slo"]["tbt_ms"]).is_good()) for record in records],
        "background": [int(record.is_background) for record in records],
    }


def rate_and_workload(target, cell: Cell, options: dict, knee_rate: float | None) -> tuple[float | None, Workload]:
    """What the cell's rate means, and the workload of its seed at that rate."""
    settings = dict(options)
    if cell.rate.startswith("x"):
        settings["time_scale"], rate = float(cell.rate[1:]), None
    elif cell.rate.endswith("%"):
        rate = float(cell.rate[:-1]) / 100 * knee_rate
    else:
        rate = float(cell.rate)
    count = options["num_prompts"] or (None if options["trace"] else 300)
    if options["duration_s"] and rate is not None:
        count = max(2, min(math.ceil(rate * options["duration_s"]), count if options["num_prompts"] else 10**9))
    return rate, workload_of(settings, target.max_model_len, cell.seed, count)


def knee(target, spec: PolicySpec, options: dict, console: Console) -> float:
    """Requests/s that a policy gets through when all prompts wait at once: above that rate its queue grows forever."""
    engine = target.engine_for(spec, SLO(options["slo_ttft_ms"]))
    workload = workload_of(options, target.max_model_len, target.seed, KNEE_PROMPTS)
    progress = Progress(console, len(workload.samples), f"highest stable rate of {spec.text}")
    num_ids = min(options["vocab_size"], target.vocab_size)
    records = run_workload(
        engine, workload, math.inf, target.seed, prompt_seed="knee", num_ids=num_ids, encode=target.encode,
        advance=progress,
    )  # fmt: skip
    own = [record for record in records if not record.is_background]
    if len(own) < len(workload.samples):
        raise KeyboardInterrupt
    return len(own) / (max(record.token_s[0] for record in own) - own[0].arrival_s)


def _simulate_cell(job: tuple) -> list[tuple[dict, dict]]:
    """In a process of its own: a simulated cell depends on nothing but its options."""
    options, cell, tbts_ms, knee_rate = job
    return measure_cell(SimTarget(options), cell, options, tbts_ms, knee_rate)


def _checked_rate(text: str) -> str:
    number = text.strip().removeprefix("x").removesuffix("%")
    try:
        positive(number)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"a rate is requests/s, such as 4, or 80%, or x0.4 of a trace; got {text!r}") from None
    return text.strip()


def _key(policy: str, rate: str, seed: int, tbt_ms: float) -> tuple:
    return policy, rate, seed, float(tbt_ms)


# ---- for the eye -----------------------------------------------------------------------------------------------------

COLUMNS = (
    "policy                 TBT  req/s   done   good strict | TTFT P50      P99 | TBT P50    P99     max  first | "
    "  in/s  out/s | split fused | idle d    p |    W tok/J"
)
BRIEF = (
    "policy", "rate", "request_rate", "seed", "slo", "simulated", "issued", "completed", "own_throughput",
    "slo_attainment", "slo_attainment_strict", "slo_attainment_own", "median_ttft_ms", "p99_ttft_ms",
    "median_itl_ms", "p99_tbt_ms", "max_tbt_ms", "p99_first_gap_ms", "prefill_tokens_per_s", "decode_tokens_per_s",
    "split_share", "fused_share", "decode_bubble_ratio", "prefill_bubble_ratio", "watts", "tokens_per_joule",
    "saturated",
)  # fmt: skip


def brief(point: dict) -> dict:
    """The point as it stands in the last line."""
    short = {key: point[key] for key in BRIEF if point.get(key) is not None}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in short.items()}


def row(point: dict) -> str:
    """One line of the table: latencies in ms, shares in percent of all issued requests."""

    def cell(key: str, width: int, digits: int = 1, factor: float = 1.0) -> str:
        value = point.get(key)
        return f"{value * factor:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"

    marks = ("  over-saturated" if point["saturated"] else "") + ("  SIMULATED" if point["simulated"] else "")
    return (
        f"{point['policy']:<20} {point['slo']['tbt_ms']:5g} {cell('request_rate', 6, 2)} "
        f"{cell('own_throughput', 6, 2)} {cell('slo_attainment', 6, 1, 100)} "
        f"{cell('slo_attainment_strict', 6, 1, 100)} | {cell('median_ttft_ms', 8)} {cell('p99_ttft_ms', 8)} | "
        f"{cell('median_itl_ms', 7)} {cell('p99_tbt_ms', 6)} {cell('max_tbt_ms', 7)} {cell('p99_first_gap_ms', 6)} | "
        f"{cell('prefill_tokens_per_s', 6, 0)} {cell('decode_tokens_per_s', 6, 0)} | "
        f"{cell('split_share', 5, 0, 100)} {cell('fused_share', 5, 0, 100)} | {cell('decode_bubble_ratio', 6, 1, 100)} "
        f"{cell('prefill_bubble_ratio', 4, 1, 100)} | {cell('watts', 4, 0)} {cell('tokens_per_joule', 5, 1)}"
        f"{marks}"
    )
