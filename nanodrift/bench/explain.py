"""Six requests through the real scheduler on a simulated H200, every change of mind as one line, and a text Gantt.

    python bench.py explain
    python bench.py explain --slo-tbt-ms 10 --modes split,exclusive
    python bench.py explain --policy chunked

Needs no GPU and no torch; takes seconds. All times are simulated, from the cost profile that the first line names.
"""

from __future__ import annotations

import argparse
import sys

from nanodrift.bench.simulate import simulated_engine, simulated_policy
from nanodrift.config import SLO
from nanodrift.cost import h200_prior
from nanodrift.dispatch import Decision, Load, Mode, Policy
from nanodrift.executor import Clock
from nanodrift.plan import FusedWork, Lane
from nanodrift.request import Request, SamplingParams
from nanodrift.sim import SimExecutor, Span

REQUESTS = (  # name, arrival in ms, prompt tokens, output tokens
    ("a", 0, 600, 60),
    ("b", 0, 400, 80),
    ("c", 40, 8000, 20),
    ("d", 90, 500, 40),
    ("e", 200, 12000, 10),
    ("f", 320, 300, 30),
)
GANTT_COLUMNS = 110
TENS = "0123456789abc"


class Narrator:
    """A policy that passes every question on, and prints what is answered when the answer changes."""

    def __init__(self, policy: Policy, modes: tuple[Mode, ...], clock: Clock):
        self.policy, self.clock = policy, clock
        self.dispatcher = simulated_policy("mux", modes)  # what each mode would offer, whatever the policy
        self._told: tuple | None = None

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        decision = self.policy.choose(load, current)
        key = (decision.mode, decision.partition, decision.token_chunk, load.decode.batch)
        if key != self._told and load.decode.batch + load.prompt_tokens > 0:
            self._told = key
            print(self._line(load, decision))
        return decision

    def _line(self, load: Load, decision: Decision) -> str:
        is_shared = load.decode.batch > 0 and load.prompt_tokens > 0
        offers = {option.mode: option for option in self.dispatcher.options(load)} if is_shared else {}
        cells = []
        for mode in Mode:
            offer = offers.get(mode)
            cells.append(f"{1e3 * offer.step_s:5.1f} {offer.prompt_tokens_per_s / 1e3:3.0f}k" if offer else "    -    ")
        where = "whole chip" if decision.partition.is_shared else f"decode on {decision.partition.decode_sms} SMs"
        return (
            f"{1e3 * self.clock.now():7.1f}  {load.decode.batch:5d}  {load.prompt_tokens:6d}  {'  '.join(cells)}  "
            f"{decision.mode.value}, {where}, {reason(load, decision, offers)}"
        )


def reason(load: Load, decision: Decision, offers: dict[Mode, Decision]) -> str:
    if load.decode.batch == 0:
        return "nobody decodes"
    if load.prompt_tokens == 0:
        return "no prompt waits"
    if decision.is_unmeetable:
        return "the TBT cannot be met: decode first, prefill gets its least share"
    if load.is_chunk_open and decision.mode is not Mode.FUSED:
        return "a chunk is on its way through the layers"
    if len(offers) == 1:
        return "nothing else keeps the TBT"
    if decision.mode in offers and decision.prompt_tokens_per_s == max(o.prompt_tokens_per_s for o in offers.values()):
        return "most prompt tokens per second within the TBT"
    return "as good as any, and in force"


def simulate(policy_name: str, modes: tuple[Mode, ...], slo: SLO) -> tuple[list[Request], SimExecutor]:
    """Runs the six requests to their end, telling what is decided."""
    engine = simulated_engine(policy_name, slo, modes, wrap=lambda policy, clock: Narrator(policy, modes, clock))
    requests = []
    for number, (name, arrival_ms, num_prompt, num_output) in enumerate(REQUESTS):
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        requests.append(engine.new_request([number] * num_prompt, params, request_id=name, arrival_s=arrival_ms / 1e3))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    return requests, engine.executor


def gantt(timeline: list[Span]) -> str:
    """Two rows of one character a time slot: the tens of SMs the lane held (a is 100), # the whole chip, F fused."""
    end_s = max(span.finished_s for span in timeline)
    rows = {Lane.DECODE: [" "] * GANTT_COLUMNS, Lane.PREFILL: [" "] * GANTT_COLUMNS}
    for span in timeline:
        work, partition = span.ticket.work, span.ticket.partition
        first, last = (int(t / end_s * (GANTT_COLUMNS - 1)) for t in (span.started_s, span.finished_s))
        for lane in work.lanes:
            sms = partition.decode_sms if lane is Lane.DECODE else partition.prefill_sms
            mark = "F" if isinstance(work, FusedWork) else "#" if partition.is_shared else TENS[sms // 10]
            rows[lane][first : last + 1] = mark * (last + 1 - first)
    scale = "".join(f"{1e3 * end_s * i / 5:<{GANTT_COLUMNS // 5}.0f}" for i in range(5))
    return "\n".join([f"     ms  {scale}"] + [f"{lane.value:>7}  {''.join(row)}" for lane, row in rows.items()])


def outcome(requests: list[Request], slo: SLO) -> str:
    lines = ["request  prompt  output  TTFT ms  longest gap ms  gaps over the TBT"]
    for request in requests:
        gaps = [b - a for a, b in zip(request.token_s, request.token_s[1:], strict=False)]
        num_late = sum(1e3 * gap > slo.tbt_ms for gap in gaps)
        ttft_ms = 1e3 * (request.first_token_s - request.arrival_s)
        lines.append(
            f"{request.request_id:>7}  {len(request.prompt_token_ids):6d}  {len(request.output_token_ids):6d}  "
            f"{ttft_ms:7.1f}  {1e3 * max(gaps):14.1f}  {num_late} of {len(gaps)}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py explain", description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mux", help="mux, turns, chunked, chunked-auto or static")
    parser.add_argument("--slo-tbt-ms", type=float, default=12.0, metavar="MS")
    parser.add_argument(
        "--modes", default=",".join(mode.value for mode in Mode), help="of mux, for example split,exclusive"
    )
    options = parser.parse_args(argv)
    try:
        modes = tuple(Mode(name) for name in options.modes.split(","))
        slo = SLO(tbt_ms=options.slo_tbt_ms)
        print(f"SIMULATED: Llama-3.1-8B on the {h200_prior().name}, policy {options.policy}, TBT {slo.tbt_ms:g} ms\n")
        print("each mode: longest gap in ms it guards for, and prompt tokens per second\n")
        print("     ms  batch  prompt      split      fused  exclusive  choice")
        requests, executor = simulate(options.policy, modes, slo)
    except ValueError as error:
        print(f"bench.py explain: {error}", file=sys.stderr)
        return 2
    print(f"\nSMs in tens (a: 100, b: 110), # the whole chip, F a fused step\n{gantt(executor.timeline)}\n")
    print(outcome(requests, slo))
    return 0
