"""The executor on a GPU: work is enqueued on streams, completions are events that are polled, nothing blocks the host.

Decode steps are CUDA graphs, one per batch bucket, captured largest first into one memory pool; tokens, positions and
block tables stay on the device, so a step can be launched before the host has read the one before it. Prefill pieces
are launched operator by operator. Both lanes have the whole chip here and share one stream, hence run in launch order.
After start-up nothing is compiled or captured, and all memory that grows with the work is preallocated.
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
from nanodrift.plan import (
    Completion,
    DecodeWork,
    FusedWork,
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


class GpuExecutor:
    """Both lanes on the whole chip, one stream, one KV pool sized from what memory is left."""

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
        report: Callable[[str, float], None] = lambda phase, done: None,
    ):
        self.clock = WallClock()
        device = model.device
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        num_sms = properties.multi_processor_count
        self.partitions = (Partition(prefill_sms=num_sms, decode_sms=num_sms, is_shared=True),)
        self.num_layers, self.num_rows = model.config.num_layers, num_rows
        self.max_prefill_tokens, self.device_name = max_prefill_tokens, properties.name
        self.stream = torch.cuda.Stream(device)

        max_tokens = max_prefill_tokens + num_rows  # a fused step holds both
        rows = Rows(num_rows, max_model_len, device)
        lane = LaneResources(num_sms, deterministic, model.new_scratch(max_tokens, (num_sms,)))
        self.runner = Runner(model, None, rows, lane, max_tokens)
        num_ints = 4 * max_tokens + 64 * num_rows + num_rows * rows.max_blocks
        self._prefill_stages = deque(Stage(num_ints, num_rows, device) for _ in range(NUM_STAGES))
        self._decode_stages = deque(Stage(num_ints, num_rows, device) for _ in range(NUM_STAGES))
        self.num_blocks = num_blocks or _blocks_that_fit(model, rows, memory_fraction)
        self.runner.kv = KVPool(model.config, self.num_blocks, model.dtype, device)

        self._buckets = sorted({min(b, num_rows) for b in BATCH_BUCKETS if b < num_rows} | {num_rows})
        self._row_ids = torch.zeros(2 * num_rows, dtype=torch.int32, device=device)
        self._token_ids = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._context_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._indices = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._rows_on_device: tuple[int, tuple[int, ...]] | None = None  # (bucket, rows) of the last decode step
        self._num_tickets = 0
        self._in_flight: deque[_InFlight] = deque()
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self._warm_up(report)
            self._capture(report)
        torch.cuda.synchronize(device)

    # ---- the protocol ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, work: Work, partition: Partition) -> Ticket:
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets, work, partition, launched_s=self.clock.now())
        with torch.cuda.stream(self.stream):
            if isinstance(work, DecodeWork):
                stage = _next(self._decode_stages)
                token_ids = self._decode(work, stage)
            elif isinstance(work, FusedWork):
                stage = _next(self._prefill_stages)
                token_ids = self.runner.fused(work, stage.upload)
            else:  # the pieces of a chunk share a stage: its metadata must outlive them all
                stage = _next(self._prefill_stages) if work.first_layer == 0 else self._prefill_stages[-1]
                token_ids = self.runner.prefill(work, stage.upload)
            answer = None
            if token_ids is not None:
                answer = stage.tokens[: token_ids.shape[0]]
                answer.copy_(token_ids, non_blocking=True)
            stage.event = torch.cuda.Event()
            stage.event.record()
        self._in_flight.append(_InFlight(ticket, stage.event, answer))
        return ticket

    def wait(self, until_s: float | None) -> list[Completion]:
        while True:
            done = []
            while self._in_flight and self._in_flight[0].event.query():
                done.append(self._complete(self._in_flight.popleft()))
            now_s = self.clock.now()
            if done or (until_s is not None and now_s >= until_s) or (until_s is None and not self._in_flight):
                return done
            time.sleep(POLL_S if self._in_flight else until_s - now_s)

    def close(self) -> None:
        torch.cuda.synchronize(self.stream.device)
        self._graphs.clear()
        self.runner = None
        gc.collect()
        torch.cuda.empty_cache()

    # ---- decode in graphs --------------------------------------------------------------------------------------

    def _decode(self, work: DecodeWork, stage: Stage) -> torch.Tensor:
        runner, num = self.runner, len(work.rows)
        runner.rows.assign_blocks(work.new_blocks, stage.upload)
        bucket = next(b for b in self._buckets if b >= num)
        if self._rows_on_device != (bucket, work.rows):
            padding = bucket - num
            row_ids = array("i", work.rows + (-1,) * padding + work.rows + (runner.rows.spare_row,) * padding)
            stage.copy(row_ids, self._row_ids[: 2 * bucket])
            self._rows_on_device = (bucket, work.rows)
        self._graphs[bucket].replay()
        logits, positions = runner.logits[:num], self._positions[:num]
        return runner.sample(logits, self._row_ids[:num], positions, work.has_filter, work.has_ban)

    def _decode_pass(self, bucket: int) -> None:
        """What a graph holds: rows -> last tokens and positions -> logits. Sampling follows outside of it."""
        runner, rows = self.runner, self.runner.rows
        row_ids, gather_ids = self._row_ids[: 2 * bucket].view(2, bucket)  # [B] -1 for padding; [B] spare for padding
        token_ids, positions = self._token_ids[:bucket], self._positions[:bucket]  # [B]
        context_lens = self._context_lens[:bucket]  # [B]
        torch.index_select(rows.last_token, 0, gather_ids, out=token_ids)
        torch.index_select(rows.next_position, 0, gather_ids, out=positions)
        torch.add(positions, 1, out=context_lens)
        indices = self._indices[:bucket]
        batch = Batch(token_ids, positions, row_ids, indices, rows.block_table, decode_context_lens=context_lens)
        runner.model.embed(batch, runner.decode_state, runner.lane)
        runner.model.run_layers(batch, runner.decode_state, runner.kv, 0, runner.num_layers, runner.lane)
        runner.model.head(batch, runner.decode_state, runner.lane, out=runner.logits[:bucket])

    def _capture(self, report: Callable[[str, float], None]) -> None:
        """One graph per bucket, largest first, so that the smaller ones fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.disable()  # a compiled kernel that is collected during capture breaks it
        try:
            for done, bucket in enumerate(reversed(self._buckets)):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                    self._decode_pass(bucket)
                self._graphs[bucket] = graph
                report("graphs", (done + 1) / len(self._buckets))
        finally:
            gc.enable()

    def _warm_up(self, report: Callable[[str, float], None]) -> None:
        """Runs every kernel at every size that has its own binary. What it writes goes to the spare row's one block."""
        runner = self.runner
        spare, params = runner.rows.spare_row, RowParams(top_k=1, min_position=self.max_prefill_tokens)
        sizes = [n for n in WARM_UP_TOKENS if n < self.max_prefill_tokens] + [self.max_prefill_tokens]
        num_runs = len(sizes) + len(self._buckets)
        for done, num_tokens in enumerate(sizes):
            for num_slices in {1, min(3, num_tokens)}:
                stage = _next(self._prefill_stages)
                piece = PrefillSlice("warm-up", spare, 0, (0,) * (num_tokens // num_slices), params)
                runner.prefill(PrefillWork(0, (piece,) * num_slices, 0, 1, is_last=True), stage.upload)
                stage.event.record()
            report("kernels", (done + 1) / num_runs)
        for done, bucket in enumerate(self._buckets):
            row_ids, gather_ids = self._row_ids[: 2 * bucket].view(2, bucket)
            row_ids.fill_(-1)
            gather_ids.fill_(spare)
            self._decode_pass(bucket)
            for has_filter, has_ban in ((False, False), (True, True)):
                runner.sample(runner.logits[:bucket], row_ids, self._positions[:bucket], has_filter, has_ban)
            report("kernels", (len(sizes) + done + 1) / num_runs)
        self.stream.synchronize()

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


def _next(stages: deque[Stage]) -> Stage:
    """The stage that was used longest ago, now the newest."""
    stages.rotate(-1)
    return stages[-1].begin()
