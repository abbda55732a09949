"""The queue: most urgent first, promises that are lost behind those that can be kept, and nobody starves."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodrift.config import SLO
from nanodrift.request import Request, SamplingParams
from nanodrift.waiting import AGEING, MARGIN, MAX_OVERTAKEN, PATIENCE, SOON, Waiting, may_overtake, plan


def request(name="r", arrival_s=0.0, ttft_ms=2000.0, priority=0, num_prompt=10):
    made = Request(name, [0] * num_prompt, SamplingParams(), arrival_s=arrival_s, slo=SLO(ttft_ms=ttft_ms))
    made.priority = priority
    return made


def queue(*requests):
    waiting = Waiting()
    for one in requests:
        waiting.add(one)
    return waiting


def names(waiting, now_s, token_s=0.0):
    return [one.request_id for one in waiting.in_turn(now_s, token_s)]


def test_the_shortest_go_first_where_all_can_be_kept():
    requests = request("long", num_prompt=300), request("short", num_prompt=50), request("middle", num_prompt=100)
    assert names(queue(*requests), 0.0, 1e-3) == ["short", "middle", "long"]
    assert names(queue(*requests), 0.0) == ["long", "short", "middle"], "in order of arrival while the pace is unknown"


def test_a_long_one_goes_first_where_it_could_not_wait():
    waiting = queue(request("tight", ttft_ms=900, num_prompt=400), *(request(f"short {i}") for i in range(3)))
    assert names(waiting, 0.0, 1e-3)[0] == "tight", "it is to end within half of its TTFT"
    hasty = queue(request("plain", num_prompt=20), request("hasty", ttft_ms=60, num_prompt=50))
    assert names(hasty, 0.0, 1e-3) == ["hasty", "plain"]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(50, 3000)), max_size=8))
def test_as_many_are_kept_as_by_any_order_and_the_kept_stay_kept(sizes):
    """Of the orders by due time without some of the requests, none keeps more with the margin that the plan leaves."""
    requests = [request(str(i), ttft_ms=ttft, num_prompt=n) for i, (n, ttft) in enumerate(sizes)]

    def num_kept(order):
        end_s, kept = 0.0, 0
        for one in order:
            end_s += MARGIN * one.num_tokens * 1e-3
            kept += end_s <= one.due_s + (MARGIN - 1) * one.num_tokens * 1e-3
        return kept

    planned = plan(requests, 0.0, 1e-3)
    assert sorted(planned, key=id) == sorted(requests, key=id)
    by_due = sorted(requests, key=lambda one: one.due_s)
    sets = ([one for i, one in enumerate(by_due) if chosen >> i & 1] for chosen in range(2 ** len(by_due)))
    most = max((len(some) for some in sets if num_kept(some) == len(some)), default=0)
    assert num_kept(planned) >= most - 1, "the margin is not counted alike for all, so that one may differ"


def test_equals_keep_their_order():
    assert names(queue(*(request(str(i)) for i in range(5))), 0.0) == list("01234")


def test_priority_leads_and_the_preempted_lead_everybody():
    victim = request("victim", arrival_s=9.0, priority=5)
    victim.num_preemptions = 1
    waiting = queue(request("low", priority=1), request("high", arrival_s=3.0, priority=-1), request("plain"), victim)
    assert names(waiting, 0.0) == ["victim", "high", "plain", "low"]


def test_lost_promises_stand_behind_those_that_can_be_kept():
    requests = [*(request(f"lost {i}", arrival_s=float(i)) for i in range(2)), request("new", arrival_s=3.9)]
    assert names(queue(*requests), 3.95) == ["new", "lost 0", "lost 1"]
    assert names(queue(*requests), 1.9) == ["lost 0", "lost 1", "new"], "not lost yet"


@settings(derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), num_before=st.integers(0, 12))
def test_nobody_starves(seed, num_before):
    """Under a stream of requests that all can be kept, one whose promise is lost is admitted in its turn."""
    random, now_s = Random(seed), 10.0
    waiting = queue(
        *(request(f"old {i}", arrival_s=i * 1e-3) for i in range(num_before)), request("one", arrival_s=0.1)
    )
    for admitted in range(AGEING * (num_before + 1) + 1):
        waiting.add(request(f"new {admitted}", arrival_s=now_s, priority=random.randint(-1, 0)))
        first = next(waiting.in_turn(now_s, random.random() * 1e-2))
        waiting.take(first)
        if first.request_id == "one":
            return
        now_s += 0.01
    raise AssertionError("it starves")


def test_ageing_waits_for_patience_and_comes_every_few_admissions():
    old, now_s = request("old"), PATIENCE * 2.0 - 0.01
    waiting = queue(old, *(request(f"new {i}", arrival_s=now_s + i * 1e-3) for i in range(9)))

    def admit(at_s):
        first = next(waiting.in_turn(at_s, 0.0))
        waiting.take(first)
        return first.request_id

    first_round = [admit(now_s) for _ in range(AGEING)]
    assert "old" not in first_round, "it has not waited long enough"
    assert [admit(now_s + 0.02) for _ in range(AGEING)][-1] == "old"


def victim(left=1000, due_s=10.0, num_slices=1):
    made = request("victim", ttft_ms=1e3 * due_s, num_prompt=left)
    made.num_slices = num_slices
    return made


def try_to_pass(short, *victims, num_ahead=1000.0, is_chunk_open=True):
    """A millisecond a token."""
    return may_overtake(short, list(victims), num_ahead, 1e-3, 0.0, is_chunk_open=is_chunk_open)


def short(ttft_ms):
    return request("short", ttft_ms=ttft_ms, num_prompt=100)


def test_in_the_middle_of_a_chunk_a_prompt_passes_once_and_only_where_it_must():
    long, urgent = victim(), short(ttft_ms=500)
    assert try_to_pass(urgent, long)
    long.num_overtaken = 1
    assert not try_to_pass(urgent, long), "it is not overtaken again"
    urgent.has_overtaken = True
    assert not try_to_pass(short(ttft_ms=500), urgent), "who has overtaken is not overtaken"


@pytest.mark.parametrize(
    "hurried, long, why",
    [
        (short(ttft_ms=1500), victim(), "it keeps its promise behind them"),
        (short(ttft_ms=50), victim(), "its promise is lost anyhow"),
        (short(ttft_ms=500), victim(due_s=1.05), "the other would lose its own: 1.0 s of work, 0.1 s to wait"),
    ],
)
def test_nobody_passes_without_need_or_at_anothers_cost(hurried, long, why):
    assert not try_to_pass(hurried, long), why


def test_between_two_chunks_the_shorter_passes_while_the_other_ends_soon():
    soon_s = MARGIN * (1.0 + 0.1)
    assert try_to_pass(short(ttft_ms=9000), victim(due_s=1.01 * soon_s / SOON), is_chunk_open=False)
    assert not try_to_pass(short(ttft_ms=9000), victim(due_s=0.99 * soon_s / SOON), is_chunk_open=False)
    assert not try_to_pass(short(ttft_ms=9000), victim(), num_ahead=90, is_chunk_open=False), "it is the longer one"
    often = victim(num_slices=2)
    often.num_overtaken = 2 * MAX_OVERTAKEN
    assert not try_to_pass(short(ttft_ms=9000), often, is_chunk_open=False), "not more often than it gets chunks"


def test_a_lost_promise_lets_others_pass_but_keeps_a_share():
    long, passed = victim(due_s=0.5, num_slices=2), 0  # a second of work: cannot be kept
    while try_to_pass(short(ttft_ms=500), long):
        passed, long.num_overtaken = passed + 1, long.num_overtaken + 1
    assert passed == 2 * MAX_OVERTAKEN


def test_who_recomputes_is_not_overtaken():
    long = victim()
    long.output_token_ids.append(1)
    assert not try_to_pass(short(ttft_ms=500), long)
