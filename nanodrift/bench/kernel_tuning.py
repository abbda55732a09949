"""Compiles what ``bench.py kernels`` needs in parallel, and measures tiles that the kernels' rules do not choose.

A candidate is timed together with what follows it in a decode step (residual, norm), so that split-K partials have
their price. Printed beside each other: cuBLAS, what the rule chose, the best candidates. The tables of tiles in
kernels/ are literals: a candidate that wins is entered there, with its cost, by hand.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median

import torch

from nanodrift.bench.kernel_cases import MODELS, Case, Maker
from nanodrift.kernels import gemm, gemm_skinny, swiglu

S, T = gemm_skinny.SkinnyTile, gemm.Tile
SKINNY = (  # as SkinnyTile: rows, columns, k, warps, stages, programs on an SM
    *gemm_skinny.TILES,
    S(16, 64, 128, 4, 6, 2), S(16, 128, 128, 4, 5, 1), S(16, 128, 128, 4, 3, 2), S(16, 64, 256, 4, 3, 2),
    S(32, 128, 128, 4, 5, 1), S(32, 128, 64, 4, 5, 2), S(32, 64, 64, 4, 8, 2),
    S(64, 128, 64, 4, 4, 2), S(64, 128, 64, 4, 8, 1), S(64, 128, 128, 8, 4, 1), S(64, 256, 64, 8, 4, 1),
    S(64, 256, 64, 4, 4, 1),
    S(64, 64, 64, 4, 6, 2), S(64, 128, 64, 8, 8, 1),
    S(128, 128, 64, 4, 6, 1), S(128, 128, 128, 8, 3, 1), S(128, 256, 64, 8, 4, 1), S(128, 64, 64, 4, 4, 2),
    S(128, 128, 64, 4, 3, 2),
)  # fmt: skip
GEMM = (
    *gemm.TILES,
    T(128, 192, 64, 8, 5, 3, 0), T(128, 192, 64, 8, 4, 3, 0), T(128, 96, 64, 8, 6, 3, 0), T(256, 192, 64, 8, 3, 3, 0),
    T(128, 128, 64, 8, 6, 1, 0), T(128, 128, 64, 4, 3, 1, 0, 2), T(128, 64, 64, 4, 4, 1, 0, 2),
    T(64, 128, 64, 4, 4, 1, 0, 2), T(256, 128, 64, 8, 4, 1, 0), T(256, 128, 64, 8, 4, 2, 0),
)  # fmt: skip
SWIGLU = (
    *swiglu.TILES, *swiglu.FEW_ROWS_TILES, *swiglu.FEW_ROWS_FEW_SMS_TILES,
    T(64, 128, 64, 8, 4, 1, 0), T(64, 64, 64, 4, 4, 1, 0, 2), T(64, 64, 128, 4, 4, 1, 0), T(128, 128, 64, 8, 4, 1, 0),
    T(128, 64, 64, 8, 6, 1, 0), T(64, 64, 64, 4, 8, 1, 0), T(128, 32, 64, 4, 4, 1, 0, 2),
)  # fmt: skip


def warm_up(model: str, is_tuning: bool, processes: int = 15) -> None:
    """Every kernel compiled once, in processes of their own: what follows finds it in Triton's cache on disk."""
    jobs = [("skinny", t) for t in (SKINNY if is_tuning else gemm_skinny.TILES)]
    jobs += [("gemm", t) for t in (GEMM if is_tuning else gemm.TILES)]
    shipped = (*swiglu.TILES, *swiglu.FEW_ROWS_TILES, *swiglu.FEW_ROWS_FEW_SMS_TILES)
    jobs += [("swiglu", t) for t in dict.fromkeys(SWIGLU if is_tuning else shipped)]
    jobs += [("case", (model, i)) for i in range(len(_small_cases(model, make=False)))]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, problem in zip(jobs, pool.map(_compile, jobs), strict=True):
            if problem:
                print(f"does not compile: {job}: {problem}")


def _small_cases(model: str, make: bool = True) -> list:
    maker = Maker(MODELS[model], torch.device("cuda")) if make else None
    return [
        lambda: maker.prefill(1, 64), lambda: maker.decode([100], ""), lambda: maker.norm(64), lambda: maker.norm(1, 4),
        lambda: maker.norm(64, 2), lambda: maker.norm(300, 1), lambda: maker.rope(4, 4), lambda: maker.rope(4, 2),
        lambda: maker.rope(300, 1), lambda: maker.sample(1),
    ]  # fmt: skip


def _compile(job) -> str | None:
    kind, what = job
    half = {"device": "cuda", "dtype": torch.bfloat16}
    try:
        if kind == "case":
            _small_cases(what[0])[what[1]]().ours(0, 4)
            return None
        x, w = torch.zeros(16, 512, **half), torch.zeros(512, 512, **half)
        if kind == "skinny":
            gemm_skinny.gemm_skinny(x, w, num_sms=4, tile=what, num_splits=1)
        elif kind == "swiglu":
            swiglu.gemm_swiglu(x, w, num_sms=4, tile=what)
        else:
            out = torch.zeros(16, 512, **half)
            gemm.gemm(x, w, out=out, num_sms=4, tile=what)
            gemm.gemm(x, w, out=out, residual=out, num_sms=4, tile=what)
            gemm.gemm(x, w, out=out.float(), num_sms=4, tile=what)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit is no candidate
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def main(arguments, lanes, console) -> int:
    maker, rows = Maker(MODELS[arguments.model], lanes.device), []
    sms = [int(n) for n in arguments.sms.split(",")] if arguments.sms else None
    wanted = arguments.op or ["gemm_skinny", "gemm", "swiglu"]
    tokens = [int(n) for n in arguments.tokens.split(",")] if arguments.tokens else None
    if "gemm_skinny" in wanted:
        for name in ("qkv", "o", "down", "head"):
            for M in tokens or (1, 32, 64, 128):
                rows += tune(maker.product(name, M), skinny_options(name, M), lanes, sms or (132, 64, 32, 16), console)
    if "gemm" in wanted:
        for name in ("qkv", "o", "down"):
            for M in tokens or (192, 256, 384, 512, 768, 1024):
                rows += tune(maker.product(name, M), gemm_options(name, M), lanes, sms or (132, 100, 84, 68), console)
    if "swiglu" in wanted:
        for M in tokens or (1, 32, 64, 128, 192, 256, 384, 512, 768, 1024):
            counts = sms or ((132, 64, 32, 16) if M <= 128 else (132, 100, 84, 68))
            rows += tune(maker.swiglu(M), swiglu_options(M), lanes, counts, console)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows) + "\n")
    return 0


def skinny_options(name: str, M: int) -> list[dict]:
    block_m = max(16, 1 << (M - 1).bit_length())
    splits = (1,) if name == "head" else (1, 2, 3, 4, 6, 8)
    return [{"tile": t, "splits": s} for t in SKINNY if t.block_m == block_m for s in splits]


def gemm_options(name: str, M: int) -> list[dict]:
    options = [{"tile": t} for t in GEMM]
    if M <= 256:
        options += [{"tile": t, "splits": s} for t in SKINNY if t.block_m == 128 for s in (1, 2, 3, 4)]
    return options


def swiglu_options(M: int) -> list[dict]:
    block_m = max(16, 1 << (M - 1).bit_length())
    tiles = [t for t in dict.fromkeys(SWIGLU) if t.block_m <= max(64, block_m)]
    return [{"tile": t} for t in tiles if isinstance(t, T) or t.block_m >= M]


def tune(case: Case, options: list[dict], lanes, sms, console) -> list[dict]:
    """Times every option on every SM count and prints the best beside the rule's choice and cuBLAS."""
    rows = []
    order = list(range(case.num_sets)) * max(1, -(-8 // case.num_sets))
    consumer = {"consumer": True} if case.op == "gemm_skinny" and not case.name.startswith("head") else {}
    for num_sms in sms:
        timed = []
        for option in [{}, *options]:
            case.options.clear()
            case.options.update(option | consumer)
            try:
                graph = lanes.capture(num_sms, [partial(case.ours, i, num_sms) for i in order])
                timed.append([graph.seconds(1e-3), option, graph])
            except Exception as error:
                rows.append({"case": case.name, "sms": num_sms, "option": repr(option), "error": str(error)[:80]})
        rule = timed[0]
        best = sorted(timed[1:], key=lambda one: one[0])[:4]
        library = lanes.capture(num_sms, [partial(next(iter(case.libraries.values())), i) for i in order])
        for one in (rule, *best):
            one[0] = [one[0]]
        base = []
        for _ in range(3):
            base.append(library.seconds(2e-3))
            for one in (rule, *best):
                one[0].append(one[2].seconds(2e-3))
        us = {id(one): median(one[0]) * 1e6 for one in (rule, *best)}
        best.sort(key=lambda one: us[id(one)])
        rows.append({
            "op": case.op, "case": case.name, "sms": num_sms, "library_us": median(base) * 1e6, "rule_us": us[id(rule)],
            "best": [[us[id(one)], short(one[1])] for one in best],
            "all": [[one[0] if isinstance(one[0], float) else one[0][0], short(one[1])] for one in timed],
        })  # fmt: skip
        gain = us[id(rule)] / us[id(best[0])]
        console.print(
            f"{case.op:<12} {case.name:<12} {num_sms:>3} SMs  library {median(base) * 1e6:7.1f}  "
            f"rule {us[id(rule)]:7.1f}  best {us[id(best[0])]:7.1f} ({gain:.2f}x) {short(best[0][1])}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        del timed, best, rule, library
    case.options.clear()
    return rows


def short(option: dict) -> str:
    tile = option.get("tile")
    text = "rule" if tile is None else f"{'k' if isinstance(tile, S) else 'g'}{tuple(tile)[:6]}"
    if isinstance(tile, T):
        text += f"x{tile.programs_per_sm}"
    return text + (f"/{option['splits']}" if "splits" in option else "")
