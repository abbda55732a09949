"""Logprobs, penalties and logit bias through the engine on the CPU, against the model asked directly."""

from dataclasses import replace

import pytest
import torch
from test_engine_cpu import GREEDY, SAMPLED, VOCAB_SIZE, make_engine, model, outputs, prompts, run  # noqa: F401
from tiny_models import Driver

from nanodrift.plan import DecodeWork, FusedWork, NewBlocks, PrefillSlice, PrefillWork, RowParams
from nanodrift.request import MAX_LOGPROBS, SamplingParams

SCHEDULES = [{}, {"max_prefill_tokens": 17, "prefill_layers": 1}, {"num_rows": 2}, {"num_blocks": 6}]
SHORT = replace(GREEDY, max_tokens=40)


@pytest.fixture(scope="module")
def logits_of(model):  # noqa: F811
    """token ids -> logits [T, V] after each of them, in one pass."""
    driver = Driver(model, num_rows=1, max_len=512)

    def logits_of(token_ids):
        batch = driver.batch([(0, 0, token_ids, True)])
        batch.sample_indices = torch.arange(len(token_ids), dtype=torch.int32)
        with torch.inference_mode():
            model.embed(batch, driver.state, driver.lane)
            model.run_layers(batch, driver.state, driver.kv, 0, 3, driver.lane)
            return model.head(batch, driver.state, driver.lane).clone()

    return logits_of


def check_logprobs(logprobs, token_ids, logits, num_top):
    """logprobs of token_ids [N], each drawn after logits [N, V]."""
    assert len(logprobs) == len(token_ids) == len(logits)
    expected = logits.log_softmax(-1)
    for one, token, row in zip(logprobs, token_ids, expected, strict=True):
        assert one.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert len(one.top_ids) == len(one.top_logprobs) == num_top
        torch.testing.assert_close(torch.tensor(one.top_logprobs), row.topk(num_top).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(row[list(one.top_ids)], row.topk(num_top).values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("params", [SHORT, replace(SAMPLED, max_tokens=40, repetition_penalty=1.3, min_tokens=9)],
                         ids=["greedy", "sampled"])  # fmt: skip
def test_logprobs_are_the_models_own_whatever_the_schedule(model, logits_of, params, options):  # noqa: F811
    engine = make_engine(model, **options)
    if "num_blocks" in options:
        params = replace(params, max_tokens=120)  # the longest needs 5 blocks
    plain = outputs(make_engine(model), params)
    requests = run(engine, replace(params, logprobs=3, prompt_logprobs=2))
    assert [r.output_token_ids for r in requests] == plain  # asking changes nothing
    assert engine.scheduler.num_preemptions > 0 or "num_blocks" not in options, "the pool was meant to be too small"
    for request in requests:
        prompt, logits = request.prompt_token_ids, logits_of(request.token_ids)
        check_logprobs(request.logprobs, request.output_token_ids, logits[len(prompt) - 1 : -1], 3)
        check_logprobs(request.prompt_logprobs, prompt[1:], logits[: len(prompt) - 1], 2)


def test_neighbours_that_ask_for_nothing_get_nothing(model):  # noqa: F811
    engine = make_engine(model)
    asked = [GREEDY, replace(GREEDY, logprobs=0), replace(GREEDY, prompt_logprobs=MAX_LOGPROBS), GREEDY]
    requests = [engine.new_request(p, params) for p, params in zip(prompts(4), asked, strict=True)]
    for request in requests:
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
    assert [len(r.logprobs) for r in requests] == [0, 24, 0, 0]
    assert [len(r.prompt_logprobs) for r in requests] == [0, 0, 63, 0]
    assert all(one.top_ids == [] for one in requests[1].logprobs)
    seen = [sum((e.logprobs for e in events if e.request_id == r.request_id), ()) for r in requests]
    assert [list(one) for one in seen] == [r.logprobs for r in requests]  # events carry what the requests keep
    first = next(e for e in events if e.request_id == requests[2].request_id)
    assert list(first.prompt_logprobs) == requests[2].prompt_logprobs


def test_a_cached_prompt_is_computed_again_for_its_logprobs(model):  # noqa: F811
    engine = make_engine(model)
    for params, num_cached in [(GREEDY, 0), (GREEDY, 127), (replace(GREEDY, prompt_logprobs=0), 0)]:
        request = engine.new_request([i * 11 % VOCAB_SIZE for i in range(128)], params)
        engine.add(request)
        while engine.has_work:
            engine.step()
        assert request.num_cached_tokens == num_cached
    assert len(request.prompt_logprobs) == 127


def test_a_prompt_longer_than_the_memory_for_logits_is_scored_in_parts(model, logits_of):  # noqa: F811
    engine = make_engine(model, num_rows=3)
    assert engine.executor._prefill.logits.shape[0] < 20
    request = engine.new_request(prompts()[5], replace(GREEDY, max_tokens=1, prompt_logprobs=1))
    engine.add(request)
    while engine.has_work:
        engine.step()
    check_logprobs(request.prompt_logprobs, prompts()[5][1:], logits_of(prompts()[5])[:-1], 1)


def test_the_python_api_gives_them_back():
    from nanodrift import LLM

    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    with LLM(device="cpu", max_model_len=256, max_num_seqs=2) as llm:
        asked, plain = llm.generate([[1, 654, 692]] * 2, [params, replace(params, logprobs=None)], progress=False)
    assert asked.token_ids == plain.token_ids == [one.top_ids[0] for one in asked.logprobs]
    assert len(asked.prompt_logprobs) == 2 and plain.logprobs is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_choices_follow_from_what_the_logprobs_say(device):
    """Penalties and biases that do not care for a constant: what was drawn is the best of the likeliest after them."""
    from nanodrift import LLM

    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, logprobs=MAX_LOGPROBS, prompt_logprobs=1,
        frequency_penalty=0.9, presence_penalty=0.6, logit_bias={17: 2.5, 23: -100},
    )  # fmt: skip
    prompts_and_params = [([1, *range(300 + i, 330 + 37 * i)], params) for i in range(5)]
    prompts_and_params.append((prompts_and_params[2][0], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    with LLM(device=device, max_model_len=512, max_num_seqs=8) as llm:
        first, again = (llm.generate(*map(list, zip(*prompts_and_params, strict=True)), progress=False) for _ in "12")
    for answer in first[:-1]:
        for i, (token, one) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            scores = dict(zip(one.top_ids, one.top_logprobs, strict=True))
            assert list(scores.values()) == sorted(scores.values(), reverse=True)
            worst, said = min(scores.values()), answer.token_ids[:i]
            for candidate in scores:
                count = said.count(candidate)
                scores[candidate] += {17: 2.5, 23: -100}.get(candidate, 0) - 0.9 * count - 0.6 * (count > 0)
            best = max(scores.values())
            assert scores.get(token, worst + 2.5) >= best - 1e-4 or best < worst + 2.5, f"output token {i}"
        assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) - 1
        assert 23 not in answer.token_ids and max(map(answer.token_ids.count, answer.token_ids)) <= 6
    plain = first[-1]
    assert plain.logprobs is None and max(map(plain.token_ids.count, plain.token_ids)) > 6  # a neighbour is let alone
    if device == "cpu":
        assert [a.token_ids for a in again] == [a.token_ids for a in first]


# ---- penalties and bias --------------------------------------------------------------------------------------------


def penalised(logits, params, prompt, output):
    """The definitions, token by token: bias, repetition, frequency, presence."""
    logits = logits.clone()
    for token, bias in params.biases:
        logits[token] += bias
    for token in {*prompt, *output}:
        logits[token] = logits[token] * params.repetition_penalty ** (-1 if logits[token] > 0 else 1)
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


PENALTIES = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7, "presence_penalty": 0.3},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -1.0, "frequency_penalty": 1.1},
    {"logit_bias": {5: 7.5, "17": 6.0, 9: -100}},
    {"logit_bias": {i: 3 + i / 300 for i in range(300)}, "repetition_penalty": 1.2, "frequency_penalty": 2.0},
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda p: " ".join(p))
def test_penalties_follow_their_definitions(model, logits_of, penalties):  # noqa: F811
    params = replace(SHORT, **penalties)
    plain, asked = (run(make_engine(model), one, num=3)[2] for one in (SHORT, params))
    prompt, output = asked.prompt_token_ids, asked.output_token_ids
    assert output != plain.output_token_ids
    for i, (token, logits) in enumerate(zip(output, logits_of(asked.token_ids)[len(prompt) - 1 :], strict=False)):
        row = penalised(logits, params, prompt, output[:i])
        assert row[token] >= row.max() - 1e-4, f"output token {i}"


@pytest.mark.parametrize("options", SCHEDULES[1:], ids=str)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_penalties_do_not_depend_on_the_schedule(model, params, options):  # noqa: F811
    """Chunked prompts, rows that are used again, preempted requests whose own blocks are cached."""
    num_tokens = 120 if "num_blocks" in options else 30
    mixed = [replace(params, max_tokens=num_tokens, **penalties) for penalties in (*PENALTIES, {})]

    def serve(engine):
        requests = []
        for turn in range(2):  # the second finds the first in the cache
            for i, one in enumerate(mixed):
                requests.append(engine.new_request(prompts()[2 + (i + turn) % 4], replace(one, seed=i)))
                engine.add(requests[-1])
            while engine.has_work:
                engine.step()
        return requests

    engine = make_engine(model, **options)
    expected = serve(make_engine(model, prefix_caching=False, num_blocks=100, num_rows=20))
    found = serve(engine)
    assert [r.output_token_ids for r in found] == [r.output_token_ids for r in expected]
    assert engine.scheduler.num_preemptions > 0 or "num_blocks" not in options
    assert any(r.num_cached_tokens for r in found) or "num_blocks" in options, (
        "those without a repetition penalty read the cache"
    )


def test_a_fused_step_counts_and_scores_like_separate_ones(model):  # noqa: F811
    a, b = prompts()[2], prompts()[3]
    params = RowParams(temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.4, has_logprobs=True)

    def prefill(batch_id, name, row, token_ids, block_ids):
        piece = PrefillSlice(
            name, row, 0, tuple(token_ids), params, output_start=len(token_ids), next_token_ids=tuple(token_ids[1:])
        )
        return PrefillWork(batch_id, (piece,), 0, 3, True, (NewBlocks(row, 0, block_ids),))

    def start():
        executor = make_engine(model).executor
        executor.launch(prefill(1, "a", 0, a, (3, 5)), executor.partitions[0])
        executor.wait(None)
        return executor

    decode = DecodeWork(("a",), (0,), (len(a),), has_penalty=True, has_logprobs=True)
    separate, fused = start(), start()
    separate.launch(decode, separate.partitions[0])
    separate.launch(prefill(2, "b", 1, b, (2, 9)), separate.partitions[0])
    step, chunk = separate.wait(None) + separate.wait(None)
    fused.launch(FusedWork(prefill(2, "b", 1, b, (2, 9)), decode), fused.partitions[0])
    (both,) = fused.wait(None)
    assert both.tokens == chunk.tokens + step.tokens
    assert len(both.logprobs) == 2 and len(both.prompt_logprobs) == len(b) - 1
    for found, expected in [
        (both.logprobs, chunk.logprobs + step.logprobs),
        (both.prompt_logprobs, chunk.prompt_logprobs),
    ]:
        own = [torch.tensor([one.logprob for one in side]) for side in (found, expected)]
        torch.testing.assert_close(*own, atol=1e-5, rtol=0)
    tables = [executor._prefill.rows.penalties.counts[:2] for executor in (separate, fused)]
    assert torch.equal(*tables) and tables[0].count_nonzero() > 100


@pytest.mark.parametrize(
    "values, message",
    [
        ({"presence_penalty": 3}, "presence_penalty must lie between -2 and 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must lie between"),
        ({"repetition_penalty": 0}, "repetition_penalty must lie"),
        ({"logprobs": 21}, "logprobs must be an integer between 0 and 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be"),
        ({"logit_bias": {1: 101}}, "logit_bias must give"),
        ({"logit_bias": {-1: 1}}, "logit_bias must give"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias may name 300 tokens"),
    ],
    ids=str,
)
def test_values_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_bias_on_a_token_that_the_model_lacks_is_refused(model):  # noqa: F811
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary"):
        make_engine(model).new_request([1], replace(GREEDY, logit_bias={"300": 1}))
