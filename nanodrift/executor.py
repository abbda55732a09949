"""What a machine must offer the scheduler: launch, wait, a clock. Three machines do: gpu.py, cpu.py, sim.py.

``launch`` returns at once; ``wait`` is the only call that blocks; ``clock.now()`` is the only time anyone reads.
"""

from __future__ import annotations

import time
from typing import Protocol

from nanodrift.plan import Completion, Partition, Ticket, Work


class Clock(Protocol):
    def now(self) -> float:
        """Seconds, monotonic, from an arbitrary origin."""


class WallClock:
    def now(self) -> float:
        return time.perf_counter()


class VirtualClock:
    """Moves only when it is told to; the simulator's and the tests' time."""

    def __init__(self, now_s: float = 0.0):
        self.now_s = now_s

    def now(self) -> float:
        return self.now_s

    def advance_to(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)


class Executor(Protocol):
    clock: Clock
    partitions: tuple[Partition, ...]  # the first gives every lane the whole device
    num_layers: int
    num_blocks: int  # KV blocks of 64 tokens
    num_rows: int  # requests that can hold device state at once
    max_prefill_tokens: int
    device_name: str

    def launch(self, work: Work, partition: Partition) -> Ticket:
        """Starts the work and returns at once. Work of one lane runs in launch order."""

    def wait(self, until_s: float | None) -> list[Completion]:
        """Returns as soon as something has finished, or at ``until_s``.

        With nothing in flight it sleeps until then, and returns at once when ``until_s`` is None.
        """

    def counters(self) -> dict[str, int | float]:
        """What should not happen once it is ready, and what its graphs cost; empty where there is none of it."""

    def close(self) -> None:
        """Gives back the device's memory."""
