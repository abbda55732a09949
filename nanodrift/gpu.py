"""The executor on a GPU: work is enqueued on streams, completions are events that are polled, nothing blocks the host.

Each lane has its memory (runner.py), and a stream in every partition; on the whole chip both share one stream, hence
take turns in launch order. Decode steps are CUDA graphs, one per (partition, batch bucket), captured largest first into
one memory pool; tokens, positions and block tables stay on the device, so a step can be launched before the host has
read the one before it. Prefill pieces are launched operator by operator. A lane that changes its partition goes on
behind its own last work, and behind the other lane's where that still holds SMs it now wants: a wait between streams,
never on the host. After start-up nothing is compiled or captured, and all memory that grows with the work is there.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanodrift.batch import Batch, Rows
from nanodrift.config import BLOCK_SIZE, ConfigError
from nanodrift.executor import WallClock
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources
from nanodrift.partition import split_device
from nanodrift.plan import (
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
from nanodrift.runner import Runner

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WARM_UP_TOKENS = (
    1,
    2,
    16,
    17,
    33,
    48,
    64,
    65,
    100,
    128,
    129,
    192,
    250,
    256,
    300,
    384,
    512,
    640,
    1000,
    1024,
    1500,
    2048,
)
GRAPH_RESERVE_BYTES = 1 << 30  # for graphs, compiled kernels and library workspaces
POLL_S = 20e-6
NUM_STAGES = 4  # more launches than a lane ever has in flight, so that a stage is never waited for


class Stage:
    """The ints of one launch: pinned host memory, its twin on the device, and pinned memory for the answer.

    Reused only behind the event of its last launch.
    """

    def __init__(self, num_ints: int, num_tokens: int, device: torch.device):
        self.host = torch.empty(num_ints, dtype=torch.int32, pin_memory=True)
        self.device = torch.empty(num_ints, dtype=torch.int32, device=device)
        self.tokens = torch.empty(num_tokens, dtype=torch.int32, pin_memory=True)
        self.event = torch.cuda.Event()
        self.num_used = 0

    def begin(self) -> Stage:
        self.event.synchronize()  # done long ago, or never recorded: see NUM_STAGES
        self.num_used = 0
        return self

    def upload(self, ints: array) -> torch.Tensor:
        return self.copy(ints, self.device[self.num_used : self.num_used + len(ints)])

    def copy(self, ints: array, target: torch.Tensor) -> torch.Tensor:
        """Copies ints to ``target`` on the device, stream-ordered, through this stage's pinned memory."""
        if not ints:
            return target
        start, end = self.num_used, self.num_used + len(ints)
        self.host[start:end] = torch.frombuffer(ints, dtype=torch.int32)
        target.copy_(self.host[start:end], non_blocking=True)
        self.num_used = -(-end // 4) * 4  # 16-byte steps: some ints are halves of 64-bit seeds
        return target


@dataclass
class _InFlight:
    ticket: Ticket
    event: torch.cuda.Event
    tokens: torch.Tensor | None  # pinned; valid behind the event


@dataclass
class _LastLaunch:
    """Where a lane's newest work runs: what comes next may have to wait for it."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream
    num_sms: int


class GpuExecutor:
    """Two lanes over one KV pool sized from what memory is left; partitions of ``decode_sms`` beside the whole chip."""

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
        self.split = split_device(device, decode_sms)
        whole_chip, stream = Partition(num_sms, num_sms, is_shared=True), torch.cuda.Stream(device)
        self._streams = {whole_chip: {Lane.PREFILL: stream, Lane.DECODE: stream}} | {
            one.partition: {Lane.PREFILL: one.prefill_stream, Lane.DECODE: one.decode_stream}
            for one in self.split.streams
        }
        self.partitions = tuple(self._streams)

        rows = Rows(num_rows, max_model_len, device)
        max_tokens = {Lane.PREFILL: max_prefill_tokens + num_rows, Lane.DECODE: num_rows}  # a fused step holds both
        self._resources = {lane: self._lane_resources(model, lane, n, deterministic) for lane, n in max_tokens.items()}
        self._runners = {
            lane: Runner(model, None, rows, self._resources[lane][num_sms], n) for lane, n in max_tokens.items()
        }
        num_ints = 4 * max_tokens[Lane.PREFILL] + 64 * num_rows + num_rows * rows.max_blocks
        self._stages = {lane: deque(Stage(num_ints, num_rows, device) for _ in range(NUM_STAGES)) for lane in Lane}
        self.num_blocks = num_blocks or _blocks_that_fit(model, rows, memory_fraction)
        kv = KVPool(model.config, self.num_blocks, model.dtype, device)
        for runner in self._runners.values():
            runner.kv = kv

        self._buckets = sorted({min(b, num_rows) for b in BATCH_BUCKETS if b < num_rows} | {num_rows})
        self._row_ids = torch.zeros(2 * num_rows, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._context_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._indices = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[Partition, int], torch.cuda.CUDAGraph] = {}
        self._rows_on_device: tuple[int, tuple[int, ...]] | None = None  # (bucket, rows) of the last decode step
        self._num_tickets = 0
        self._in_flight = {lane: deque() for lane in Lane}  # a fused step stands in the prefill lane's
        self._last: dict[Lane, _LastLaunch] = {}
        with torch.inference_mode():
            self._warm_up(report)
            self._capture(report)
        torch.cuda.synchronize(device)

    # ---- the protocol ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, work: Work, partition: Partition) -> Ticket:
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets, work, partition, launched_s=self.clock.now())
        if isinstance(work, FusedWork):
            partition = self.partitions[0]  # its products use every SM
        lane = work.lanes[0]
        stream, num_sms = self._streams[partition][lane], _lane_sms(partition, lane)
        self._wait_for_sms(stream, num_sms, work.lanes)
        runner, stage = self._runners[lane], self._stage_of(work)
        runner.lane = self._resources[lane][num_sms]
        answer = None
        with torch.cuda.stream(stream):
            if isinstance(work, DecodeWork):
                token_ids = self._decode(runner, work, partition, stage)
            elif isinstance(work, FusedWork):
                token_ids = runner.fused(work, stage.upload)
            else:
                token_ids = runner.prefill(work, stage.upload)
            if token_ids is not None:
                answer = stage.tokens[: token_ids.shape[0]]
                answer.copy_(token_ids, non_blocking=True)
            stage.event = torch.cuda.Event()
            stage.event.record()
        for occupied in work.lanes:
            self._last[occupied] = _LastLaunch(stage.event, stream, num_sms)
        self._in_flight[lane].append(_InFlight(ticket, stage.event, answer))
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

    def close(self) -> None:
        torch.cuda.synchronize()
        self._graphs.clear()
        self._runners.clear()
        self._resources.clear()
        gc.collect()
        torch.cuda.empty_cache()

    # ---- lanes and partitions ----------------------------------------------------------------------------------

    def _lane_resources(
        self, model: Model, lane: Lane, max_tokens: int, deterministic: bool
    ) -> dict[int, LaneResources]:
        """What a lane's kernels get in each partition: its SM count there, over one scratch of the lane's."""
        counts = {_lane_sms(partition, lane) for partition in self.partitions}
        scratch = model.new_scratch(max_tokens, tuple(sorted(counts)))
        return {num_sms: LaneResources(num_sms, deterministic, scratch) for num_sms in counts}

    def _stage_of(self, work: Work) -> Stage:
        """The pieces of a chunk share a stage: its metadata must outlive them all."""
        stages = self._stages[work.lanes[0]]
        if isinstance(work, PrefillWork) and work.first_layer > 0:
            return stages[-1]
        stages.rotate(-1)
        return stages[-1].begin()

    def _wait_for_sms(self, stream: torch.cuda.Stream, num_sms: int, lanes: tuple[Lane, ...]) -> None:
        """Puts ``stream`` behind what came before it on these lanes, and behind work that holds SMs it wants."""
        for lane, last in self._last.items():
            has_room = lane not in lanes and num_sms + last.num_sms <= self.num_sms
            if last.stream != stream and not has_room:
                stream.wait_event(last.event)

    # ---- decode in graphs --------------------------------------------------------------------------------------

    def _decode(self, runner: Runner, work: DecodeWork, partition: Partition, stage: Stage) -> torch.Tensor:
        num = len(work.rows)
        runner.rows.assign_blocks(work.new_blocks, stage.upload)
        bucket = next(b for b in self._buckets if b >= num)
        if self._rows_on_device != (bucket, work.rows):
            padding = bucket - num
            row_ids = array("i", work.rows + (-1,) * padding + work.rows + (runner.rows.spare_row,) * padding)
            stage.copy(row_ids, self._row_ids[: 2 * bucket])
            self._rows_on_device = (bucket, work.rows)
        self._graphs[partition, bucket].replay()
        logits, positions = runner.logits[:num], self._positions[:num]
        return runner.sample(logits, self._row_ids[:num], positions, work.has_filter, work.has_ban)

    def _decode_pass(self, runner: Runner, bucket: int) -> None:
        """What a graph holds: rows -> last tokens and positions -> logits. Sampling follows outside of it."""
        rows = runner.rows
        row_ids, gather_ids = self._row_ids[: 2 * bucket].view(2, bucket)  # [B] -1 for padding; [B] spare for padding
        token_ids, positions = self._token_ids[:bucket], self._positions[:bucket]  # [B]
        context_lens = self._context_lens[:bucket]  # [B]
        torch.index_select(rows.last_token, 0, gather_ids, out=token_ids)
        torch.index_select(rows.next_position, 0, gather_ids, out=positions)
        torch.add(positions, 1, out=context_lens)
        indices = self._indices[:bucket]
        batch = Batch(token_ids, positions, row_ids, indices, rows.block_table, decode_context_lens=context_lens)
        runner.model.embed(batch, runner.state, runner.lane)
        runner.model.run_layers(batch, runner.state, runner.kv, 0, runner.num_layers, runner.lane)
        runner.model.head(batch, runner.state, runner.lane, out=runner.logits[:bucket])

    def _capture(self, report: Callable[[str, float], None]) -> None:
        """One graph per partition and bucket, largest first, so that the others fit into its memory.

        They share one pool, since only one decode step runs at a time.
        """
        runner, pool = self._runners[Lane.DECODE], torch.cuda.graph_pool_handle()
        wanted = [(partition, bucket) for bucket in reversed(self._buckets) for partition in self.partitions]
        gc.collect()
        gc.disable()  # a compiled kernel that is collected during capture breaks it
        try:
            for done, (partition, bucket) in enumerate(wanted):
                runner.lane = self._resources[Lane.DECODE][partition.decode_sms]
                stream, graph = self._streams[partition][Lane.DECODE], torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._decode_pass(runner, bucket)
                self._graphs[partition, bucket] = graph
                report("graphs", (done + 1) / len(wanted))
        finally:
            gc.enable()

    def _warm_up(self, report: Callable[[str, float], None]) -> None:
        """Runs every kernel at every size that has its own binary, in every partition, before anything is captured."""
        for done, partition in enumerate(self.partitions):
            for lane, warm_up in ((Lane.PREFILL, self._warm_up_prefill), (Lane.DECODE, self._warm_up_decode)):
                runner, stream = self._runners[lane], self._streams[partition][lane]
                runner.lane = self._resources[lane][_lane_sms(partition, lane)]
                with torch.cuda.stream(stream):
                    warm_up(runner, lambda share, base=done: report("kernels", (base + share) / len(self.partitions)))
                stream.synchronize()

    def _warm_up_prefill(self, runner: Runner, report: Callable[[float], None]) -> None:
        """What it writes goes to the spare block."""
        params = RowParams(top_k=1, min_position=self.max_prefill_tokens)
        sizes = [n for n in WARM_UP_TOKENS if n < self.max_prefill_tokens] + [self.max_prefill_tokens]
        for done, num_tokens in enumerate(sizes):
            for num_slices in {1, min(3, num_tokens)}:
                piece = PrefillSlice("warm-up", runner.rows.spare_row, 0, (0,) * (num_tokens // num_slices), params)
                work = PrefillWork(0, (piece,) * num_slices, 0, 1, is_last=True)
                stage = self._stage_of(work)
                runner.prefill(work, stage.upload)
                stage.event.record()
            report((done + 1) / len(sizes) / 2)

    def _warm_up_decode(self, runner: Runner, report: Callable[[float], None]) -> None:
        for done, bucket in enumerate(self._buckets):
            row_ids, gather_ids = self._row_ids[: 2 * bucket].view(2, bucket)
            row_ids.fill_(-1)
            gather_ids.fill_(runner.rows.spare_row)
            self._decode_pass(runner, bucket)
            for has_filter, has_ban in ((False, False), (True, True)):
                runner.sample(runner.logits[:bucket], row_ids, self._positions[:bucket], has_filter, has_ban)
            report(0.5 + (done + 1) / len(self._buckets) / 2)

    def _complete(self, entry: _InFlight) -> Completion:
        token_ids = entry.tokens.tolist() if entry.tokens is not None else []
        tokens = tuple(zip(entry.ticket.work.sampled_ids, token_ids, strict=True))
        return Completion(entry.ticket, self.clock.now(), tokens)


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


def _lane_sms(partition: Partition, lane: Lane) -> int:
    return partition.prefill_sms if lane is Lane.PREFILL else partition.decode_sms
