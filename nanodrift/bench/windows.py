"""Keeps one kind of load on an executor for a while, and says how long its steps took: what calibration is made of.

A window is steady: so many rows decode at such contexts, or chunks of such prompts go through the layers, or both side
by side, in turns or fused; two pieces of work are in flight on each lane, as in serving. The first 0.4 of it is thrown
away, for clocks settle under load. Drives any executor by its protocol: no scheduler, no policy, no torch. The KV cache
should hold noise (``calibrate.open_device`` sees to that): zeros draw less power.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from nanodrift.cost import DecodeLoad, PrefillLoad
from nanodrift.executor import Executor
from nanodrift.kvcache import blocks_for
from nanodrift.metrics import percentile
from nanodrift.plan import (
    Completion,
    DecodeWork,
    FusedWork,
    Lane,
    NewBlocks,
    Partition,
    PrefillSlice,
    PrefillWork,
    RowParams,
    Work,
)

GROWTH = 128  # steps until the contexts are wound back, so that a window measures the context it names
MIN_WORK = 12  # pieces of a stretch, however long they take
GREEDY = RowParams(temperature=0.0)


@dataclass(frozen=True)
class Shape:
    """The load of one window."""

    partition: Partition
    contexts: tuple[int, ...] = ()  # tokens of each decoding request
    prompts: tuple[tuple[int, int], ...] = ()  # (new tokens, tokens before them) of each slice of a chunk
    layers: int = 0  # of a prefill piece; 0: all
    is_fused: bool = False

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return (Lane.DECODE,) * bool(self.contexts) + (Lane.PREFILL,) * bool(self.prompts)

    @property
    def chunk(self) -> PrefillLoad:
        return PrefillLoad.of_parts(self.prompts, len(self.prompts))

    def num_blocks(self) -> int:
        return sum(blocks_for(n + GROWTH + 2) for n in self.contexts) + sum(blocks_for(n + r) for n, r in self.prompts)


@dataclass
class Window:
    """What was seen of a shape after it had settled. Completions of one stretch follow each other without a break."""

    shape: Shape
    stretches: list[list[Completion]] = field(default_factory=list)
    sm_mhz: float | None = None
    watts: float | None = None
    host_s: list[float] = field(default_factory=list)  # of each launch of a prefill piece

    def gaps(self, lane: Lane) -> list[float]:
        """Seconds between the ends of consecutive work of a lane."""
        ends = [[c.finished_s for c in stretch[2:] if lane in c.ticket.work.lanes] for stretch in self.stretches]
        return [b - a for one in ends for a, b in itertools.pairwise(one)]

    def busy(self, lane: Lane) -> list[Completion]:
        return [c for stretch in self.stretches for c in stretch[2:] if c.ticket.work.lanes[-1] is lane]

    @property
    def is_enough(self) -> bool:
        return all(len(self.gaps(lane)) > 1 for lane in self.shape.lanes)

    def summary(self, num_layers: int) -> dict:
        """One row of a result file: the shape, milliseconds of its steps, rates, and what the device drew."""
        shape, partition, row = self.shape, self.shape.partition, {}
        decode, prefill = self.busy(Lane.DECODE), self.busy(Lane.PREFILL)
        row |= {"prefill_sms": partition.prefill_sms, "decode_sms": partition.decode_sms, "shared": partition.is_shared}
        row |= {"fused": shape.is_fused, "batch": len(shape.contexts), "prompts": [list(p) for p in shape.prompts]}
        if decode:
            steps = [c.ticket.work.parts[-1] for c in decode]
            row["context_tokens"] = round(median(DecodeLoad.of(step).context_tokens for step in steps))
            row["step_ms"] = _milliseconds([c.busy_s for c in decode])
            row["gap_ms"] = _milliseconds(self.gaps(Lane.DECODE))
            row["steps_per_s"] = 1 / fmean(self.gaps(Lane.DECODE))
        if shape.prompts:
            pieces = decode if shape.is_fused else prefill
            shares = [(p.last_layer - p.first_layer) / num_layers for p in (c.ticket.work.parts[0] for c in pieces)]
            if not shape.is_fused:
                row["layers"] = shape.layers or num_layers
                bare = [(c, s) for c, s in zip(pieces, shares, strict=True) if s == 1 or not c.ticket.work.is_last]
                row["chunk_ms"] = _milliseconds([c.busy_s / share for c, share in bare])  # without the head, if cut
                row["host_ms_per_layer"] = 1e3 * median(self.host_s) / row["layers"]
            gaps_s = fmean(self.gaps(Lane.PREFILL))
            row["prompt_tokens_per_s"] = shape.chunk.num_tokens * fmean(shares) / gaps_s
        return row | {"sm_mhz": self.sm_mhz, "watts": self.watts}


def _milliseconds(seconds: list[float]) -> dict:
    ms = [1e3 * s for s in seconds]
    return {"num": len(ms), "p50": median(ms), "mean": fmean(ms), "p99": percentile(ms, 99), "max": max(ms)}


class Driver:
    """Launches windows on ``executor``. ``power`` makes a context manager with ``samples`` (see machine.PowerLog)."""

    def __init__(self, executor: Executor, vocab_size: int, power=None, seed: int = 0):
        self.executor, self.vocab_size, self.num_layers = executor, vocab_size, executor.num_layers
        self._power, self._draw = power, random.Random(seed)
        self._num_chunks = 0

    def has_room(self, shape: Shape) -> bool:
        num_rows = len(shape.contexts) + len(shape.prompts)
        is_small = shape.chunk.num_tokens <= self.executor.max_prefill_tokens
        return is_small and shape.num_blocks() <= self.executor.num_blocks and num_rows <= self.executor.num_rows

    def run(self, shape: Shape, seconds: float) -> Window:
        window = Window(shape)
        clock, power = self.executor.clock, self._power() if self._power else None
        with power or contextlib.nullcontext():
            started_s = clock.now()
            until_s, settled_s = started_s + seconds, started_s + 0.4 * seconds
            while clock.now() < until_s or (not window.is_enough and clock.now() < started_s + 4 * seconds):
                stretch = self._stretch(shape, until_s, window.host_s)
                settled = [c for c in stretch if c.finished_s - c.busy_s >= settled_s]
                if len(settled) > 4:
                    window.stretches.append(settled)
        if power and power.samples:
            samples = power.samples[2 * len(power.samples) // 5 :]
            window.sm_mhz, window.watts = median(s[0] for s in samples), median(s[1] for s in samples)
        return window

    def _stretch(self, shape: Shape, until_s: float, host_s: list[float]) -> list[Completion]:
        """Up to ``GROWTH`` decode steps from the contexts the shape names."""
        blocks = self._prime(shape)
        in_flight, ends_s, done, num_steps, chunk = dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0.0), [], 0, None
        clock = self.executor.clock
        full_s = clock.now()
        while True:
            launched = (clock.now() < until_s or len(done) < MIN_WORK) and num_steps < GROWTH
            if launched:
                full_s = clock.now()
            while launched:  # as the engine does: lanes take turns, so that on the whole chip their work alternates
                launched = False
                for lane in shape.lanes[:1] if shape.is_fused else shape.lanes:
                    if in_flight[lane] >= 2 or num_steps >= GROWTH:
                        continue
                    if shape.is_fused:
                        work = FusedWork(self._piece(shape, None, blocks), self._step(shape, num_steps))
                    elif lane is Lane.DECODE:
                        work = self._step(shape, num_steps)
                    else:
                        work = chunk = self._piece(shape, chunk, blocks)
                    before_s = clock.now()
                    self.executor.launch(work, shape.partition)
                    if lane is Lane.PREFILL:
                        host_s.append(clock.now() - before_s)
                    num_steps += lane is Lane.DECODE
                    in_flight[lane] += 1
                    launched = True
            if not any(in_flight.values()):  # what ended after the last launch may have run alone
                return done if len(shape.lanes) == 1 else [c for c in done if c.finished_s <= full_s]
            for completion in self.executor.wait(None):
                lane = _lane_of(completion.ticket.work)
                in_flight[lane] -= 1
                if not completion.busy_s:  # an executor that does not say: since the lane was free, as the host saw it
                    since_s = max(completion.ticket.launched_s, ends_s[lane])
                    completion = replace(completion, busy_s=completion.finished_s - since_s)
                ends_s[lane] = completion.finished_s
                done.append(completion)

    def _prime(self, shape: Shape) -> tuple[NewBlocks, ...]:
        """Gives all rows their blocks, the decoding ones a last token and a position. Returns the prompts' blocks."""
        next_id, all_blocks = 1, []
        sizes = [n + GROWTH + 2 for n in shape.contexts] + [n + r for n, r in shape.prompts]
        for row, num_tokens in enumerate(sizes):
            num = blocks_for(num_tokens)
            all_blocks.append(NewBlocks(row, 0, tuple(range(next_id, next_id + num))))
            next_id += num
        batch = len(shape.contexts)
        if batch:
            slices = tuple(
                PrefillSlice(f"d{row}", row, n - 1, (self._draw.randrange(self.vocab_size),), GREEDY)
                for row, n in enumerate(shape.contexts)
            )
            self._num_chunks += 1
            work = PrefillWork(self._num_chunks, slices, 0, self.num_layers, True, tuple(all_blocks[:batch]))
            self.executor.launch(work, self.executor.partitions[0])
            while self.executor.wait(None):
                pass
        return tuple(all_blocks[batch:])

    def _step(self, shape: Shape, number: int) -> DecodeWork:
        rows = tuple(range(len(shape.contexts)))
        return DecodeWork(tuple(f"d{row}" for row in rows), rows, tuple(n + number for n in shape.contexts))

    def _piece(self, shape: Shape, last: PrefillWork | None, blocks: tuple[NewBlocks, ...]) -> PrefillWork:
        """The next layers of the chunk under way, or the first of a new one (all layers of it, in a fused step)."""
        first = last.last_layer if last is not None and not last.is_last else 0
        layers = self.num_layers if shape.is_fused else shape.layers or self.num_layers
        end = min(first + layers, self.num_layers)
        if first:
            return PrefillWork(last.batch_id, last.slices, first, end, end == self.num_layers)
        self._num_chunks += 1
        batch = len(shape.contexts)
        slices = tuple(
            PrefillSlice(f"p{i}", batch + i, r, tuple(self._draw.choices(range(self.vocab_size), k=n)), GREEDY)
            for i, (n, r) in enumerate(shape.prompts)
        )
        return PrefillWork(self._num_chunks, slices, 0, end, end == self.num_layers, blocks)


def _lane_of(work: Work) -> Lane:
    return Lane.DECODE if isinstance(work, FusedWork) else work.lanes[0]
