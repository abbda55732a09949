"""The worked example of nanodrift/README.md: its numbers come from the run that ``bench.py explain`` shows.

    python bench.py explain --course        writes them anew, after a change of the costs or of the dispatcher

A pair of comments names what stands between them (``<!-- explain: layers -->``); a test holds the file to this.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from nanodrift.bench import explain
from nanodrift.bench.simulate import simulated_policy
from nanodrift.config import SLO
from nanodrift.decision import Decision, Load, Mode, Policy
from nanodrift.dispatch import HYSTERESIS, MERGE_STEPS, Dispatcher
from nanodrift.executor import Clock
from nanodrift.plan import DecodeWork, PrefillWork

COURSE = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(<!-- explain: (\w+) -->\n)(.*?)(<!-- /explain -->)", re.DOTALL)


@dataclass
class Moment:
    """A question the scheduler asked, and the answer."""

    at_s: float
    load: Load
    decision: Decision


class Recorder:
    """A policy that passes every question on, and keeps those in which both lanes had something to do."""

    def __init__(self, policy: Policy, clock: Clock, moments: list[Moment]):
        self.policy, self.clock, self.moments = policy, clock, moments

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        decision = self.policy.choose(load, current)
        if load.decode.batch and load.prompt_tokens and not load.open_tokens:
            self.moments.append(Moment(self.clock.now(), load, decision))
        return decision

    def may_join(self, *loads) -> bool:
        return self.policy.may_join(*loads)


def moments_of(slo: SLO) -> list[Moment]:
    moments: list[Moment] = []
    explain.simulate("mux", tuple(Mode), slo, lambda policy, clock: Recorder(policy, clock, moments))
    return moments


def ms(seconds: float, digits: int = 2) -> str:
    return f"{1e3 * seconds:.{digits}f} ms"


def longest_gap_s(run: explain.Run) -> float:
    return max(b - a for r in run.requests for a, b in zip(r.token_s, r.token_s[1:], strict=False))


def problem() -> str:
    slo = SLO(tbt_ms=explain.TBT_MS)
    rows = []
    for name in explain.PANELS:
        run = explain.simulate(name, tuple(Mode), slo)
        ttfts = sorted(request.first_token_s - request.arrival_s for request in run.requests)
        late = len(run.late_s())
        rows.append(f"| `{name}` | {late} | {ms(longest_gap_s(run), 1)} | {ms(sum(ttfts) / len(ttfts), 1)} |\n")
    head = f"| policy | tokens later than {slo.tbt_ms:g} ms | longest gap | mean TTFT |\n|---|---:|---:|---:|\n"
    return head + "".join(rows)


def at_arrival(name: str = "c") -> Moment:
    """The first question after this request has arrived: two decode, and it has a long prompt."""
    arrival_s = next(at_ms for known, at_ms, *_ in explain.REQUESTS if known == name) / 1e3
    return next(moment for moment in moments_of(SLO(tbt_ms=explain.TBT_MS)) if moment.at_s >= arrival_s)


def prediction() -> str:
    """One guarded prediction for each partition, at that moment."""
    moment, dispatcher = at_arrival(), _dispatcher()
    load = moment.load
    chunk, merged = load.chunk(dispatcher.max_prefill_tokens)
    head = (
        f"At {ms(moment.at_s, 1)} {load.decode.batch} requests decode, {load.decode.context_tokens:,} tokens of "
        f"context between them, each promised a token every {explain.TBT_MS:g} ms: a step may be planned to take "
        f"{ms(load.tbt_s)}. A prompt of {load.prompt_tokens:,} tokens arrives; its first chunk has "
        f"{chunk.num_tokens:,}. A decode step beside it would take, on each of the partitions that were made at "
        "start:\n\n"
        f"| decode SMs | alone | x guard, worst | = promised | within {ms(load.tbt_s)} | prefill meanwhile |\n"
        "|---:|---:|---:|---:|---|---:|\n"
    )
    rows, chosen = [], None
    for partition in dispatcher.splits:
        sms, offer = partition.decode_sms, dispatcher.split_at(load, partition)
        solo_s = dispatcher.cost.decode_s(merged, sms)
        chosen = sms if chosen is None and not offer.is_unmeetable else chosen
        cells = (
            f"**{sms}**" if sms == chosen else f"{sms}",
            ms(solo_s),
            f"{offer.decode_s / solo_s:.3f}",
            ms(offer.decode_s),
            "no" if offer.is_unmeetable else "yes",
            f"{offer.prompt_tokens_per_s:,.0f} tokens/s",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return f"{head}{''.join(rows)}\n{_at_the_end(load, dispatcher)}"


def _at_the_end(load: Load, dispatcher: Dispatcher) -> str:
    """What the split of this moment comes to when it meets the last chunk of the prompt."""
    start = (load.prompt_tokens - 1) // dispatcher.max_prefill_tokens * dispatcher.max_prefill_tokens
    last = replace(load, prompt_tokens=load.prompt_tokens - start, prompt_start=start, prompts=())
    offers = [dispatcher.split_at(last, partition) for partition in dispatcher.splits]
    found = next((offer for offer in offers if not offer.is_unmeetable), None)
    best = found or min(offers, key=lambda offer: offer.step_s)
    step = f"{MERGE_STEPS} x {ms(best.decode_s)} = {ms(best.step_s)} on {best.partition.decode_sms} SMs"
    return (
        f"Where a prompt ends, {MERGE_STEPS} steps must fit (why: see the merge below). For this prompt's last chunk, "
        f"{last.prompt_tokens:,} tokens, {'some rows do' if found else 'no row does, not even the shortest'}: {step}.\n"
    )


def layers() -> str:
    """N_layers for the split of the same moment."""
    load, dispatcher = at_arrival().load, _dispatcher()
    offer = next(o for p in dispatcher.splits if not (o := dispatcher.split_at(load, p)).is_unmeetable)
    prefill_s, num_layers = offer.token_chunk / offer.prompt_tokens_per_s, dispatcher.cost.num_layers
    chunk, _ = load.chunk(dispatcher.max_prefill_tokens)
    solo_s = dispatcher.cost.prefill_s(chunk, offer.partition.prefill_sms)
    exact = offer.decode_s * num_layers / prefill_s
    assert min(num_layers, math.ceil(exact)) == offer.layers, "the launch time of a piece decides here: say so"
    return (
        f"```text\nT_decode  = {ms(offer.decode_s)}, the row in bold\nT_prefill = {ms(solo_s)} alone on "
        f"{offer.partition.prefill_sms} SMs x {prefill_s / solo_s:.3f}, the guard's mean = {ms(prefill_s)}\n"
        f"N_layers  = ceil(T_decode x layers / T_prefill) = ceil({1e3 * offer.decode_s:.2f} x {num_layers} / "
        f"{1e3 * prefill_s:.2f}) = ceil({exact:.2f}) = {offer.layers}\n```\n"
    )


def choice() -> str:
    """The offers of all modes at that moment, which was taken, and when another first was."""
    moment, dispatcher = at_arrival(), _dispatcher()
    rows, fused = [], None
    for offer in dispatcher.options(moment.load):
        fused = offer if offer.mode is Mode.FUSED else fused
        cells = (
            f"**{offer.mode.value}**" if offer.mode is moment.decision.mode else offer.mode.value,
            _where(offer),
            f"{offer.token_chunk:,}",
            f"{offer.layers}",
            ms(offer.step_s),
            f"{offer.prompt_tokens_per_s:,.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    head = "| mode | SMs, prefill + decode | token chunk | layers a piece | gap promised | prompt tokens/s |\n"
    head += "|---|---|---:|---:|---:|---:|\n"
    taken = f"Taken: {moment.decision.mode.value}."
    if fused:
        batch = moment.load.decode.batch
        taken += (
            f" ({fused.token_chunk} prompt tokens and {batch} of decode are {fused.token_chunk + batch}, a size that a "
            "CUDA graph was captured for.)"
        )
    taken += f" Each step asks again; only into a split or out of it must the other be better by {HYSTERESIS:.0%}."
    return f"{head}{''.join(rows)}\n{taken}{_later(moment, dispatcher)}\n"


def _later(moment: Moment, dispatcher: Dispatcher) -> str:
    """The next moment at which another mode was taken."""
    mode, moments = moment.decision.mode, moments_of(SLO(tbt_ms=explain.TBT_MS))
    found = next((m for m in moments if m.at_s > moment.at_s and m.decision.mode is not mode), None)
    if found is None:
        return ""
    rates = {offer.mode: f"{offer.prompt_tokens_per_s:,.0f}" for offer in dispatcher.options(found.load)}
    against = (
        f"{rates[found.decision.mode]} tokens/s against {rates[mode]}" if mode in rates else "alone within the TBT"
    )
    return (
        f" At {ms(found.at_s, 1)}, {found.load.prompt_start:,} tokens into the prompt, {found.decision.mode.value} is "
        f"taken: {against}."
    )


def _where(offer: Decision) -> str:
    if offer.partition.is_shared:
        return "the whole chip"
    sms = f"{offer.partition.prefill_sms} + {offer.partition.decode_sms}"
    return f"the whole chip, attention {sms}" if offer.mode is Mode.FUSED else sms


def merge() -> str:
    """A prompt that ends beside the decode lane; a fixed split shows it whatever the costs are."""
    run = explain.simulate("static", tuple(Mode), SLO(tbt_ms=explain.TBT_MS))
    pieces = [s for s in run.timeline if isinstance(s.ticket.work, PrefillWork) and s.ticket.work.sampled_ids]
    ended = next(piece for piece in pieces if not piece.ticket.partition.is_shared)
    steps = [span for span in run.timeline if isinstance(span.ticket.work, DecodeWork)]
    name = ended.ticket.work.sampled_ids[0]
    request = next(request for request in run.requests if request.request_id == name)
    joined = next(step for step in steps if name in step.ticket.work.request_ids)
    last = next((s for s in reversed(steps) if s.started_s < ended.finished_s and s is not joined), None)
    sums = ""
    if last.finished_s > ended.finished_s:
        left_s, step_s = joined.started_s - ended.finished_s, joined.finished_s - joined.started_s
        sums = f": {ms(left_s)} that were left of the running step, and {ms(step_s)} of its own"
        meanwhile = f"A decode step is running until {ms(last.finished_s)}; nobody stops it"
    else:
        meanwhile = f"The decode lane's last step ended at {ms(last.finished_s)}; the next one was held back for {name}"
    return (
        f"Under `--policy static` the last layers of request {name} end at {ms(ended.finished_s)}, on "
        f"{ended.ticket.partition.prefill_sms} SMs: its first token. {meanwhile}. The step from {ms(joined.started_s)} "
        f"to {ms(joined.finished_s)} takes {name} in: {len(joined.ticket.work.rows)} rows. The first gap of {name} is "
        f"{ms(request.token_s[1] - request.token_s[0])}{sums}.\n"
    )


KINDS = {kind.__name__: kind for kind in (problem, prediction, layers, choice, merge)}


def _dispatcher() -> Dispatcher:
    return simulated_policy("mux", tuple(Mode))


def regenerate(text: str) -> str:
    return SECTION.sub(lambda match: f"{match[1]}{KINDS[match[2]]()}{match[4]}", text)


def main(check: bool = False) -> int:
    """Rewrites the course's numbers; with ``check`` only says whether they are up to date."""
    text = COURSE.read_text()
    if (new := regenerate(text)) == text:
        return 0
    if check:
        print("nanodrift/README.md is not what explain says: run python bench.py explain --course", file=sys.stderr)
        return 1
    COURSE.write_text(new)
    print("wrote nanodrift/README.md", file=sys.stderr)
    return 0
