"""One KV memory under two lanes, on a GPU: the prefix cache, preemption and multiplexing change no bit of any answer.

``pytest -m gpu tests/test_memory_gpu.py``: about three minutes and 60 GiB on an H200. Everything runs with
``deterministic=True`` at the full Llama-3-8B shape with drawn weights. Tokens are drawn at temperature 1 with seeds, so
they tell logits apart that greedy tokens would not.
"""

import itertools
import random

import pytest

from nanodrift import LLM, SamplingParams
from nanodrift.config import BLOCK_SIZE, SLO
from nanodrift.dispatch import Mode

pytestmark = pytest.mark.gpu

OPTIONS = {"load_format": "dummy", "deterministic": True, "max_model_len": 4096, "num_kv_blocks": 600}


def conversations(vocab_size, num=24, num_turns=3):
    """Turn by turn: prompts that grow by what was said, a third of whole blocks, half with one system prompt."""
    rng = random.Random(3)
    system = [rng.randrange(vocab_size) for _ in range(3 * BLOCK_SIZE)]
    turns, histories = [], [system * (i % 2) for i in range(num)]
    for _ in range(num_turns):
        for i in range(num):
            length = rng.randint(1, 150) if i % 3 else -len(histories[i]) % BLOCK_SIZE + BLOCK_SIZE
            histories[i] = histories[i] + [rng.randrange(vocab_size) for _ in range(length)]
        turns.append(list(histories))
    return turns


def seeded(num, max_tokens=24):
    return [SamplingParams(temperature=1.0, seed=i, max_tokens=max_tokens, ignore_eos=True) for i in range(num)]


def test_answers_do_not_depend_on_the_cache():
    answers, stats = {}, {}
    for caching in (False, True):
        llm = LLM("llama-3-8b", prefix_caching=caching, **OPTIONS)
        answers[caching] = []
        for prompts in conversations(llm.model_config.vocab_size):
            for _ in range(2):  # the second time every prompt is there whole
                outputs = llm.generate(prompts, seeded(len(prompts)), progress=False)
                answers[caching].append([output.token_ids for output in outputs])
        stats[caching] = llm.engine.stats()
        llm.close()
    assert answers[True] == answers[False]
    assert stats[False]["prefix_cache_hits_total"] == 0
    assert stats[True]["prefix_cache_hits_total"] > 0.6 * stats[True]["prefix_cache_queries_total"]
    assert stats[True]["kv_blocks_leaked"] == 0 and stats[True]["num_free_kv_blocks"] == OPTIONS["num_kv_blocks"]


def test_multiplexed_answers_equal_those_of_taking_turns():
    """Requests with promises of 5 to 60 ms come and go, so that the dispatcher keeps changing its mind."""
    rng = random.Random(9)
    lengths = [rng.choice((40, 64, 200, 500, 1000, 2500)) for _ in range(300)]
    answers = {}
    for policy in ("turns", "mux"):
        llm = LLM("llama-3-8b", policy=policy, **OPTIONS)
        engine, draw = llm.engine, random.Random(4)
        now_s, requests, seen = engine.executor.clock.now(), [], []
        for i, length in enumerate(lengths):
            prompt = [draw.randrange(engine.vocab_size) for _ in range(length)]
            params = SamplingParams(temperature=1.0, seed=i, max_tokens=20 + i % 60, ignore_eos=True)
            slo = SLO(tbt_ms=draw.choice((5.0, 9.0, 12.0, 20.0, 60.0)))
            requests.append(engine.new_request(prompt, params, slo=slo, arrival_s=now_s + 0.02 * i))
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
            if (decision := engine.scheduler.decision) is not None:
                seen.append((decision.mode, decision.partition))
        answers[policy] = [request.output_token_ids for request in requests]
        changes = sum(a != b for a, b in itertools.pairwise(seen))
        print(f"{policy}: {changes} changes over {sorted({f'{m.value} {p.decode_sms}' for m, p in seen})}")
        llm.close()
    different = [i for i in range(len(lengths)) if answers["mux"][i] != answers["turns"][i]]
    assert not different, f"requests {different} depend on how the lanes shared the device"
    assert changes >= 100 and {Mode.SPLIT, Mode.FUSED} <= {mode for mode, _ in seen}
