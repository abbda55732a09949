"""Workloads, traces, arrivals and the goodput search: pure functions of a seed, checked by counting and by a queue."""

import itertools
import json
import math
import random
from statistics import fmean, pstdev

import pytest

from nanodrift.bench import arrivals, goodput, lengths, traces, workloads
from nanodrift.bench.arrivals import Ramp
from nanodrift.bench.workloads import PromptMaker, Sample, Workload, draw_length, find_tick, named
from nanodrift.config import SLO
from nanodrift.metrics import RequestTimes, percentile

# --- named workloads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workloads.NAMES)
def test_a_seed_gives_the_same_requests_and_another_seed_others(name):
    first, again, other = (named(name, 60, seed) for seed in (3, 3, 4))
    assert first == again and len(first.samples) == 60
    assert all(sample.num_prompt_tokens >= 1 and sample.num_output_tokens >= 1 for sample in first.samples)
    assert first.samples != other.samples or name in ("random", "steady8k")  # of fixed lengths


def test_more_requests_begin_with_the_fewer():
    for name in workloads.NAMES:
        assert named(name, 80).samples[:30] == named(name, 30).samples


@pytest.mark.parametrize(
    "name, side, mean, median",
    [("sharegpt", "num_prompt_tokens", 2340, 1730), ("sharegpt", "num_output_tokens", 439, 415),
     ("chat", "num_prompt_tokens", 1155, 1020), ("code", "num_prompt_tokens", 2048, 1469),
     ("reasoning", "num_output_tokens", 1527, 792)],
)  # fmt: skip
def test_lengths_follow_the_published_statistics(name, side, mean, median):
    drawn = [getattr(sample, side) for sample in named(name, 4000, seed=1).samples]
    assert fmean(drawn) == pytest.approx(mean, rel=0.12)
    assert percentile(drawn, 50) == pytest.approx(median, rel=0.12)


def test_the_quantile_function_is_hit_at_its_points():
    points = [[0, 1], [50, 100], [90, 1000], [100, 5000]]
    drawn = [draw_length(points, random.Random(seed)) for seed in range(4000)]
    assert min(drawn) >= 1 and max(drawn) <= 5000
    for percent, value in points[1:3]:
        assert sum(x <= value for x in drawn) / len(drawn) == pytest.approx(percent / 100, abs=0.03)
    assert draw_length([[0, 7], [100, 7]], random.Random(0)) == 7


def test_the_lowest_length_makes_the_mean_come_right():
    points = lengths.with_lowest(2048, {50: 1469, 90: 5188, 99: 7436, 100: 7437})
    assert lengths.mean_of(points) == pytest.approx(2048, rel=0.01)
    assert lengths.mean_of([[0, 10], [100, 10]]) == 10


def test_the_data_file_says_where_every_entry_is_from():
    data = json.loads(workloads.LENGTHS.read_text())
    assert workloads.LENGTHS.stat().st_size < 10_000
    assert set(data) == {"sharegpt", "chat", "code", "reasoning", "conversation"}
    for entry in data.values():
        assert ("measured" in entry["source"]) != ("published" in entry["source"])
        for points in (points for points in entry.values() if isinstance(points, list)):
            assert points[0][0] == 0 and points[-1][0] == 100
            assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))


def shared_tokens(workload) -> float:
    """Share of prompt tokens that an endless prefix cache would have seen, by comparing ids."""
    prompts, seen, hits, total = PromptMaker(0), set(), 0, 0
    for sample in workload.samples:
        ids = prompts.token_ids(sample)
        blocks = [tuple(ids[: 16 * (i + 1)]) for i in range(len(ids) // 16)]
        hits += 16 * next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        total += len(ids)
        seen.update(blocks)
    return hits / total


def test_prefixes_are_shared_where_the_workload_says_so():
    assert shared_tokens(named("chat", 30, length_scale=0.1)) == 0
    for name in ("chat", "longdoc", "conversation"):
        workload = named(name, 100, length_scale=0.01)
        assert workload.num_shared_tokens >= shared_tokens(workload) * sum(
            s.num_prompt_tokens for s in workload.samples
        )
    assert shared_tokens(named("longdoc", 100, length_scale=0.01)) > 0.6
    assert 0.1 < shared_tokens(named("conversation", 200, length_scale=0.02)) < 0.8


def test_turns_of_a_conversation_extend_each_other():
    prompts, last, num_turns = PromptMaker(5), {}, 0
    for sample in named("conversation", 300, length_scale=0.05).samples:
        ids = prompts.token_ids(sample)
        before = last.get(sample.conversation)
        if before is not None:
            num_turns += 1
            assert len(ids) >= len(before) and ids[: len(before)] == before
        last[sample.conversation] = ids
    assert num_turns > 50
    starts = {tuple(ids[:20]) for ids in last.values()}
    assert len(starts) == 1, "all share the system prompt"


def test_what_does_not_fit_is_passed_over_and_counted():
    workload = named("sharegpt", 100, max_model_len=2048)
    assert len(workload.samples) == 100 and max(s.num_tokens for s in workload.samples) <= 2048
    assert "passed over: longer than 2048 tokens" in workload.notes[0]
    with pytest.raises(ValueError, match="--length-scale"):
        named("longdoc", 10, max_model_len=8192)
    with pytest.raises(ValueError, match="there is no workload"):
        named("shakespeare", 10)
    assert named("random", 2, input_len=7, output_len=3).samples[1].num_tokens == 10


def test_prompts_are_ids_of_the_vocabulary_and_differ_by_seed():
    sample = named("random", 1, input_len=500).samples[0]
    ids = PromptMaker(1, 100).token_ids(sample)
    assert len(ids) == 500 and min(ids) >= workloads.LOWEST_ID and max(ids) < 100
    assert ids == PromptMaker(1, 100).token_ids(sample) != PromptMaker(2, 100).token_ids(sample)
    assert len(PromptMaker(1).text(sample).split()) == 500
    assert len(PromptMaker(1).text(sample, tokens_per_word=2.5).split()) == 200
    with pytest.raises(ValueError, match="too small"):
        PromptMaker(0, 3)


def test_text_prompts_need_a_tokenizer():
    sample = Sample((), 4, text="hello")
    assert PromptMaker().text(sample) == "hello"
    assert PromptMaker().token_ids(sample, encode=lambda text: [len(text)]) == [5]
    with pytest.raises(ValueError, match="no tokenizer"):
        PromptMaker().token_ids(sample)


# --- traces ----------------------------------------------------------------------------------------------------------

MOONCAKE = [
    {"timestamp": 3000, "input_length": 1000, "output_length": 9, "hash_ids": [0, 1]},
    {"timestamp": 3000, "input_length": 700, "output_length": 9, "hash_ids": [0, 5]},
    {"timestamp": 33000, "input_length": 1600, "output_length": 9, "hash_ids": [0, 1, 2, 3]},
]
FILES = {
    "plain.jsonl": ("[0.0, 374, 44]\n\n[4.3146, 396, 109]\n", [(0.0, 374, 44), (4.3146, 396, 109)]),
    "mooncake.jsonl": ("\n".join(map(json.dumps, MOONCAKE)),
                       [(3.0, 1000, 9), (3.0, 700, 9), (33.0, 1600, 9)]),
    "bailian.jsonl": ('{"chat_id": 7, "timestamp": 61.1, "input_length": 20, "output_length": 5, "hash_ids": [1, 2]}\n',
                      [(61.1, 20, 5)]),
    "azure.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n",
                  [(1700158546.68059, 374, 44)]),
    "azure2024.csv": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n",
                      [(1715299200.00993, 2162, 5)]),
    "burst.csv": ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,x\n",
                  [(5.0, 472, 18)]),
    "lengths.csv": ("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n",
                    [(None, 74, 918)]),
    "vllm.jsonl": ('{"prompt": "Why?", "output_tokens": 12}\n', [(None, 0, 12)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_formats_are_told_apart_by_looking(name, tmp_path):
    text, expected = FILES[name]
    (tmp_path / name).write_text(text)
    found = traces.read(tmp_path / name).samples
    assert [(s.num_prompt_tokens, s.num_output_tokens) for s in found] == [row[1:] for row in expected]
    assert [s.arrival_s for s in found] == [row[0] if row[0] is None else pytest.approx(row[0]) for row in expected]


def test_blocks_of_a_trace_are_shared_prefixes(tmp_path):
    (tmp_path / "m.jsonl").write_text(FILES["mooncake.jsonl"][0])
    samples = traces.read(tmp_path / "m.jsonl").samples
    one, other, longer = map(PromptMaker().token_ids, samples)
    assert one[:512] == other[:512] and one[512:700] != other[512:700]
    assert longer[:1000] == one
    assert samples[0].conversation == samples[2].conversation != samples[1].conversation


@pytest.mark.parametrize(
    "text, complaint",
    [("", "is empty"), ("[1, 2]\n", "line 1: expected"), ('{"a": 1}\n', "line 1"), ("[0, 5, 5]\n{oops", "line 2 is"),
     ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,12\n", "line 2"), ("[0, 0, 5]\n", "0 prompt"),
     ('{"timestamp": 1, "input_length": 600, "output_length": 5, "hash_ids": [1]}', "neither 512 nor 16")],
)  # fmt: skip
def test_a_bad_line_is_named(text, complaint, tmp_path):
    (tmp_path / "bad").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        traces.read(tmp_path / "bad")


def trace(arrivals_s, talks=None, tokens=100) -> Workload:
    talks = talks or range(len(arrivals_s))
    samples = [Sample(((f"t{talk}", tokens),), 10, f"t{talk}", s) for s, talk in zip(arrivals_s, talks, strict=True)]
    return Workload("trace", tuple(samples))


def test_rows_out_of_order_are_sorted_and_that_is_said(tmp_path):
    (tmp_path / "t.jsonl").write_text("[3, 5, 5]\n[1, 6, 6]\n")
    workload = traces.read(tmp_path / "t.jsonl")
    assert [s.num_prompt_tokens for s in workload.samples] == [6, 5] and "sorted" in workload.notes[0]


def test_a_coarse_clock_is_found_and_spread_in_order():
    coarse = trace([3.0 * (i // 4) for i in range(80)], talks=[i % 7 for i in range(80)])
    spread = coarse.jittered(None, seed=1)
    times = [s.arrival_s for s in spread.samples]
    assert find_tick([s.arrival_s for s in coarse.samples]) == 3.0 and "3 s clock" in spread.notes[0]
    assert times == sorted(times) and len(set(times)) == 80 and times[0] == 0
    assert [s.conversation for s in spread.samples] == [s.conversation for s in coarse.samples]
    assert all(abs(s - c.arrival_s) <= 3.0 for s, c in zip(times, coarse.samples, strict=True))
    assert spread == coarse.jittered(None, seed=1) != coarse.jittered(None, seed=2)
    fine = trace([i * 0.7 for i in range(80)])
    assert fine.jittered(None, seed=1) == fine == fine.jittered(0, seed=1)


def test_sampling_keeps_whole_conversations():
    workload = trace([float(i) for i in range(900)], talks=[i % 300 for i in range(900)])
    kept = workload.sampled(0.25, seed=1)
    talks = {s.conversation for s in kept.samples}
    assert len(kept.samples) == 3 * len(talks) and 45 <= len(talks) <= 105
    assert f"kept {len(talks)} of 300 conversations ({len(kept.samples)} of 900 requests)" in kept.notes
    assert workload.sampled(1.0, seed=1) == workload


def test_every_change_leaves_a_note():
    workload = trace([0.0, 1.0, 2.0])
    assert workload.fitting(110) == workload and workload.stretched(1) == workload and workload.scaled(1) == workload
    changed = workload.stretched(0.5).scaled(0.1).first(2)
    assert [s.arrival_s for s in changed.samples] == [0.0, 0.5] and changed.samples[0].num_tokens == 11
    assert len(changed.notes) == 3
    dropped = workload.fitting(109)
    assert not dropped.samples and "dropped 3 of 3 requests: longer than 109" in dropped.notes[0]


# --- arrivals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness, variation", [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_gaps_have_the_rate_and_the_variation_that_were_asked_for(burstiness, variation):
    times = arrivals.drawn(4000, 8.0, seed=1, burstiness=burstiness)
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert times == sorted(times) and times[-1] == pytest.approx(4000 / 8.0)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, abs=0.12)
    assert times == arrivals.drawn(4000, 8.0, seed=1, burstiness=burstiness)


@pytest.mark.parametrize("strategy, at_half", [("linear", 5.5), ("exponential", math.sqrt(10))])
def test_a_ramp_starts_slow_and_ends_fast(strategy, at_half):
    ramp = Ramp(strategy, 1.0, 10.0)
    assert (ramp.rate(0), ramp.rate(0.5), ramp.rate(1)) == (1.0, pytest.approx(at_half), pytest.approx(10.0))
    times = arrivals.drawn(2000, ramp, seed=0)
    first, last = times[200], times[-1] - times[-201]
    assert 200 / first < 2.6 and 200 / last > 7.0


def test_arrivals_without_a_rate():
    assert arrivals.drawn(3, math.inf, seed=0) == [0.0] * 3 and arrivals.drawn(0, 1.0, 0) == []
    for bad in (lambda: arrivals.drawn(3, 0.0, 0), lambda: arrivals.drawn(3, 1.0, 0, 0.0), lambda: Ramp("wild", 1, 2),
                lambda: Ramp("linear", 0, 2), lambda: arrivals.of_trace(named("random", 2))):  # fmt: skip
        with pytest.raises(ValueError):
            bad()


def test_a_trace_keeps_its_rhythm_at_any_rate():
    workload = trace([10.0, 11.0, 14.0, 18.0])
    assert arrivals.of_trace(workload) == [0.0, 1.0, 4.0, 8.0]
    assert arrivals.of_trace(workload, rate=2.0) == pytest.approx([0.0, 0.25, 1.0, 2.0])
    assert arrivals.of_trace(workload, rate=math.inf) == [0.0] * 4


# --- goodput ---------------------------------------------------------------------------------------------------------


def queue(rate, seed, count=2000, service_s=0.1, ttft_ms=1000.0, burstiness=1.0):
    """One server that takes ``service_s`` for each request, first come first served: capacity 1 / service_s."""
    free_s, records = 0.0, []
    for due_s in arrivals.drawn(count, rate, seed, burstiness):
        free_s = max(free_s, due_s) + service_s
        records.append(RequestTimes(due_s, (free_s,), SLO(ttft_ms, 50.0)))
    return records


def test_the_search_finds_the_capacity_of_a_steady_queue():
    seen = []
    result = goodput.search(lambda rate, seed: queue(rate, seed, burstiness=math.inf), 1.0, on_point=seen.append)
    assert result["is_complete"] and len(seen) == len(result["points"]) <= 24
    for percent in (90, 99):  # above 10/s each request waits 0.1 - 1 / rate longer than the one before: 0.9 s at most
        capacity = 1 / (0.1 - 0.9 / (2000 * percent / 100))
        assert result[f"max_rate_at_{percent}"] <= capacity <= result[f"first_miss_at_{percent}"]
        assert 1 < result[f"first_miss_at_{percent}"] / result[f"max_rate_at_{percent}"] <= 1.05
    rates = [point["request_rate"] for point in result["points"]]
    assert rates == sorted(rates) and len(set(rates)) == len(rates)


def test_a_bursty_queue_carries_less_and_99_percent_less_than_90():
    result = goodput.search(lambda rate, seed: queue(rate, seed, ttft_ms=300.0), 40.0)
    assert 2.5 < result["max_rate_at_99"] < result["max_rate_at_90"] < 9.5
    assert all(point["seeds"] == 3 and point["issued"] == 6000 for point in result["points"])
    assert any(point["slo_attainment_min"] < point["slo_attainment_max"] for point in result["points"])


def test_a_promise_that_cannot_be_kept_is_a_goodput_of_zero():
    result = goodput.search(lambda rate, seed: queue(rate, seed, count=50, ttft_ms=10.0), 1.0)
    assert result["max_rate_at_90"] == result["max_rate_at_99"] == 0.0 and result["is_complete"]
    assert not goodput.search(lambda rate, seed: queue(rate, seed, count=50), 1.0, max_points=3)["is_complete"]
    with pytest.raises(ValueError, match="positive rate"):
        goodput.search(queue, math.inf)


def test_refused_requests_count_against_the_rate():
    def half_refused(rate, seed):
        good = queue(rate, seed, count=100)
        return [*good[::2], *(RequestTimes(r.arrival_s, (), r.slo, is_completed=False) for r in good[1::2])]

    result = goodput.search(half_refused, 1.0, targets=(0.4, 0.9), max_points=12)
    assert result["max_rate_at_90"] == 0.0 and result["max_rate_at_40"] > 1.0


@pytest.mark.parametrize("load, saturated", [(0.5, 0), (0.8, 0), (1.2, 20), (2.0, 20)])
def test_the_verdict_tells_a_full_queue_from_one_without_end(load, saturated):
    verdicts = [goodput.is_saturated(queue(10 * load, seed)) for seed in range(20)]
    assert abs(sum(verdicts) - saturated) <= 2


def test_too_few_requests_give_no_verdict():
    assert not goodput.is_saturated(queue(100.0, 0, count=40))
    assert not goodput.is_saturated([]) and not goodput.is_saturated(queue(math.inf, 0))
