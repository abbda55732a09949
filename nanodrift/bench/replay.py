"""Writes down every call into the scheduler, and makes them again: the same calls must give the same launches.

    recorder = Recorder(scheduler)             # in the scheduler's place: Engine(recorder, executor, ...)
    recorder.save(path)
    assert not differences(path, scheduler)    # a fresh scheduler of the same sizes and policy

One call a line, in JSON, made to be read: what was asked and when, what was launched, what came back. A policy's
decisions are written down too. They are compared where the scheduler asks a policy of its own, and given where it does
not (``differences(path, scheduler, gives_decisions=True)``), so that a recording outlives the costs it was made with.
Reads no clock.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from nanodrift.config import SLO
from nanodrift.decision import Decision, Load, Mode
from nanodrift.plan import Completion, DecodeWork, Lane, Partition, Ticket, Work
from nanodrift.request import Request, SamplingParams
from nanodrift.scheduler import Scheduler, TokenEvent


def told(work: Work, partition: Partition) -> str:
    """A launch in words; two launches are the same if these are."""
    parts = []
    for part in work.parts:
        blocks = " ".join(f"row {b.row}[{b.first_index}:]={','.join(map(str, b.block_ids))}" for b in part.new_blocks)
        if isinstance(part, DecodeWork):
            rows = zip(part.request_ids, part.rows, part.positions, strict=True)
            parts.append("decode " + " ".join(f"{name}/{row}@{position}" for name, row, position in rows))
        else:
            slices = " ".join(f"{s.request_id}/{s.row}@{s.start}+{len(s.token_ids)}" for s in part.slices)
            parts.append(f"prefill {part.batch_id} layers {part.first_layer}-{part.last_layer} {slices}")
        parts[-1] += f" ({blocks})" if blocks else ""
    where = "whole chip" if partition.is_shared else f"{partition.prefill_sms}/{partition.decode_sms}"
    return f"{where}: {' | '.join(parts)}"


def _plain(decision: Decision) -> dict:
    partition = decision.partition
    fields = {name: getattr(decision, name) for name in Decision.__dataclass_fields__}
    sizes = [partition.prefill_sms, partition.decode_sms, partition.is_shared]
    return fields | {"mode": decision.mode.value, "partition": sizes}


def _decision(fields: dict) -> Decision:
    return Decision(**fields | {"mode": Mode(fields["mode"]), "partition": Partition(*fields["partition"])})


class Recorder:
    """A scheduler that keeps a diary. All else passes through."""

    def __init__(self, scheduler: Scheduler):
        self.calls: list[list] = []
        self._scheduler, self._policy = scheduler, scheduler.policy
        scheduler.policy = self

    def __getattr__(self, name: str):
        return getattr(self._scheduler, name)

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        decision = self._policy.choose(load, current)
        self.calls.append(["decided", _plain(decision)])
        return decision

    def may_join(self, *loads) -> bool:
        self.calls.append(["joins", joins := self._policy.may_join(*loads)])
        return joins

    def add(self, request: Request) -> None:
        runs = [[token, len(list(run))] for token, run in groupby(request.prompt_token_ids)]
        slo = [request.slo.ttft_ms, request.slo.tbt_ms]
        stop = sorted(request.stop_token_ids)
        fields = [request.request_id, runs, request.params.max_tokens, request.arrival_s, slo, request.priority, stop]
        self.calls.append(["add", *fields, request.params.min_tokens, request.cache_salt])
        self._scheduler.add(request)

    def finish(self, request_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        self.calls.append(["finish", request_id, reason])
        return self._scheduler.finish(request_id, reason, stop_reason)

    def next_work(self, lane: Lane, now_s: float) -> tuple[Work, Partition] | None:
        self.calls.append(entry := ["next", lane.value, now_s, None])
        found = self._scheduler.next_work(lane, now_s)
        entry[3] = None if found is None else told(*found)
        return found

    def on_launch(self, ticket: Ticket) -> None:
        self.calls.append(["launched", ticket.number, ticket.launched_s])
        self._scheduler.on_launch(ticket)

    def on_complete(self, completion: Completion) -> list[TokenEvent]:
        self.calls.append(["done", completion.ticket.number, completion.finished_s, list(completion.tokens)])
        return self._scheduler.on_complete(completion)

    def save(self, path: Path) -> None:
        path.write_text("[\n" + ",\n".join(json.dumps(call) for call in self.calls) + "\n]\n")


class _Decisions:
    """The recorded ones: given in place of a policy, or compared with what it says."""

    def __init__(self, calls: list[list], policy, found: list[str]):
        self.left = [_decision(call[1]) for call in calls if call[0] == "decided"]
        self.joins = [call[1] for call in calls if call[0] == "joins"]
        self.policy, self.found = policy, found

    def choose(self, load: Load, current: Decision | None = None) -> Decision:
        recorded = self.left.pop(0) if self.left else None
        decision = self.policy.choose(load, current) if self.policy else recorded
        if decision is None or recorded != decision:
            self.found.append(f"decided {decision}, recorded {recorded}")
        return decision or current

    def may_join(self, *loads) -> bool:
        recorded = self.joins.pop(0) if self.joins else True
        return self.policy.may_join(*loads) if self.policy else recorded


def differences(path: Path, scheduler: Scheduler, gives_decisions: bool = False) -> list[str]:
    """Makes the recorded calls to a scheduler; returns what it answered otherwise, nothing if all is the same."""
    calls, found, tickets = json.loads(path.read_text()), [], {}
    scheduler.policy = decisions = _Decisions(calls, None if gives_decisions else scheduler.policy, found)
    launch = None
    for kind, *call in calls:
        if kind == "add":
            name, runs, max_tokens, arrival_s, slo, priority, stop, min_tokens, salt = call
            params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens)
            prompt = [token for token, count in runs for _ in range(count)]
            request = Request(name, prompt, params, arrival_s, SLO(*slo), frozenset(stop), cache_salt=salt)
            request.priority = priority
            scheduler.add(request)
        elif kind == "finish":
            scheduler.finish(*call)
        elif kind == "next":
            launch = scheduler.next_work(Lane(call[0]), call[1])
            answer = None if launch is None else told(*launch)
            if answer != call[2]:
                return [*found, f"at {call[1]} {call[0]}: {answer}, recorded {call[2]}"]
        elif kind == "launched":
            tickets[call[0]] = Ticket(call[0], *launch, call[1])
            scheduler.on_launch(tickets[call[0]])
        elif kind == "done":
            tokens = tuple((name, token) for name, token in call[2])
            scheduler.on_complete(Completion(tickets.pop(call[0]), call[1], tokens))
    return found + ([f"{len(decisions.left)} decisions were not asked for"] if decisions.left else [])
