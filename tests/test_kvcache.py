"""The block pool and its prefix tree, alone: who holds what, what is found again, what is evicted first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_machine import check_pool

from nanodrift.config import BLOCK_SIZE
from nanodrift.kvcache import BlockPool, blocks_for
from nanodrift.request import Request, SamplingParams


def request_of(token_ids, salt=None):
    return Request("r", list(token_ids), SamplingParams(), cache_salt=salt)


def blocks(*values):
    """Token ids of whole blocks, each full of one value."""
    return [value for value in values for _ in range(BLOCK_SIZE)]


def admit(pool, token_ids, salt=None):
    request = request_of(token_ids, salt)
    pool.match(request)
    pool.admit(request)
    return request


def serve(pool, token_ids, salt=None):
    """Admits a request, sees all of it written, and lets it go."""
    request = admit(pool, token_ids, salt)
    request.num_written_tokens = len(token_ids)
    pool.enter(request)
    pool.release(request)
    return request


def num_matched(pool, token_ids, salt=None):
    request = request_of(token_ids, salt)
    pool.match(request)
    return len(request.nodes)


def test_the_longest_known_prefix_is_found():
    pool = BlockPool(20)
    serve(pool, blocks(1, 2, 3))
    serve(pool, blocks(1, 2, 4) + [5] * 10)
    assert num_matched(pool, blocks(1, 2, 3, 9)) == 3
    assert num_matched(pool, blocks(1, 2, 4) + [5] * 10) == 3, "the block that is not full is not known"
    assert num_matched(pool, blocks(1, 3)) == 1
    assert num_matched(pool, blocks(2, 3)) == 0, "a block is known by all that stands before it"
    assert num_matched(pool, blocks(1)[:-1]) == 0
    assert pool.num_cached_blocks == 4
    assert (pool.num_hit_tokens, pool.num_queried_tokens) == (2 * BLOCK_SIZE, 6 * BLOCK_SIZE + 10)


def test_equal_hashes_are_not_equal_tokens():
    assert hash(-1) == hash(-2), "CPython's only pair of small ints with one hash"
    pool = BlockPool(4)
    serve(pool, blocks(-1))
    assert hash(tuple(blocks(-1))) == hash(tuple(blocks(-2)))
    assert num_matched(pool, blocks(-2)) == 0


def test_only_what_was_seen_written_is_known():
    pool = BlockPool(8)
    request = admit(pool, blocks(1, 2))
    pool.enter(request)
    assert num_matched(pool, blocks(1, 2)) == 0
    request.num_written_tokens = 2 * BLOCK_SIZE - 1
    pool.enter(request)
    assert num_matched(pool, blocks(1, 2)) == 1
    pool.release(request)
    assert (pool.num_cached_blocks, pool.num_free_blocks) == (1, 7)
    check_pool(pool, [])


def test_a_full_hit_leaves_one_token_to_compute():
    pool = BlockPool(8)
    serve(pool, blocks(1, 2))
    request = admit(pool, blocks(1, 2))
    assert request.num_computed_tokens == request.num_cached_tokens == 2 * BLOCK_SIZE - 1
    assert request.num_written_tokens == 2 * BLOCK_SIZE
    assert pool.num_free_blocks == 6, "no block was copied or computed anew"


def test_a_shared_block_is_free_again_after_its_last_holder():
    pool = BlockPool(2, has_tree=True)
    first = admit(pool, blocks(1))
    first.num_written_tokens = BLOCK_SIZE
    pool.enter(first)
    second = admit(pool, blocks(1))
    assert second.block_ids == first.block_ids
    pool.release(first)
    assert (pool.num_used_blocks, pool.num_cached_blocks) == (1, 0)
    check_pool(pool, [second])
    pool.release(second)
    assert (pool.num_used_blocks, pool.num_cached_blocks) == (0, 1)
    with pytest.raises(AssertionError, match="let go twice"):
        second.block_ids = [1]
        pool.release(second)


def test_the_least_recently_used_leaf_goes_first():
    pool = BlockPool(5)
    serve(pool, blocks(1, 2))
    serve(pool, blocks(3))
    serve(pool, blocks(1, 4))  # uses 1 again
    assert pool.num_free_blocks == 1
    order = []
    while pool.num_cached_blocks:
        pool._evict()
        check_pool(pool, [])
        order.append([num_matched(pool, blocks(*path)) for path in ((1, 2), (3,), (1, 4))])
    assert order == [[1, 1, 2], [1, 0, 2], [1, 0, 1], [0, 0, 0]]


def test_blocks_in_use_are_never_evicted():
    pool = BlockPool(4)
    serve(pool, blocks(1, 2, 3))
    holder = admit(pool, [*blocks(1, 2), 9])
    taker = request_of([])
    pool.allocate(taker, 1)
    assert num_matched(pool, blocks(1, 2, 3)) == 2
    check_pool(pool, [holder, taker])
    with pytest.raises(AssertionError, match="1 of 0 blocks"):
        pool.allocate(taker, 1)


def test_a_match_outlives_what_happens_while_it_waits():
    pool = BlockPool(4)
    serve(pool, blocks(1, 2))
    waiter = request_of(blocks(1, 2, 3, 4))
    pool.match(waiter)
    assert len(waiter.nodes) == 2
    pool._evict()
    pool.match(waiter)
    assert len(waiter.nodes) == 1, "what was evicted is forgotten"
    serve(pool, blocks(1, 7))
    serve(pool, blocks(1, 2, 3))
    pool.match(waiter)
    assert len(waiter.nodes) == 3, "what came since is found"
    assert pool.num_missing_blocks(waiter) == 4, "cached blocks count as missing: they are among the available ones"
    pool.admit(waiter)
    check_pool(pool, [waiter])


def test_salts_keep_trees_apart():
    pool = BlockPool(16)
    serve(pool, blocks(1, 2), salt="a")
    assert num_matched(pool, blocks(1, 2), salt="a") == 2
    assert num_matched(pool, blocks(1, 2), salt="b") == num_matched(pool, blocks(1, 2)) == 0
    serve(pool, blocks(1, 2))
    assert pool.num_cached_blocks == 4


def test_whom_to_wait_for():
    pool = BlockPool(32)
    serve(pool, blocks(1))
    owner = admit(pool, [*blocks(1, 2, 3), 5])

    def waits(token_ids, salt=None):
        request = request_of(token_ids, salt)
        pool.match(request)
        return pool.is_about_to_write(owner, request)

    assert waits(blocks(1, 2)) and waits([*blocks(1, 2), 7])
    assert not waits(blocks(1, 3)), "it will not write that one"
    assert not waits([*blocks(1), 2, 2]), "a block that is not full cannot be shared"
    assert not waits(blocks(4, 2)) and not waits(blocks(1, 2), salt="a"), "the same ids elsewhere"
    serve(pool, blocks(6))
    assert not waits(blocks(6, 2))
    owner.num_written_tokens = 2 * BLOCK_SIZE
    pool.enter(owner)
    assert not waits(blocks(1, 2)), "it is there by now"
    assert waits(blocks(1, 2, 3))
    owner.num_written_tokens = 3 * BLOCK_SIZE
    pool.enter(owner)
    assert not waits([*blocks(1, 2, 3), 5]), "the rest of the same prompt is everyone's own"


def test_the_same_block_written_twice_is_known_once():
    pool = BlockPool(16)
    pair = [admit(pool, blocks(1, 2, 3)) for _ in range(2)]
    for request in pair:
        request.num_written_tokens = 3 * BLOCK_SIZE
        pool.enter(request)
        check_pool(pool, pair)
    assert (len(pair[0].nodes), len(pair[1].nodes)) == (3, 0)
    pair[1].token_ids += blocks(4)
    pool.allocate(pair[1], 1)
    pair[1].num_written_tokens += BLOCK_SIZE
    pool.enter(pair[1])
    pool.release(pair[1])
    check_pool(pool, pair[:1])
    assert num_matched(pool, blocks(1, 2, 3, 4)) == 4, "what only the second had written hangs below the first's blocks"
    pool.release(pair[0])
    check_pool(pool, [])
    assert pool.num_cached_blocks == 4


def test_without_a_tree_nothing_stays():
    pool = BlockPool(4, has_tree=False)
    serve(pool, blocks(1, 2))
    assert (pool.num_free_blocks, num_matched(pool, blocks(1, 2))) == (4, 0)


@pytest.mark.parametrize(
    "fault",
    [
        lambda pool, request: pool._num_holders.__setitem__(request.block_ids[0], 2),
        lambda pool, request: pool._free.pop(),
        lambda pool, request: pool._free.append(request.block_ids[0]),
        lambda pool, request: pool._cached.popitem(),
        lambda pool, request: request.block_ids.pop(),
        lambda pool, request: pool._cached.move_to_end(next(reversed(pool._cached)), last=False),
        lambda pool, request: pool._nodes.__setitem__(request.block_ids[0], None),
    ],
)
def test_check_finds_what_is_wrong(fault):
    pool = BlockPool(8)
    serve(pool, blocks(5, 6))
    request = admit(pool, blocks(1, 2))
    request.num_written_tokens = 2 * BLOCK_SIZE
    pool.enter(request)
    check_pool(pool, [request])
    fault(pool, request)
    with pytest.raises(AssertionError):
        check_pool(pool, [request])


class PoolMachine(RuleBasedStateMachine):
    """Requests come, write, grow and go in any order, over a handful of prefixes."""

    @initialize(num_blocks=st.integers(3, 14))
    def start(self, num_blocks):
        self.pool, self.holders, self.waiting = BlockPool(num_blocks), [], []

    @rule(
        path=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        rest=st.integers(0, 3),
        salt=st.sampled_from([None, "s"]),
    )
    def arrive(self, path, rest, salt):
        self.waiting.append(request_of(blocks(*path) + [7] * rest, salt))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data):
        request = data.draw(st.sampled_from(self.waiting))
        self.pool.match(request)
        fresh = request_of(request.token_ids, request.cache_salt)
        self.pool.match(fresh)
        assert request.nodes == fresh.nodes, "a search that goes on from the last one finds what a new one finds"
        if self.pool.num_missing_blocks(request) <= self.pool.num_available_blocks:
            self.pool.admit(request)
            assert request.num_computed_tokens < request.num_tokens
            assert len(request.block_ids) == blocks_for(request.num_tokens)
            self.waiting.remove(request)
            self.holders.append(request)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), num_tokens=st.integers(1, 200))
    def write(self, data, num_tokens):
        request = data.draw(st.sampled_from(self.holders))
        request.num_written_tokens = min(request.num_tokens, request.num_written_tokens + num_tokens)
        self.pool.enter(request)

    @precondition(lambda self: self.holders and self.pool.num_available_blocks)
    @rule(data=st.data(), value=st.integers(0, 1))
    def grow(self, data, value):
        request = data.draw(st.sampled_from(self.holders))
        request.token_ids += [value] * (len(request.block_ids) * BLOCK_SIZE + BLOCK_SIZE - request.num_tokens)
        self.pool.allocate(request, 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), comes_back=st.booleans())
    def go(self, data, comes_back):
        request = data.draw(st.sampled_from(self.holders))
        self.pool.release(request)
        self.holders.remove(request)
        if comes_back:
            self.waiting.append(request)

    @precondition(lambda self: self.pool.num_cached_blocks)
    @rule()
    def evict(self):
        self.pool._evict()

    @invariant()
    def everything_is_accounted_for(self):
        if hasattr(self, "pool"):
            check_pool(self.pool, self.holders)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
TestPoolMachine = PoolMachine.TestCase


@pytest.mark.slow
class TestPoolMachineAtLength(PoolMachine.TestCase):
    """10,000 operations."""

    settings = settings(max_examples=200, stateful_step_count=50, derandomize=True, deadline=None)
