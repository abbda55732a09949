"""The scheduler under the engine's loop, on a machine that checks every position it reads (paged_machine.py)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_machine import VOCAB_SIZE, PagedMachine, expected_output

from nanodrift.engine import Engine
from nanodrift.kvcache import BlockPool, blocks_for
from nanodrift.plan import DecodeWork, PrefillWork
from nanodrift.request import SamplingParams
from nanodrift.scheduler import Scheduler


def make_engine(
    num_blocks=64, num_rows=8, num_layers=4, max_model_len=1024, max_prefill_tokens=100, prefill_layers=None, seed=0
):
    machine = PagedMachine(num_blocks, num_rows, num_layers, seed=seed)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        num_rows=num_rows,
        num_layers=num_layers,
        max_model_len=max_model_len,
        max_prefill_tokens=max_prefill_tokens,
        prefill_layers=prefill_layers,
    )
    return Engine(scheduler, machine, vocab_size=VOCAB_SIZE), machine


def add(engine, prompt, max_tokens, **params):
    params = {"ignore_eos": True, **params}
    request = engine.new_request(list(prompt), SamplingParams(max_tokens=max_tokens, **params))
    engine.add(request)
    return request


def run(engine, max_steps=10_000):
    events = []
    for _ in range(max_steps):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError("the engine still has work: something hangs")


def prompt_of(n, salt=1):
    return [(i * 7 + salt) % VOCAB_SIZE for i in range(n)]


@pytest.mark.parametrize("prefill_layers", [None, 1, 3])
@pytest.mark.parametrize("max_prefill_tokens", [1, 33, 64, 1000])
def test_every_chunking_writes_the_same_tokens(prefill_layers, max_prefill_tokens):
    engine, machine = make_engine(prefill_layers=prefill_layers, max_prefill_tokens=max_prefill_tokens)
    sizes = [(1, 5), (63, 3), (64, 4), (65, 70), (130, 1)]
    requests = [add(engine, prompt_of(n, n), out) for n, out in sizes]
    run(engine)
    for request, (n, out) in zip(requests, sizes, strict=True):
        assert request.output_token_ids == expected_output(prompt_of(n, n), out)
        assert request.finish_reason == "length"
        assert len(request.token_s) == out
    assert engine.scheduler.pool.num_used_blocks == 0
    for work in machine.launches:
        if isinstance(work, PrefillWork):
            assert work.num_tokens <= max_prefill_tokens


def test_a_step_is_launched_before_the_last_one_is_read():
    engine, machine = make_engine()
    add(engine, prompt_of(10), 20)
    ahead = 0
    while engine.has_work:
        engine.step()
        ahead = max(ahead, sum(isinstance(t.work, DecodeWork) for t in machine.in_flight))
    machine_rows = [w for w in machine.launches if isinstance(w, DecodeWork)]
    assert len(machine_rows) == 19, "max_tokens is known: no step beyond it is launched"
    assert ahead >= 1


def test_preemption_recomputes_and_loses_nothing():
    engine, _ = make_engine(num_blocks=6, max_prefill_tokens=64)
    sizes = [(60, 100), (50, 120), (70, 90), (10, 150)]  # 11 blocks at their longest
    requests = [add(engine, prompt_of(n, n), out) for n, out in sizes]
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0, "the oldest is never preempted"
    for request, (n, out) in zip(requests, sizes, strict=True):
        assert request.output_token_ids == expected_output(prompt_of(n, n), out)
    assert engine.scheduler.pool.num_used_blocks == 0


def test_more_requests_than_rows_wait_their_turn():
    engine, _ = make_engine(num_rows=2)
    requests = [add(engine, prompt_of(5, i), 4) for i in range(9)]
    run(engine)
    firsts = [request.first_token_s for request in requests]
    assert firsts == sorted(firsts)
    assert all(r.output_token_ids == expected_output(prompt_of(5, i), 4) for i, r in enumerate(requests))


def test_stop_token_ends_and_min_tokens_holds_it_back():
    prompt = prompt_of(12)
    output = expected_output(prompt, 30)
    stop = output[4]
    first = output.index(stop) + 1
    engine, _ = make_engine()
    plain = add(engine, prompt, 30, stop_token_ids=[stop])
    held = add(engine, prompt, 30, stop_token_ids=[stop], min_tokens=first)
    run(engine)
    assert plain.output_token_ids == output[:first]
    assert (plain.finish_reason, plain.stop_reason) == ("stop", stop)
    assert len(held.output_token_ids) > first


def test_the_window_ends_a_request():
    engine, _ = make_engine(max_model_len=40)
    request = add(engine, prompt_of(30), 100)
    run(engine)
    assert request.finish_reason == "length"
    assert request.num_tokens == 40


def test_what_can_never_fit_is_refused_with_both_numbers():
    engine, _ = make_engine(num_blocks=3)
    with pytest.raises(ValueError, match=r"4 KV blocks.*cache has 3"):
        add(engine, prompt_of(100), 150)
    with pytest.raises(ValueError, match=r"1024 tokens.*holds 1024"):
        add(engine, prompt_of(1024), 1)
    with pytest.raises(ValueError, match="empty"):
        add(engine, [], 1)
    with pytest.raises(ValueError, match=rf"{VOCAB_SIZE} is outside the vocabulary"):
        add(engine, [VOCAB_SIZE], 1)
    assert not engine.has_work


@pytest.mark.parametrize("num_turns", range(12))
def test_abort_at_any_moment_frees_everything(num_turns):
    engine, _ = make_engine(prefill_layers=1, max_prefill_tokens=30, seed=num_turns)
    doomed = add(engine, prompt_of(70, 3), 50)
    other = add(engine, prompt_of(40, 4), 12)
    for _ in range(num_turns):
        engine.step()
    engine.abort(doomed.request_id)
    engine.abort("nobody")
    run(engine)
    assert doomed.finish_reason == "abort"
    assert other.output_token_ids == expected_output(prompt_of(40, 4), 12)
    assert engine.scheduler.pool.num_used_blocks == 0


def test_future_arrivals_wait_for_their_time():
    engine, machine = make_engine()
    late = engine.new_request(prompt_of(5), SamplingParams(max_tokens=2, ignore_eos=True), arrival_s=100.0)
    engine.add(late)
    early = add(engine, prompt_of(6), 3)
    run(engine)
    assert early.finished_s < 100.0 <= late.scheduled_s
    assert machine.clock.now() >= 100.0


def test_two_runs_launch_the_same_work():
    def launches():
        engine, machine = make_engine(num_blocks=9, prefill_layers=2, seed=3)
        for i in range(12):
            add(engine, prompt_of(11 * i + 1, i), 30)
        run(engine)
        return machine.launches

    assert launches() == launches()


class EngineMachine(RuleBasedStateMachine):
    """Add, step and abort in any order; the memory, the rows and the outputs must stay consistent throughout."""

    @initialize(
        num_blocks=st.integers(4, 12),
        num_rows=st.integers(1, 4),
        chunk=st.sampled_from([7, 64, 200]),
        layers=st.sampled_from([1, 2, None]),
        seed=st.integers(0, 1000),
    )
    def start(self, num_blocks, num_rows, chunk, layers, seed):
        self.engine, self.machine = make_engine(
            num_blocks, num_rows, 3, max_model_len=200, max_prefill_tokens=chunk, prefill_layers=layers, seed=seed
        )
        self.requests = []

    @rule(num_prompt=st.integers(1, 150), max_tokens=st.integers(1, 120))
    def add_request(self, num_prompt, max_tokens):
        prompt = prompt_of(num_prompt, len(self.requests))
        try:
            self.requests.append((add(self.engine, prompt, max_tokens), prompt, max_tokens))
        except ValueError:
            assert blocks_for(min(num_prompt + max_tokens, 200)) > self.engine.scheduler.pool.num_blocks

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request, *_ = data.draw(st.sampled_from(self.requests))
        self.engine.abort(request.request_id)

    @invariant()
    def blocks_have_one_owner(self):
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        held = [block_id for request in scheduler.requests.values() for block_id in request.block_ids]
        assert len(held) == len(set(held)) == scheduler.pool.num_used_blocks
        rows = [request.row for request in scheduler.requests.values() if request.row is not None]
        assert len(rows) == len(set(rows))

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        run(self.engine)
        assert self.engine.scheduler.pool.num_used_blocks == 0
        for request, prompt, max_tokens in self.requests:
            num_tokens = min(max_tokens, 200 - len(prompt))
            expected = expected_output(prompt, num_tokens)
            if request.finish_reason == "abort":
                assert request.output_token_ids == expected[: len(request.output_token_ids)]
            else:
                assert request.output_token_ids == expected


EngineMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, derandomize=True, deadline=None)
TestEngineMachine = EngineMachine.TestCase


@given(st.lists(st.integers(1, 5), max_size=30))
@settings(derandomize=True, deadline=None)
def test_block_pool_conserves_blocks(sizes):
    pool = BlockPool(40)
    held = []
    for size in sizes:
        if size <= pool.num_free_blocks:
            held.append(pool.allocate(size))
        elif held:
            pool.free(held.pop(0))
        assert pool.num_free_blocks + sum(map(len, held)) == pool.num_blocks
    in_use = [b for block_ids in held for b in block_ids]
    assert len(set(in_use)) == len(in_use)


def test_a_shared_block_returns_with_its_last_holder():
    pool = BlockPool(2)
    block_ids = pool.allocate(2)
    pool.share(block_ids[:1])
    pool.free(block_ids)
    assert pool.num_free_blocks == 1
    pool.free(block_ids[:1])
    assert pool.num_free_blocks == 2
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block_ids[:1])
