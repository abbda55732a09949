"""Two simulated GPUs: one for prefill and one for decode, or two replicas of the engine. Never measured.

    disaggregated:50           one device prefills, KV goes over a link of 50 GB/s, the other decodes; a pool each
    disaggregated-dynamic:50   the same, but the decode device prefills whenever it has nothing to decode
    2xmux                      two whole engines, conversations dealt out in turn

The disaggregated pair is a queue model on the costs of cost.py, as good as such a pair can be: no scheduling overhead,
no prefix cache, prompts in order and in chunks of 2,048 tokens, the next chunk as soon as one is done, transfers one
after another beside the work of both devices, and first tokens that leave from the prefill device. What a decode device
has no room for waits behind the link. The replicas are engines under the real scheduler. Imports no torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanodrift.bench.load import CUT_OFF, Record, run_workload
from nanodrift.bench.policies import PolicySpec
from nanodrift.bench.simulate import MAX_PREFILL_TOKENS, NUM_BLOCKS, NUM_ROWS, SimMachine
from nanodrift.bench.workloads import Sample, Workload
from nanodrift.config import SLO
from nanodrift.cost import DecodeLoad, PrefillLoad
from nanodrift.kvcache import blocks_for


def run(
    machine: SimMachine,
    spec: PolicySpec,
    workload: Workload,
    due_s: Sequence[float],
    slo: SLO,
    seed: int,
    drain_s: float,
) -> list[Record]:
    """A record for each sample, in order of arrival. Raises ValueError for a workload that holds a batch."""
    if workload.background is not None:
        raise ValueError(f"{workload.name} holds a batch on one device: two devices need another workload")
    if spec.inner is not None:
        return replicas(machine, spec.inner, workload, due_s, slo, seed, drain_s)
    return Pair(machine, spec.gb_per_s * 1e9, spec.is_dynamic, slo)(workload.samples, due_s, drain_s)


def replicas(machine, inner: PolicySpec, workload, due_s, slo: SLO, seed: int, drain_s: float) -> list[Record]:
    homes: dict[str, int] = {}
    dealt: list[list[Sample]] = [[], []]
    for sample, due in zip(workload.samples, due_s, strict=True):
        home = homes.setdefault(sample.conversation, len(homes) % 2)
        dealt[home].append(replace(sample, arrival_s=due))
    records = []
    for samples in filter(None, dealt):
        part = Workload(workload.name, tuple(samples))
        offset = samples[0].arrival_s  # a run counts from its own first arrival
        for record in run_workload(machine.engine(inner, slo), part, None, seed, slo=slo, drain_s=drain_s):
            records.append(_later(record, offset))
    return sorted(records, key=lambda record: record.arrival_s)


def _later(record: Record, offset_s: float) -> Record:
    times = {name: getattr(record, name) + offset_s for name in ("arrival_s", "sent_s", "end_s")}
    return replace(record, token_s=tuple(s + offset_s for s in record.token_s), **times)


@dataclass(eq=False)
class _Job:
    sample: Sample
    arrival_s: float
    num_computed: int = 0  # prompt tokens
    ready_s: float = 0.0  # its KV lies on the decode device
    token_s: list[float] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.sample.num_tokens)

    @property
    def is_done(self) -> bool:
        return len(self.token_s) >= self.sample.num_output_tokens


class Pair:
    """A prefill device and a decode device, each with a clock of its own; whichever is behind acts next."""

    def __init__(self, machine: SimMachine, bytes_per_s: float, is_dynamic: bool, slo: SLO):
        self.cost, self.is_dynamic, self.slo = machine.cost, is_dynamic, slo
        self.token_s = machine.model_config.num_kv_values_per_token * 2 / bytes_per_s  # over the link
        self.num_sms = machine.cost.profile.num_sms
        self.queue: deque[_Job] = deque()  # prompts, some begun
        self.in_transfer: deque[_Job] = deque()
        self.batch: list[_Job] = []
        self.helped: _Job | None = None  # a prompt that the decode device has begun
        self.link_free_s = 0.0

    def __call__(self, samples: Sequence[Sample], due_s: Sequence[float], drain_s: float) -> list[Record]:
        jobs = [_Job(sample, due) for sample, due in zip(samples, due_s, strict=True)]
        self.queue.extend(jobs)
        deadline_s = max(due_s) + drain_s
        prefill_s = decode_s = 0.0
        while not all(job.is_done for job in self.batch) or self.queue or self.in_transfer or self.helped:
            if min(prefill_s, decode_s) >= deadline_s:
                break
            if prefill_s <= decode_s:
                prefill_s = self._prefill(prefill_s)
            else:
                decode_s = self._decode(decode_s, prefill_s)
        return [self._record(job, deadline_s) for job in jobs]

    def _chunk(self, queue: deque[_Job], now_s: float) -> tuple[list[_Job], float]:
        """(the prompts that end in the next chunk, its seconds); takes them out of the queue."""
        room, pairs, ended = MAX_PREFILL_TOKENS, 0.0, []
        while room and queue and queue[0].arrival_s <= now_s:
            job = queue[0]
            count = min(room, job.sample.num_prompt_tokens - job.num_computed)
            pairs += count * (count / 2 + job.num_computed)
            job.num_computed += count
            room -= count
            if job.num_computed == job.sample.num_prompt_tokens:
                ended.append(queue.popleft())
        load = PrefillLoad(MAX_PREFILL_TOKENS - room, pairs, len(ended))
        return ended, self.cost.prefill_s(load, self.num_sms)

    def _prefill(self, now_s: float) -> float:
        """One chunk on the prefill device; returns when it is free again."""
        if not self.queue:
            return math.inf
        if self.queue[0].arrival_s > now_s:
            return self.queue[0].arrival_s
        ended, seconds = self._chunk(self.queue, now_s)
        for job in ended:
            job.token_s.append(now_s + seconds)
            if not job.is_done:
                start_s = max(now_s + seconds, self.link_free_s)
                self.link_free_s = job.ready_s = start_s + job.sample.num_prompt_tokens * self.token_s
                self.in_transfer.append(job)
        return now_s + seconds

    def _decode(self, now_s: float, prefill_free_s: float) -> float:
        """One step on the decode device, or a chunk where it may help out; returns when it is free again."""
        self.batch = [job for job in self.batch if not job.is_done]
        held = sum(job.num_blocks for job in self.batch)
        while self.in_transfer and self.in_transfer[0].ready_s <= now_s and len(self.batch) < NUM_ROWS:
            if held + self.in_transfer[0].num_blocks > NUM_BLOCKS:
                break
            held += self.in_transfer[0].num_blocks
            self.batch.append(self.in_transfer.popleft())
        if self.batch:
            context = sum(job.sample.num_prompt_tokens + len(job.token_s) for job in self.batch)
            end_s = now_s + self.cost.decode_s(DecodeLoad(len(self.batch), context), self.num_sms)
            for job in self.batch:
                job.token_s.append(end_s)
            return end_s
        if self.is_dynamic and (job := self.helped or self._waiting(now_s)) is not None:
            own = deque([job])
            ended, seconds = self._chunk(own, now_s)
            self.helped = None if ended else own[0]
            for job in ended:
                job.token_s.append(now_s + seconds)
                self.batch.append(job)
            return now_s + seconds
        ready = [self.in_transfer[0].ready_s] if self.in_transfer else []
        return min((s for s in (prefill_free_s, *ready) if s > now_s), default=math.nextafter(now_s, math.inf))

    def _waiting(self, now_s: float) -> _Job | None:
        """Takes the first prompt that has come and that nobody has begun out of the queue."""
        job = next((job for job in self.queue if job.arrival_s <= now_s and not job.num_computed), None)
        if job is not None:
            self.queue.remove(job)
        return job

    def _record(self, job: _Job, deadline_s: float) -> Record:
        token_s = tuple(s for s in job.token_s[: job.sample.num_output_tokens] if s <= deadline_s)
        is_completed = len(token_s) == job.sample.num_output_tokens
        return Record(
            arrival_s=job.arrival_s,
            token_s=token_s,
            slo=self.slo,
            is_completed=is_completed,
            num_prompt_tokens=job.sample.num_prompt_tokens,
            sent_s=job.arrival_s,
            end_s=token_s[-1] if is_completed else deadline_s,
            error=None if is_completed else CUT_OFF,
        )
