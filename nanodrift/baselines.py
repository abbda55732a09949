"""The other policies, on the same mechanism: same kernels, cache, queue order and loop as the dispatcher's.

A policy answers ``choose(load, current) -> Decision``; the scheduler carries any decision out. So a comparison of
policies compares policies and nothing else. Asked whether a prompt ``may_join``, those who do not look at promises say
yes.

    turns           a token chunk, a decode step, a token chunk: nobody's promise is looked at. The default until the
                    machine's costs are known
    prefill-first   whole prompts as soon as there is room for them, decode steps when none waits (SGLang's default)
    chunked         every step is one fused batch of a fixed token budget, decoding rows first (Sarathi-Serve, vLLM)
    chunked-auto    the same, its budget sized by the estimator to the tightest TBT
    static          one partition for good, whatever the load
    overlap         the same on an executor whose halves are plain streams: grids are limited to each side's SM count,
                    but nothing keeps them on SMs of their own. Also what a GPU without green contexts can do

While nothing decodes, each of them prefills on the whole chip. Imports no torch, reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanodrift.config import POLICIES
from nanodrift.cost import Cell, CostModel, DecodeLoad, Guard, PrefillLoad
from nanodrift.decision import Decision, Load, Mode, Policy
from nanodrift.dispatch import Dispatcher
from nanodrift.plan import MAX_FUSED_TOKENS, Lane, Partition

TYPICAL = PrefillLoad.of_chunk(2048, 0), DecodeLoad(64, 64 * 1024)  # what the best split is best for


@dataclass(frozen=True)
class Turns(Policy):
    """Prompts and tokens take turns on the whole chip, in chunks of fixed size: needs to know no costs."""

    whole_chip: Partition
    token_chunk: int
    layers: int

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        return Decision(Mode.EXCLUSIVE, self.whole_chip, self.token_chunk, self.layers)


class PrefillFirst(Turns):
    """No decode step is launched while there is prefill to launch."""

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        return replace(super().choose(load), holds_decode=load.prompt_tokens > 0)


@dataclass(frozen=True)
class Chunked(Policy):
    """``budget_tokens`` a step: the decoding rows, and prompt tokens up to the budget."""

    whole_chip: Partition
    budget_tokens: int
    token_chunk: int  # while nothing decodes
    layers: int

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        if load.decode.batch == 0:
            return Decision(Mode.EXCLUSIVE, self.whole_chip, self.token_chunk, self.layers)
        token_chunk = min(max(1, self.budget_tokens - load.decode.batch), MAX_FUSED_TOKENS)
        return Decision(Mode.FUSED, self.whole_chip, token_chunk, self.layers)


@dataclass(frozen=True)
class Static(Policy):
    """Decode on its half, prefill on the other, for good; a lane alone still gets the chip."""

    dispatcher: Dispatcher
    partition: Partition

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        if load.decode.batch == 0 or load.prompt_tokens == 0:
            return self.dispatcher.choose(load)
        return self.dispatcher.split_at(load, self.partition)


def best_split(dispatcher: Dispatcher) -> Partition:
    """The partition on which both lanes together do most of what each would do alone on the chip, by the profile."""
    cost, guard, (prefill, decode) = dispatcher.cost, dispatcher.guard, TYPICAL
    whole = dispatcher.whole_chip

    def co_run_sum(partition: Partition) -> float:
        cell = Cell.of(prefill, decode, partition.decode_sms)
        prefill_s = cost.prefill_s(prefill, partition.prefill_sms) * guard.factor(Lane.PREFILL, cell).mean
        decode_s = cost.decode_s(decode, partition.decode_sms) * guard.factor(Lane.DECODE, cell).mean
        alone_s = cost.prefill_s(prefill, whole.prefill_sms), cost.decode_s(decode, whole.decode_sms)
        return alone_s[0] / prefill_s + alone_s[1] / decode_s

    return max(dispatcher.splits, key=co_run_sum)


def make_policy(
    name: str,
    cost: CostModel,
    guard: Guard,
    partitions: tuple[Partition, ...],
    *,
    max_prefill_tokens: int,
    modes: tuple[Mode, ...] = tuple(Mode),
    side_by_side: bool = True,
    layers: int | None = None,
    budget_tokens: int = 512,
    decode_sms: int = 32,
) -> Policy:
    """A policy of config.POLICIES but auto. Raises ValueError for any other, and for a partition that there is not.

    ``modes`` and ``side_by_side`` (of a fused step's attentions) are of mux, ``layers`` of a launch is of those that do
    not choose it themselves (None: all), ``budget_tokens`` is of chunked, ``decode_sms`` of static and overlap: 0 takes
    the best split by the profile.
    """
    options = {"max_prefill_tokens": max_prefill_tokens}
    dispatcher = Dispatcher(cost, guard, partitions, modes=modes, side_by_side=side_by_side, **options)
    whole_chip, layers = dispatcher.whole_chip, layers or cost.num_layers
    if name == "mux":
        return dispatcher
    if name == "turns":
        return Turns(whole_chip, max_prefill_tokens, layers)
    if name == "prefill-first":
        return PrefillFirst(whole_chip, max_prefill_tokens, layers)
    if name == "chunked":
        return Chunked(whole_chip, budget_tokens, max_prefill_tokens, layers)
    if name == "chunked-auto":  # attentions in sequence, as chunked prefill runs them
        return Dispatcher(cost, guard, (whole_chip,), modes=(Mode.FUSED,), side_by_side=False, **options)
    if name in ("static", "overlap"):
        halves = {partition.decode_sms: partition for partition in dispatcher.splits}
        if not halves or (decode_sms and decode_sms not in halves):
            raise ValueError(f"no partition gives decode {decode_sms} SMs; there are {sorted(halves)}")
        return Static(dispatcher, halves[decode_sms] if decode_sms else best_split(dispatcher))
    raise ValueError(f"there is no policy {name!r}: {', '.join(POLICIES[1:])} are known")
