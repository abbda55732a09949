"""Which passes are captured as CUDA graphs at start-up, and the capturing.

A graph has fixed sizes and addresses, so work is padded to one of a few shapes and its metadata lies where the graph
expects it (batch.py, runner.py). Decode steps and fused steps are one graph each: launching them costs the host next
to nothing. A prefill goes through the layers in pieces of any number, so each of its layers is a graph of its own.

Knows shapes, streams and memory pools; what is captured it is handed as a function. Captures allocate from pools that
live as long as their graphs, so nothing is allocated when they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from nanodrift.batch import PassShape
from nanodrift.plan import DECODE_ROWS, FUSED_TOKENS, MAX_FUSED_SLICES, MAX_FUSED_TOKENS, PREFILL_TOKENS

FUSED_ROWS = (64, 128, 256)  # rows that do not decode cost attention a little, and products nothing


def decode_shapes(num_rows: int) -> tuple[PassShape, ...]:
    return tuple(PassShape(rows, 0, rows, rows) for rows in _up_to(DECODE_ROWS, num_rows))


def prefill_shapes(max_prefill_tokens: int) -> tuple[PassShape, ...]:
    slices = MAX_FUSED_SLICES
    return tuple(PassShape(tokens, slices, 0, slices) for tokens in PREFILL_TOKENS if tokens <= max_prefill_tokens)


def fused_shapes(max_prefill_tokens: int, num_rows: int) -> tuple[PassShape, ...]:
    """The smallest first."""
    slices = MAX_FUSED_SLICES
    most_tokens = min(min(MAX_FUSED_TOKENS, max_prefill_tokens) + num_rows, FUSED_TOKENS[-1])
    return tuple(
        PassShape(tokens, 1 + slices, rows, slices + rows)
        for tokens in _up_to(FUSED_TOKENS, most_tokens)
        for rows in sorted({min(rows, tokens) for rows in _up_to(FUSED_ROWS, num_rows)})
    )


def _up_to(sizes: tuple[int, ...], limit: int) -> list[int]:
    """The sizes below the limit, and the limit itself."""
    return [size for size in sizes if size < limit] + [limit]


@dataclass
class Capture:
    """One graph to be made: ``body`` recorded on the stream that ``enter`` makes current, filed under ``key``."""

    graphs: dict[Hashable, torch.cuda.CUDAGraph]
    key: Hashable
    enter: Callable[[], AbstractContextManager]
    pool: tuple[int, int]  # work that may run at the same time must not share one
    body: Callable[[], None]


def capture(wanted: list[Capture], device: torch.device, report: Callable[[float], None]) -> dict:
    """Makes the graphs, in order: those that need most memory should come first, so that the others fit into it.

    Every kernel must have run before: nothing can be compiled or loaded during a capture. Returns what it cost.
    """
    free_bytes, started_s = torch.cuda.mem_get_info(device)[0], time.perf_counter()
    for done, one in enumerate(wanted):
        graph = torch.cuda.CUDAGraph()
        with one.enter():
            graph.capture_begin(pool=one.pool, capture_error_mode="thread_local")
            try:
                one.body()
            finally:
                graph.capture_end()
        one.graphs[one.key] = graph
        report((done + 1) / len(wanted))
    taken_bytes = free_bytes - torch.cuda.mem_get_info(device)[0]  # by the graphs and their pools
    return {"num_graphs": len(wanted), "graph_seconds": time.perf_counter() - started_s, "graph_bytes": taken_bytes}
