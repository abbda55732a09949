"""The latency definitions: worked examples by hand, and properties that any definition of the word must have."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodrift.bench.summary import summarize
from nanodrift.config import SLO
from nanodrift.metrics import RequestTimes, attainment, goodput, percentile
from nanodrift.request import Request, RequestState, SamplingParams

property_test = settings(derandomize=True, max_examples=100, deadline=None)
values = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=60)
percents = st.integers(1, 1000).map(lambda n: n / 10)


def at(*token_s, arrival_s=0.0, ttft_ms=100.0, tbt_ms=20.0, **more):
    return RequestTimes(arrival_s, token_s, SLO(ttft_ms, tbt_ms), **more)


def steady(num_gaps, gap_s, slow_gaps=(), first_s=0.05, **more):
    """A request whose gaps are gap_s, except for the given slow ones at the start."""
    times = [first_s]
    for index in range(num_gaps):
        times.append(times[-1] + (slow_gaps[index] if index < len(slow_gaps) else gap_s))
    return at(*times, **more)


@pytest.mark.parametrize(
    "count, percent, rank",
    [(1, 99, 1), (2, 50, 1), (3, 50, 2), (99, 99, 99), (100, 99, 99), (101, 99, 100), (1000, 99.9, 999), (5, 100, 5)],
)
def test_nearest_rank(count, percent, rank):
    assert percentile(range(1, count + 1), percent) == rank


@property_test
@given(values, percents)
def test_percentile_is_the_smallest_value_that_covers_the_share(xs, percent):
    p = percentile(xs, percent)
    assert p in xs
    assert sum(x <= p for x in xs) * 100 >= percent * len(xs) - 1e-6
    assert sum(x < p for x in xs) * 100 < percent * len(xs)


@property_test
@given(values, percents, percents)
def test_percentile_grows_with_the_percent(xs, a, b):
    assert percentile(xs, min(a, b)) <= percentile(xs, max(a, b)) <= percentile(xs, 100) == max(xs)


@pytest.mark.parametrize("bad", [0, -1, 100.5])
def test_percentile_refuses_what_it_cannot_rank(bad):
    with pytest.raises(ValueError, match="percent"):
        percentile([1.0], bad)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_one_request_by_hand():
    r = at(1.05, 1.06, 1.09, arrival_s=1.0)
    assert r.ttft_s == pytest.approx(0.05)
    assert r.tbt_s == pytest.approx([0.01, 0.03])
    assert r.tpot_s == pytest.approx(0.02)
    assert r.end_to_end_s == pytest.approx(0.09)
    assert not r.is_good() and r.meets_ttft  # under 100 gaps the largest one counts: 30 ms > 20 ms


def test_waiting_in_the_queue_counts_in_ttft():
    assert at(1.05, arrival_s=1.0).is_good()
    assert not at(1.05, arrival_s=0.9).is_good()


@pytest.mark.parametrize(
    "num_gaps, num_slow, good",
    [(99, 0, True), (99, 1, False), (100, 1, True), (100, 2, False), (199, 1, True), (199, 2, False), (200, 2, True)],
)
def test_a_good_request_may_miss_one_gap_in_a_hundred(num_gaps, num_slow, good):
    r = steady(num_gaps, 0.010, [0.5] * num_slow)
    assert r.is_good() is good
    assert r.is_good(strict=True) is (num_slow == 0)


def test_a_request_that_did_not_complete_is_bad_whatever_its_times():
    assert at(0.05, 0.06).is_good()
    assert not at(0.05, 0.06, is_completed=False).is_good()
    assert not at().is_good()  # completed, yet no token: nothing was served


def test_no_gap_keeps_the_tbt_promise_but_has_no_tpot():
    r = at(0.05)
    assert r.is_good(strict=True) and r.tpot_s is None and r.tbt_s == []


@property_test
@given(st.lists(st.floats(0.001, 1.0), max_size=150), st.floats(1, 2000), st.floats(1, 2000))
def test_strict_is_stricter_and_looser_slos_never_hurt(gaps, ttft_ms, tbt_ms):
    r = steady(len(gaps), 0, gaps, ttft_ms=ttft_ms, tbt_ms=tbt_ms)
    assert r.is_good() >= r.is_good(strict=True)
    looser = RequestTimes(r.arrival_s, r.token_s, SLO(ttft_ms * 2, tbt_ms * 2))
    assert looser.is_good() >= r.is_good()


@property_test
@given(st.floats(-1e3, 1e3), st.lists(st.floats(0.001, 0.1), min_size=1, max_size=50))
def test_tpot_is_the_mean_gap_and_the_clock_origin_does_not_matter(origin_s, gaps):
    r = steady(len(gaps), 0, gaps)
    moved = RequestTimes(origin_s, [t + origin_s for t in r.token_s], r.slo)
    assert r.tpot_s == pytest.approx(sum(r.tbt_s) / len(gaps))
    assert moved.tpot_s == pytest.approx(r.tpot_s, abs=1e-9)
    assert moved.ttft_s == pytest.approx(r.ttft_s, abs=1e-9)
    assert r.end_to_end_s == pytest.approx(r.ttft_s + sum(gaps))


def test_attainment_counts_every_issued_request():
    requests = [at(0.05, 0.06), at(0.5, 0.51), at(0.05, 0.09), at(is_completed=False)]
    assert attainment(requests) == 0.25
    assert attainment([]) == 0.0


def test_goodput_is_the_highest_rate_that_reaches_the_target():
    points = [(1, 1.0), (2, 0.995), (4, 0.95), (8, 0.4)]
    assert goodput(points, 0.99) == 2
    assert goodput(points, 0.90) == 4
    assert goodput([(1, 0.5)], 0.9) == 0.0


@property_test
@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0, 1)), max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_harder_target_never_raises_goodput(points, a, b):
    assert goodput(points, max(a, b)) <= goodput(points, min(a, b))


def test_summary_by_hand():
    requests = [
        at(0.05, 0.06, 0.07, num_prompt_tokens=10),
        at(0.05, 0.06, 0.10, num_prompt_tokens=20),
        at(0.05, is_completed=False, num_prompt_tokens=40),
    ]
    s = summarize(requests, duration_s=2.0)
    assert (s["completed"], s["failed"]) == (2, 1)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (30, 6)
    assert (s["request_throughput"], s["output_throughput"], s["total_token_throughput"]) == (1.0, 3.0, 18.0)
    assert s["request_goodput"] == 0.5 and s["slo_attainment"] == pytest.approx(1 / 3)
    assert s["median_ttft_ms"] == pytest.approx(50) and s["std_ttft_ms"] == pytest.approx(0)
    assert s["p99_tbt_ms"] == s["p99_itl_ms"] == pytest.approx(40)
    assert s["mean_tpot_ms"] == pytest.approx((10 + 25) / 2)
    assert s["p99_max_tbt_ms"] == pytest.approx(40)
    assert s["tokens_within_tbt_frac"] == pytest.approx(3 / 4)
    json.dumps(s, allow_nan=False)


def test_summary_of_nothing_is_still_valid_json():
    s = summarize([], duration_s=1.0)
    assert s["completed"] == 0 and s["median_ttft_ms"] is None and s["tokens_within_tbt_frac"] is None
    json.dumps(s, allow_nan=False)
    with pytest.raises(ValueError, match="duration"):
        summarize([], duration_s=0.0)


def test_times_of_an_engine_request():
    request = Request("a", [1, 2, 3], SamplingParams(), arrival_s=1.0, slo=SLO(100, 20))
    request.token_s = [1.05, 1.06]
    assert not RequestTimes.of(request).is_completed  # still running
    request.state, request.finish_reason = RequestState.FINISHED, "length"
    times = RequestTimes.of(request)
    assert times.is_good() and times.num_prompt_tokens == 3
    request.finish_reason = "abort"
    assert not RequestTimes.of(request).is_good()
