"""Which mode, partition and token chunk next: pure functions of what is running and what it is predicted to cost.

Three modes compete, each by the prompt tokens per second it computes while every running request keeps its TBT
(time between tokens):

    split       decode on the fewest SMs whose guarded step meets the TBT, prefill on all the others at the same time
    fused       one pass for both over the weights, its prompt chunk the fastest that the TBT allows
    exclusive   the chip in turns: a decode step, then as many prefill layers as the rest of the TBT holds

The paper's dispatcher (arXiv 2504.14489, section 3.4) is the first of them. Promises are judged by the guard's worst
factor, throughput by what to expect: the guard's mean, of a fused step as it will be when the clock has settled, and
the solo time in turns (whose decode steps count as promised). Chunks of any size are compared as if they were all like
the first prompt: a large one may end in the cheap head of the next. A choice changes to split, from it, or to another
partition only when that is better by a margin. Where no mode can keep the TBT, decode gets the chip and prefill a
stated share of the time, or each a half if steps take no longer there, and the decision says ``unmeetable``. So that
this is seldom, a prompt begins only when the decode steps of all who are under way would keep the TBT with it.

Imports no torch, reads no clock, keeps no state: the caller passes the decision in force.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nanodrift.cost import Cell, CostModel, DecodeLoad, Guard, PrefillLoad
from nanodrift.decision import Decision, Load, Mode, Policy
from nanodrift.plan import FUSED_TOKENS, MAX_FUSED_SLICES, Lane, Partition, is_wasteful

MIN_PREFILL_SHARE = 0.1  # of the time: when no mode can keep the TBT, and of the TBT when a request joins
LONE_PIECE_S = 5e-3  # a prefill piece while nothing decodes; a first decode step may have two in flight before it
HYSTERESIS = 0.05  # a new choice must be better by this
MERGE_STEPS = 1.5  # split: the gap after a first token is at most so many steps (Flight.step_from_s says why)


class Dispatcher(Policy):
    """The modes and partitions that may be used on one machine for one model.

    Without ``side_by_side`` the two attentions of a fused step follow each other on the whole chip.
    """

    def __init__(
        self,
        cost: CostModel,
        guard: Guard,
        partitions: tuple[Partition, ...],
        *,
        max_prefill_tokens: int,
        modes: Iterable[Mode] = tuple(Mode),
        side_by_side: bool = True,
    ):
        self.cost, self.guard, self.modes, self.side_by_side = cost, guard, tuple(modes), side_by_side
        self.max_prefill_tokens = max_prefill_tokens
        self.whole_chip = next(p for p in partitions if p.is_shared)
        self.splits = sorted((p for p in partitions if not p.is_shared), key=lambda p: p.decode_sms)

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        """The best option. Into a split and out of it by the margin only: the lanes have to wait for each other."""
        if load.decode.batch == 0 or load.prompt_tokens == 0:
            return self._alone(load)
        options = self.options(load, current)
        if not options:  # a half where steps take no longer lets prefill do more meanwhile
            forced = self._exclusive(load, is_forced=True)
            halves = [self.split_at(load, p) for p in self.splits if Mode.SPLIT in self.modes]
            options = [option for option in (forced, *halves) if option.step_s <= forced.step_s]
        best = max(options, key=lambda option: option.prompt_tokens_per_s)
        in_force = current and (current.mode, current.partition)
        kept = next((option for option in options if (option.mode, option.partition) == in_force), None)
        is_free = kept is None or Mode.SPLIT not in (best.mode, kept.mode)
        return best if is_free or best.prompt_tokens_per_s > (1 + HYSTERESIS) * kept.prompt_tokens_per_s else kept

    def may_join(self, joined: DecodeLoad, newest: DecodeLoad, tbt_s: float) -> bool:
        """Who would make decode steps too long waits, unless it alone makes them so: waiting would not help it."""
        most_s = tbt_s * (1 - MIN_PREFILL_SHARE)
        return self._alone_s(joined) <= most_s or self._alone_s(newest) > most_s

    def options(self, load: Load, current: Decision | None = None) -> list[Decision]:
        """Every permitted way that keeps the TBT, at most one a mode."""
        modes = self.modes
        if load.open_tokens:  # begun by layers, it cannot become fused; taking turns can always finish it
            modes = [mode for mode in modes if mode is not Mode.FUSED] or [Mode.EXCLUSIVE]
        guess = current.token_chunk if current and current.mode is Mode.FUSED else 512
        makers = {
            Mode.SPLIT: self._split,
            Mode.FUSED: lambda load: self._fused(load, guess),
            Mode.EXCLUSIVE: self._exclusive,
        }
        options = (makers[mode](load) for mode in modes)
        return [option for option in options if option is not None]

    def split_at(self, load: Load, partition: Partition) -> Decision:
        """Decode and prefill side by side on this partition, whatever it means for the TBT."""
        return self._first_split(load, [partition], math.inf)

    def _split(self, load: Load) -> Decision | None:
        """Best fit: the smallest decode half whose guarded step meets the TBT leaves the most SMs to prefill."""
        return self._first_split(load, self.splits, load.tbt_s)

    def _first_split(self, load: Load, partitions: Iterable[Partition], most_s: float) -> Decision | None:
        """On the first partition whose longest gap is at most ``most_s``."""
        chunk, merged = load.chunk(self.max_prefill_tokens)
        alike = load.like_first(chunk, self.max_prefill_tokens)
        num_steps = MERGE_STEPS if chunk.num_sampled or load.is_merging else 1.0
        for partition in partitions:
            cell = Cell.of(chunk, load.decode, partition.decode_sms)
            decode_s = self.cost.decode_s(merged, partition.decode_sms) * self.guard.factor(Lane.DECODE, cell).worst
            if (gap_s := decode_s * num_steps) <= most_s:
                slowdown = self.guard.factor(Lane.PREFILL, cell).mean
                prefill_s = self.cost.prefill_s(chunk, partition.prefill_sms) * slowdown
                rate = chunk.num_tokens / (self.cost.prefill_s(alike, partition.prefill_sms) * slowdown)
                layers = self._layers(decode_s, prefill_s)
                promise = {"step_s": gap_s, "decode_s": decode_s, "is_unmeetable": gap_s > load.tbt_s}
                return Decision(Mode.SPLIT, partition, chunk.num_tokens, layers, prompt_tokens_per_s=rate, **promise)
        return None

    def fused_at(self, load: Load, partition: Partition, size: int) -> Decision:
        """One pass of at most ``size`` tokens for both, its attentions on this partition, whatever that takes."""
        chunk, _ = load.chunk(min(size - load.decode.batch, self.max_prefill_tokens), MAX_FUSED_SLICES)
        alike, sms = load.like_first(chunk, self.max_prefill_tokens), (partition.prefill_sms, partition.decode_sms)
        solo_s, alike_s = (self.cost.fused_s(one, load.decode, *sms) for one in (chunk, alike))
        cell = Cell.of(chunk, load.decode, partition.decode_sms, True, load.is_behind_split)
        step_s = solo_s * self.guard.factor(Lane.DECODE, cell).worst
        settled = self.guard.factor(Lane.DECODE, cell._replace(is_behind_split=False))
        rate, layers = chunk.num_tokens / (alike_s * settled.mean), self.cost.num_layers
        promise = {"step_s": step_s, "decode_s": step_s, "is_unmeetable": step_s > load.tbt_s}
        return Decision(Mode.FUSED, partition, chunk.num_tokens, layers, prompt_tokens_per_s=rate, **promise)

    def _fused(self, load: Load, guess: int) -> Decision | None:
        """The fastest token chunk that keeps the TBT, the attentions beside each other where that pays."""
        best = self._fused_on(load, self.whole_chip, guess)
        if self.side_by_side and self.splits and load.decode.batch < FUSED_TOKENS[-1]:
            least = load.decode.batch + (best.token_chunk if best else 1)
            size = next(size for size in FUSED_TOKENS if size >= least)
            chunk, _ = load.chunk(size - load.decode.batch, MAX_FUSED_SLICES)
            solo_s = {p: self.cost.fused_s(chunk, load.decode, p.prefill_sms, p.decode_sms) for p in self.splits}
            beside = self._fused_on(load, min(solo_s, key=solo_s.get), guess)
            best = max(best, beside, key=lambda option: option.prompt_tokens_per_s if option else 0.0)
        return best

    def _fused_on(self, load: Load, partition: Partition, guess: int) -> Decision | None:
        """The fastest chunk on this partition whose step keeps the TBT.

        The largest first: from ``guess`` in strides that double, up while sizes fit and down while they do not. Then
        smaller ones, while they are faster.
        """
        batch = load.decode.batch
        most = batch + load.chunk(self.max_prefill_tokens, MAX_FUSED_SLICES)[0].num_tokens
        sizes = [size for size in FUSED_TOKENS if size > batch and not is_wasteful(min(most, size), size)]  # captured
        sizes = sizes[: 1 + sum(size < most for size in sizes)]
        low, high, best = -1, len(sizes), None  # the largest size known to fit, the smallest known not to
        probe, stride = min(sum(size < batch + guess for size in sizes), high - 1), 1
        while high - low > 1:
            option = self.fused_at(load, partition, sizes[probe])
            if option.is_unmeetable:
                high, probe = probe, probe - stride
            else:
                low, best, probe = probe, option, probe + stride
            stride *= 2
            probe = min(max(probe, low + 1), high - 1)
        while low > 0:  # as they are far into a prompt, where attention grows with the chunk
            smaller = self.fused_at(load, partition, sizes[(low := low - 1)])
            if smaller.prompt_tokens_per_s <= best.prompt_tokens_per_s:
                break
            best = smaller
        return best

    def _exclusive(self, load: Load, is_forced: bool = False) -> Decision | None:
        """A decode step on the whole chip, then prefill layers until the TBT is used up.

        Forced where no mode can keep the TBT: prefill gets its minimum share of the time, at least one layer a turn.
        """
        chunk, merged = load.chunk(self.max_prefill_tokens)
        sms, num_layers = self.whole_chip.prefill_sms, self.cost.num_layers
        slowest = self.guard.factor(Lane.PREFILL, Cell.of(chunk, DecodeLoad(), sms)).worst
        decode_s = self._alone_s(merged)
        body_s = self.cost.prefill_s(chunk._replace(num_sampled=0), sms) * slowest
        chunk_s = self.cost.prefill_s(chunk, sms) * slowest
        head_s = chunk_s - body_s if chunk.num_sampled else 0.0  # behind the last layer
        layer_s, room_s = body_s / num_layers, load.tbt_s - decode_s - head_s
        if is_forced:
            room_s = max(layer_s, decode_s * MIN_PREFILL_SHARE / (1 - MIN_PREFILL_SHARE))
        if room_s < layer_s:
            return None
        turns = math.ceil(num_layers / math.floor(room_s / layer_s))
        layers = math.ceil(num_layers / turns)  # even pieces
        gap_s = decode_s + layer_s * layers + head_s
        num_steps = turns + (not load.open_tokens)  # one before the first piece
        alike_s = self.cost.prefill_s(load.like_first(chunk, self.max_prefill_tokens), sms)
        rate = chunk.num_tokens / (alike_s + num_steps * decode_s)
        promise = {"step_s": gap_s, "decode_s": decode_s, "is_unmeetable": is_forced}
        return Decision(Mode.EXCLUSIVE, self.whole_chip, chunk.num_tokens, layers, prompt_tokens_per_s=rate, **promise)

    def _alone(self, load: Load) -> Decision:
        """One lane has nothing to do: the other gets the chip. Prefill goes in short pieces, for a decode may begin."""
        decode_s, layers, rate = self._alone_s(load.decode), self.cost.num_layers, 0.0
        chunk = load.chunk(self.max_prefill_tokens)[0] if load.prompt_tokens else PrefillLoad()
        if chunk.num_tokens:
            prefill_s = self.cost.prefill_s(chunk, self.whole_chip.prefill_sms)
            layers, rate = self._layers(LONE_PIECE_S, prefill_s), chunk.num_tokens / prefill_s
        promise = {"step_s": decode_s, "decode_s": decode_s, "is_unmeetable": decode_s > load.tbt_s}
        return Decision(Mode.EXCLUSIVE, self.whole_chip, chunk.num_tokens, layers, prompt_tokens_per_s=rate, **promise)

    def _alone_s(self, decode: DecodeLoad) -> float:
        """Guarded prediction of a decode step that has the whole chip."""
        sms = self.whole_chip.decode_sms
        worst = self.guard.factor(Lane.DECODE, Cell.of(PrefillLoad(), decode, sms)).worst
        return self.cost.decode_s(decode, sms) * worst if decode.batch else 0.0

    def _layers(self, decode_s: float, prefill_s: float) -> int:
        """N_layers = ceil(T_decode x layers / T_prefill): about a decode step. No layer is shorter than its launch."""
        per_layer_s = max(prefill_s / self.cost.num_layers, self.cost.profile.host_launch_s)
        return min(self.cost.num_layers, max(1, math.ceil(decode_s / per_layer_s)))
