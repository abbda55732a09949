"""The scheduler under the engine's loop, on a machine that checks every position it reads (paged_machine.py)."""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_machine import VOCAB_SIZE, PagedMachine, check_pool, expected_output

from nanodrift.baselines import Chunked, PrefillFirst, Turns
from nanodrift.config import BLOCK_SIZE, SLO
from nanodrift.decision import Decision, Mode, Policy
from nanodrift.engine import Engine
from nanodrift.kvcache import blocks_for
from nanodrift.plan import (
    MAX_FUSED_SLICES,
    MAX_FUSED_TOKENS,
    DecodeWork,
    FusedWork,
    Lane,
    Partition,
    PrefillWork,
)
from nanodrift.request import RequestState, SamplingParams
from nanodrift.scheduler import Scheduler


def make_engine(
    num_blocks=64,
    num_rows=8,
    num_layers=4,
    max_model_len=1024,
    max_prefill_tokens=100,
    prefill_layers=None,
    policy=None,
    seed=0,
    **options,
):
    machine = PagedMachine(num_blocks, num_rows, num_layers, seed=seed)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        num_rows=num_rows,
        num_layers=num_layers,
        max_model_len=max_model_len,
        max_prefill_tokens=max_prefill_tokens,
        policy=policy or Turns(machine.partitions[0], max_prefill_tokens, prefill_layers or num_layers),
        **options,
    )
    machine.watch_launch = lambda work: check_written_blocks(scheduler, work)
    return Engine(scheduler, machine, vocab_size=VOCAB_SIZE), machine


class Asked(Policy):
    """Answers as told."""

    def __init__(self, choose):
        self.choose = choose


class AnyPolicy(Policy):
    """Draws every decision: whatever a policy wants, the scheduler must carry it out without mixing up a token."""

    def __init__(self, num_layers, seed):
        self.random, self.num_layers = Random(seed), num_layers
        self.partitions = [Partition(1, 1, is_shared=True), Partition(3, 1), Partition(2, 2)]
        self.modes_chosen = set()

    def choose(self, load, current=None):
        assert load.prompt_tokens >= 0
        assert load.decode.context_tokens >= load.decode.batch
        mode = self.random.choice(list(Mode))
        self.modes_chosen.add(mode)
        partition = self.partitions[0] if mode is Mode.EXCLUSIVE else self.random.choice(self.partitions)
        rate, decode_s = self.random.choice([0.0, 5.0, 30.0]), self.random.choice([0.0, 0.5, 2.0])  # a wait takes 1 s
        chunk, layers = self.random.randint(1, 90), self.random.randint(1, self.num_layers)
        return Decision(mode, partition, chunk, layers, decode_s, rate, decode_s=decode_s)

    def may_join(self, joined, newest, tbt_s):
        assert joined.batch >= newest.batch == 1 and joined.context_tokens >= newest.context_tokens
        return joined == newest or self.random.random() < 0.7


@pytest.mark.parametrize("seed", range(8))
def test_tokens_do_not_depend_on_the_policy(seed):
    policy = AnyPolicy(num_layers=4, seed=seed)
    engine, machine = make_engine(num_blocks=14, policy=policy, seed=seed)
    sizes = [(1, 40), (63, 30), (64, 44), (130, 70), (65, 90), (200, 20), (33, 100)]
    requests = [add(engine, prompt_of(n, n), out) for n, out in sizes]
    run(engine)
    for request, (n, out) in zip(requests, sizes, strict=True):
        assert request.output_token_ids == expected_output(prompt_of(n, n), out)
    assert policy.modes_chosen == set(Mode)
    assert {PrefillWork, DecodeWork} <= {type(work) for work in machine.launches}
    check_empty(engine)


def test_any_policy_gets_its_fused_steps():
    engine, machine = make_engine(policy=AnyPolicy(num_layers=4, seed=0))
    for n in range(1, 300, 20):
        add(engine, prompt_of(n, n), 20)
    run(engine)
    assert sum(isinstance(work, FusedWork) for work in machine.launches) > 5


def test_lanes_are_told_the_partition_of_the_decision():
    policy = AnyPolicy(num_layers=4, seed=3)
    engine, machine = make_engine(policy=policy)
    where = []
    machine.launch = lambda work, partition, launch=machine.launch: (where.append(partition), launch(work, partition))[
        1
    ]
    for n in (100, 200, 300):
        add(engine, prompt_of(n, n), 30)
    run(engine)
    assert set(where) == set(policy.partitions)


def test_the_tightest_promise_of_the_running_requests_counts():
    loads = []
    policy = Turns(Partition(1, 1, is_shared=True), 100, 4)
    engine, _ = make_engine(policy=policy)
    engine.scheduler.policy = Asked(choose=lambda load, _: loads.append(load) or policy.choose(load))
    for tbt_ms in (50.0, 20.0, 80.0):
        request = engine.new_request(
            prompt_of(40), SamplingParams(max_tokens=9, ignore_eos=True), slo=SLO(tbt_ms=tbt_ms)
        )
        engine.add(request)
    run(engine)
    assert min(load.tbt_s for load in loads if load.decode.batch == 3) == pytest.approx(0.020, rel=0.02)
    assert {load.tbt_s for load in loads if load.decode.batch == 0} == {float("inf")}
    assert max(load.prompt_tokens for load in loads) >= 100


def test_who_may_join_is_asked_with_all_who_are_under_way_and_what_half_of_them_are_promised():
    asked = []
    engine, _ = make_engine(policy=Asked(lambda load, _: Decision(Mode.EXCLUSIVE, Partition(1, 1, True), 100, 4)))
    engine.scheduler.policy.may_join = lambda *loads: asked.append(loads) or True
    for tbt_ms, n in ((50.0, 40), (20.0, 30), (80.0, 20)):
        request = engine.new_request(
            prompt_of(n), SamplingParams(max_tokens=9, ignore_eos=True), slo=SLO(tbt_ms=tbt_ms)
        )
        engine.add(request)
    engine.step()
    while len(engine.scheduler.running) < 3:
        engine.step()
    late = engine.new_request(prompt_of(60), SamplingParams(max_tokens=9, ignore_eos=True), slo=SLO(tbt_ms=80.0))
    engine.add(late)
    engine.step()
    whom = [(joined.batch, newest.context_tokens, round(1e3 * tbt_s)) for joined, newest, tbt_s in asked]
    assert whom[0] == (1, 40, 50) and {(2, 30, 50), (3, 20, 50)} <= set(whom) and whom[-1] == (4, 60, 79)
    joined, newest, _ = asked[-1]
    assert newest.batch == 1 and 150 < joined.context_tokens <= 150 + 3 * 9, "as far as each has come"


def check_written_blocks(scheduler, work):
    """What is launched may write only into blocks that one request holds and the tree does not know."""
    if isinstance(work, PrefillWork):
        spans = [(s.request_id, s.start, s.end) for s in work.slices if s.writes_kv]
    else:
        spans = [(name, at, at + 1) for name, at in zip(work.request_ids, work.positions, strict=True)]
    for request_id, start, end in spans:
        for block_id in scheduler.requests[request_id].block_ids[start // BLOCK_SIZE : blocks_for(end)]:
            assert scheduler.pool._num_holders[block_id] == 1, f"block {block_id} has two writers"
            assert scheduler.pool._nodes[block_id] is None, f"block {block_id} is read only"


def add(engine, prompt, max_tokens, cache_salt=None, slo=None, priority=0, **params):
    params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **params})
    request = engine.new_request(list(prompt), params, cache_salt=cache_salt, slo=slo)
    request.priority = priority
    engine.add(request)
    return request


def check_outputs(*requests):
    for request in requests:
        assert request.output_token_ids == expected_output(request.prompt_token_ids, request.params.max_tokens)


def check_empty(engine):
    """No request is left, and no block is unaccounted for."""
    assert not engine.scheduler.requests
    check_pool(engine.scheduler.pool, [])
    assert engine.stats()["kv_blocks_leaked"] == engine.scheduler.pool.num_used_blocks == 0
    assert len(engine.scheduler._free_rows) == engine.executor.num_rows


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
    check_empty(engine)
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
    check_empty(engine)


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
    check_empty(engine)


def test_future_arrivals_wait_for_their_time():
    engine, machine = make_engine()
    late = engine.new_request(prompt_of(5), SamplingParams(max_tokens=2, ignore_eos=True), arrival_s=100.0)
    engine.add(late)
    early = add(engine, prompt_of(6), 3)
    run(engine)
    assert early.finished_s < 100.0 <= late.scheduled_s
    assert machine.clock.now() >= 100.0


def test_arrivals_due_at_once_keep_their_order():
    engine, _ = make_engine(num_rows=1)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    requests = [engine.new_request(prompt_of(5, i), params, arrival_s=7.0) for i in range(4)]
    for request in requests:
        engine.add(request)
    run(engine)
    firsts = [request.first_token_s for request in requests]
    assert firsts == sorted(firsts) and firsts[0] >= 7.0


def test_two_runs_launch_the_same_work():
    def launches():
        engine, machine = make_engine(num_blocks=9, prefill_layers=2, seed=3)
        for i in range(12):
            add(engine, prompt_of(11 * i + 1, i), 30)
        run(engine)
        return machine.launches

    assert launches() == launches()


# ---- prefix cache ---------------------------------------------------------------------------------------------------


def num_computed(machine, action):
    """Prompt tokens that were computed while ``action`` ran."""
    before = machine.num_prefill_tokens
    action()
    return machine.num_prefill_tokens - before


@pytest.mark.parametrize("num_prompt", [64, 128, 192])
def test_a_full_hit_computes_one_token(num_prompt):
    engine, machine = make_engine()
    first = add(engine, prompt_of(num_prompt), 5)
    run(engine)
    again = add(engine, prompt_of(num_prompt), 70)
    assert num_computed(machine, lambda: run(engine)) == 1
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, num_prompt - 1)
    check_outputs(first, again)
    check_empty(engine)


def test_many_full_hits_at_once_share_their_blocks():
    engine, machine = make_engine(num_blocks=12)
    run_first = add(engine, prompt_of(128), 2)
    run(engine)
    crowd = [add(engine, prompt_of(128), 40) for _ in range(8)]
    assert num_computed(machine, lambda: run(engine)) == 8
    assert engine.scheduler.num_preemptions == 0, "8 x 3 blocks would not fit, 2 + 8 do"
    check_outputs(run_first, *crowd)
    check_empty(engine)


@pytest.mark.parametrize("num_prompt", [63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("chunk", [64, 128, 50])
@pytest.mark.parametrize("prefill_layers", [None, 1])
def test_chunk_ends_and_block_ends_in_any_relation(num_prompt, chunk, prefill_layers):
    engine, machine = make_engine(max_prefill_tokens=chunk, prefill_layers=prefill_layers)
    first = add(engine, prompt_of(num_prompt), 3)
    run(engine)
    longer = add(engine, prompt_of(num_prompt + 70), 3)
    cached = num_prompt // BLOCK_SIZE * BLOCK_SIZE  # the same ids go on, so 64 - n of the output rarely fit as well
    assert num_computed(machine, lambda: run(engine)) == num_prompt + 70 - longer.num_cached_tokens
    assert longer.num_cached_tokens == cached
    check_outputs(first, longer)
    check_empty(engine)


def test_the_next_turn_finds_the_answer_too():
    engine, machine = make_engine()
    prompt, computed = prompt_of(60), []
    for _turn in range(4):
        request = add(engine, prompt, 50)
        computed.append(num_computed(machine, lambda: run(engine)))
        check_outputs(request)
        prompt = request.token_ids + prompt_of(20, 9)
    # the last token of an answer is never fed, so a turn finds the full blocks of all but one token
    assert computed == [60, 130 - 64, 200 - 128, 270 - 192 - 64 * (249 // 64 > 3)]
    check_empty(engine)


def test_a_request_under_way_shares_what_it_has_written():
    engine, _ = make_engine()
    talker = add(engine, prompt_of(70), 100)
    while len(talker.output_token_ids) < 70:
        engine.step()
    listener = add(engine, talker.token_ids[:135], 5)
    run(engine)
    assert listener.num_cached_tokens == 128
    check_outputs(talker, listener)
    check_empty(engine)


@pytest.mark.parametrize("layers, chunk", [(None, 1000), (1, 1000), (2, 40)])
def test_two_who_race_for_one_prefix_compute_it_once(layers, chunk):
    engine, machine = make_engine(prefill_layers=layers, max_prefill_tokens=chunk)
    pair = [add(engine, prompt_of(200) + tail, 9) for tail in (prompt_of(30, 2), prompt_of(50, 3))]
    assert num_computed(machine, lambda: run(engine)) == 230 + 250 - 192
    assert [request.num_cached_tokens for request in pair] == [0, 192]
    check_outputs(*pair)
    check_empty(engine)


def test_identical_requests_at_once_agree():
    engine, machine = make_engine()
    crowd = [add(engine, prompt_of(100), 100) for _ in range(6)]
    assert num_computed(machine, lambda: run(engine)) == 100 + 5 * 36
    check_outputs(*crowd)
    assert engine.scheduler.pool.num_cached_blocks == 199 // BLOCK_SIZE, "six times written, known once"
    check_empty(engine)


@pytest.mark.parametrize("num_turns", range(14))
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=["owner", "waiter", "both"])
def test_abort_in_any_phase_while_another_waits(num_turns, victims):
    engine, _ = make_engine(prefill_layers=1, max_prefill_tokens=150, seed=num_turns)
    requests = [add(engine, prompt_of(200) + prompt_of(10, i), 20) for i in range(3)]
    for _ in range(num_turns):
        engine.step()
        check_pool(engine.scheduler.pool, engine.scheduler.requests.values())
    doomed = [requests[i] for i in victims]
    for request in doomed:
        engine.abort(request.request_id)
    run(engine)
    assert all(request.finish_reason == "abort" for request in doomed)
    check_outputs(*(request for request in requests if request not in doomed))
    check_empty(engine)


def test_owner_aborted_in_the_middle_of_its_layers():
    engine, machine = make_engine(prefill_layers=1, max_prefill_tokens=1000)
    owner, waiter = (add(engine, prompt_of(200) + prompt_of(10, i), 5) for i in range(2))
    engine.step()
    assert owner.state is RequestState.PREFILL and waiter.state is RequestState.WAITING
    engine.abort(owner.request_id)
    run(engine)
    assert waiter.num_cached_tokens == 0, "nothing of the owner's was complete"
    assert machine.num_prefill_tokens == 210
    check_outputs(waiter)
    check_empty(engine)


def test_those_behind_one_who_waits_pass_but_do_not_take_its_place():
    engine, _ = make_engine(max_prefill_tokens=1000)
    owner, waiter = (add(engine, prompt_of(400) + prompt_of(9, i), 5) for i in range(2))
    other = add(engine, prompt_of(10, 5), 5)
    run(engine)
    assert other.scheduled_s < waiter.scheduled_s, "it need not wait for a prefix it does not share"
    check_outputs(owner, waiter, other)


@pytest.mark.parametrize("scarce", [{"num_rows": 2}, {"num_blocks": 16}, {"num_rows": 8, "num_blocks": 24}], ids=str)
def test_those_behind_do_not_take_the_place_of_one_who_waits(scarce):
    """There is a row or room for the one who waits, and for nobody in addition."""
    engine, machine = make_engine(max_prefill_tokens=1000, num_layers=4, prefill_layers=1, **scarce)
    num_waiters = 2 if len(scarce) == 2 else 1
    owner, *waiters = (add(engine, prompt_of(400) + prompt_of(9, i), 5) for i in range(1 + num_waiters))
    crowd = [add(engine, prompt_of(60, 5 + i), 60, priority=1) for i in range(12)]
    engine.step()
    assert list(engine.scheduler.waiting) == [*waiters, *crowd]
    run(engine)
    order = [s.request_id for w in machine.launches if isinstance(w, PrefillWork) for s in w.slices]
    assert list(dict.fromkeys(order))[: 1 + num_waiters] == [r.request_id for r in (owner, *waiters)]
    assert all(waiter.num_cached_tokens == 384 for waiter in waiters)
    check_outputs(owner, *waiters, *crowd)
    check_empty(engine)


def test_an_abort_with_two_steps_in_flight_leaves_no_half_known_block():
    """The second of them feeds a token that nobody will ever have read, and it would fill the block."""
    engine, machine = make_engine()
    request = add(engine, prompt_of(100), 60)
    while request.num_tokens < 2 * BLOCK_SIZE - 1:
        engine.step()
    while (found := engine.scheduler.next_work(Lane.DECODE, 0.0)) is not None:
        engine.scheduler.on_launch(machine.launch(*found))
    assert request.num_launched_tokens == 2
    engine.abort(request.request_id)
    run(engine)
    assert engine.scheduler.pool.num_cached_blocks == 1
    check_empty(engine)


def test_salts_do_not_share():
    engine, machine = make_engine()
    salts = [None, "a", "b", "a"]
    requests = [add(engine, prompt_of(150), 4, cache_salt=salt) for salt in salts]
    assert num_computed(machine, lambda: run(engine)) == 3 * 150 + 22
    assert [request.num_cached_tokens for request in requests] == [0, 0, 0, 128]
    check_outputs(*requests)
    check_empty(engine)


def test_without_prefix_caching_everything_is_computed():
    engine, machine = make_engine(prefix_caching=False)
    requests = [add(engine, prompt_of(150), 4) for _ in range(3)]
    assert num_computed(machine, lambda: run(engine)) == 450
    assert engine.scheduler.pool.num_cached_blocks == 0
    check_outputs(*requests)
    check_empty(engine)


def test_cached_tokens_are_told_once():
    engine, _ = make_engine()
    add(engine, prompt_of(130), 3)
    run(engine)
    request = add(engine, prompt_of(130), 3)
    events = run(engine)
    assert [event.num_cached_tokens for event in events if event.request_id == request.request_id] == [128, 0, 0]
    stats = engine.stats()
    assert (stats["prefix_cache_queries_total"], stats["prefix_cache_hits_total"]) == (260, 128)


# ---- who goes first -------------------------------------------------------------------------------------------------


class ByLayers(Policy):
    """Prefill in pieces of one layer, in turns or beside decode steps, at a rate that is as predicted here.

    A wait of the machine takes 1 s, and about a piece and a step.
    """

    def __init__(self, partition, num_layers=4, chunk=100, layer_s=2.0):
        self.partition, self.chunk, self.rate = partition, chunk, chunk / (num_layers * layer_s)

    def choose(self, load, current=None):
        mode = Mode.EXCLUSIVE if self.partition.is_shared else Mode.SPLIT
        return Decision(mode, self.partition, self.chunk, 1, 1.0, self.rate, decode_s=1.0)


PLACES = pytest.mark.parametrize(
    "partition", [Partition(1, 1, is_shared=True), Partition(3, 1)], ids=["turns", "split"]
)


def suspended(engine):
    """A long prompt in the middle of its layers, and a short one that came and cannot wait for the rest of them."""
    long = add(engine, prompt_of(100, 1), 30, slo=SLO(ttft_ms=100e3))
    engine.step()
    short = add(engine, prompt_of(10, 2), 30, slo=SLO(ttft_ms=1e3))
    while short.state is RequestState.WAITING:
        engine.step()
    return long, short


@PLACES
def test_a_short_prompt_goes_first_between_two_layers_of_a_long_one(partition):
    engine, machine = make_engine(policy=ByLayers(partition))
    long, short = suspended(engine)
    assert len(engine.scheduler._open) == 2 and long.num_overtaken == 1
    late = add(engine, prompt_of(10, 3), 5, slo=SLO(ttft_ms=1e3))
    run(engine)
    batches = [work.batch_id for work in machine.launches if isinstance(work, PrefillWork)]
    began = batches.index(2)
    assert 1 <= batches[:began].count(1) <= 3, "the long one had begun ..."
    assert batches[began : began + 4] == [2] * 4 and batches[began + 4] == 1, "... and went on afterwards"
    assert short.first_token_s < long.first_token_s <= late.first_token_s, "and it was made to wait only once"
    check_outputs(long, short, late)
    check_empty(engine)


@PLACES
@pytest.mark.parametrize("doomed", ["long", "short", "both"])
@pytest.mark.parametrize("num_turns", range(4))
def test_abort_while_one_is_suspended(partition, doomed, num_turns):
    engine, _ = make_engine(policy=ByLayers(partition), seed=num_turns)
    long, short = suspended(engine)
    other = add(engine, prompt_of(90, 5), 20)
    for _ in range(num_turns):
        engine.step()
    for request in {"long": [long], "short": [short], "both": [long, short]}[doomed]:
        engine.abort(request.request_id)
    run(engine)
    check_outputs(other, *(r for r in (long, short) if r.finish_reason != "abort"))
    check_empty(engine)


@PLACES
def test_blocks_run_out_while_one_is_suspended(partition):
    engine, _ = make_engine(num_blocks=5, policy=ByLayers(partition))
    talkers = [add(engine, prompt_of(40, 7 + i), 90) for i in range(2)]
    while not all(len(talker.output_token_ids) > 20 for talker in talkers):
        engine.step()
    long, short = suspended(engine)
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    check_outputs(long, short, *talkers)
    check_empty(engine)


@PLACES
def test_nobody_is_suspended_who_would_lose_by_it(partition):
    engine, machine = make_engine(policy=ByLayers(partition))
    long = add(engine, prompt_of(100, 1), 3, slo=SLO(ttft_ms=3.05e3))
    engine.step()
    short = add(engine, prompt_of(10, 2), 3, slo=SLO(ttft_ms=1e3))
    run(engine)
    assert not short.has_overtaken
    batches = [work.batch_id for work in machine.launches if isinstance(work, PrefillWork)]
    assert batches == sorted(batches)
    check_outputs(long, short)


def test_a_short_prompt_goes_first_between_two_chunks_of_a_long_one():
    engine, machine = make_engine(policy=ByLayers(Partition(1, 1, is_shared=True), chunk=30, layer_s=0.5))
    long = add(engine, prompt_of(400, 1), 3, slo=SLO(ttft_ms=200e3))
    engine.step()
    short = add(engine, prompt_of(10, 2), 3, slo=SLO(ttft_ms=8e3))
    run(engine)
    order = [s.request_id for w in machine.launches if isinstance(w, PrefillWork) and w.is_last for s in w.slices]
    assert order.index(short.request_id) < 4 and order[-1] == long.request_id
    check_outputs(long, short)
    check_empty(engine)


def test_the_queue_is_in_order_of_urgency_whatever_the_policy():
    engine, _ = make_engine(num_rows=1)
    ttfts = [50e3, 20e3, 90e3, 30e3]
    requests = [add(engine, prompt_of(5, i), 2, slo=SLO(ttft_ms=ttft)) for i, ttft in enumerate(ttfts)]
    requests.append(add(engine, prompt_of(5, 9), 2, slo=SLO(ttft_ms=90e3), priority=-1))
    run(engine)
    firsts = sorted(requests, key=lambda request: request.first_token_s)
    assert [requests.index(request) for request in firsts] == [4, 1, 3, 0, 2]


# ---- merging and taking turns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Mode.FUSED, Mode.EXCLUSIVE])
def test_a_prompt_joins_the_very_next_step_on_the_whole_chip(mode):
    whole = Partition(1, 1, is_shared=True)
    engine, machine = make_engine(policy=Asked(choose=lambda load, _: Decision(mode, whole, 64, 4)))
    talker = add(engine, prompt_of(20, 1), 40)
    while len(talker.output_token_ids) < 5:
        engine.step()
    prompt = add(engine, prompt_of(30, 2), 5)
    run(engine)
    ids = [work.sampled_ids for work in machine.launches]
    joined = next(i for i, work in enumerate(machine.launches) if prompt.request_id in ids[i])
    assert set(ids[joined + 1]) == {talker.request_id, prompt.request_id}
    check_outputs(talker, prompt)


def test_beside_decode_a_prompt_joins_when_it_has_been_seen():
    engine, machine = make_engine(policy=ByLayers(Partition(3, 1)))
    talker, prompt = add(engine, prompt_of(20, 1), 40), None
    while engine.has_work:
        in_flight = {i for ticket in machine.in_flight for i in getattr(ticket.work, "sampled_ids", ())}
        if prompt is not None and prompt.state is RequestState.PREFILL and prompt.request_id in in_flight:
            steps = [t.work for t in machine.in_flight if isinstance(t.work, DecodeWork)]
            assert all(prompt.request_id not in step.request_ids for step in steps)
        engine.step()
        if prompt is None and len(talker.output_token_ids) > 5:
            prompt = add(engine, prompt_of(30, 2), 9)
    check_outputs(talker, prompt)


def test_on_the_whole_chip_a_step_follows_every_piece_while_somebody_decodes():
    engine, machine = make_engine(policy=ByLayers(Partition(1, 1, is_shared=True)))
    talker = add(engine, prompt_of(20, 1), 60)
    while len(talker.output_token_ids) < 5:
        engine.step()
    machine.launches.clear()
    add(engine, prompt_of(300, 2), 1)
    while talker.request_id in engine.scheduler.requests:
        engine.step()
    kinds = "".join("P" if isinstance(work, PrefillWork) else "D" for work in machine.launches)
    assert "PP" not in kinds.rstrip("P") and kinds.count("P") >= 12


def test_prefill_first_launches_no_step_while_there_is_prefill_to_launch():
    policy = PrefillFirst(Partition(1, 1, is_shared=True), 64, 4)
    engine, machine = make_engine(policy=policy)
    talker = add(engine, prompt_of(20, 1), 60)
    while len(talker.output_token_ids) < 5:
        engine.step()
    machine.launches.clear()
    prompts = [add(engine, prompt_of(200, 2 + i), 5) for i in range(3)]
    run(engine)
    kinds = "".join("P" if isinstance(work, PrefillWork) else "D" for work in machine.launches)
    assert kinds.lstrip("D").startswith("P" * 10 + "D"), "600 tokens in chunks of 64, then steps"
    check_outputs(talker, *prompts)


def test_a_fused_step_holds_what_executors_have_graphs_for():
    whole = Partition(1, 1, is_shared=True)
    options = {"num_blocks": 400, "num_rows": 64, "max_prefill_tokens": 8192, "max_model_len": 4096}
    engine, machine = make_engine(policy=Chunked(whole, 10_000, 8192, 4), **options)
    talker = add(engine, prompt_of(20, 1), 60)
    while len(talker.output_token_ids) < 5:
        engine.step()
    crowd = [add(engine, prompt_of(3, i), 2) for i in range(20)] + [add(engine, prompt_of(3000, 30), 2)]
    run(engine)
    fused = [work.prefill for work in machine.launches if isinstance(work, FusedWork)]
    assert max(len(work.slices) for work in fused) == MAX_FUSED_SLICES
    assert max(work.num_tokens for work in fused) == MAX_FUSED_TOKENS
    check_outputs(talker, *crowd)


def test_a_policy_is_asked_at_most_once_for_each_launch():
    asked = []
    whole = Partition(1, 1, is_shared=True)
    policy = Turns(whole, 100, 2)
    engine, machine = make_engine(num_rows=8)
    engine.scheduler.policy = Asked(choose=lambda load, now: asked.append(load) or policy.choose(load))
    for i in range(8):
        add(engine, prompt_of(100, i), 30)
    run(engine)
    assert len(asked) <= 1.5 * len(machine.launches)


# ---- pressure -------------------------------------------------------------------------------------------------------


def test_cached_blocks_go_before_anybody_is_preempted():
    engine, _ = make_engine(num_blocks=8)
    for i in range(4):
        add(engine, prompt_of(130, i), 10)
        run(engine)
    assert engine.scheduler.pool.num_free_blocks < 3
    requests = [add(engine, prompt_of(150, 10 + i), 70) for i in range(2)]
    while engine.has_work:
        engine.step()
        assert not engine.scheduler._is_draining, "a cached block is as good as a free one: nobody need wait"
    assert engine.scheduler.num_preemptions == 0
    check_outputs(*requests)
    check_empty(engine)


def test_the_preempted_find_their_own_prefix_again():
    engine, machine = make_engine(num_blocks=9, max_prefill_tokens=1000)
    requests = [add(engine, prompt_of(100, i), 150) for i in range(3)]
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    again = [s.start for w in machine.launches if isinstance(w, PrefillWork) for s in w.slices if s.start > 0]
    assert again and all(start >= BLOCK_SIZE for start in again)
    assert all(request.num_cached_tokens == 0 for request in requests), "one's own work is no hit"
    check_outputs(*requests)
    check_empty(engine)


def test_the_cheapest_to_bring_back_is_preempted():
    engine, _ = make_engine(num_blocks=14, max_prefill_tokens=1000)
    oldest, long, short, longest = (add(engine, prompt_of(n, n), 150) for n in (180, 190, 20, 250))
    while engine.scheduler.num_preemptions == 0:
        engine.step()
    assert [r.num_preemptions for r in (oldest, long, short, longest)] == [0, 0, 1, 0]
    run(engine)
    check_outputs(oldest, long, short, longest)
    check_empty(engine)


def test_the_oldest_is_never_preempted():
    engine, _ = make_engine(num_blocks=8, max_prefill_tokens=1000)
    oldest, *others = (add(engine, prompt_of(n, n), 150) for n in (20, 50, 60))
    run(engine)
    assert oldest.num_preemptions == 0, "though it would cost least"
    assert engine.scheduler.num_preemptions > 0
    check_outputs(oldest, *others)
    check_empty(engine)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_of_twice_the_longest_request_serves_200(prefix_caching):
    longest = blocks_for(90 + 160)
    engine, _ = make_engine(2 * longest, 16, 2, max_prefill_tokens=128, seed=1, prefix_caching=prefix_caching)
    sizes = [(1 + (i * 37) % 90, 61 + (i * 53) % 100) for i in range(200)]
    requests = [add(engine, prompt_of(n, i % 7), out) for i, (n, out) in enumerate(sizes)]
    with pytest.raises(ValueError, match=rf"{2 * longest + 1} KV blocks.*cache has {2 * longest}"):
        add(engine, prompt_of(100), 2 * longest * BLOCK_SIZE - 99)
    run(engine)
    assert engine.scheduler.num_preemptions > 0
    check_outputs(*requests)
    check_empty(engine)


def test_pressure_does_not_thrash():
    """Admission leaves a block for everybody, so a preemption buys many steps."""
    engine, machine = make_engine(num_blocks=16, num_rows=16, max_prefill_tokens=1000)
    requests = [add(engine, prompt_of(100, i), 150) for i in range(12)]
    computed = num_computed(machine, lambda: run(engine))
    assert 0 < engine.scheduler.num_preemptions <= 2, "6 if admission left nothing"
    assert computed <= 1.2 * 100 * len(requests)
    check_outputs(*requests)
    check_empty(engine)


def test_a_leak_would_show():
    engine, _ = make_engine()
    request = add(engine, prompt_of(100), 3)
    run(engine)
    engine.scheduler.pool.allocate(request, 2)
    assert engine.stats()["kv_blocks_leaked"] == 2


class EngineMachine(RuleBasedStateMachine):
    """Add, step, abort, preempt and evict in any order, over prompts that share prefixes and continue each other.

    Memory, rows and outputs must stay consistent throughout, and every request must end exactly once.
    """

    @initialize(
        num_blocks=st.integers(4, 12),
        num_rows=st.integers(1, 4),
        chunk=st.sampled_from([7, 64, 200]),
        layers=st.sampled_from([1, 2, None]),
        seed=st.integers(0, 1000),
        has_any_policy=st.booleans(),
    )
    def start(self, num_blocks, num_rows, chunk, layers, seed, has_any_policy):
        options = {"policy": AnyPolicy(3, seed)} if has_any_policy else {"prefill_layers": layers}
        self.engine, self.machine = make_engine(
            num_blocks, num_rows, 3, max_model_len=200, max_prefill_tokens=chunk, seed=seed, **options
        )
        self.requests, self.ends = [], []

    def add_prompt(self, prompt, max_tokens, salt, slo=None, priority=0):
        try:
            request = add(self.engine, prompt, max_tokens, cache_salt=salt, slo=slo, priority=priority)
            self.requests.append((request, prompt, max_tokens))
        except ValueError:
            assert blocks_for(min(len(prompt) + max_tokens, 200)) > self.engine.scheduler.pool.num_blocks

    @rule(
        family=st.integers(0, 2),
        num_shared=st.sampled_from([0, 63, 64, 65, 128, 130]),
        num_own=st.integers(0, 60),
        max_tokens=st.integers(1, 120),
        salt=st.sampled_from([None, None, "tenant"]),
        ttft_ms=st.sampled_from([2e3, 10e3, 60e3]),
        priority=st.sampled_from([0, 0, 1]),
    )
    def add_request(self, family, num_shared, num_own, max_tokens, salt, ttft_ms, priority):
        prompt = prompt_of(num_shared, family) + prompt_of(num_own, len(self.requests))
        self.add_prompt(prompt or [1], max_tokens, salt, SLO(ttft_ms=ttft_ms, tbt_ms=3e3), priority)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_new=st.integers(0, 20), max_tokens=st.integers(1, 60))
    def next_turn(self, data, num_new, max_tokens):
        request, *_ = data.draw(st.sampled_from(self.requests))
        self.add_prompt((request.token_ids + prompt_of(num_new, 5))[:190], max_tokens, request.cache_salt)

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.take(self.engine.step())

    def take(self, events):
        self.ends += [event.request_id for event in events if event.finish_reason is not None]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def preempt(self, data):
        scheduler = self.engine.scheduler
        while scheduler._is_busy():
            self.take(self.engine.step())
            scheduler._is_draining = True
        scheduler._is_draining = False
        if holders := scheduler.prefilling + scheduler.running:
            scheduler._preempt(data.draw(st.sampled_from(holders)))

    @rule(num_blocks=st.integers(1, 5))
    def evict(self, num_blocks):
        for _ in range(min(num_blocks, self.engine.scheduler.pool.num_cached_blocks)):
            self.engine.scheduler.pool._evict()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request, *_ = data.draw(st.sampled_from(self.requests))
        self.engine.abort(request.request_id)

    @invariant()
    def everything_is_accounted_for(self):
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        check_pool(scheduler.pool, scheduler.requests.values())
        assert scheduler.num_leaked_blocks == 0
        rows = [request.row for request in scheduler.requests.values() if request.row is not None]
        assert len(rows) == len(set(rows))

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.take(run(self.engine))
        check_empty(self.engine)
        aborted = [r.request_id for r, *_ in self.requests if r.finish_reason == "abort"]
        assert sorted(self.ends + aborted) == sorted(r.request_id for r, *_ in self.requests), "each ends once"
        for request, prompt, max_tokens in self.requests:
            num_tokens = min(max_tokens, 200 - len(prompt))
            expected = expected_output(prompt, num_tokens)
            if request.finish_reason == "abort":
                assert request.output_token_ids == expected[: len(request.output_token_ids)]
            else:
                assert request.output_token_ids == expected


def test_two_prompts_pass_a_chunk_that_is_under_way():
    """One after the other: the state set of the first is free for the second. Found by the machine above."""
    state = EngineMachine()
    state.start(num_blocks=6, num_rows=3, chunk=64, layers=1, seed=184, has_any_policy=True)
    state.add_prompt(prompt_of(128, 0), 1, None)
    state.add_prompt(prompt_of(128, 0), 14, None)
    state.engine.abort(state.requests[0][0].request_id)
    state.step(num_steps=15)
    state.engine.abort(state.requests[1][0].request_id)
    for prompt in (prompt_of(128, 0), [1], [1]):
        state.add_prompt(prompt, 1, None)
    state.evict(num_blocks=2)
    state.step(num_steps=5)
    state.teardown()


EngineMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, derandomize=True, deadline=None)
TestEngineMachine = EngineMachine.TestCase


@pytest.mark.slow
class TestEngineMachineAtLength(EngineMachine.TestCase):
    """10,000 operations."""

    settings = settings(max_examples=250, stateful_step_count=40, derandomize=True, deadline=None)
