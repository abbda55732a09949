"""Policies as people write them: a name, and behind a colon what it is set to.

    mux                     the dispatcher with all of its modes
    mux:fused+exclusive     the dispatcher without split; any of split, fused, exclusive
    mux:sequential          the two attentions of a fused step after each other, never side by side; also with modes
    chunked:512             every step one fused batch of 512 tokens
    chunked-auto            the same, sized by the estimator
    static:32               32 SMs decode, the others prefill, for good; without a number the best by the cost profile
    overlap:32              the same on plain streams: grids limited likewise, SMs left to the hardware
    prefill-first | turns   nothing to set
    2xmux                   two devices, each under that policy (simulated only, as are the next; two_devices.py)
    disaggregated:50        a prefill device and a decode device, 50 GB/s between them; disaggregated-dynamic:50

Knows no machine: costs, guard and partitions arrive as arguments. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanodrift.baselines import make_policy
from nanodrift.cost import CostModel, Guard
from nanodrift.decision import Mode, Policy
from nanodrift.plan import Partition

SEQUENTIAL = "sequential"
SET_BY_TOKENS, SET_BY_SMS = ("chunked",), ("static", "overlap")
PAIRS = ("disaggregated", "disaggregated-dynamic")
# What these do does not depend on the TBT that was promised: one run can be judged by any.
BLIND_TO_TBT = (*SET_BY_TOKENS, *PAIRS, "prefill-first", "turns")


@dataclass(frozen=True)
class PolicySpec:
    """One policy of a sweep. ``text`` is how it was written, and its name in every result."""

    text: str
    name: str
    modes: tuple[Mode, ...] = tuple(Mode)
    side_by_side: bool = True
    budget_tokens: int = 512
    decode_sms: int = 0
    inner: PolicySpec | None = None  # of each of two replicas
    gb_per_s: float = 0.0  # between two devices of which one prefills
    is_dynamic: bool = False

    @property
    def num_devices(self) -> int:
        return 2 if self.inner is not None or self.gb_per_s else 1

    @property
    def sees_tbt(self) -> bool:
        return self.inner.sees_tbt if self.inner is not None else self.name not in BLIND_TO_TBT

    def make(self, cost: CostModel, guard: Guard, partitions: tuple[Partition, ...], max_prefill_tokens: int) -> Policy:
        """The policy on a machine. Raises ValueError for a name or a partition that there is not."""
        more = {} if self.side_by_side else {"side_by_side": False}
        return make_policy(
            self.name,
            cost,
            guard,
            partitions,
            max_prefill_tokens=max_prefill_tokens,
            modes=self.modes,
            budget_tokens=self.budget_tokens,
            decode_sms=self.decode_sms,
            **more,
        )


def parse(text: str) -> PolicySpec:
    """Raises ValueError, saying what is understood, for a setting that the policy does not have."""
    if text.strip().startswith("2x"):
        return PolicySpec(text.strip(), "2x", inner=parse(text.strip()[2:]))
    name, colon, setting = text.strip().partition(":")
    if name in PAIRS and setting.replace(".", "", 1).isdigit() and float(setting) > 0:
        return PolicySpec(text.strip(), name, gb_per_s=float(setting), is_dynamic=name.endswith("dynamic"))
    if not colon and name not in PAIRS:
        return PolicySpec(text.strip(), name)
    if name == "mux":
        words = setting.split("+")
        try:
            modes = tuple(Mode(word) for word in words if word != SEQUENTIAL) or tuple(Mode)
            return PolicySpec(text.strip(), name, modes, side_by_side=SEQUENTIAL not in words)
        except ValueError as error:
            known = "+".join(mode.value for mode in Mode)
            raise ValueError(f"{error}: mux is set to some of {known}+{SEQUENTIAL}, got {text!r}") from error
    if setting.isdigit() and int(setting) > 0:
        if name in SET_BY_TOKENS:
            return PolicySpec(text.strip(), name, budget_tokens=int(setting))
        if name in SET_BY_SMS:
            return PolicySpec(text.strip(), name, decode_sms=int(setting))
    raise ValueError(
        f"{text!r} is not understood: mux:split+fused, chunked:TOKENS, static:SMS, disaggregated:GB_PER_S are"
    )


def parse_all(text: str) -> list[PolicySpec]:
    """Policies separated by commas, each once."""
    return list({spec.text: spec for spec in map(parse, text.split(","))}.values())
