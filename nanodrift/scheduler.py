"""Decides, lane by lane, what runs next: admission, token and layer chunks, merging, overtaking, preemption.

Continuous batching in the terms of plan.py. A request waits (waiting.py says whose turn it is), is prefilled in token
chunks (each chunk in layer chunks), merges into the decode batch and decodes until it stops. Steps are launched before
the host has read the last one, so a request's end is noticed up to one step late and its extra token is dropped. What
is in flight, and where and when the next step may follow it, is flight.py's business; how the lanes share the device
is the policy's, which is asked at every turn of the loop, and again when something has changed within it.

A short prompt may overtake a long one under way, at a token chunk's end or at a piece's, if it would lose its TTFT and
the long one can wait, or has lost its own already (waiting.py). Where blocks run out, cached ones go first; then
nothing new is launched, and when nothing is in flight the request that costs least to bring back is preempted. New
prompts are held back before that, and where the policy sees that their decode steps would make all others too long.

A prompt starts at its first token that is not in the prefix cache (kvcache.py). While another request is computing the
very block with which a prompt would start, the prompt stays in the queue. There it holds nothing, so nobody waits for
it in turn; and if the other request ends before the block is done, the prompt is admitted and computes the block.

Pure state: imports no torch, reads no clock, launches nothing. The engine asks ``next_work`` and reports
``on_launch`` and ``on_complete``.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from statistics import median_high

from nanodrift.config import BLOCK_SIZE
from nanodrift.cost import RECOVERY_S, DecodeLoad
from nanodrift.decision import Decision, Load, Mode, Policy
from nanodrift.flight import Chunk, Flight
from nanodrift.kvcache import BlockPool
from nanodrift.plan import (
    FLAGS,
    MAX_FUSED_SLICES,
    MAX_OPEN_CHUNKS,
    Completion,
    DecodeWork,
    FusedWork,
    Lane,
    Logprobs,
    NewBlocks,
    Partition,
    PrefillSlice,
    PrefillWork,
    Ticket,
    Work,
)
from nanodrift.request import Request, RequestState, TokenEvent
from nanodrift.waiting import Waiting, may_overtake

HEADROOM = 0.01  # of the TBT, for what no prediction knows: the host's part, and rounding
MAX_IN_FLIGHT = 2  # on each lane: step n + 1 is launched before the host has read step n


class Scheduler:
    """The most urgent first; every request that holds a row makes progress, the oldest one always."""

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
        self.requests: dict[str, Request] = {}  # every request that still owns something
        self.waiting = Waiting()
        self.prefilling: list[Request] = []  # hold a row; prompt not complete
        self.running: list[Request] = []  # decode
        self.decision: Decision | None = None  # how the lanes share the device just now
        self.num_preemptions = 0
        self._free_rows = deque(range(num_rows))
        self._open: list[Chunk] = []  # whose layers are being launched: the last one now, one before it later
        self._newest: tuple[PrefillSlice, ...] = ()  # of the chunk that was begun last
        self._num_chunks = self._num_added = 0
        self._flight = Flight(num_layers)
        self._decode, self._tbt_s = DecodeLoad(), math.inf  # of the newest decode step
        self._decided: tuple = ()  # what the decision in force was made for
        self._s_per_token = 0.0  # prefill seconds per prompt token, as last predicted; 0: unknown
        self._waited_s = 0.0  # of their TBT, when the next step starts
        self._split_step_s: dict[Partition, float] = {}  # guarded prediction of a decode step beside prefill pieces
        self._wake_s = dict.fromkeys(Lane, math.inf)
        self._is_draining = False  # blocks ran out: launch nothing new until nothing is in flight
        self._is_tight = False  # they did so lately: admit only who leaves twice the usual room

    # ---- requests come and go ----------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError, naming both numbers, if the request can never be served."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        request.check_size(self.max_model_len, self.pool.num_blocks)

    def add(self, request: Request) -> None:
        """Queues a request that ``check`` has let pass."""
        request.number = self._num_added = self._num_added + 1
        request.most_tokens = min(len(request.prompt_token_ids) + request.params.max_tokens, self.max_model_len)
        request.set_row_params()
        self.requests[request.request_id] = request
        self.pool.match(request)
        self.waiting.add(request)

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
    def wake_s(self) -> float:
        """When to ask for work again at the latest."""
        return min(self._wake_s.values())

    @property
    def num_leaked_blocks(self) -> int:
        """Blocks that are still held when the last request has left, where it shows: never anything but 0."""
        return 0 if self.requests else self.pool.num_used_blocks

    # ---- what runs next ----------------------------------------------------------------------------------------

    def next_work(self, lane: Lane, now_s: float) -> tuple[Work, Partition] | None:
        """The next piece of work for a lane and where it runs, or None if it has no room or nothing to do.

        None may also mean that the lane had better wait: ``wake_s`` says until when, if nothing ends before.
        """
        self._wake_s[lane] = math.inf
        if self._flight.num_in(lane) >= MAX_IN_FLIGHT:
            return None
        return self._next_decode(now_s) if lane is Lane.DECODE else self._next_prefill(now_s)

    def on_launch(self, ticket: Ticket) -> None:
        """Books what was launched, and merges a prompt that ends in it if the next decode step must run behind it.

        It must after a fused step and on the whole chip: it finds the prompt's first token in the device's row. A
        prompt that ends beside the decode lane merges in ``on_complete``, so that no step waits for a prompt.
        """
        work = ticket.work
        self._flight.launch(ticket, self._predicted_s(work))
        for part in work.parts:
            for request_id in part.request_ids:
                self.requests[request_id].num_in_flight += 1
            for request_id in part.sampled_ids:
                self.requests[request_id].num_launched_tokens += 1
                if isinstance(part, PrefillWork) and (ticket.partition.is_shared or part is not work):
                    self._merge(self.requests[request_id])

    def on_complete(self, completion: Completion) -> list[TokenEvent]:
        """Takes in the sampled tokens, merges prefilled requests into the decode batch, ends what has to end."""
        ticket, now_s = completion.ticket, completion.finished_s
        events, touched = [], []
        self._flight.complete(ticket, now_s)
        for part in ticket.work.parts:
            touched += [self.requests[request_id] for request_id in part.request_ids]
            if isinstance(part, PrefillWork) and part.is_last:
                self._note_written(part)
        for request in touched:
            request.num_in_flight -= 1
        if completion.prompt_logprobs:
            self._take_prompt_logprobs(ticket.work.parts[0], completion.prompt_logprobs)
        all_logprobs = completion.logprobs or itertools.repeat(None)
        for (request_id, token_id), logprobs in zip(completion.tokens, all_logprobs):  # noqa: B905
            request = self.requests[request_id]
            request.num_launched_tokens -= 1
            if not request.is_finished:  # else it ended while this was in flight
                self._merge(request)
                events.append(self._take_token(request, token_id, logprobs, now_s))
        for request in touched:
            if request.is_finished:
                self._release_if_idle(request)
        return events

    def _merge(self, request: Request) -> None:
        if request.state is RequestState.PREFILL:
            self.prefilling.remove(request)
            self.running.append(request)
            request.state = RequestState.RUNNING

    def _decide(self, now_s: float) -> None:
        """Asks the policy how the lanes are to share the device; the same question only once in a turn of the loop."""
        sizes = len(self.waiting), len(self.prefilling), self._flight.num_pieces, len(self._open)
        asked = now_s, self._decode, self._num_chunks, sizes
        if self._decided == asked:
            return
        self._decided = asked
        may_prefill = self._open or self.prefilling or self.waiting or self._flight.is_split
        prompts = self._prompts(now_s) if may_prefill else ()  # most turns
        num_tokens, start = sum(n for n, _ in prompts), prompts[0][1] if prompts else 0
        tbt_s = self._tbt_s - self._waited_s if self._decode.batch else math.inf
        flags = self._flight.is_merging, self._flight.has_split_since(self._flight.step_end_s - RECOVERY_S)
        open_tokens = self._open[-1].num_tokens if self._open else 0
        load = Load(self._decode, tbt_s, num_tokens, start, open_tokens, prompts, *flags)
        self.decision = self.policy.choose(load, self.decision)
        if self.decision.mode is Mode.SPLIT:
            self._split_step_s[self.decision.partition] = self.decision.decode_s
        if self.decision.prompt_tokens_per_s:
            self._s_per_token = 1 / self.decision.prompt_tokens_per_s

    def _prompts(self, now_s: float) -> tuple[tuple[int, int], ...]:
        """Tokens left and start of the prompts that are next, those of a chunk under way first; enough for a chunk."""
        overtaker = self._overtaker(now_s) if len(self._open) < MAX_OPEN_CHUNKS else None
        first = [(overtaker.num_new_tokens, overtaker.num_tokens - overtaker.num_new_tokens)] if overtaker else []
        if first and self._open:  # it gets a chunk of its own
            return tuple(first)
        pending = [r for r in self.prefilling if r.num_computed_tokens < r.num_tokens]
        slices = self._open[-1].slices if self._open else ()
        if self._flight.is_split and not (slices or pending or self.waiting):
            slices = self._newest  # it is all launched, but decode had better stay beside it
        starts = {s.request_id: s.start for s in slices if s.request_id in self.requests}
        for request in pending:
            starts.setdefault(request.request_id, request.num_computed_tokens)
        prompts = first + [
            (self.requests[request_id].num_tokens - start, start) for request_id, start in starts.items()
        ]
        room = self.max_prefill_tokens - sum(n for n, _ in prompts)
        for request in self.waiting.in_turn(now_s, self._pace_s) if room > 0 else ():
            if room <= 0 or not self._free_rows or not self._fits(request):
                break
            num_tokens = request.num_new_tokens
            prompts.append((num_tokens, request.num_tokens - num_tokens))
            room -= num_tokens
        return tuple(prompts)

    @property
    def _pace_s(self) -> float:
        """Prefill seconds per prompt token: as measured of late, before that as predicted; 0.0 if unknown."""
        return self._flight.token_s or self._s_per_token

    def _predicted_s(self, work: Work) -> float:
        """Seconds by the decision in force: the guarded step, the mean of a prefill piece."""
        if isinstance(work, PrefillWork):
            return self._s_per_token * work.num_tokens * (work.last_layer - work.first_layer) / self.num_layers
        return self.decision.decode_s

    # ---- decode lane -------------------------------------------------------------------------------------------

    def _next_decode(self, now_s: float) -> tuple[DecodeWork | FusedWork, Partition] | None:
        if self._is_draining and self._is_busy():
            return None
        self._is_draining = False
        while True:
            batch, positions, short = self._next_step()
            if len(short) <= self.pool.num_available_blocks:
                break
            if self._is_busy():  # what is in flight may end requests; and a block in use cannot be taken back
                self._is_draining = True
                return None
            self._preempt(self._cheapest_holder())
        self._decode = DecodeLoad(len(batch), sum(positions) + len(batch))
        if not batch:
            return None
        self._tbt_s = min([request.slo.tbt_ms for request in batch]) / 1e3 * (1 - HEADROOM)
        start_s = max(now_s, self._flight.step_end_s)  # those who are in no step in flight have waited until then
        last_s = min([r.token_s[-1] for r in batch if not r.num_launched_tokens and r.token_s], default=start_s)
        self._waited_s = start_s - last_s
        self._decide(now_s)
        is_fused = self.decision.mode is Mode.FUSED and not self._open
        if self.decision.holds_decode or (is_fused and self._flight.is_turning):
            return None  # a fused step follows as soon as the last piece of a chunk is done
        is_fused = is_fused and not self._flight.num_pieces
        partition = self._flight.step_partition(self.decision.partition)
        if not is_fused and not partition.is_shared:
            # its own partition's: pieces may hold the decision's SMs yet
            self._wake_s[Lane.DECODE] = self._flight.step_from_s(self._tbt_s, self._split_step_s.get(partition, 0.0))
            if now_s < self._wake_s[Lane.DECODE]:
                return None
        special = [r for r in batch if r.is_special]
        step = DecodeWork(
            request_ids=tuple([r.request_id for r in batch]),
            rows=tuple([r.row for r in batch]),
            positions=tuple(positions),
            has_ban=any(r.row_params.min_position > r.num_tokens + r.num_launched_tokens for r in special),
            new_blocks=tuple([NewBlocks(r.row, len(r.block_ids), tuple(self.pool.allocate(r, 1))) for r in short]),
            **{flag: any(getattr(r.row_params, flag) for r in special) for flag in FLAGS},
        )
        if not is_fused:
            return step, partition
        chunk = self._form_chunk(now_s, self.decision.token_chunk, MAX_FUSED_SLICES)
        if chunk is None:  # the next prompt waits for a prefix
            return step, self.policy.choose(Load(self._decode, self._tbt_s), self.decision).partition
        prefill = PrefillWork(chunk.batch_id, chunk.slices, 0, self.num_layers, True, chunk.new_blocks)
        return FusedWork(prefill, step), partition

    def _next_step(self) -> tuple[list[Request], list[int], list[Request]]:
        """Who decodes next, at which positions, and who of them needs a block for that."""
        batch, positions, short = [], [], []
        for request in self.running:
            position = len(request.token_ids) + request.num_launched_tokens - 1  # of its last, perhaps unread token
            if position + 1 < request.most_tokens:
                batch.append(request)
                positions.append(position)
                if position >= len(request.block_ids) * BLOCK_SIZE:
                    short.append(request)
        return batch, positions, short

    def _cheapest_holder(self) -> Request:
        """Who is to give its blocks back, when nothing is in flight: the others' next step needs them.

        Those that cost least to compute again go first, the younger of two equals. They keep their tokens and go to the
        head of the queue; their full blocks stay cached while there is room. The oldest is never taken: it fits alone,
        or ``check`` had refused it, so every request gets through at the latest when it is the oldest.
        """
        holders = sorted(self.prefilling + self.running, key=lambda request: request.number)[1:]
        return min(holders, key=lambda request: (self.pool.num_lost_tokens(request), -request.number))

    def _preempt(self, victim: Request) -> None:
        self._queue_of(victim).remove(victim)
        self._give_back(victim)
        victim.state = RequestState.WAITING
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(victim)
        self._is_tight = True

    # ---- prefill lane ------------------------------------------------------------------------------------------

    def _next_prefill(self, now_s: float) -> tuple[PrefillWork, Partition] | None:
        self._flight.planned_s = math.inf
        is_stepping = self._decode.batch > 0 and not self._is_draining
        is_fused = is_stepping and self.decision.mode is Mode.FUSED  # decode is asked first, and takes prompts along
        if not self._open and (is_fused or not (self.prefilling or self.waiting)):
            return None  # most turns: nothing to ask the policy
        self._decide(now_s)
        decision = self.decision
        # no chunk may begin: blocks have run out, or the policy has just turned to fused steps
        is_closed = not self._open and (self._is_draining or (is_stepping and decision.mode is Mode.FUSED))
        if is_closed or not self._flight.can_queue(decision.partition, is_stepping and not decision.holds_decode):
            return None
        if not self._open or (len(self._open) < MAX_OPEN_CHUNKS and not self._is_draining):
            formed = self._form_chunk(now_s, decision.token_chunk)  # beside an open one: only for who overtakes it
            self._open += [formed] if formed else []
        if not self._open:
            return None
        chunk = self._open[-1]  # a chunk that was begun by layers is finished by layers
        first = chunk.next_layer
        last = min(first + decision.layers, self.num_layers)
        is_last, new_blocks = last == self.num_layers, chunk.new_blocks if first == 0 else ()
        work = PrefillWork(chunk.batch_id, chunk.slices, first, last, is_last, new_blocks)
        if work.sampled_ids and is_stepping and not decision.partition.is_shared:
            times = self._predicted_s(work), self._tbt_s, self._split_step_s.get(decision.partition, 0.0)
            self._wake_s[Lane.PREFILL] = self._flight.merge_from_s(*times)
            if now_s < self._wake_s[Lane.PREFILL]:
                return None
        chunk.next_layer = last
        if is_last:
            self._open.pop()
        return work, decision.partition

    def _form_chunk(self, now_s: float, most_tokens: int, most_slices: int | None = None) -> Chunk | None:
        """The next token chunk, or None. If none is open: who overtakes, the prompts under way, the queue.

        If one is open: only who overtakes it, in a chunk of its own.
        """
        slices, new_blocks = [], []
        room = self.max_prefill_tokens if self._open else min(most_tokens, self.max_prefill_tokens)
        most_slices = most_slices or len(self._free_rows) + len(self.prefilling)
        if overtaker := self._overtaker(now_s):
            overtaker.has_overtaken = True
            for victim in self.prefilling:
                victim.num_overtaken += 1
            new_blocks.append(self._admit(overtaker, now_s))
            self.prefilling.insert(0, self.prefilling.pop())
        elif self._open:
            return None
        for request in self.prefilling[: 1 if self._open else most_slices]:
            room -= request.take_slice(room, slices)
        num_passed, num_kept_blocks = 0, 0  # requests that wait for a prefix; what those behind must leave to them
        for request in () if self._open else self.waiting.in_turn(now_s, self._pace_s):
            has_room = room > 0 and len(slices) < most_slices and len(self._free_rows) > num_passed
            if not has_room or not self._fits(request, num_kept_blocks):
                break
            unseen = (r for r in self.running if r.num_written_tokens < r.num_tokens - 1)
            if any(self.pool.is_about_to_write(owner, request) for owner in (*self.prefilling, *unseen)):
                num_passed += 1
                num_kept_blocks += self.pool.num_missing_blocks(request) + 1
            else:
                new_blocks.append(self._admit(request, now_s))
                room -= request.take_slice(room, slices)
        if not slices:
            return None
        self._num_chunks += 1
        self._newest = tuple(slices)
        return Chunk(self._num_chunks, self._newest, tuple(new_blocks))

    def _fits(self, request: Request, num_kept_blocks: int = 0) -> bool:
        """There is room for it, and a block more for everybody under way: two if blocks ran out lately.

        So admission is not soon undone. What does not fit waits, and decode has the device until blocks come back. And
        the policy must see the decode steps of all who are under way keep the TBT of half of them with it.
        """
        self.pool.match(request)
        num_blocks = self.pool.num_missing_blocks(request) + num_kept_blocks
        num_blocks += (len(self.prefilling) + len(self.running)) * (1 + self._is_tight)
        if num_blocks > self.pool.num_available_blocks:
            return False
        coming = [*self.prefilling, request]
        joined = self._decode.joined_by([r.num_tokens for r in coming])
        tbt_ms = median_high([r.slo.tbt_ms for r in (*self.running, *coming)])  # so that one alone shuts nobody out
        return self.policy.may_join(joined, DecodeLoad(1, request.num_tokens), tbt_ms / 1e3 * (1 - HEADROOM))

    def _overtaker(self, now_s: float) -> Request | None:
        """The next in the queue, if it may go before the prompts under way, or before the rest of an open chunk."""
        request = next(self.waiting.in_turn(now_s, self._pace_s), None) if self.prefilling and self._free_rows else None
        if request is None:
            return None
        if self._open:  # it need wait for the rest of this chunk only, and would have to make one of its own
            chunk = self._open[-1]
            num_ahead = chunk.num_tokens * (self.num_layers - chunk.next_layer) / self.num_layers
        else:
            num_ahead = sum(r.num_tokens - r.num_computed_tokens for r in self.prefilling)
        if (self._open and request.num_new_tokens > self.max_prefill_tokens) or not self._fits(request):
            return None
        where = num_ahead, self._pace_s, now_s, bool(self._open)
        return request if may_overtake(request, self.prefilling, *where) else None

    def _admit(self, request: Request, now_s: float) -> NewBlocks:
        self.waiting.take(request)
        self.pool.admit(request)
        request.row = self._free_rows.popleft()
        request.state = RequestState.PREFILL
        request.scheduled_s = now_s if request.scheduled_s is None else request.scheduled_s
        self.prefilling.append(request)
        self._is_tight = self._is_tight and len(self.prefilling) + len(self.running) > 1
        return NewBlocks(request.row, 0, tuple(request.block_ids))

    # ---- tokens, blocks, rows ----------------------------------------------------------------------------------

    def _take_prompt_logprobs(self, work: PrefillWork, logprobs: tuple[Logprobs, ...]) -> None:
        found = iter(logprobs)
        for s in work.slices:
            request, num = self.requests[s.request_id], len(s.next_token_ids)
            if num:
                most = request.params.prompt_logprobs
                request.prompt_logprobs[s.start :] = [one.cut(most) for one in itertools.islice(found, num)]

    def _take_token(self, request: Request, token_id: int, logprobs: Logprobs | None, now_s: float) -> TokenEvent:
        request.num_written_tokens = num_tokens = len(request.token_ids)  # all before this one
        if num_tokens % BLOCK_SIZE == 0:
            self.pool.enter(request)
        request.token_ids.append(token_id)
        request.output_token_ids.append(token_id)
        request.token_s.append(now_s)
        is_first = len(request.output_token_ids) == 1
        if token_id in request.stop_token_ids and len(request.output_token_ids) > request.params.min_tokens:
            self.finish(request.request_id, "stop", token_id)
        elif num_tokens + 1 >= request.most_tokens:
            self.finish(request.request_id, "length")
        elif logprobs is None and not is_first:
            return TokenEvent(request.request_id, (token_id,))  # most of them
        if request.is_finished:
            request.finished_s = now_s
        own = (logprobs.cut(request.params.logprobs),) if logprobs and request.row_params.has_logprobs else ()
        request.logprobs.extend(own)
        first = (request.num_cached_tokens, own, tuple(request.prompt_logprobs)) if is_first else (0, own)
        return TokenEvent(request.request_id, (token_id,), request.finish_reason, request.stop_reason, *first)

    def _note_written(self, work: PrefillWork) -> None:
        """A token chunk is complete: where it fills a block, others may use that from now on."""
        for piece in work.slices:
            request = self.requests[piece.request_id]
            request.num_written_tokens = max(request.num_written_tokens, piece.end)
            if request.num_written_tokens // BLOCK_SIZE > len(request.nodes):
                self.pool.enter(request)

    def _give_back(self, request: Request) -> None:
        self.pool.release(request)
        self._free_rows.append(request.row)
        request.row = None

    def _release_if_idle(self, request: Request) -> None:
        """A finished request leaves when nothing in flight or about to be launched touches its row and blocks."""
        if request.num_in_flight > 0 or request.request_id not in self.requests:
            return
        for chunk in self._open:
            in_chunk = [self.requests[s.request_id] for s in chunk.slices]
            if request in in_chunk:
                if all(other.is_finished for other in in_chunk):  # its other layers need not run
                    self._open.remove(chunk)
                    for other in in_chunk:
                        self._release_if_idle(other)
                return
        if request.row is not None:
            self._give_back(request)
        del self.requests[request.request_id]

    def _queue_of(self, request: Request) -> list[Request]:
        queues = {RequestState.WAITING: self.waiting, RequestState.PREFILL: self.prefilling}
        return queues.get(request.state, self.running)

    def _is_busy(self) -> bool:
        return bool(self._open) or len(self._flight) > 0
