"""The other policies, on the same mechanism: same kernels, cache, queue order and loop as the dispatcher's.

A policy answers ``choose(load, current) -> Decision``; the scheduler carries any decision out. So a comparison of
policies compares policies and nothing else.

    turns           a token chunk, a decode step, a token chunk: nobody's promise is looked at. The default until the
                    machine's costs are known
    chunked         every step is one fused batch of a fixed token budget (Sarathi-Serve, vLLM)
    chunked auto    the same, its budget sized by the estimator to the tightest TBT
    static          one partition for good, whatever the load

Imports no torch, reads no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanodrift.cost import CostModel, Guard
from nanodrift.dispatch import Decision, Dispatcher, Load, Mode, Policy, Turns
from nanodrift.plan import Partition


@dataclass(frozen=True)
class Chunked:
    """``budget_tokens`` a step: the decoding rows, and prompt tokens up to the budget."""

    whole_chip: Partition
    budget_tokens: int
    layers: int

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        if load.decode.batch == 0:
            return Decision(Mode.EXCLUSIVE, self.whole_chip, self.budget_tokens, self.layers)
        token_chunk = max(1, self.budget_tokens - load.decode.batch)
        return Decision(Mode.FUSED, self.whole_chip, token_chunk, self.layers)


@dataclass(frozen=True)
class Static:
    """Decode on its half, prefill on the other, for good; a lane alone still gets the chip."""

    dispatcher: Dispatcher
    partition: Partition

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        if load.decode.batch == 0 or load.prompt_tokens == 0:
            return self.dispatcher.choose(load)
        return self.dispatcher.split_at(load, self.partition)


def make_policy(
    name: str,
    cost: CostModel,
    guard: Guard,
    partitions: tuple[Partition, ...],
    *,
    max_prefill_tokens: int,
    modes: tuple[Mode, ...] = tuple(Mode),
    budget_tokens: int = 512,
    decode_sms: int = 32,
) -> Policy:
    """``mux``, ``turns``, ``chunked``, ``chunked-auto`` or ``static``. Raises ValueError for any other name."""
    dispatcher = Dispatcher(cost, guard, partitions, max_prefill_tokens=max_prefill_tokens, modes=modes)
    whole_chip = dispatcher.whole_chip
    if name == "mux":
        return dispatcher
    if name == "turns":
        return Turns(whole_chip, max_prefill_tokens, cost.num_layers)
    if name == "chunked":
        return Chunked(whole_chip, budget_tokens, cost.num_layers)
    if name == "chunked-auto":
        whole_only = (whole_chip,)  # attentions in sequence, as chunked prefill runs them
        return Dispatcher(cost, guard, whole_only, max_prefill_tokens=max_prefill_tokens, modes=(Mode.FUSED,))
    if name == "static":
        halves = {partition.decode_sms: partition for partition in dispatcher.splits}
        if decode_sms not in halves:
            raise ValueError(f"no partition gives decode {decode_sms} SMs; there are {sorted(halves)}")
        return Static(dispatcher, halves[decode_sms])
    raise ValueError(f"there is no policy {name!r}: mux, turns, chunked, chunked-auto and static are known")
