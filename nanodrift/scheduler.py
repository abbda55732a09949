"""Decides, lane by lane, what runs next: queue order, admission, token and layer chunks, merging, preemption.

Continuous batching in the terms of plan.py. A request waits, is prefilled in token chunks (each chunk in layer chunks),
merges into the decode batch when its first token is seen, and decodes until it stops. Steps are launched before the
host has read the last one, so a request's end is noticed up to one step late and its extra token is dropped.

A prompt starts at its first token that is not in the prefix cache (kvcache.py). A request whose next block is being
computed by another just now waits for it: it holds nothing meanwhile, so nobody can wait for it in turn, and when the
other ends early it finds no one to wait for and computes the block itself.

Pure state: imports no torch, reads no clock, launches nothing. The engine asks ``next_work`` and reports
``on_launch`` and ``on_complete``.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

from nanodrift.config import BLOCK_SIZE
from nanodrift.cost import DecodeLoad
from nanodrift.dispatch import Decision, Load, Mode, Policy
from nanodrift.kvcache import BlockPool, blocks_for
from nanodrift.plan import (
    Completion,
    DecodeWork,
    FusedWork,
    Lane,
    Logprobs,
    NewBlocks,
    Partition,
    PrefillSlice,
    PrefillWork,
    RowParams,
    Ticket,
    Work,
)
from nanodrift.request import MAX_STOP_TOKEN_IDS, Request, RequestState

MAX_IN_FLIGHT = 2  # on each lane: step n + 1 is launched before the host has read step n


@dataclass(frozen=True)
class TokenEvent:
    """What the outside learns of a request: new tokens, and at its end the reason."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # stop | length | abort
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[Logprobs, ...] = ()  # of token_ids, if the request wants them
    prompt_logprobs: tuple[Logprobs, ...] = ()  # with the first token


@dataclass
class _PrefillBatch:
    """One token chunk on its way through the layers."""

    batch_id: int
    slices: tuple[PrefillSlice, ...]
    new_blocks: tuple[NewBlocks, ...]
    next_layer: int = 0


class Scheduler:
    """First come, first served; every request that holds a row makes progress, the oldest one always."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_rows: int,
        num_layers: int,
        max_model_len: int,
        max_prefill_tokens: int,
        policy: Policy,
        prefix_caching: bool = True,
    ):
        self.pool = BlockPool(num_blocks, has_tree=prefix_caching)
        self.num_layers = num_layers
        self.max_model_len = max_model_len
        self.max_prefill_tokens = max_prefill_tokens
        self.policy = policy
        self.decision: Decision | None = None  # how the lanes share the device just now
        self.requests: dict[str, Request] = {}  # every request that still owns something
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []  # hold a row; prompt not complete
        self.running: list[Request] = []  # decode
        self.num_preemptions = 0
        self._free_rows = deque(range(num_rows))
        self._batch: _PrefillBatch | None = None  # the chunk whose layers are being launched
        self._num_batches = 0
        self._num_added = 0
        self._num_in_flight = {Lane.PREFILL: 0, Lane.DECODE: 0}
        self._num_pieces_in_flight = 0  # of chunks that go by layers, not in fused steps
        self._newest_chunk = (0, 0)  # tokens, start
        self._is_draining = False  # blocks ran out: launch nothing new until nothing is in flight

    # ---- requests come and go ----------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError, naming both numbers, if the request can never be served."""
        num_prompt, params = len(request.prompt_token_ids), request.params
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if num_prompt == 0:
            raise ValueError("the prompt is empty: at least one token is needed")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but the context holds {self.max_model_len} tokens of prompt and "
                "output together: shorten the prompt"
            )
        most_tokens = min(num_prompt + params.max_tokens, self.max_model_len)
        if blocks_for(most_tokens) > self.pool.num_blocks:
            raise ValueError(
                f"prompt and output may reach {most_tokens} tokens = {blocks_for(most_tokens)} KV blocks, but "
                f"the cache has {self.pool.num_blocks}: shorten the prompt, lower max_tokens, or give it more memory"
            )
        if params.min_tokens > 0 and len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"min_tokens can hold back at most {MAX_STOP_TOKEN_IDS} stop ids, eos ids included")

    def add(self, request: Request) -> None:
        """Queues a request that ``check`` has let pass."""
        params = request.params
        request.number = self._num_added = self._num_added + 1
        request.row_params = RowParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=request.seed,
            banned_token_ids=tuple(sorted(request.stop_token_ids)) if params.min_tokens else (),
            min_position=len(request.prompt_token_ids) + params.min_tokens,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.biases,
            has_logprobs=params.logprobs is not None,
        )
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def finish(self, request_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """Ends a request now; False if there is none to end. Its blocks return when no work in flight touches them."""
        request = self.requests.get(request_id)
        if request is None or request.is_finished:
            return False
        self._queue_of(request).remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        self._release_if_idle(request)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def num_leaked_blocks(self) -> int:
        """Blocks that are held while no request is there to hold them: never anything but 0."""
        return 0 if self.requests else self.pool.num_used_blocks

    # ---- what runs next ----------------------------------------------------------------------------------------

    def next_work(self, lane: Lane, now_s: float) -> tuple[Work, Partition] | None:
        """The next piece of work for a lane and where it runs, or None if it has no room or nothing to do."""
        if self._num_in_flight[lane] >= MAX_IN_FLIGHT:
            return None
        work = self._next_decode(now_s) if lane is Lane.DECODE else self._next_prefill(now_s)
        return None if work is None else (work, self.decision.partition)

    def on_launch(self, ticket: Ticket) -> None:
        work = ticket.work
        self._num_pieces_in_flight += isinstance(work, PrefillWork)
        for part in work.parts:
            self._num_in_flight[part.lanes[0]] += 1
            for request in self._requests_of(part):
                request.num_in_flight += 1
                request.num_launched_tokens += isinstance(part, DecodeWork)

    def on_complete(self, completion: Completion) -> list[TokenEvent]:
        """Takes in the sampled tokens, merges prefilled requests into the decode batch, ends what has to end."""
        work, events, touched = completion.ticket.work, [], []
        self._num_pieces_in_flight -= isinstance(work, PrefillWork)
        for part in work.parts:
            self._num_in_flight[part.lanes[0]] -= 1
            for request in self._requests_of(part):
                request.num_in_flight -= 1
                request.num_launched_tokens -= isinstance(part, DecodeWork)
                touched.append(request)
            self._enter_written_blocks(part)
        if completion.prompt_logprobs:
            self._take_prompt_logprobs(work.parts[0], completion.prompt_logprobs)
        all_logprobs = completion.logprobs or itertools.repeat(None)
        for (request_id, token_id), logprobs in zip(completion.tokens, all_logprobs):  # noqa: B905
            request = self.requests[request_id]
            if request.is_finished:
                continue  # it ended while this step was in flight: the token is dropped
            if request.state is RequestState.PREFILL:
                self.prefilling.remove(request)
                self.running.append(request)
                request.state = RequestState.RUNNING
            events.append(self._take_token(request, token_id, logprobs, completion.finished_s))
        for request in touched:
            self._release_if_idle(request)
        return events

    # ---- decode lane -------------------------------------------------------------------------------------------

    def _next_decode(self, now_s: float) -> DecodeWork | FusedWork | None:
        if self._is_draining and self._is_busy():
            return None
        self._is_draining = False
        batch = [request for request in self.running if self._can_step(request)]
        if not batch:
            return None
        num_missing = sum(self._num_missing_blocks(request) for request in batch)
        if num_missing > self.pool.num_available_blocks:
            if self._is_busy():  # what is in flight may end requests; and a block in use cannot be taken back
                self._is_draining = True
                return None
            batch = self._preempt_for(batch)
        new_blocks = []
        for request in batch:
            if num_missing := self._num_missing_blocks(request):
                new_blocks.append(self._grow(request, num_missing))
        self._decide(batch)
        step = DecodeWork(
            request_ids=tuple(r.request_id for r in batch),
            rows=tuple(r.row for r in batch),
            positions=tuple(r.num_tokens + r.num_launched_tokens - 1 for r in batch),
            has_filter=any(r.row_params.has_filter for r in batch),
            has_ban=any(len(r.output_token_ids) + r.num_launched_tokens < r.params.min_tokens for r in batch),
            has_penalty=any(r.row_params.has_penalty for r in batch),
            has_logprobs=any(r.row_params.has_logprobs for r in batch),
            new_blocks=tuple(new_blocks),
        )
        if self.decision.mode is Mode.FUSED and self._batch is None and self._num_pieces_in_flight == 0:
            chunk = self._form_batch(now_s, self.decision.token_chunk)
            if chunk is not None:
                prefill = PrefillWork(chunk.batch_id, chunk.slices, 0, self.num_layers, True, chunk.new_blocks)
                return FusedWork(prefill, step)
        return step

    def _can_step(self, request: Request) -> bool:
        num_output_tokens = len(request.output_token_ids) + request.num_launched_tokens
        num_tokens = len(request.prompt_token_ids) + num_output_tokens
        return num_output_tokens < request.params.max_tokens and num_tokens < self.max_model_len

    def _num_missing_blocks(self, request: Request) -> int:
        """Blocks to add before the step that writes the KV of the last (perhaps still unread) token."""
        return blocks_for(request.num_tokens + request.num_launched_tokens) - len(request.block_ids)

    def _preempt_for(self, batch: list[Request]) -> list[Request]:
        """Takes the blocks of requests back until the others of the batch can step. Nothing is in flight.

        Those that cost least to compute again go first, the younger of two equals. They keep their tokens and go to the
        head of the queue; their full blocks stay cached while there is room. The oldest is never taken: it fits alone,
        or ``check`` had refused it, so every request gets through at the latest when it is the oldest.
        """
        holders = sorted(self.prefilling + self.running, key=lambda request: request.number)[1:]
        while sum(self._num_missing_blocks(request) for request in batch) > self.pool.num_available_blocks:
            victim = min(holders, key=lambda request: (self.pool.num_lost_tokens(request), -request.number))
            holders.remove(victim)
            self._preempt(victim)
            batch = [request for request in batch if request is not victim]
        return batch

    def _preempt(self, victim: Request) -> None:
        self._queue_of(victim).remove(victim)
        self._give_back(victim)
        victim.state = RequestState.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(victim)

    # ---- prefill lane ------------------------------------------------------------------------------------------

    def _next_prefill(self, now_s: float) -> PrefillWork | None:
        if self._batch is None and not self.prefilling and not self.waiting:
            return None  # most turns: nothing to ask the policy
        batch = [request for request in self.running if self._can_step(request)]
        self._decide(batch)
        if self._batch is None:  # a chunk that was begun by layers is finished by layers
            if self._is_draining or (batch and self.decision.mode is Mode.FUSED):
                return None
            self._batch = self._form_batch(now_s, self.decision.token_chunk)
        if self._batch is None:
            return None
        chunk = self._batch
        first = chunk.next_layer
        chunk.next_layer = last = min(first + self.decision.layers, self.num_layers)
        is_last = last == self.num_layers
        if is_last:
            self._batch = None
        return PrefillWork(
            chunk.batch_id, chunk.slices, first, last, is_last, new_blocks=chunk.new_blocks if first == 0 else ()
        )

    def _decide(self, batch: list[Request]) -> None:
        """Asks the policy how the lanes are to share the device, for these decoding requests and what is to prefill."""
        decode = DecodeLoad(len(batch), sum(r.num_tokens + r.num_launched_tokens for r in batch))
        tbt_s = min((request.slo.tbt_ms for request in batch), default=math.inf) / 1e3
        num_tokens, start = 0, 0
        if self._batch is not None or self._num_in_flight[Lane.PREFILL] > 0:
            num_tokens, start = self._newest_chunk
        for request in itertools.chain(self.prefilling, self.waiting):
            if num_tokens >= self.max_prefill_tokens:
                break
            start = start if num_tokens else request.num_computed_tokens
            num_tokens += request.num_tokens - request.num_computed_tokens
        load = Load(decode, tbt_s, num_tokens, start, is_chunk_open=self._batch is not None)
        self.decision = self.policy.choose(load, self.decision)

    def _form_batch(self, now_s: float, most_tokens: int) -> _PrefillBatch | None:
        """The next token chunk: prompts under way first, then the queue in order, up to ``most_tokens``."""
        room, slices, new_blocks = min(most_tokens, self.max_prefill_tokens), [], []
        for request in self.prefilling:
            room -= self._take_slice(request, room, slices)
        passed, num_kept_blocks = [], 0  # requests that wait for a prefix; what those behind must leave to them
        while room > 0 and self.waiting and len(self._free_rows) > len(passed):
            request = self.waiting[0]
            self.pool.match(request)
            num_blocks = self.pool.num_missing_blocks(request) + len(self.prefilling) + len(self.running)
            if num_blocks + num_kept_blocks > self.pool.num_available_blocks:
                break  # a block for each request under way must be left, so that admission is not soon undone
            self.waiting.popleft()
            if any(self.pool.is_about_to_write(owner, request) for owner in self.prefilling):
                passed.append(request)
                num_kept_blocks += self.pool.num_missing_blocks(request) + 1
            else:
                new_blocks.append(self._admit(request, now_s))
                room -= self._take_slice(request, room, slices)
        self.waiting.extendleft(reversed(passed))
        if not slices:
            return None
        self._num_batches += 1
        self._newest_chunk = (sum(len(s.token_ids) for s in slices), slices[0].start)
        return _PrefillBatch(self._num_batches, tuple(slices), tuple(new_blocks))

    def _admit(self, request: Request, now_s: float) -> NewBlocks:
        self.pool.admit(request)
        request.row = self._free_rows.popleft()
        request.state = RequestState.PREFILL
        request.scheduled_s = now_s if request.scheduled_s is None else request.scheduled_s
        self.prefilling.append(request)
        return NewBlocks(request.row, 0, tuple(request.block_ids))

    def _take_slice(self, request: Request, room: int, slices: list[PrefillSlice]) -> int:
        """Appends the request's next slice of at most ``room`` tokens; returns its length."""
        start = request.num_computed_tokens
        end = min(start + room, request.num_tokens)
        if end == start:
            return 0
        params = request.row_params if end == request.num_tokens else None
        writes_kv = end > request.num_written_tokens  # else all is cached, and its last token runs for the next one
        token_ids = tuple(request.token_ids[start:end])
        output_start = len(request.prompt_token_ids) if request.row_params.has_penalty else None
        wants_prompt = request.params.prompt_logprobs is not None and not request.output_token_ids
        next_ids = tuple(request.token_ids[start + 1 : end + 1]) if wants_prompt else ()
        slices.append(
            PrefillSlice(request.request_id, request.row, start, token_ids, params, writes_kv, output_start, next_ids)
        )
        request.num_computed_tokens = end
        return end - start

    # ---- tokens, blocks, rows ----------------------------------------------------------------------------------

    def _take_prompt_logprobs(self, work: PrefillWork, logprobs: tuple[Logprobs, ...]) -> None:
        found = iter(logprobs)
        for s in work.slices:
            request, num = self.requests[s.request_id], len(s.next_token_ids)
            if num:
                most = request.params.prompt_logprobs
                request.prompt_logprobs[s.start :] = [one.cut(most) for one in itertools.islice(found, num)]

    def _take_token(self, request: Request, token_id: int, logprobs: Logprobs | None, now_s: float) -> TokenEvent:
        request.output_token_ids.append(token_id)
        request.token_ids.append(token_id)
        request.token_s.append(now_s)
        num_output_tokens = len(request.output_token_ids)
        if token_id in request.stop_token_ids and num_output_tokens > request.params.min_tokens:
            self.finish(request.request_id, "stop", token_id)
        elif num_output_tokens >= request.params.max_tokens or request.num_tokens >= self.max_model_len:
            self.finish(request.request_id, "length")
        if request.is_finished:
            request.finished_s = now_s
        is_first = num_output_tokens == 1
        num_cached_tokens = request.num_cached_tokens if is_first else 0
        own = (logprobs.cut(request.params.logprobs),) if logprobs and request.row_params.has_logprobs else ()
        request.logprobs.extend(own)
        of_prompt = tuple(request.prompt_logprobs) if is_first else ()
        reasons = (request.finish_reason, request.stop_reason)
        return TokenEvent(request.request_id, (token_id,), *reasons, num_cached_tokens, own, of_prompt)

    def _enter_written_blocks(self, work: Work) -> None:
        """Completed work has written KV: where that fills a block, others may use it from now on."""
        if isinstance(work, PrefillWork):
            written = [(s.request_id, s.end) for s in work.slices] if work.is_last else []
        else:  # only a step that fills a block is worth a look; a dropped token was fed to the last one
            steps = zip(work.request_ids, work.positions, strict=True)
            written = [(request_id, position + 1) for request_id, position in steps]
        for request_id, num_tokens in written:
            request = self.requests[request_id]
            request.num_written_tokens = max(request.num_written_tokens, min(num_tokens, request.num_tokens))
            if request.num_written_tokens // BLOCK_SIZE > len(request.nodes):
                self.pool.enter(request)

    def _grow(self, request: Request, num_blocks: int) -> NewBlocks:
        first_index = len(request.block_ids)
        return NewBlocks(request.row, first_index, tuple(self.pool.allocate(request, num_blocks)))

    def _give_back(self, request: Request) -> None:
        self.pool.release(request)
        self._free_rows.append(request.row)
        request.row = None

    def _release_if_idle(self, request: Request) -> None:
        """A finished request leaves when nothing in flight or about to be launched touches its row and blocks."""
        if not request.is_finished or request.num_in_flight > 0 or request.request_id not in self.requests:
            return
        if self._batch is not None:
            in_chunk = [self.requests[s.request_id] for s in self._batch.slices]
            if any(other is request for other in in_chunk):
                if all(other.is_finished for other in in_chunk):  # its other layers need not run
                    self._batch = None
                    for other in in_chunk:
                        self._release_if_idle(other)
                return
        if request.row is not None:
            self._give_back(request)
        del self.requests[request.request_id]

    def _requests_of(self, work: Work) -> list[Request]:
        if isinstance(work, DecodeWork):
            return [self.requests[request_id] for request_id in work.request_ids]
        return [self.requests[s.request_id] for s in work.slices]

    def _queue_of(self, request: Request):
        return {
            RequestState.WAITING: self.waiting,
            RequestState.PREFILL: self.prefilling,
            RequestState.RUNNING: self.running,
        }[request.state]

    def _is_busy(self) -> bool:
        return self._batch is not None or any(self._num_in_flight.values())
