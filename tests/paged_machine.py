"""An executor in plain Python that keeps a real paged memory of token ids, for tests of the scheduler.

Every piece of work is carried out when it completes, in launch order, and everything it reads is checked: the block
table must lead from each position of a request to the token that belongs there. The next token is a fixed function of
all tokens so far, so a run that was chunked, preempted and recomputed must write what an undisturbed run writes.
"""

from __future__ import annotations

from collections import deque
from random import Random

from nanodrift.config import BLOCK_SIZE
from nanodrift.executor import VirtualClock
from nanodrift.plan import Completion, Partition, PrefillWork, Ticket

VOCAB_SIZE = 50


def next_token(token_ids: list[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(token_ids)) * 31 + len(token_ids)) % VOCAB_SIZE


def expected_output(prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


class PagedMachine:
    """Completes at most ``max_per_wait`` tickets a wait, oldest first (``seed`` draws how many)."""

    def __init__(self, num_blocks: int, num_rows: int, num_layers: int, max_prefill_tokens: int = 10**6, seed: int = 0):
        self.clock = VirtualClock()
        self.partitions = (Partition(1, 1, is_shared=True),)
        self.num_layers, self.num_blocks, self.num_rows = num_layers, num_blocks, num_rows
        self.max_prefill_tokens, self.device_name = max_prefill_tokens, "paged machine"
        self.memory: dict[tuple[int, int], int] = {}  # (block, offset) -> token id
        self.tables: dict[int, dict[int, int]] = {row: {} for row in range(num_rows)}
        self.last_token: dict[int, tuple[int, int]] = {}  # row -> (position, token id)
        self.in_flight: deque[Ticket] = deque()
        self.launches: list = []
        self.layers_done: dict[int, int] = {}
        self.random = Random(seed)

    def launch(self, work, partition) -> Ticket:
        ticket = Ticket(len(self.launches), work, partition, self.clock.now())
        self.launches.append(work)
        self.in_flight.append(ticket)
        return ticket

    def wait(self, until_s):
        if not self.in_flight:
            if until_s is not None:
                self.clock.advance_to(until_s)
            return []
        self.clock.advance_to(self.clock.now() + 1.0)
        done = []
        for _ in range(self.random.randint(1, len(self.in_flight))):
            ticket = self.in_flight.popleft()
            done.append(Completion(ticket, self.clock.now(), self._carry_out(ticket.work)))
        return done

    def close(self):
        pass

    def _carry_out(self, work):
        for new in work.new_blocks:
            for i, block_id in enumerate(new.block_ids):
                self.tables[new.row][new.first_index + i] = block_id
        if isinstance(work, PrefillWork):
            done = self.layers_done.get(work.batch_id, 0)
            assert work.first_layer == done, "layer chunks out of order"
            assert work.last_layer > done
            assert work.is_last == (work.last_layer == self.num_layers)
            self.layers_done[work.batch_id] = work.last_layer
            if work.first_layer == 0:
                for piece in work.slices:
                    for position, token in enumerate(piece.token_ids, piece.start):
                        self._write(piece.row, position, token)
            if not work.is_last:
                return ()
            return tuple(
                (piece.request_id, self._sample(piece.row, piece.end))
                for piece in work.slices
                if piece.params is not None
            )
        tokens = []
        assert len(set(work.rows)) == len(work.rows), "a row twice in one step"
        for request_id, row, position in zip(work.request_ids, work.rows, work.positions, strict=True):
            at, token = self.last_token[row]
            assert at == position, f"row {row} stands at {at}, the scheduler thinks {position}"
            self._write(row, position, token)
            tokens.append((request_id, self._sample(row, position + 1)))
        return tuple(tokens)

    def _write(self, row, position, token):
        index, offset = divmod(position, BLOCK_SIZE)
        self.memory[(self.tables[row][index], offset)] = token

    def _sample(self, row, num_tokens):
        context = [self.memory[(self.tables[row][p // BLOCK_SIZE], p % BLOCK_SIZE)] for p in range(num_tokens)]
        token = next_token(context)
        self.last_token[row] = (num_tokens, token)
        return token
