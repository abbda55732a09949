"""The executor without a GPU: the same model through the torch references, a piece of work each time it is waited for.

The correctness oracle of the other executors, and what a laptop gets. Both lanes share the one processor.
"""

from __future__ import annotations

import time
from array import array
from collections import deque

import torch

from nanodrift.batch import Rows
from nanodrift.executor import WallClock
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources
from nanodrift.plan import Completion, DecodeWork, Partition, Ticket, Work
from nanodrift.runner import Runner, read_answer

CPU = torch.device("cpu")
ONE_THREAD_PARAMETERS = 50_000_000  # products of a smaller model are too short to share among threads


class CpuExecutor:
    """Holds everything in host memory; ``num_blocks`` KV blocks of 64 tokens."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        num_rows: int,
        max_model_len: int,
        max_prefill_tokens: int,
        deterministic: bool = False,
    ):
        if model.config.num_parameters < ONE_THREAD_PARAMETERS:
            torch.set_num_threads(1)
        self.clock = WallClock()
        self.partitions = (Partition(prefill_sms=1, decode_sms=1, is_shared=True),)
        self.num_layers = model.config.num_layers
        self.num_blocks, self.num_rows, self.max_prefill_tokens = num_blocks, num_rows, max_prefill_tokens
        self.device_name = f"cpu ({torch.get_num_threads()} threads)"
        rows = Rows(num_rows, max_model_len, CPU, model.config.vocab_size)
        kv = KVPool(model.config, num_blocks, model.dtype, CPU)
        lane = LaneResources(num_sms=1, deterministic=deterministic)
        self._prefill = Runner(model, kv, rows, lane, max_prefill_tokens + num_rows)
        self._decode = Runner(model, kv, rows, lane, num_rows)
        self._num_tickets = 0
        self._queue: deque[Ticket] = deque()

    def launch(self, work: Work, partition: Partition) -> Ticket:
        self._num_tickets += 1
        self._queue.append(Ticket(self._num_tickets, work, partition, launched_s=self.clock.now()))
        return self._queue[-1]

    @torch.inference_mode()
    def wait(self, until_s: float | None) -> list[Completion]:
        if not self._queue:
            if until_s is not None:
                time.sleep(max(0.0, until_s - self.clock.now()))
            return []
        ticket, started_s = self._queue.popleft(), self.clock.now()
        runner = self._decode if isinstance(ticket.work, DecodeWork) else self._prefill
        found = read_answer(ticket.work, runner.carry_out(ticket.work, _upload))
        finished_s = self.clock.now()
        return [Completion(ticket, finished_s, busy_s=finished_s - started_s, **found)]

    def counters(self) -> dict[str, int | float]:
        return {}

    def close(self) -> None:
        self._prefill = self._decode = None


def _upload(ints: array, out: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(len(ints), dtype=torch.int32) if out is None else out[: len(ints)]
    return out.copy_(torch.frombuffer(ints, dtype=torch.int32)) if ints else out
