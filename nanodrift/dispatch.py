"""Which mode, partition and token chunk next: pure functions of what is running and what it is predicted to cost.

Three modes compete, each by the prompt tokens per second it computes while every running request keeps its TBT
(time between tokens):

    split       decode on the fewest SMs whose guarded step meets the TBT, prefill on all the others at the same time
    fused       one pass for both over the weights, its prompt chunk as large as the TBT allows
    exclusive   the chip in turns: a decode step, then as many prefill layers as the rest of the TBT holds

The paper's dispatcher (arXiv 2504.14489, section 3.4) is the first of them. Promises are judged by the guard's worst
factor, throughput by its mean. A choice changes only when another is better by a margin. Where no mode can keep the
TBT, decode gets the chip, prefill a stated share of the time, and the decision says ``unmeetable``.

Imports no torch, reads no clock, keeps no state: the caller passes the decision in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from nanodrift.cost import Cell, CostModel, DecodeLoad, Guard, PrefillLoad
from nanodrift.plan import Lane, Partition

TOKEN_CHUNKS = (64, 128, 256, 512, 1024, 2048)  # of a fused step, decoding rows not counted
MIN_PREFILL_SHARE = 0.1  # of the time, when no mode can keep the TBT
LONE_PIECE_S = 5e-3  # of prefill while nothing decodes: what a first decode step may have to wait for, twice
HYSTERESIS = 0.05  # a new choice must be better by this


class Mode(Enum):
    SPLIT = "split"
    FUSED = "fused"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class Load:
    """What the dispatcher decides for: the running batch, its promise, and the prompt that is next."""

    decode: DecodeLoad
    tbt_s: float  # the tightest TBT among the running requests
    prompt_tokens: int = 0  # that wait to be computed, of all prompts together
    prompt_start: int = 0  # where the next token chunk begins in its prompt: cached and computed tokens before it
    is_chunk_open: bool = False  # a chunk is on its way through the layers, and must go on by layers


@dataclass(frozen=True)
class Decision:
    """How the two lanes share the device until the next decision."""

    mode: Mode
    partition: Partition
    token_chunk: int  # prompt tokens of the next chunk
    layers: int  # of one prefill piece, about as long as a decode step
    step_s: float = 0.0  # guarded prediction of the gap between two tokens; 0 where nothing was predicted
    prompt_tokens_per_s: float = 0.0
    is_unmeetable: bool = False

    def describe(self) -> str:
        where = "whole chip" if self.partition.is_shared else f"{self.partition.decode_sms} SMs decode"
        late = ", TBT unmeetable" if self.is_unmeetable else ""
        rate = f"{self.prompt_tokens_per_s:,.0f} prompt tokens/s"
        return f"{self.mode.value} ({where}): gap <= {1e3 * self.step_s:.1f} ms, {rate}{late}"


class Policy(Protocol):
    """What the scheduler asks before it launches anything: this module's dispatcher, or one of baselines.py."""

    def choose(self, load: Load, current: Decision | None = None) -> Decision: ...


@dataclass(frozen=True)
class Turns:
    """Prompts and tokens take turns on the whole chip, in chunks of fixed size: needs to know no costs."""

    whole_chip: Partition
    token_chunk: int
    layers: int

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        return Decision(Mode.EXCLUSIVE, self.whole_chip, self.token_chunk, self.layers)


class Dispatcher:
    """The modes and partitions that may be used on one machine for one model."""

    def __init__(
        self,
        cost: CostModel,
        guard: Guard,
        partitions: Iterable[Partition],
        *,
        max_prefill_tokens: int,
        modes: Iterable[Mode] = tuple(Mode),
    ):
        self.cost, self.guard, self.modes = cost, guard, tuple(modes)
        self.max_prefill_tokens = max_prefill_tokens
        partitions = tuple(partitions)
        self.whole_chip = next(p for p in partitions if p.is_shared)
        self.splits = sorted((p for p in partitions if not p.is_shared), key=lambda p: p.decode_sms)

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        """The best option; the one in force unless it fails the TBT or another is better by the margin."""
        if load.decode.batch == 0 or load.prompt_tokens == 0:
            return self._alone(load)
        options = self.options(load)
        if not options:
            return self._unmeetable(load)
        best = max(options, key=lambda option: option.prompt_tokens_per_s)
        kept = next(
            (o for o in options if current and (o.mode, o.partition) == (current.mode, current.partition)), None
        )
        if kept is not None and best.prompt_tokens_per_s < (1 + HYSTERESIS) * kept.prompt_tokens_per_s:
            return kept
        return best

    def options(self, load: Load) -> list[Decision]:
        """Every permitted way that keeps the TBT, at most one a mode."""
        makers = {Mode.SPLIT: self._split, Mode.FUSED: self._fused, Mode.EXCLUSIVE: self._exclusive}
        modes = self.modes
        if load.is_chunk_open:  # modes change at the boundaries of chunks; taking turns can always finish one
            modes = [mode for mode in modes if mode is not Mode.FUSED] or [Mode.EXCLUSIVE]
        options = (makers[mode](load) for mode in modes)
        return [option for option in options if option is not None]

    def split_at(self, load: Load, partition: Partition) -> Decision:
        """Decode and prefill side by side on this partition, whatever it means for the TBT."""
        chunk = self._chunk(load, self.max_prefill_tokens)
        cell = Cell.of(chunk, load.decode, partition.decode_sms)
        solo_s = self.cost.decode_s(load.decode, partition.decode_sms)
        step_s = solo_s * self.guard.factor(Lane.DECODE, cell).worst
        prefill_s = self.cost.prefill_s(chunk, partition.prefill_sms) * self.guard.factor(Lane.PREFILL, cell).mean
        rate, layers = chunk.num_tokens / prefill_s, self._layers(solo_s, prefill_s)
        return Decision(Mode.SPLIT, partition, chunk.num_tokens, layers, step_s, rate, step_s > load.tbt_s)

    def _split(self, load: Load) -> Decision | None:
        """Best fit: the smallest decode half whose guarded step meets the TBT leaves the most SMs to prefill."""
        halves = (self.split_at(load, partition) for partition in self.splits)
        return next((half for half in halves if not half.is_unmeetable), None)

    def _fused(self, load: Load) -> Decision | None:
        """The token chunk of the highest rate that keeps the TBT, the attentions beside each other where that pays."""
        best = None
        for size in TOKEN_CHUNKS:
            if size > self.max_prefill_tokens:
                break
            chunk = self._chunk(load, size)
            for partition in (self.whole_chip, *self.splits):
                solo_s = self.cost.fused_s(chunk, load.decode, partition.prefill_sms, partition.decode_sms)
                cell = Cell.of(chunk, load.decode, partition.decode_sms)
                worst = 1.0 if partition.is_shared else self.guard.factor(Lane.DECODE, cell).worst
                step_s, rate = solo_s * worst, chunk.num_tokens / solo_s
                if step_s <= load.tbt_s and (best is None or rate > best.prompt_tokens_per_s):
                    layers = self.cost.num_layers
                    best = Decision(Mode.FUSED, partition, chunk.num_tokens, layers, step_s, rate)
            if size >= load.prompt_tokens:
                break
        return best

    def _exclusive(self, load: Load) -> Decision | None:
        """A decode step on the whole chip, then prefill layers until the TBT is used up."""
        decode_s = self.cost.decode_s(load.decode, self.whole_chip.decode_sms)
        chunk = self._chunk(load, self.max_prefill_tokens)
        prefill_s = self.cost.prefill_s(chunk, self.whole_chip.prefill_sms)
        layers = math.floor((load.tbt_s - decode_s) / prefill_s * self.cost.num_layers)
        if layers < 1:
            return None
        return self._in_turns(load, chunk, min(layers, self.cost.num_layers))

    def _in_turns(self, load: Load, chunk: PrefillLoad, layers: int, is_unmeetable: bool = False) -> Decision:
        decode_s = self.cost.decode_s(load.decode, self.whole_chip.decode_sms)
        prefill_s = self.cost.prefill_s(chunk, self.whole_chip.prefill_sms)
        gap_s = decode_s + prefill_s * layers / self.cost.num_layers
        rate = chunk.num_tokens * layers / self.cost.num_layers / gap_s
        return Decision(Mode.EXCLUSIVE, self.whole_chip, chunk.num_tokens, layers, gap_s, rate, is_unmeetable)

    def _unmeetable(self, load: Load) -> Decision:
        """Decode has the chip; prefill gets its minimum share of the time, at least one layer a turn."""
        chunk = self._chunk(load, self.max_prefill_tokens)
        decode_s = self.cost.decode_s(load.decode, self.whole_chip.decode_sms)
        prefill_s = self.cost.prefill_s(chunk, self.whole_chip.prefill_sms)
        share_s = decode_s * MIN_PREFILL_SHARE / (1 - MIN_PREFILL_SHARE)
        layers = max(1, math.floor(share_s / prefill_s * self.cost.num_layers))
        return self._in_turns(load, chunk, min(layers, self.cost.num_layers), is_unmeetable=True)

    def _alone(self, load: Load) -> Decision:
        """One lane has nothing to do: the other gets the chip. Prefill goes in short pieces, for a decode may begin."""
        chunk = self._chunk(load, self.max_prefill_tokens)
        decode_s = self.cost.decode_s(load.decode, self.whole_chip.decode_sms) if load.decode.batch else 0.0
        layers, rate = self.cost.num_layers, 0.0
        if chunk.num_tokens:
            prefill_s = self.cost.prefill_s(chunk, self.whole_chip.prefill_sms)
            layers, rate = self._layers(LONE_PIECE_S, prefill_s), chunk.num_tokens / prefill_s
        is_late = decode_s > load.tbt_s
        return Decision(Mode.EXCLUSIVE, self.whole_chip, chunk.num_tokens, layers, decode_s, rate, is_late)

    def _chunk(self, load: Load, most_tokens: int) -> PrefillLoad:
        return PrefillLoad.of_chunk(min(load.prompt_tokens, most_tokens), load.prompt_start)

    def _layers(self, decode_s: float, prefill_s: float) -> int:
        """N_layers = ceil(T_decode x layers / T_prefill): a piece lasts about one decode step, launch time included."""
        per_layer_s = max(prefill_s / self.cost.num_layers, self.cost.profile.host_launch_s)
        return min(self.cost.num_layers, max(1, math.ceil(decode_s / per_layer_s)))
