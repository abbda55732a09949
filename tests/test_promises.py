"""What policies promise, kept by the real scheduler on the simulated machine; and the same calls, the same launches."""

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from nanodrift.bench import simulate, workloads
from nanodrift.bench.load import run_workload
from nanodrift.bench.policies import parse
from nanodrift.bench.replay import Recorder, differences
from nanodrift.config import SLO
from nanodrift.cost import DecodeLoad
from nanodrift.decision import Load
from nanodrift.request import SamplingParams

GOLDEN = Path(__file__).parent / "data" / "recorded_run.json"


def engine_of(policy, slo):
    return simulate.machine().engine(parse(policy), slo)


def gaps_ms(token_s):
    return [1e3 * (b - a) for a, b in pairwise(token_s)]


@pytest.mark.parametrize("tbt_ms, rate", [(10, 3), (20, 6), (50, 6)])
def test_no_gap_of_a_conversation_is_late_the_first_ones_least(tbt_ms, rate):
    slo = SLO(ttft_ms=5000, tbt_ms=tbt_ms)
    records = run_workload(engine_of("mux", slo), workloads.named("sharegpt", 40, 0), rate, 0, slo=slo)
    assert max(gap for record in records for gap in gaps_ms(record.token_s)) <= tbt_ms
    assert sum(len(record.token_s) for record in records) > 5000


@pytest.mark.parametrize("policy", ["mux", "mux:split+exclusive", "mux:fused", "mux:exclusive"])
@pytest.mark.parametrize("tbt_ms", [12, 20, 50])
def test_no_gap_is_late_while_long_prompts_keep_coming(policy, tbt_ms):
    slo = SLO(ttft_ms=5000, tbt_ms=tbt_ms)
    engine = engine_of(policy, slo)
    requests = []
    for i in range(16):
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        requests.append(engine.new_request([i] * 900, params, slo=slo))
    for i in range(5):
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        requests.append(engine.new_request([100 + i] * 8000, params, arrival_s=0.3 + 0.4 * i, slo=slo))
        requests.append(engine.new_request([200 + i] * 300, params, arrival_s=0.35 + 0.4 * i, slo=slo))
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert max(gap for request in requests for gap in gaps_ms(request.token_s)) <= tbt_ms


@pytest.mark.parametrize("seed", [6, 8])
def test_no_gap_of_24_chat_users_is_late_beside_a_prompt_of_100000_tokens(seed):
    """Each asks again when answered. Where the split changes, steps run on the old half until its pieces are done."""
    engine, draw, requests = engine_of("mux", slo := SLO(ttft_ms=60_000, tbt_ms=20)), Random(seed), []

    def ask():
        params = SamplingParams(max_tokens=draw.randint(150, 250), ignore_eos=True)
        requests.append(engine.new_request([1] * draw.randint(200, 500), params, slo=slo))
        engine.add(requests[-1])

    for _ in range(24):
        ask()
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    long = engine.new_request([2] * 100_000, params, slo=slo, arrival_s=1.0)
    engine.add(long)
    while not long.is_finished:
        for event in engine.step():
            if event.finish_reason is not None and event.request_id != long.request_id:
                ask()
    assert max(gap for request in requests for gap in gaps_ms(request.token_s)) <= 20
    assert len(requests) > 48, "they talked on"


def long_answers(policy, tbt_ms):
    """Forty about one document, at once: (their gaps, most of them that decoded at the same time)."""
    engine, document, most = engine_of(policy, slo := SLO(ttft_ms=60_000, tbt_ms=tbt_ms)), [7] * 24_000, 0
    requests = []
    for i in range(40):
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        requests.append(engine.new_request(document + [100 + i] * 100, params, slo=slo))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert all(len(request.output_token_ids) == 60 for request in requests)
    return [gap for request in requests for gap in gaps_ms(request.token_s)], most


@pytest.mark.parametrize("policy", ["mux", "chunked-auto"])
def test_no_prompt_begins_that_would_make_the_decode_steps_of_all_too_long(policy):
    gaps, most = long_answers(policy, tbt_ms=20)
    assert max(gaps) <= 20
    assert 16 <= most < 40, "as many as keep it"
    gaps, most = long_answers("chunked:256", tbt_ms=20)
    assert max(gaps) > 25 and most == 40, "nothing else holds them back"


def test_a_promise_that_nobody_could_keep_holds_nobody_back():
    _, most = long_answers("mux", tbt_ms=2)
    assert most > 32


def test_one_who_asks_for_more_than_the_others_shuts_nobody_out():
    """Its TBT holds for a batch of few; the others, promised 50 ms, need not wait until it has ended."""
    engine = engine_of("mux", slo := SLO(ttft_ms=2000, tbt_ms=50))
    alone_ms = 1e3 * engine.scheduler.policy.choose(Load(DecodeLoad(1, 50), 1.0)).step_s
    more = SLO(tbt_ms=1.2 * alone_ms)
    greedy = engine.new_request([1] * 50, SamplingParams(max_tokens=2000, ignore_eos=True), slo=more)
    engine.add(greedy)
    while not greedy.token_s:
        engine.step()
    params, most = SamplingParams(max_tokens=500, ignore_eos=True), 0
    others = [engine.new_request([2 + i] * 150, params, slo=slo) for i in range(60)]
    for request in others:
        engine.add(request)
    while not all(request.is_finished for request in others):
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert not greedy.is_finished
    assert most == 61


def prefill_tokens_per_s(policy, tbt_ms):
    """Of a backlog of prompts, among sixteen who decode all the while."""
    slo = SLO(ttft_ms=1e6, tbt_ms=tbt_ms)
    engine = engine_of(policy, slo)
    talkers = [engine.new_request([i] * 1000, SamplingParams(max_tokens=5000, ignore_eos=True)) for i in range(16)]
    for talker in talkers:
        engine.add(talker)
    while not all(len(talker.output_token_ids) > 3 for talker in talkers):
        engine.step()
    start_s = engine.executor.clock.now()
    sizes = [300, 4000, 2000] * 3
    prompts = [engine.new_request([100 + i] * n, SamplingParams(max_tokens=1)) for i, n in enumerate(sizes)]
    for prompt in prompts:
        engine.add(prompt)
    while not all(prompt.is_finished for prompt in prompts):
        engine.step()
    return sum(sizes) / (max(prompt.finished_s for prompt in prompts) - start_s)


def test_a_looser_tbt_never_lowers_prefill_throughput():
    """But for one part in twenty: a change of mode costs about that once, and its price is the hysteresis."""
    rates = [prefill_tokens_per_s("mux", tbt_ms) for tbt_ms in (9, 12, 16, 25, 50, 100)]
    assert rates[-1] > 1.5 * rates[0]
    for i, rate in enumerate(rates):
        assert rate >= 0.95 * max(rates[: i + 1])


# ---- the same calls, the same launches ------------------------------------------------------------------------------


def recorded(policy="mux", tbt_ms=12):
    """Four small requests, one aborted: prompts beside, inside and between steps."""
    slo = SLO(tbt_ms=tbt_ms)
    engine = engine_of(policy, slo)
    recorder = Recorder(engine.scheduler)
    engine.scheduler = recorder
    for i, (arrival_ms, num_prompt, num_output) in enumerate([(0, 200, 12), (5, 90, 10), (30, 3000, 3), (45, 70, 5)]):
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        name = "abcd"[i]
        engine.add(engine.new_request([i] * num_prompt, params, request_id=name, arrival_s=arrival_ms / 1e3, slo=slo))
    while engine.has_work:
        engine.step()
        if engine.executor.clock.now() > 0.06:
            engine.abort("b")
    return recorder


def fresh_scheduler(policy):
    return engine_of(policy, SLO()).scheduler


@pytest.mark.parametrize("policy", ["mux", "mux:split+exclusive", "chunked:256", "prefill-first", "static:32"])
def test_the_same_calls_give_the_same_launches(policy, tmp_path):
    recorder = recorded(policy)
    recorder.save(tmp_path / "run.json")
    assert not differences(tmp_path / "run.json", fresh_scheduler(policy))
    assert not differences(tmp_path / "run.json", fresh_scheduler(policy), gives_decisions=True)
    if policy != "static:32":
        assert differences(tmp_path / "run.json", fresh_scheduler("static:32"))


def test_a_recorded_run_is_repeated_launch_by_launch():
    """Where the scheduler is meant to change, ``PYTHONPATH=. python tests/test_promises.py`` records it anew."""
    assert not differences(GOLDEN, fresh_scheduler("mux"), gives_decisions=True)
    text = GOLDEN.read_text()
    assert text.count('"next"') > 50 and "prefill" in text and "decode" in text


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    recorded().save(GOLDEN)
