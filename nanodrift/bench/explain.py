"""Six requests through the real scheduler on a simulated H200, every change of mind as one line, and a text Gantt.

    python bench.py explain
    python bench.py explain --slo-tbt-ms 10 --modes split,exclusive
    python bench.py explain --policy chunked
    python bench.py explain --plot results/simulated/explain      four policies on one time axis: .svg and .png
    python bench.py explain --course                              the worked example in nanodrift/README.md, anew

After a change of costs or policies: ``python bench.py explain --course --plot results/simulated/explain``.

Needs no GPU and no torch; takes seconds. All times are simulated, from the cost profile that the first line names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nanodrift.bench import timeline
from nanodrift.bench.residency import block
from nanodrift.bench.simulate import WHOLE_CHIP, Wrap, simulated_engine, simulated_policy
from nanodrift.config import SLO
from nanodrift.decision import Decision, Load, Mode, Policy
from nanodrift.engine import Engine
from nanodrift.executor import Clock
from nanodrift.plan import FusedWork, Lane
from nanodrift.request import Request, SamplingParams
from nanodrift.server.trace import Trace
from nanodrift.sim import Span

REQUESTS = (  # name, arrival in ms, prompt tokens, output tokens
    ("a", 0, 600, 60),
    ("b", 0, 400, 80),
    ("c", 40, 8000, 20),
    ("d", 90, 500, 40),
    ("e", 200, 12000, 10),
    ("f", 320, 300, 30),
)
TBT_MS = 9.0
PANELS = ("prefill-first", "chunked", "static", "mux")  # of the figure
GANTT_COLUMNS = 110
TENS = "0123456789abc"


@dataclass
class Run:
    """The six requests at their end, the engine that served them, and what it did."""

    requests: list[Request]
    engine: Engine
    trace: Trace

    @property
    def timeline(self) -> list[Span]:
        return self.engine.executor.timeline

    def late_s(self) -> list[float]:
        """When a token came later after the one before it than its request was promised."""
        return [
            after
            for request in self.requests
            for before, after in zip(request.token_s, request.token_s[1:], strict=False)
            if 1e3 * (after - before) > request.slo.tbt_ms
        ]


def simulate(policy_name: str, modes: tuple[Mode, ...], slo: SLO, wrap: Wrap | None = None) -> Run:
    """Runs the six requests to their end; ``wrap`` may put a listener around the policy."""
    engine = simulated_engine(policy_name, slo, modes, **({"wrap": wrap} if wrap else {}))
    run = Run([], engine, Trace(engine))
    for number, (name, arrival_ms, num_prompt, num_output) in enumerate(REQUESTS):
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        request = engine.new_request([number] * num_prompt, params, request_id=name, arrival_s=arrival_ms / 1e3)
        run.requests.append(request)
        engine.add(request)
    while engine.has_work:
        engine.step()
    return run


# --- decisions as text ------------------------------------------------------------------------------------------------


class Narrator:
    """A policy that passes every question on, and tells what is answered when the answer changes."""

    def __init__(self, policy: Policy, modes: tuple[Mode, ...], clock: Clock, tell: Callable[[str], None] = print):
        self.policy, self.clock, self.tell = policy, clock, tell
        self.dispatcher = simulated_policy("mux", modes)  # what each mode would offer, whatever the policy
        self._told: tuple | None = None

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        decision = self.policy.choose(load, current)
        key = (decision.mode, decision.partition, decision.token_chunk, load.decode.batch)
        if key != self._told and load.decode.batch + load.prompt_tokens > 0:
            self._told = key
            self.tell(self._line(load, decision, current))
        return decision

    def __getattr__(self, name: str):
        return getattr(self.policy, name)

    def _line(self, load: Load, decision: Decision, current: Decision | None) -> str:
        is_shared = load.decode.batch > 0 and load.prompt_tokens > 0
        offers = {option.mode: option for option in self.dispatcher.options(load, current)} if is_shared else {}
        cells = []
        for mode in Mode:
            offer = offers.get(mode)
            cells.append(f"{1e3 * offer.step_s:5.1f} {offer.prompt_tokens_per_s / 1e3:3.0f}k" if offer else "    -    ")
        return (
            f"{1e3 * self.clock.now():7.1f}  {load.decode.batch:5d}  {load.prompt_tokens:6d}  {'  '.join(cells)}  "
            f"{decision.mode.value}, {where(decision)}, {reason(load, decision, offers)}"
        )


def where(decision: Decision) -> str:
    prefill_sms, decode_sms = decision.partition.prefill_sms, decision.partition.decode_sms
    if decision.partition.is_shared:
        return "whole chip"
    return (
        f"attention {prefill_sms} + {decode_sms} SMs" if decision.mode is Mode.FUSED else f"decode on {decode_sms} SMs"
    )


def reason(load: Load, decision: Decision, offers: dict[Mode, Decision]) -> str:
    if load.decode.batch == 0:
        return "nobody decodes"
    if load.prompt_tokens == 0:
        return "no prompt waits"
    if decision.is_unmeetable:
        return "the TBT cannot be met: decode first, prefill gets its least share"
    if load.open_tokens and decision.mode is not Mode.FUSED:
        return "a chunk is on its way through the layers"
    if len(offers) == 1:
        return "nothing else keeps the TBT"
    if decision.mode in offers and decision.prompt_tokens_per_s == max(o.prompt_tokens_per_s for o in offers.values()):
        return "most prompt tokens per second within the TBT"
    return "as good as any, and in force"


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


# --- the figure -------------------------------------------------------------------------------------------------------


def told(run: Run) -> str:
    """What stands over a strip."""
    ttfts = [request.first_token_s - request.arrival_s for request in run.requests]
    gaps = [b - a for request in run.requests for a, b in zip(request.token_s, request.token_s[1:], strict=False)]
    late = len(run.late_s())
    counted = f"{late} token{'' if late == 1 else 's'} late"
    return f"{counted}, longest gap {1e3 * max(gaps):.1f} ms, mean TTFT {1e3 * fmean(ttfts):.0f} ms"


def draw(runs: dict[str, Run], slo: SLO):
    """The runs as strips on one time axis: what held the SMs, and a red mark for every token that came late."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(len(runs), 1, figsize=(10, 0.72 + 0.98 * len(runs)), sharex=True, squeeze=False)
    num_sms = WHOLE_CHIP.decode_sms
    for (name, run), (ax,) in zip(runs.items(), axes, strict=True):
        timeline.draw_bars(ax, timeline.bars(map(json.loads, run.trace.lines), num_sms), num_sms)
        late_ms = [1e3 * at_s for at_s in run.late_s()]
        ax.scatter(late_ms, [1.09 * num_sms] * len(late_ms), marker="v", s=16, color=timeline.LATE, clip_on=False)
        ax.set_title(name, loc="left", fontsize=9, fontweight="bold", pad=9)
        ax.set_title(told(run), loc="right", fontsize=8.5, pad=9)
        ax.spines["bottom"].set_visible(ax is axes[-1][0])
        ax.tick_params(axis="x", length=2 if ax is axes[-1][0] else 0)
    axes[len(axes) // 2][0].set_ylabel("SMs", labelpad=-8)
    axes[-1][0].set_xlim(0, 1e3 * max(run.engine.executor.clock.now() for run in runs.values()))
    axes[-1][0].set_xlabel("ms, simulated")
    figure.suptitle(f"Six requests, {num_sms} SMs, a token promised every {slo.tbt_ms:g} ms", fontsize=9.5, x=0.01,
                    y=0.985, ha="left")  # fmt: skip
    miss = Line2D([], [], color=timeline.LATE, marker="v", linestyle="", markersize=4, label="late token")
    timeline.legend(figure, more=[miss], loc="upper right", bbox_to_anchor=(1.0, 1.005))
    figure.tight_layout(rect=(0, 0, 1, 0.975), h_pad=0.6)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.py explain", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--policy", default="mux", help="mux, turns, prefill-first, chunked, chunked-auto, static or overlap")
    add("--slo-tbt-ms", type=float, default=TBT_MS, metavar="MS")
    add("--modes", default=",".join(mode.value for mode in Mode), help="of mux, for example split,exclusive")
    add("--plot", type=Path, metavar="PREFIX", help=f"PREFIX.svg and .png: {', '.join(PANELS)} on one time axis")
    add("--course", action="store_true", help="write the numbers of nanodrift/README.md anew")
    options = parser.parse_args(argv)
    if options.course:
        from nanodrift.bench import course

        course.main()
    try:
        modes = tuple(Mode(name) for name in options.modes.split(","))
        slo = SLO(tbt_ms=options.slo_tbt_ms)
        if options.plot:
            with timeline.plotting():
                paths = timeline.save(draw({name: simulate(name, modes, slo) for name in PANELS}, slo), options.plot)
            print(*paths, sep="\n", file=sys.stderr)
        if options.plot or options.course:
            return 0
        profile = simulated_policy("mux", modes).cost.profile
        print(f"SIMULATED: Llama-3.1-8B on the {profile.name}, policy {options.policy}, TBT {slo.tbt_ms:g} ms\n")
        print("each mode: longest gap in ms it guards for, and prompt tokens per second\n")
        print("     ms  batch  prompt      split      fused  exclusive  choice")
        run = simulate(options.policy, modes, slo, lambda policy, clock: Narrator(policy, modes, clock))
    except ValueError as error:
        print(f"bench.py explain: {error}", file=sys.stderr)
        return 2
    print(f"\nSMs in tens (a: 100, b: 110), # the whole chip, F a fused step\n{gantt(run.timeline)}\n")
    print(outcome(run.requests, slo))
    print("\n" + "\n".join(block(run.engine.stats())))
    return 0
