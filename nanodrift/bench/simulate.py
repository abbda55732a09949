"""Policies beside each other on a simulated H200: the real scheduler and engine, time from the cost model.

    python bench.py sim
    python bench.py sim --policy mux,chunked-auto --workload conversation --rates 2,4 --slo-tbt-ms 20

Needs no GPU and no torch. Every line is simulated and says so; the same seed prints the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from nanodrift.baselines import make_policy
from nanodrift.bench import workloads
from nanodrift.bench.load import Record, duration_s, run_workload
from nanodrift.config import SLO, ModelConfig
from nanodrift.cost import CostModel, Guard, h200_prior
from nanodrift.dispatch import Mode, Policy
from nanodrift.engine import Engine
from nanodrift.executor import Clock
from nanodrift.metrics import attainment, percentile
from nanodrift.plan import Partition
from nanodrift.scheduler import Scheduler
from nanodrift.sim import SimExecutor

COST = CostModel(ModelConfig.from_folder(Path(__file__).parent.parent / "configs" / "llama-3.1-8b"), h200_prior())
WHOLE_CHIP = Partition(132, 132, is_shared=True)
SPLITS = tuple(Partition(132 - decode_sms, decode_sms) for decode_sms in (16, 32, 48, 64, 80))
NUM_BLOCKS = 13_000  # what an H200 has room for beside the weights: 100 GiB
NUM_ROWS = 256
MAX_PREFILL_TOKENS = 2048
MAX_MODEL_LEN = 131_072
COLUMNS = "policy        req/s   done  TTFT P50     P99  TBT P50    P99     max  good %"

Wrap = Callable[[Policy, Clock], Policy]


def simulated_policy(name: str, modes: tuple[Mode, ...], budget_tokens: int = 512, decode_sms: int = 32) -> Policy:
    """A policy for Llama-3.1-8B on the simulated H200. Raises ValueError for a name that there is not."""
    return make_policy(
        name,
        COST,
        Guard(),
        (WHOLE_CHIP, *SPLITS),
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        modes=modes,
        budget_tokens=budget_tokens,
        decode_sms=decode_sms,
    )


def simulated_engine(
    policy_name: str,
    slo: SLO,
    modes: tuple[Mode, ...] = tuple(Mode),
    budget_tokens: int = 512,
    decode_sms: int = 32,
    wrap: Wrap = lambda policy, clock: policy,
) -> Engine:
    """Llama-3.1-8B on one H200 under a policy of this name. ``wrap`` may put something around the policy."""
    policy = simulated_policy(policy_name, modes, budget_tokens, decode_sms)
    executor = SimExecutor(
        COST, partitions=SPLITS, num_blocks=NUM_BLOCKS, num_rows=NUM_ROWS, max_prefill_tokens=MAX_PREFILL_TOKENS
    )
    scheduler = Scheduler(
        num_blocks=NUM_BLOCKS,
        num_rows=NUM_ROWS,
        num_layers=executor.num_layers,
        max_model_len=MAX_MODEL_LEN,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        policy=wrap(policy, executor.clock),
    )
    return Engine(scheduler, executor, vocab_size=workloads.NUM_IDS, slo=slo)


def row(policy_name: str, rate: float, records: list[Record]) -> str:
    """One line of the table: latencies in ms over all requests and gaps; good is what metrics.py says it is."""
    ttfts = [record.ttft_s for record in records if record.ttft_s is not None]
    gaps = [gap for record in records for gap in record.tbt_s]

    def ms(values: list[float], percent: float) -> str:
        return f"{1e3 * percentile(values, percent):.1f}" if values else "-"

    done = sum(record.is_completed for record in records) / duration_s(records)
    return (
        f"{policy_name:<12} {rate:6.2f} {done:6.2f} {ms(ttfts, 50):>9} {ms(ttfts, 99):>7} {ms(gaps, 50):>8} "
        f"{ms(gaps, 99):>6} {ms(gaps, 100):>7} {100 * attainment(records):7.1f}  SIMULATED"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py sim", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--policy", default="mux,chunked-auto,chunked,static,turns", help="names, separated by commas")
    add("--workload", default="sharegpt", help=", ".join(workloads.NAMES))
    add("--rates", default="4,8,12", help="requests per second, separated by commas")
    add("--num-prompts", type=int, default=300, metavar="N")
    add("--slo-ttft-ms", type=float, default=2000.0, metavar="MS")
    add("--slo-tbt-ms", type=float, default=20.0, metavar="MS")
    add("--modes", default=",".join(mode.value for mode in Mode), help="of mux, for example split,exclusive")
    add("--budget-tokens", type=int, default=512, metavar="N", help="of chunked")
    add("--decode-sms", type=int, default=32, metavar="N", help="of static")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        slo = SLO(options.slo_ttft_ms, options.slo_tbt_ms)
        modes = tuple(Mode(name) for name in options.modes.split(","))
        rates = [float(rate) for rate in options.rates.split(",")]
        names = options.policy.split(",")
        workload = workloads.named(options.workload, options.num_prompts, options.seed)
        engines = {name: lambda name=name: simulated_engine(name, slo, modes, options.budget_tokens, options.decode_sms)
                   for name in names}  # fmt: skip
        for name in names:
            engines[name]()  # mistakes come before the first line
    except ValueError as error:
        print(f"bench.py sim: {error}", file=sys.stderr)
        return 2
    what = f"{options.workload}, {options.num_prompts} requests, seed {options.seed}"
    promise = f"TTFT {slo.ttft_ms:g} ms, TBT {slo.tbt_ms:g} ms"
    print(f"SIMULATED: Llama-3.1-8B on the {h200_prior().name}, {what}, {promise}\n\n{COLUMNS}")
    for rate in rates:
        for name in names:
            print(f"{name} at {rate:g}/s ...", end="\r", file=sys.stderr, flush=True)
            print(row(name, rate, run_workload(engines[name](), workload, rate, options.seed, slo=slo)), flush=True)
    return 0
