"""An executor in plain Python that keeps a real paged memory, for tests of the scheduler; and an auditor of the pool.

Work is carried out when it completes: in launch order within a lane, and where it wants SMs that earlier work holds;
otherwise in any order. Everything it reads is checked, layer by layer: the block table must lead from each position of
a request to the token that belongs there, and that must have been computed with exactly the tokens before it. So a
block that was handed out too early, overwritten while it was read, shared before its last layer was written or found
under the wrong prefix does not go unnoticed. The next token is a fixed function of all tokens so far, so a run that was
chunked, preempted and recomputed must write what an undisturbed run writes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from random import Random

from nanodrift.config import BLOCK_SIZE
from nanodrift.executor import VirtualClock
from nanodrift.kvcache import BlockPool
from nanodrift.plan import MAX_OPEN_CHUNKS, Completion, FusedWork, Lane, Partition, PrefillWork, Ticket
from nanodrift.request import Request

VOCAB_SIZE = 50
NUM_SMS = 4  # of the partitions that tests use: (3, 1), (2, 2)

Entry = tuple[int, int]  # what lies at a position: its token id, and a number that stands for it and all before it


def next_token(token_ids: list[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(token_ids)) * 31 + len(token_ids)) % VOCAB_SIZE


def expected_output(prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


def entries_after(entries: list[Entry], token_ids) -> list[Entry]:
    """What belongs at the positions of ``token_ids``, which follow ``entries``."""
    new, before = [], entries[-1][1] if entries else 0
    for token in token_ids:
        before = hash((before, token))
        new.append((token, before))
    return new


class PagedMachine:
    """``seed`` draws how many tickets a wait completes, and of which lane."""

    def __init__(self, num_blocks: int, num_rows: int, num_layers: int, max_prefill_tokens: int = 10**6, seed: int = 0):
        self.clock = VirtualClock()
        self.partitions = (Partition(1, 1, is_shared=True),)
        self.num_layers, self.num_blocks, self.num_rows = num_layers, num_blocks, num_rows
        self.max_prefill_tokens, self.device_name = max_prefill_tokens, "paged machine"
        self.memory: list[dict[int, list[Entry | None]]] = [
            {block_id: [None] * BLOCK_SIZE for block_id in range(1, num_blocks + 1)} for _ in range(num_layers)
        ]
        self.tables: dict[int, dict[int, int]] = {row: {} for row in range(num_rows)}
        self.last_token: dict[int, tuple[int, int]] = {}  # row -> (position, token id)
        self.fed: dict[int, list[Entry]] = {}  # row -> what the positions of its request must hold
        self.in_flight: deque[Ticket] = deque()
        self.launches: list = []
        self.layers_done: dict[int, int] = {}
        self.state_of: dict[int, tuple] = {}  # batch id -> the slices of that chunk
        self.state_sets: list[int] = []  # batch ids of the chunks whose hidden states are kept, as launched last
        self.num_prefill_tokens = 0  # computed in all
        self.random = Random(seed)
        self.watch_launch: Callable = lambda work: None

    def launch(self, work, partition) -> Ticket:
        for part in work.parts:
            self.watch_launch(part)
        if isinstance(work, PrefillWork):
            self._take_state_set(work)
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
            ticket = self.random.choice([t for i, t in enumerate(self.in_flight) if self._is_first(i)])
            self.in_flight.remove(ticket)
            done.append(Completion(ticket, self.clock.now(), self._carry_out(ticket.work)))
        return done

    def close(self):
        pass

    def _take_state_set(self, work: PrefillWork) -> None:
        """A chunk that begins takes a free state set, else that not used for longest; one that goes on must have one.

        The set of a chunk whose last piece is launched is free: what begins behind it runs behind it.
        """
        if work.first_layer > 0:
            assert work.batch_id in self.state_sets, "its hidden states were given to another chunk"
            self.state_sets.remove(work.batch_id)
        self.state_sets = [*self.state_sets, work.batch_id][-MAX_OPEN_CHUNKS:]
        if work.is_last:
            self.state_sets.remove(work.batch_id)

    def _is_first(self, index: int) -> bool:
        """Of its lane, and of those that hold the same SMs."""
        ticket = self.in_flight[index]
        return not any(_must_follow(ticket, self.in_flight[i]) for i in range(index))

    def _carry_out(self, work):
        if isinstance(work, FusedWork):
            return self._carry_out(work.prefill) + self._carry_out(work.decode)
        for new in work.new_blocks:
            for i, block_id in enumerate(new.block_ids):
                self.tables[new.row][new.first_index + i] = block_id
        if isinstance(work, PrefillWork):
            done = self.layers_done.get(work.batch_id, 0)
            assert work.first_layer == done, "layer chunks out of order"
            assert self.state_of.setdefault(work.batch_id, work.slices) == work.slices, "another chunk's state"
            assert work.last_layer > done
            assert work.is_last == (work.last_layer == self.num_layers)
            self.layers_done[work.batch_id] = work.last_layer
            self.num_prefill_tokens += work.num_tokens if work.is_last else 0
            for piece in work.slices:
                if work.first_layer == 0:
                    self._feed(piece)
                self._run(piece.row, piece.start, piece.end, work.first_layer, work.last_layer, piece.writes_kv)
            if not work.is_last:
                return ()
            return tuple((s.request_id, self._sample(s.row)) for s in work.slices if s.params is not None)
        tokens = []
        assert len(set(work.rows)) == len(work.rows), "a row twice in one step"
        for request_id, row, position in zip(work.request_ids, work.rows, work.positions, strict=True):
            at, token = self.last_token[row]
            assert at == position, f"row {row} stands at {at}, the scheduler thinks {position}"
            self.fed[row] += entries_after(self.fed[row], [token])
            self._run(row, position, position + 1, 0, self.num_layers, True)
            tokens.append((request_id, self._sample(row)))
        return tuple(tokens)

    def _feed(self, piece) -> None:
        """A chunk begins: what stands before it must be one sequence, whoever computed it."""
        before = self._read(0, piece.row, piece.start)
        assert None not in before, f"{piece.request_id}: nothing was written in its prefix"
        assert before == entries_after([], [token for token, _ in before]), f"{piece.request_id}: its prefix is mixed"
        self.fed[piece.row] = before + entries_after(before, piece.token_ids)

    def _run(self, row: int, start: int, end: int, first_layer: int, last_layer: int, writes_kv: bool) -> None:
        """Computes positions start .. end in some layers: writes them, and reads all up to them."""
        entries = self.fed[row][:end]
        for layer in range(first_layer, last_layer):
            for position in range(start, end) if writes_kv else ():
                block_id = self.tables[row][position // BLOCK_SIZE]
                self.memory[layer][block_id][position % BLOCK_SIZE] = entries[position]
            assert self._read(layer, row, end) == entries, f"row {row} reads foreign keys in layer {layer}"

    def _read(self, layer: int, row: int, num_tokens: int) -> list[Entry | None]:
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        found = [entry for i in range(num_blocks) for entry in self.memory[layer][self.tables[row][i]]]
        return found[:num_tokens]

    def _sample(self, row: int) -> int:
        token = next_token([token for token, _ in self.fed[row]])
        self.last_token[row] = (len(self.fed[row]), token)
        return token


def _must_follow(ticket: Ticket, earlier: Ticket) -> bool:
    is_same_lane = set(ticket.work.lanes) & set(earlier.work.lanes)
    prefill, decode = (ticket, earlier) if Lane.PREFILL in ticket.work.lanes else (earlier, ticket)
    is_whole = ticket.partition.is_shared or earlier.partition.is_shared
    return bool(is_same_lane) or is_whole or prefill.partition.prefill_sms + decode.partition.decode_sms > NUM_SMS


def check_pool(pool: BlockPool, requests: Iterable[Request]) -> None:
    """Asserts that every block and every reference count of the pool is explained by these requests and the tree."""
    held = Counter(block_id for request in requests for block_id in request.block_ids)
    assert held == Counter(dict(enumerate(pool._num_holders))), "a reference count without its request"
    known, order = {}, {block_id: place for place, block_id in enumerate(pool._cached)}
    branches = [pool._root]
    while branches:
        node = branches.pop()
        for key, child in node.children.items():
            assert child.parent is node and child.key == key and pool._nodes[child.block_id] is child
            assert child.block_id not in known, f"block {child.block_id} stands twice in the tree"
            assert [type(part) for part in key][-BLOCK_SIZE:] == [int] * BLOCK_SIZE, "a block that is not full is known"
            known[child.block_id] = child
            if node.block_id in order:
                assert order[child.block_id] < order[node.block_id], "a leaf would outlive its branch"
            branches.append(child)
    assert known == {i: node for i, node in enumerate(pool._nodes) if node is not None}
    assert set(order) == {block_id for block_id in known if not held[block_id]}, "cached: known and unheld"
    outside = [b for b in range(1, pool.num_blocks + 1) if not held[b] and b not in known]
    assert sorted(pool._free) == outside, "free: neither known nor held"
    assert pool.num_free_blocks + pool.num_cached_blocks + sum(n > 0 for n in held.values()) == pool.num_blocks
