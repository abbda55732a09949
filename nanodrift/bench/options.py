"""The options that several modes of bench.py share, and what they describe: a workload, its arrivals, a progress line.

Imports no torch, so that the simulated modes need none.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from nanodrift.bench import traces, workloads
from nanodrift.bench.arrivals import Ramp
from nanodrift.bench.load import Record
from nanodrift.config import SLO, EngineConfig


def key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def about_options() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    about.add_argument("--model", help="alias, hub id or folder; default: the embedded model, or the server's own")
    about.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    about.add_argument("--label", help="a name for this run, stored in the JSON")
    about.add_argument(
        "--metadata", nargs="+", type=key_value, metavar="KEY=VALUE", help="stored in the JSON as they are"
    )
    return about


def add_engine_options(parser: argparse.ArgumentParser, but: tuple[str, ...] = ()) -> None:
    """A flag for each field of EngineConfig that is not in ``but``; what is not given stays out of the result."""
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        if field.name not in (*but, "slo"):
            add_engine_option(group, field)


def add_engine_option(group, field) -> None:
    flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
    more = {"default": argparse.SUPPRESS, "help": f"default {field.default}"}
    if kind.startswith("bool"):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
    else:
        value = int if kind.startswith("int") else float if kind.startswith("float") else str
        group.add_argument(flag, type=value, metavar=field.name.split("_")[-1].upper(), **more)


def positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return float(text)


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value


def header(text: str) -> tuple[str, str]:
    name, separator, value = text.replace(":", "=", 1).partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name.strip(), value.strip()


def tick(text: str) -> float | None:
    return None if text == "auto" else float(text)


def load_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--workload", "--dataset-name", choices=workloads.NAMES, default="random", help="default random")
    what.add_argument("--trace", "--dataset-path", type=Path, metavar="FILE", help="requests from a trace instead")
    what.add_argument("--num-prompts", type=int, metavar="N", help="default 200, or all of a trace")
    what.add_argument(
        "--input-len", "--random-input-len", type=int, metavar="N", help="of random (1024) and steady8k (8000)"
    )
    what.add_argument(
        "--output-len", "--random-output-len", type=int, metavar="N", help="of random and steady8k; default 128"
    )
    what.add_argument("--length-scale", type=positive, default=1.0, metavar="X", help="all lengths times X")
    what.add_argument(
        "--keep-conversations", type=positive, default=1.0, metavar="SHARE", help="of a trace: whole ones, seeded"
    )
    batch, num_in, num_out = (getattr(workloads.BACKGROUND, name) for name in ("batch", "input_len", "output_len"))
    what.add_argument("--decode-batch", type=int, metavar="N", help=f"of steady8k, held at any time; default {batch}")
    what.add_argument("--decode-input-len", type=int, metavar="N", help=f"of its prompts; default {num_in}")
    what.add_argument("--decode-output-len", type=int, metavar="N", help=f"of its answers; default {num_out}")
    what.add_argument("--vocab-size", type=int, default=workloads.NUM_IDS, metavar="N", help="prompt ids lie below it")
    when = parser.add_argument_group("when it is asked")
    when.add_argument(
        "--request-rate", type=positive, metavar="R", help="requests/s; default inf, or the trace's own pace"
    )
    when.add_argument("--burstiness", type=positive, default=1.0, metavar="B", help="gamma shape: 1 Poisson, inf even")
    when.add_argument("--max-concurrency", type=int, metavar="N", help="with rate inf: a closed loop of N")
    when.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    when.add_argument("--ramp-up-start-rps", type=positive, metavar="R")
    when.add_argument("--ramp-up-end-rps", type=positive, metavar="R")
    when.add_argument("--time-scale", type=positive, default=1.0, metavar="X", help="trace arrivals times X")
    when.add_argument(
        "--jitter", type=tick, metavar="S", help="spread a coarse clock's ticks of S seconds; default auto, 0 = off"
    )
    how = parser.add_argument_group("how it is judged and kept")
    how.add_argument("--slo-ttft-ms", type=positive, default=SLO.ttft_ms, metavar="MS")
    how.add_argument("--slo-tbt-ms", type=positive, default=SLO.tbt_ms, metavar="MS", help="P99 of a request's gaps")
    how.add_argument(
        "--drain-s",
        type=positive,
        metavar="S",
        help="in process: what is not done so long after the last arrival is a miss",
    )
    how.add_argument("--save-detailed", action="store_true", help="per-request lists in the JSON (compare needs them)")
    how.add_argument("--csv", type=Path, metavar="FILE", help="append the figures as a line")
    return parser


def server_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    where = parser.add_argument_group("server")
    where.add_argument("--base-url", metavar="URL", help="default http://HOST:PORT")
    where.add_argument("--host", default="127.0.0.1")
    where.add_argument("--port", type=int, default=8000)
    where.add_argument("--endpoint", default="/v1/completions", help="or /v1/chat/completions: prompts as text")
    where.add_argument("--header", type=header, nargs="+", default=[], metavar="NAME=VALUE")
    where.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="joins every request")
    where.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="of a request, from when it is due")
    where.add_argument("--ready-check-timeout-sec", type=float, default=0.0, metavar="S", help="wait for the server")
    where.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false", help="answers may end early")
    where.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before the run; not counted")
    return parser


def run_options(options: dict) -> dict:
    return {
        "burstiness": options["burstiness"],
        "max_concurrency": options["max_concurrency"],
        "num_ids": options["vocab_size"],
    }


def workload_of(options: dict, max_model_len: int | None, seed: int, num_prompts: int | None = None):
    """The workload that the options describe, cut to the window, with notes of what that cost."""
    count = num_prompts or options["num_prompts"]
    if options["trace"]:
        workload = traces.read(options["trace"]).sampled(options["keep_conversations"], seed)
        if workload.has_arrivals:
            workload = workload.jittered(options["jitter"], seed).stretched(options["time_scale"])
        workload = workload.scaled(options["length_scale"]).fitting(max_model_len or 2**31)
        workload = workload.first(count) if count else workload
    else:
        window = max_model_len or 2**31
        default_in, default_out = workloads.FIXED_LENGTHS.get(options["workload"], (1, 1))
        given = {key: options[f"decode_{key}"] for key in ("batch", "input_len", "output_len")}
        background = replace(workloads.BACKGROUND, **{key: value for key, value in given.items() if value})
        workload = workloads.named(
            options["workload"],
            count or 200,
            seed,
            max_model_len=max_model_len,
            length_scale=options["length_scale"],
            input_len=options["input_len"] or min(default_in, window - default_out if window > 4096 else window // 2),
            output_len=options["output_len"] or min(default_out, window // 4),
            background=background,
        )
    if not workload.samples:
        raise ValueError(f"no request of {workload.name} is left: {'; '.join(workload.notes)}")
    return workload


def rate_of(options: dict, workload) -> float | Ramp | None:
    if options["ramp_up_strategy"]:
        if None in (options["ramp_up_start_rps"], options["ramp_up_end_rps"]):
            raise ValueError("a ramp needs --ramp-up-start-rps and --ramp-up-end-rps")
        return Ramp(options["ramp_up_strategy"], options["ramp_up_start_rps"], options["ramp_up_end_rps"])
    default = None if workload.has_arrivals and not options["max_concurrency"] else math.inf
    return options["request_rate"] or default


class Progress:
    """A line on stderr about twice a second: drawing more often would itself be load."""

    def __init__(self, console: Console, total: int, title: str):
        self.console, self.total, self.title = console, total, title
        self.num_done = self.num_failed = 0
        self.shown_s = 0.0

    def __call__(self, record: Record) -> None:
        self.num_done += 1
        self.num_failed += not record.is_completed
        if self.console.is_terminal and time.monotonic() > self.shown_s + 0.5:
            self.shown_s = time.monotonic()
            failed = f", {self.num_failed} failed" if self.num_failed else ""
            self.console.file.write(f"\r{self.title}: {self.num_done} of {self.total} requests{failed} ")
            self.console.file.flush()
