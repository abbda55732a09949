"""Every kernel beside the best library and the chip's limit, over the SM counts of the lanes.

    python bench.py kernels                                  # Llama-3-8B shapes, all operators (about three minutes)
    python bench.py kernels --op gemm --op swiglu --sms 132,96 --model qwen3-8b
    python bench.py kernels --tune                           # tiles that are not shipped, beside what the rules choose
    python bench.py kernels --output results/h200/kernels.json

Each SM count is a real green-context partition, and everything in a row runs in it. Rows time captured graphs over
rotating inputs, ours and the libraries' in turn, medians of rounds; outputs start as NaN and are compared with fp32
mathematics first. Headline rows run again for 1.5 s each, with SM clock and watts. The limit of a row is the longer of
its bytes over the bandwidth that a bulk read reached on as many SMs, and its FLOPs over SMs x 4096 x 1.83 GHz.

``cublas told`` is cuBLAS after cublasSetSmCountTarget with the partition's SM count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from nanodrift.bench import kernel_plots, kernel_tuning
from nanodrift.bench.kernel_cases import MODELS, Case, Maker, cases
from nanodrift.bench.machine import PowerLog, describe
from nanodrift.partition import split_device

FLOPS_PER_SM_CLOCK = 4096  # dense bf16, compute capability 9.0
NOMINAL_HZ = 1.83e9
ROUND_S, ROUNDS, SUSTAINED_S = 4e-3, 3, 1.5
MAX_ERROR = 1.5  # times the library's, both against fp32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", help="one operator; may be repeated (default: all)")
    parser.add_argument("--sms", help="comma-separated SM counts (default: those of the operator's lane)")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b", help="whose shapes")
    parser.add_argument("--output", type=Path, help="write every row as JSON, and plots beside it")
    parser.add_argument("--tune", action="store_true", help="measure tiles that the rules do not choose, too")
    parser.add_argument("--tokens", help="with --tune: comma-separated token counts")
    parser.add_argument("--no-sustained", action="store_true", help="leave out the 1.5 s windows")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.py kernels measures a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    console, device = Console(), torch.device("cuda", 0)
    lanes = Lanes(device)
    with Console(stderr=True).status("compiling"):
        kernel_tuning.warm_up(arguments.model, arguments.tune)
    if arguments.tune:
        return kernel_tuning.main(arguments, lanes, console)
    wanted = None if arguments.sms is None else [int(n) for n in arguments.sms.split(",")]
    rates = {n: lanes.read_rate(n) for n in lanes.sms}
    limits = {n: max(rate for m, rate in rates.items() if m <= n) for n in rates}  # more SMs cannot read less
    console.print("bulk read, TB/s: " + ", ".join(f"{n} SMs {rate / 1e12:.2f}" for n, rate in limits.items()))
    rows = []
    for op, make in cases(Maker(MODELS[arguments.model], device)):
        if arguments.op and op not in arguments.op:
            continue
        case = make()
        for num_sms in case.sms if wanted is None else wanted:
            if num_sms in lanes.sms:
                rows.append(measure(case, num_sms, lanes, limits[num_sms], not arguments.no_sustained))
                console.print(line(rows[-1]), highlight=False)
        del case
        torch.cuda.empty_cache()
    console.print(table(rows))
    if arguments.output:
        result = describe(device) | {"benchmark": "kernels", "model_id": arguments.model, "read_bytes_per_s": limits}
        lines = ",\n".join(json.dumps(row) for row in rows)  # a row a line
        arguments.output.write_text(f'{json.dumps(result)[:-1]},\n"rows": [\n{lines}\n]}}\n')
        kernel_plots.draw(result | {"rows": rows}, arguments.output.with_suffix(""), console)
    wrong = [f"{r['op']} {r['case']} on {r['sms']} SMs" for r in rows if not r["is_right"]]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


class Lanes:
    """One stream for each SM count: the whole chip, and halves of green-context partitions."""

    def __init__(self, device: torch.device, decode_sms: tuple[int, ...] = (16, 32, 48, 64, 96)):
        self.device = device
        self._split = split_device(device, decode_sms)  # holds the contexts
        self.streams = {self._split.num_sms: torch.cuda.Stream(device)}
        for one in self._split.streams:
            self.streams.setdefault(one.partition.decode_sms, one.decode_stream)
            self.streams.setdefault(one.partition.prefill_sms, one.prefill_stream)
        self.sms = sorted(self.streams, reverse=True)

    def capture(self, num_sms: int, calls) -> Graph:
        """A graph of the calls on so many SMs; each has run once before."""
        stream = self.streams[num_sms]
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for call in calls:
                    call()
            graph.replay()
        stream.synchronize()
        return Graph(graph, stream, len(calls))

    def read_rate(self, num_sms: int) -> float:
        """Bytes per second of a bulk read (TMA) on so many SMs, the best of a few shapes of its ring."""
        from nanodrift.bench.yardsticks import SHAPES, bulk_read

        data = torch.randn(1 << 19, 1024, device=self.device, dtype=torch.bfloat16)  # 1 GiB
        size = data.numel() * data.element_size()
        return max(
            size / self.capture(num_sms, [lambda s=s: bulk_read(data, num_sms, s)]).seconds(ROUND_S) for s in SHAPES
        )


@dataclass
class Graph:
    """A captured graph, its stream, and how many calls it holds."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    num_calls: int

    def seconds(self, at_least_s: float) -> float:
        """Seconds of one call, replayed back to back for at least so long."""
        first = self._timed(1)
        return self._timed(max(1, min(10_000, round(at_least_s / first)))) / self.num_calls

    def _timed(self, times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(times):
                self.graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / times / 1e3


@contextlib.contextmanager
def cublas_told(num_sms: int | None):
    """cuBLAS plans for so many SMs (None: for the whole chip). Yields False where the library cannot be told."""
    try:
        library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.split('.')[0]}")
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        told = num_sms is not None and library.cublasSetSmCountTarget(handle, num_sms) == 0
    except OSError:
        yield False
        return
    try:
        yield told
    finally:
        library.cublasSetSmCountTarget(handle, 0)


def measure(case: Case, num_sms: int, lanes: Lanes, read_rate: float, is_sustained: bool) -> dict:
    """One row: ours and every library that can do it, alternating, on so many SMs."""
    sets = range(case.num_sets)
    repeats = max(1, -(-8 // case.num_sets)) if not case.is_sum else 1  # a graph of a few launches at least
    order = [i for _ in range(repeats) for i in sets]
    exact = case.exact()
    error = compare(case.ours(0, num_sms), exact)
    graphs = {"ours": lanes.capture(num_sms, [lambda i=i: case.ours(i, num_sms) for i in order])}
    library_error = None
    for name, call in case.libraries.items():
        for told in (None, num_sms) if "cublas" in name and num_sms != max(lanes.sms) else (None,):
            with contextlib.suppress(RuntimeError), torch.cuda.stream(lanes.streams[num_sms]), cublas_told(told) as ok:
                if ok or told is None:
                    if library_error is None:
                        again = case.exact()  # where both work in place, this starts over
                        library_error = compare(call(-1 if case.op == "attn_prefill" else 0), again)
                    label = name if told is None else name.replace("cublas", "cublas told")
                    graphs[label] = lanes.capture(num_sms, [lambda i=i, call=call: call(i) for i in order])
    del exact
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(graph.seconds(ROUND_S))
    scale = case.num_sets if case.is_sum else 1
    us = {name: median(t) * scale * 1e6 for name, t in times.items()}
    ours = us.pop("ours")
    limit_us = 1e6 * max(case.num_bytes / read_rate, case.num_flops / (num_sms * FLOPS_PER_SM_CLOCK * NOMINAL_HZ))
    row = {
        "op": case.op, "case": case.name, "sms": num_sms, "us": ours, "library_us": us,
        "ratio": min(us.values()) / ours if us else None, "num_bytes": case.num_bytes, "num_flops": case.num_flops,
        "limit_us": limit_us, "limit_share": limit_us / ours, "tb_per_s": case.num_bytes / ours / 1e6,
        "tflops": case.num_flops / ours / 1e6, "error": error, "library_error": library_error,
        "is_right": error == error and error <= max(MAX_ERROR * (library_error or 0.0), 6e-3),
    }  # fmt: skip
    if is_sustained and case.is_headline and num_sms in (max(lanes.sms), 100, 32):
        best = min(us, key=us.get) if us else None
        row["sustained"] = {
            name: sustained(graphs[name], scale, lanes.device) for name in ("ours", best) if name in graphs
        }
    return row


def sustained(graph: Graph, scale: int, device: torch.device) -> dict:
    """Microseconds of one call, back to back for 1.5 s: the last two thirds, when the clock has settled."""
    each, start_s = [], time.perf_counter()
    with PowerLog(device) as power:
        while time.perf_counter() - start_s < SUSTAINED_S:
            each.append(graph.seconds(0.05))
    return {"us": median(each[len(each) // 3 :]) * scale * 1e6} | power.medians()


def compare(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error where ``exact`` says something; partials are summed, tokens compared as numbers."""
    actual = actual.float()
    if actual.dim() == exact.dim() + 1:
        actual = actual.sum(0)
    is_said = ~exact.isnan()
    if exact.shape != actual.shape:
        return float("nan")
    return ((actual - exact)[is_said].norm() / exact[is_said].norm()).item()


def line(row: dict) -> str:
    libraries = "  ".join(f"{name} {us:.1f}" for name, us in row["library_us"].items())
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] else "     "
    right = "" if row["is_right"] else "  WRONG"
    hot = "".join(f"  [{n} {s['us']:.1f} us {s['sm_mhz']:.0f} MHz {s['watts']:.0f} W]" for n, s in
                  row.get("sustained", {}).items() if s["watts"])  # fmt: skip
    return (
        f"{row['op']:<15} {row['case']:<22} {row['sms']:>3} SMs {row['us']:9.1f} us {row['tb_per_s']:5.2f} TB/s "
        f"{row['tflops']:6.1f} TFLOP/s {row['limit_share']:4.0%} of limit  {ratio}  {libraries}{right}{hot}"
    )


def table(rows: list[dict]) -> Table:
    """Geometric means over the shapes of each operator and SM count."""
    result = Table(title="geometric means over shapes")
    for column in ("operator", "SMs", "rows", "share of limit", "vs best library"):
        result.add_column(column, justify="left" if column == "operator" else "right")
    for key in dict.fromkeys((r["op"], r["sms"]) for r in rows):
        mine = [r for r in rows if (r["op"], r["sms"]) == key]
        ratios = [r["ratio"] for r in mine if r["ratio"]]
        shares = geometric([r["limit_share"] for r in mine])
        result.add_row(
            key[0], str(key[1]), str(len(mine)), f"{shares:.0%}", f"{geometric(ratios):.2f}x" if ratios else ""
        )
    return result


def geometric(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def in_parallel(function, jobs: list, processes: int = 15) -> list:
    """Compiles in processes of their own, so that the cache on disk is warm before anything is measured."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, jobs))
