"""The executor on a GPU: work is enqueued on streams, completions are events that are polled, nothing blocks the host.

Each lane has its memory (runner.py), and a stream in every partition; on the whole chip both share one stream, hence
take turns in launch order. A fused step runs on the whole chip and may fork its two attentions onto the halves of a
partition. Work of the sizes that matter is replayed from CUDA graphs (graphs.py), the rest is launched operator by
operator; tokens, positions and block tables stay on the device, so a step can be launched before the host has read the
one before it. A lane that changes its partition goes on behind its own last work, and behind the other lane's where
that still holds SMs it now wants: a wait between streams, never on the host. After start-up nothing is compiled or
captured, and all memory that grows with the work is there: ``counters`` counts what is not.

What is done is known from events alone: a device-wide synchronise may miss work on a green context's stream.
"""

from __future__ import annotations

import gc
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from nanodrift import graphs
from nanodrift.batch import PassShape, Rows
from nanodrift.config import BLOCK_SIZE, ConfigError
from nanodrift.executor import WallClock
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources, Scratch
from nanodrift.partition import split_device
from nanodrift.plan import (
    MAX_FUSED_SLICES,
    Completion,
    DecodeWork,
    FusedWork,
    Lane,
    Partition,
    PrefillSlice,
    PrefillWork,
    RowParams,
    Ticket,
    Work,
)
from nanodrift.request import MAX_BIASED_TOKENS
from nanodrift.runner import ANSWER_WIDTH, Runner, read_answer

# Read when CUDA starts, hence set on import. With fewer hardware queues than streams, work of one lane could end up
# queued behind the other's.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

WARM_UP_SIZES = (1, 2, 16, 17, 33, 48, 64, 65, 100, 128, 129, 192, 250, 256, 300, 384, 512, 640, 1000, 1024, 1500, 2048)
GRAPH_RESERVE_BYTES = 1 << 30  # for graphs, compiled kernels and library workspaces
POLL_S = 20e-6
NUM_STAGES = 4  # more launches than a lane ever has in flight, so that a stage is never waited for


class Stage:
    """The ints of one launch: pinned host memory, its twin on the device, and pinned memory for the answer.

    Reused only behind the event of its last launch.
    """

    def __init__(self, num_ints: int, num_answer_ints: int, device: torch.device):
        self.host = torch.empty(num_ints, dtype=torch.int32, pin_memory=True)
        self.device = torch.empty(num_ints, dtype=torch.int32, device=device)
        self.answer = torch.empty(num_answer_ints, dtype=torch.int32, pin_memory=True)
        self.event = torch.cuda.Event()
        self.num_used = 0

    def begin(self) -> Stage:
        self.event.synchronize()  # done long ago, or never recorded: see NUM_STAGES
        self.num_used = 0
        return self

    def upload(self, ints: array, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copies ints to the device, stream-ordered: to the front of ``out``, or to where this stage has room."""
        start, end = self.num_used, self.num_used + len(ints)
        target = self.device[start:end] if out is None else out[: len(ints)]
        if ints:
            self.host[start:end] = torch.frombuffer(ints, dtype=torch.int32)
            target.copy_(self.host[start:end], non_blocking=True)
            self.num_used = -(-end // 4) * 4  # 16-byte steps: some ints are halves of 64-bit seeds
        return target


@dataclass(frozen=True)
class _Place:
    """Where one kind of work runs in one partition."""

    runner: Runner
    resources: LaneResources
    stream: torch.cuda.Stream
    partition: Partition

    def enter(self) -> torch.cuda.StreamContext:
        """Gives the runner what it may use there."""
        self.runner.lane, self.runner.partition = self.resources, self.partition
        return torch.cuda.stream(self.stream)


@dataclass
class _InFlight:
    ticket: Ticket
    start: torch.cuda.Event  # behind all waits, before the first kernel
    event: torch.cuda.Event
    answer: torch.Tensor | None  # pinned; valid behind the event


@dataclass
class _LastLaunch:
    """Where a lane's newest work runs: what comes next may have to wait for it."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream
    num_sms: int


class GpuExecutor:
    """Two lanes over one KV pool sized from what memory is left; partitions of ``decode_sms`` beside the whole chip.

    Without green contexts partitions are plain streams, see partition.py.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_rows: int,
        max_model_len: int,
        max_prefill_tokens: int,
        memory_fraction: float = 0.9,
        num_blocks: int | None = None,
        deterministic: bool = False,
        decode_sms: tuple[int, ...] = (),
        green_contexts: bool = True,
        report: Callable[[str, float], None] = lambda phase, done: None,
    ):
        self.clock = WallClock()
        device = model.device
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        num_sms = properties.multi_processor_count
        self.num_layers, self.num_rows = model.config.num_layers, num_rows
        self.max_prefill_tokens, self.device_name = max_prefill_tokens, properties.name
        self.num_sms = num_sms
        self.split = split_device(device, decode_sms, green_contexts)
        whole_chip, whole_stream = Partition(num_sms, num_sms, is_shared=True), torch.cuda.Stream(device)
        streams = {whole_chip: dict.fromkeys(Lane, whole_stream)} | {
            one.partition: {Lane.PREFILL: one.prefill_stream, Lane.DECODE: one.decode_stream}
            for one in self.split.streams
        }
        self.partitions = tuple(streams)

        rows = Rows(num_rows, max_model_len, device, model.config.vocab_size)
        max_tokens = {Lane.PREFILL: max_prefill_tokens + num_rows, Lane.DECODE: num_rows}  # a fused step holds both
        counts = {lane: {partition.sms_of(lane) for partition in streams} for lane in Lane}
        counts[Lane.PREFILL] |= counts[Lane.DECODE]  # a fused step's: it attends on both halves
        scratch = {lane: model.new_scratch(n, tuple(sorted(counts[lane]))) for lane, n in max_tokens.items()}
        self._runners = {lane: Runner(model, None, rows, LaneResources(), n) for lane, n in max_tokens.items()}
        has_pdl = properties.major >= 9
        self._places = _make_places(self._runners, streams, scratch, deterministic, has_pdl)
        most_sampled = num_rows + MAX_FUSED_SLICES
        num_ints = 8 * max_tokens[Lane.PREFILL] + 2 * num_rows * rows.max_blocks
        num_ints += (100 + 2 * MAX_BIASED_TOKENS) * most_sampled  # what requests ask for
        self._stages = {
            lane: deque(Stage(num_ints, (most_sampled + n) * ANSWER_WIDTH, device) for _ in range(NUM_STAGES))
            for lane, n in max_tokens.items()
        }
        self.num_blocks = num_blocks or _blocks_that_fit(model, rows, memory_fraction)
        kv = KVPool(model.config, self.num_blocks, model.dtype, device)
        for runner in self._runners.values():
            runner.kv = kv

        self._num_tickets = 0
        self._in_flight = {lane: deque() for lane in Lane}  # a fused step stands in the prefill lane's
        self._last: dict[Lane, _LastLaunch] = {}
        shapes = {
            PrefillWork: graphs.prefill_shapes(max_prefill_tokens),
            DecodeWork: graphs.decode_shapes(num_rows),
            FusedWork: graphs.fused_shapes(max_prefill_tokens, num_rows),
        }
        with torch.inference_mode():
            self._warm_up(shapes, report)
            self._graph_costs = self._capture(shapes, device, report)
        self._runners[Lane.DECODE].shapes = shapes[DecodeWork]
        both = shapes[PrefillWork] + shapes[FusedWork]
        self._runners[Lane.PREFILL].shapes = tuple(sorted(both, key=lambda shape: shape.num_tokens))
        gc.collect()
        gc.freeze()  # what start-up made stays: no reason to walk through it again and again
        self._count_compilations()
        self._num_mallocs_at_start = _num_mallocs()

    # ---- the protocol ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, work: Work, partition: Partition) -> Ticket:
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets, work, partition, launched_s=self.clock.now())
        lane, place = work.lanes[0], self._places[type(work), partition]
        stream, num_sms = place.stream, place.resources.num_sms
        self._wait_for_sms(stream, num_sms, work.lanes)
        stage = self._next_stage(lane)
        start, stage.event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        answer = None
        with place.enter():
            start.record()
            found = place.runner.carry_out(work, stage.upload)
            if found is not None:
                answer = stage.answer[: found.numel()].view(found.shape)
                answer.copy_(found, non_blocking=True)
            stage.event.record()
        for occupied in work.lanes:
            self._last[occupied] = _LastLaunch(stage.event, stream, num_sms)
        self._in_flight[lane].append(_InFlight(ticket, start, stage.event, answer))
        return ticket

    def wait(self, until_s: float | None) -> list[Completion]:
        while True:
            done = []
            for queue in self._in_flight.values():
                while queue and queue[0].event.query():
                    done.append(self._complete(queue.popleft()))
            is_idle = not any(self._in_flight.values())
            now_s = self.clock.now()
            if done or (until_s is not None and now_s >= until_s) or (until_s is None and is_idle):
                return sorted(done, key=lambda completion: completion.ticket.number)
            time.sleep(until_s - now_s if is_idle else POLL_S)

    def counters(self) -> dict[str, int | float]:
        """What should not happen once the engine is ready, and what its graphs cost."""
        return {
            "num_compilations": self._num_compilations,
            "num_cuda_mallocs": _num_mallocs() - self._num_mallocs_at_start,
            **self._graph_costs,
        }

    def close(self) -> None:
        for last in self._last.values():
            last.event.synchronize()
        self._stop_counting()
        gc.unfreeze()
        self._runners.clear()
        self._places.clear()
        gc.collect()
        torch.cuda.empty_cache()

    # ---- lanes and partitions ----------------------------------------------------------------------------------

    def _next_stage(self, lane: Lane) -> Stage:
        self._stages[lane].rotate(-1)
        return self._stages[lane][-1].begin()

    def _wait_for_sms(self, stream: torch.cuda.Stream, num_sms: int, lanes: tuple[Lane, ...]) -> None:
        """Puts ``stream`` behind what came before it on these lanes, and behind work that holds SMs it wants."""
        for lane, last in self._last.items():
            has_room = lane not in lanes and num_sms + last.num_sms <= self.num_sms
            if last.stream != stream and not has_room:
                stream.wait_event(last.event)

    # ---- start-up ----------------------------------------------------------------------------------------------

    def _warm_up(self, shapes: dict[type, tuple[PassShape, ...]], report: Callable[[str, float], None]) -> None:
        """Runs every kernel at every size that has its own binary, in every partition, before anything is captured.

        What it writes goes to the spare block.
        """
        params = RowParams(top_k=1, min_position=self.max_prefill_tokens, logit_bias=((0, 0.0),), has_logprobs=True)
        sizes = [n for n in WARM_UP_SIZES if n < self.max_prefill_tokens] + [self.max_prefill_tokens]
        for done, (kind, partition) in enumerate(self._places):
            place = self._places[kind, partition]
            runner = place.runner
            with place.enter():
                for shape in shapes[kind]:
                    with self._borrowed_stage(kind.lanes[0]) as stage:
                        batch = runner.padding(shape, stage.upload)
                    runner.compute(batch, num_layers=1)
                    sampled = runner.logits[: shape.num_sampled], batch.sample_rows, batch.sample_positions
                    for is_special in (False, True):
                        runner.sample(*sampled, is_special, is_special, is_special, is_special)
                for num_tokens in sizes if kind is PrefillWork else ():  # no graph is sure to have room for it
                    most = runner.model.cos_sin.shape[0]  # positions: a longer slice would run out of its tables
                    counts = (1, min(3, num_tokens), min(self.num_rows, num_tokens))  # the last: to sample them all
                    for num_slices in {max(n, -(-num_tokens // most)) for n in counts}:
                        token_ids = (0,) * (num_tokens // num_slices)
                        next_ids = token_ids[1:] if num_tokens <= 64 else ()
                        piece = PrefillSlice("warm-up", runner.rows.spare_row, 0, token_ids, params, True, 9, next_ids)
                        with self._borrowed_stage(Lane.PREFILL) as stage:
                            runner.prefill(PrefillWork(0, (piece,) * num_slices, 0, 1, is_last=True), stage.upload)
            place.stream.synchronize()
            report("kernels", (done + 1) / len(self._places))

    def _capture(
        self,
        shapes: dict[type, tuple[PassShape, ...]],
        device: torch.device,
        report: Callable[[str, float], None],
    ) -> dict[str, int | float]:
        """Graphs of decode steps and fused steps, and of each layer of a prefill; in every partition.

        Work of one lane never runs beside itself, so a lane's graphs share one memory pool.
        """
        pools = {lane: torch.cuda.graph_pool_handle() for lane in Lane}
        wanted = []
        for kind, partition in self._places:
            place, pool = self._places[kind, partition], pools[kind.lanes[0]]
            runner = place.runner
            for shape in reversed(shapes[kind]):
                batch = runner.batch_of(shape)
                bodies = {(partition, shape): partial(runner.compute, batch)}
                if kind is PrefillWork:
                    bodies = {
                        (partition, shape, layer): partial(runner.run_layer, batch, layer)
                        for layer in range(self.num_layers)
                    }
                wanted += [graphs.Capture(runner.graphs, key, place.enter, pool, body) for key, body in bodies.items()]
        gc.collect()
        gc.disable()  # a compiled kernel that is collected during a capture breaks it
        try:
            return graphs.capture(wanted, device, partial(report, "graphs"))
        finally:
            gc.enable()

    @contextmanager
    def _borrowed_stage(self, lane: Lane) -> Iterator[Stage]:
        stage = self._next_stage(lane)
        yield stage
        stage.event.record()

    # ---- completions -------------------------------------------------------------------------------------------

    def _complete(self, entry: _InFlight) -> Completion:
        busy_s = entry.start.elapsed_time(entry.event) / 1e3
        found = read_answer(entry.ticket.work, entry.answer)
        return Completion(entry.ticket, self.clock.now(), busy_s=busy_s, **found)

    def _count_compilations(self) -> None:
        """Has Triton report every kernel that it compiles or loads from now on, on top of whom it tells already."""
        from triton import knobs  # a machine without a GPU need not have it

        others = knobs.runtime.jit_post_compile_hook
        self._num_compilations = 0

        def note(**details) -> None:
            self._num_compilations += 1
            if others is not None:
                others(**details)

        def stop() -> None:
            knobs.runtime.jit_post_compile_hook = others

        knobs.runtime.jit_post_compile_hook, self._stop_counting = note, stop


def _make_places(
    runners: dict[Lane, Runner],
    streams: dict[Partition, dict[Lane, torch.cuda.Stream]],
    scratch: dict[Lane, Scratch],
    deterministic: bool,
    has_pdl: bool,
) -> dict[tuple[type, Partition], _Place]:
    """Every kind of work in every partition; the first partition is the whole chip."""
    places: dict[tuple[type, Partition], _Place] = {}
    whole_chip = next(iter(streams))
    for partition, here in streams.items():
        for kind, lane in ((PrefillWork, Lane.PREFILL), (DecodeWork, Lane.DECODE)):
            pdl = has_pdl and kind is DecodeWork  # large products lose by it: up to 7% of a prefill
            resources = LaneResources(partition.sms_of(lane), deterministic, scratch[lane], pdl=pdl)
            places[kind, partition] = _Place(runners[lane], resources, here[lane], partition)
        # a fused step: products on every SM, attentions on the two halves, all of it in the prefill lane's memory
        whole = LaneResources(whole_chip.prefill_sms, deterministic, scratch[Lane.PREFILL])
        halves = tuple((here[lane], replace(whole, num_sms=partition.sms_of(lane))) for lane in Lane)
        resources = whole if partition.is_shared else replace(whole, halves=halves)
        stream = streams[whole_chip][Lane.PREFILL]
        places[FusedWork, partition] = _Place(runners[Lane.PREFILL], resources, stream, partition)
    return places


def _num_mallocs() -> int:
    """Times that torch has asked CUDA for memory so far."""
    return torch.cuda.memory_stats()["segment.all.allocated"]


def _blocks_that_fit(model: Model, rows: Rows, memory_fraction: float) -> int:
    """KV blocks in what ``memory_fraction`` of the device leaves, at most what all rows could ever fill."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    budget_bytes = total_bytes * memory_fraction - (total_bytes - free_bytes) - GRAPH_RESERVE_BYTES
    size_bytes = model.config.num_kv_values_per_token * BLOCK_SIZE * model.dtype.itemsize
    num_blocks = min(int(budget_bytes // size_bytes), rows.num_rows * rows.max_blocks)
    if num_blocks < 2:
        raise ConfigError(
            f"no memory is left for the KV cache: {free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free "
            f"after the weights, and memory_fraction is {memory_fraction}. Raise it, lower max_model_len or "
            "max_num_seqs, or serve a smaller model."
        )
    return num_blocks
