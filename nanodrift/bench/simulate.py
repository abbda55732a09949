"""The machine that bench.py simulates, and engines on it: the real scheduler, loop and policies, time from the costs.

    python bench.py sim                     short for ``bench.py sweep --device sim``: policies beside each other
    python bench.py goodput --device sim    and so for every mode that takes a device

Needs no GPU and no torch. Nothing here reads a clock: the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from nanodrift.bench.policies import PolicySpec, parse
from nanodrift.config import SLO, ConfigError, ModelConfig
from nanodrift.cost import CostModel, Guard, find_profile, h200_prior, read_profile
from nanodrift.decision import Mode, Policy
from nanodrift.engine import Engine
from nanodrift.executor import Clock
from nanodrift.plan import DECODE_SMS, Partition
from nanodrift.scheduler import Scheduler
from nanodrift.sim import SimExecutor

CONFIGS = Path(__file__).parent.parent / "configs"
DEFAULT_MODEL, DEVICE = "llama-3.1-8b", "NVIDIA H200"
WHOLE_CHIP = Partition(132, 132, is_shared=True)
SPLITS = tuple(Partition(132 - decode_sms, decode_sms) for decode_sms in DECODE_SMS)
NUM_BLOCKS = 13_000  # what an H200 has room for beside the weights of an 8B model: 100 GiB
NUM_ROWS = 256
MAX_PREFILL_TOKENS = 2048

Wrap = Callable[[Policy, Clock], Policy]


@dataclass(frozen=True)
class SimMachine:
    """One model on one simulated GPU."""

    model_id: str
    model_config: ModelConfig
    cost: CostModel
    prefix_caching: bool = True

    @property
    def name(self) -> str:
        return self.cost.profile.name

    def policy(self, spec: PolicySpec) -> Policy:
        """Raises ValueError for a name that there is not."""
        return spec.make(self.cost, Guard.of(self.cost.profile), (WHOLE_CHIP, *SPLITS), MAX_PREFILL_TOKENS)

    def engine(self, spec: PolicySpec, slo: SLO, wrap: Wrap = lambda policy, clock: policy) -> Engine:
        """An engine of its own at time 0. ``wrap`` may put something around the policy."""
        executor = SimExecutor(
            self.cost,
            partitions=SPLITS,
            num_blocks=NUM_BLOCKS,
            num_rows=NUM_ROWS,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
        )
        scheduler = Scheduler(
            num_blocks=NUM_BLOCKS,
            num_rows=NUM_ROWS,
            num_layers=executor.num_layers,
            max_model_len=self.model_config.max_position,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            policy=wrap(self.policy(spec), executor.clock),
            prefix_caching=self.prefix_caching,
        )
        return Engine(scheduler, executor, vocab_size=self.model_config.vocab_size, slo=slo)


@lru_cache(maxsize=8)
def machine(model: str = DEFAULT_MODEL, prefix_caching: bool = True, profile: str | None = None) -> SimMachine:
    """An H200 as it was measured, or as ``profile`` says. Raises ConfigError for a model whose shape is not shipped."""
    if not (CONFIGS / model).is_dir():
        known = ", ".join(sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
        raise ConfigError(f"there is no shape of a model {model!r} to simulate; there are {known}")
    config = ModelConfig.from_folder(CONFIGS / model)
    costs = read_profile(profile) if profile else find_profile(DEVICE, config, "bfloat16") or h200_prior()
    return SimMachine(model, config, CostModel(config, costs), prefix_caching)


def simulated_policy(name: str, modes: tuple[Mode, ...], budget_tokens: int = 512, decode_sms: int = 32) -> Policy:
    """A policy for Llama-3.1-8B on the simulated H200. Raises ValueError for a name that there is not."""
    return machine().policy(replace(parse(name), modes=modes, budget_tokens=budget_tokens, decode_sms=decode_sms))


def simulated_engine(
    policy_name: str,
    slo: SLO,
    modes: tuple[Mode, ...] = tuple(Mode),
    budget_tokens: int = 512,
    decode_sms: int = 32,
    wrap: Wrap = lambda policy, clock: policy,
) -> Engine:
    """Llama-3.1-8B on one H200 under a policy of this name."""
    spec = replace(parse(policy_name), modes=modes, budget_tokens=budget_tokens, decode_sms=decode_sms)
    return machine().engine(spec, slo, wrap)


def main(argv: list[str] | None = None) -> int:
    from nanodrift.bench import sweep

    return sweep.main(argv, device="sim")
