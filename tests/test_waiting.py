"""The queue: most urgent first, promises that are lost behind those that can be kept, and nobody starves."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodrift.config import SLO
from nanodrift.request import Request, SamplingParams
from nanodrift.waiting import AGEING, MAX_OVERTAKEN, PATIENCE, Waiting, overtake


def request(name="r", arrival_s=0.0, ttft_ms=2000.0, priority=0, num_prompt=10):
    made = Request(name, [0] * num_prompt, SamplingParams(), arrival_s=arrival_s, slo=SLO(ttft_ms=ttft_ms))
    made.priority = priority
    return made


def queue(*requests, prefill_s=0.0):
    waiting = Waiting()
    for one in requests:
        waiting.add(one, prefill_s)
    return waiting


def names(waiting, now_s):
    return [one.request_id for one in waiting.in_turn(now_s)]


def test_who_must_begin_soonest_goes_first():
    waiting = Waiting()
    waiting.add(request("plain"), 0.1)
    waiting.add(request("long"), 1.5)  # of the same promise, but its prefill takes longer
    waiting.add(request("tight", arrival_s=0.5, ttft_ms=300), 0.1)
    assert names(waiting, 0.5) == ["long", "tight", "plain"]
    assert len(waiting) == 3


def test_equals_keep_their_order():
    assert names(queue(*(request(str(i)) for i in range(5))), 0.0) == list("01234")


def test_priority_leads_and_the_preempted_lead_everybody():
    victim = request("victim", arrival_s=9.0, priority=5)
    victim.num_preemptions = 1
    waiting = queue(request("low", priority=1), request("high", arrival_s=3.0, priority=-1), request("plain"), victim)
    assert names(waiting, 0.0) == ["victim", "high", "plain", "low"]


def test_lost_promises_stand_behind_those_that_can_be_kept():
    waiting = queue(*(request(f"lost {i}", arrival_s=float(i)) for i in range(2)), request("new", arrival_s=3.9))
    assert names(waiting, 3.95) == ["new", "lost 0", "lost 1"]
    assert names(waiting, 1.9) == ["lost 0", "lost 1", "new"], "not lost yet"


@settings(derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), num_before=st.integers(0, 12))
def test_nobody_starves(seed, num_before):
    """Under a stream of requests that all can be kept, one whose promise is lost is admitted in its turn."""
    random, now_s = Random(seed), 10.0
    waiting = queue(
        *(request(f"old {i}", arrival_s=i * 1e-3) for i in range(num_before)), request("one", arrival_s=0.1)
    )
    for admitted in range(AGEING * (num_before + 1) + 1):
        waiting.add(request(f"new {admitted}", arrival_s=now_s, priority=random.randint(-1, 0)), random.random())
        first = next(waiting.in_turn(now_s))
        waiting.take(first)
        if first.request_id == "one":
            return
        now_s += 0.01
    raise AssertionError("it starves")


def test_ageing_waits_for_patience_and_comes_every_few_admissions():
    old, now_s = request("old"), PATIENCE * 2.0 - 0.01
    waiting = queue(old, *(request(f"new {i}", arrival_s=now_s + i * 1e-3) for i in range(9)))

    def admit(at_s):
        first = next(waiting.in_turn(at_s))
        waiting.take(first)
        return first.request_id

    first_round = [admit(now_s) for _ in range(AGEING)]
    assert "old" not in first_round, "it has not waited long enough"
    assert [admit(now_s + 0.02) for _ in range(AGEING)][-1] == "old"


def victim(left=1000, due_s=10.0, num_slices=1):
    made = request("victim", ttft_ms=1e3 * due_s, num_prompt=left)
    made.num_slices = num_slices
    return made


def try_to_pass(short, *victims, now_s=0.0, num_ahead=1000.0):
    short.start_by_s = short.due_s - 0.1
    return overtake(short, 100, list(victims), num_ahead, token_s=1e-3, now_s=now_s)  # 100 tokens take 0.1 s


def test_a_short_prompt_passes_once_where_nobody_loses():
    long, short = victim(), request("short", ttft_ms=500)
    assert try_to_pass(short, long)
    assert short.has_overtaken and long.num_overtaken == 1
    assert not try_to_pass(request("other", ttft_ms=500), long), "it is not overtaken again"
    assert not try_to_pass(request("third", ttft_ms=500), short), "who has overtaken is not overtaken"


@pytest.mark.parametrize(
    "short, long, why",
    [
        (request(ttft_ms=1500), victim(), "it keeps its promise behind them"),
        (request(ttft_ms=50), victim(), "its promise is lost anyhow"),
        (request(ttft_ms=500), victim(due_s=1.05), "the other would lose its own: 1.0 s of work, 0.1 s to wait"),
    ],
)
def test_nobody_passes_without_need_or_at_anothers_cost(short, long, why):
    assert not try_to_pass(short, long), why
    assert not short.has_overtaken and long.num_overtaken == 0


def test_a_lost_promise_lets_others_pass_but_keeps_a_share():
    long = victim(due_s=0.5, num_slices=2)  # a second of work: cannot be kept
    passed = [try_to_pass(request(ttft_ms=500), long) for _ in range(10)]
    assert passed.count(True) == 2 * MAX_OVERTAKEN


def test_who_recomputes_is_not_overtaken():
    long = victim()
    long.output_token_ids.append(1)
    assert not try_to_pass(request(ttft_ms=500), long)
