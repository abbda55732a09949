"""The engine on the CPU executor with a small random model: what the scheduler does must not show in the tokens."""

from dataclasses import replace

import pytest
import torch
from paged_machine import check_pool

from nanodrift.baselines import Turns
from nanodrift.config import ModelConfig, RopeConfig
from nanodrift.cpu import CpuExecutor
from nanodrift.engine import Engine
from nanodrift.model import Model
from nanodrift.plan import DecodeWork, FusedWork, NewBlocks, PrefillSlice, PrefillWork, RowParams
from nanodrift.request import SamplingParams
from nanodrift.scheduler import Scheduler
from nanodrift.weights import dummy_weights

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
        max_position=512,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        is_head_tied=False,
        has_qkv_bias=False,
        has_qk_norm=False,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(7,),
    )
    return Model(config, dummy_weights(config, torch.device("cpu"), torch.float32, seed=3))


def make_engine(model, num_blocks=40, num_rows=8, max_prefill_tokens=256, prefill_layers=None, prefix_caching=True):
    executor = CpuExecutor(
        model, num_blocks=num_blocks, num_rows=num_rows, max_model_len=512, max_prefill_tokens=max_prefill_tokens
    )
    scheduler = Scheduler(
        num_blocks=num_blocks,
        num_rows=num_rows,
        num_layers=3,
        max_model_len=512,
        max_prefill_tokens=max_prefill_tokens,
        policy=Turns(executor.partitions[0], max_prefill_tokens, prefill_layers or 3),
        prefix_caching=prefix_caching,
    )
    return Engine(scheduler, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(7,))


def prompts(num=6):
    sizes = (1, 63, 64, 65, 130, 200)[:num]
    return [[(i * 7 + j * 13) % VOCAB_SIZE for i in range(n)] for j, n in enumerate(sizes)]


def run(engine, params, num=6):
    requests = [engine.new_request(p, params, request_id=f"r{i}") for i, p in enumerate(prompts(num))]
    for request in requests:
        engine.add(request)
    for _ in range(5000):
        if not engine.has_work:
            return requests
        engine.step()
    raise AssertionError("the engine hangs")


def outputs(engine, params, num=6):
    return [request.output_token_ids for request in run(engine, params, num)]


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, max_tokens=24, ignore_eos=True, seed=5)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_prefill_tokens": 17},
        {"prefill_layers": 1},
        {"max_prefill_tokens": 50, "prefill_layers": 2},
        {"num_rows": 1},
        {"prefix_caching": False},
        {"num_blocks": 6},
        {"num_blocks": 6, "prefix_caching": False},
    ],
    ids=str,
)
def test_outputs_do_not_depend_on_the_schedule(model, params, options):
    if "num_blocks" in options:
        params = replace(params, max_tokens=120)  # the longest needs 5 blocks
    plain = outputs(make_engine(model), params)
    engine = make_engine(model, **options)
    assert outputs(engine, params) == plain
    assert engine.scheduler.pool.num_used_blocks == 0
    if "num_blocks" in options:
        assert engine.scheduler.num_preemptions > 0, "the pool was meant to be too small"


def test_seeds_decide_sampled_tokens(model):
    def sampled(seed):
        return outputs(make_engine(model), SamplingParams(max_tokens=16, ignore_eos=True, seed=seed), num=2)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_eos_ends_unless_ignored_or_held_back(model):
    free = outputs(make_engine(model), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), num=1)[0]
    stop = free[2]
    first = free.index(stop) + 1
    params = {"temperature": 0, "max_tokens": 60, "stop_token_ids": [stop]}
    (ended,) = run(make_engine(model), SamplingParams(**params), num=1)
    assert ended.output_token_ids == free[:first]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    held = outputs(make_engine(model), SamplingParams(**params, min_tokens=first + 3), num=1)[0]
    assert len(held) >= first + 3
    assert stop not in held[: first + 3], "a banned token must not be drawn at all"


def test_a_fused_step_gives_the_tokens_of_separate_ones(model):
    """Request a decodes while the prompt of b is computed: in one pass, and one after the other."""
    a, b = prompts()[2], prompts()[3]
    params = RowParams(temperature=0.0)

    def prefill(batch_id, name, row, token_ids, block_ids):
        piece = PrefillSlice(name, row, 0, tuple(token_ids), params)
        return PrefillWork(batch_id, (piece,), 0, 3, True, (NewBlocks(row, 0, block_ids),))

    def start():
        executor = make_engine(model).executor
        executor.launch(prefill(1, "a", 0, a, (3, 5)), executor.partitions[0])
        return executor, executor.wait(None)[0].tokens

    decode = DecodeWork(("a",), (0,), (len(a),))
    separate, first = start()
    separate.launch(decode, separate.partitions[0])
    separate.launch(prefill(2, "b", 1, b, (2, 9)), separate.partitions[0])
    step, chunk = separate.wait(None) + separate.wait(None)
    fused, first_again = start()
    fused.launch(FusedWork(prefill(2, "b", 1, b, (2, 9)), decode), fused.partitions[0])
    (both,) = fused.wait(None)
    assert first == first_again
    assert both.tokens == chunk.tokens + step.tokens


def test_a_token_is_out_before_the_next_is_computed(model):
    """Two steps are in flight, but who waits gets one after the other: a stream does not come in pairs."""
    engine = make_engine(model)
    engine.add(engine.new_request(prompts()[2], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)))
    counts = []
    while engine.has_work:
        counts.append(sum(len(event.token_ids) for event in engine.step()))
    assert sum(counts) == 12 and max(counts) == 1


def chat(engine, params, num_turns=4, num_chats=3):
    """Conversations side by side, each turn its own history and 30 new tokens. Returns requests, chat by chat."""
    histories, turns = [prompts()[4] for _ in range(num_chats)], [[] for _ in range(num_chats)]
    for turn in range(num_turns):
        for i in range(num_chats):
            histories[i] = histories[i] + [(turn * 31 + i * 17 + j) % VOCAB_SIZE for j in range(30)]
            turns[i].append(engine.new_request(histories[i], replace(params, seed=turn)))
            engine.add(turns[i][-1])
        while engine.has_work:
            engine.step()
        histories = [requests[-1].token_ids for requests in turns]
    return [request for requests in turns for request in requests]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "options", [{}, {"max_prefill_tokens": 50, "prefill_layers": 1}, {"num_blocks": 12}], ids=str
)  # 12 blocks: two of the three at most, and the third's cached history is soon evicted
def test_the_prefix_cache_does_not_show_in_the_tokens(model, params, options):
    off, on = (make_engine(model, prefix_caching=caching, **options) for caching in (False, True))
    expected, found = chat(off, params), chat(on, params)
    assert [r.output_token_ids for r in found] == [r.output_token_ids for r in expected]
    assert all(r.num_cached_tokens == 0 for r in expected)
    assert sum(r.num_cached_tokens > 0 for r in found) >= len(found) - 1 - 5 * ("num_blocks" in options)
    check_pool(on.scheduler.pool, [])


@pytest.mark.parametrize("num_prompt", [64, 128])
def test_a_full_hit_computes_one_token_and_writes_nothing(model, num_prompt):
    engine = make_engine(model)
    prompt = [(i * 11) % VOCAB_SIZE for i in range(num_prompt)]

    def serve():
        request = engine.new_request(prompt, GREEDY)
        engine.add(request)
        while engine.has_work:
            engine.step()
        return request

    first = serve()
    kv = engine.executor._prefill.kv
    cached = [node.block_id for node in first.nodes]
    before = kv.k[:, cached].clone(), kv.v[:, cached].clone()
    again = serve()
    assert again.num_cached_tokens == num_prompt - 1
    assert again.output_token_ids == first.output_token_ids
    assert torch.equal(before[0], kv.k[:, cached]) and torch.equal(before[1], kv.v[:, cached])


def test_the_embedded_model_tells_the_same_story_from_the_cache():
    from nanodrift import LLM

    options = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 4}
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=90)
    history, stories = "Once upon a time there was a little fox who lived in the woods. ", []
    with LLM(**options) as on, LLM(prefix_caching=False, **options) as off:
        for _turn in range(3):
            with_cache, without = (llm.generate(history, params, progress=False)[0] for llm in (on, off))
            assert with_cache.text == without.text
            assert without.num_cached_tokens == 0
            stories.append(with_cache.num_cached_tokens)
            history += with_cache.text + " Then "
    assert stories[0] == 0 and stories[2] >= 64, stories


def test_a_stop_string_is_the_reason_even_with_the_last_token_and_an_engine_seed_may_be_large():
    from nanodrift import LLM

    with LLM(device="cpu", max_num_seqs=4, seed=2**63 - 1) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        (whole,) = llm.generate("Once upon a time", greedy, progress=False)
        last = llm.tokenizer.decode(whole.token_ids[-1:]).strip()
        (cut,) = llm.generate("Once upon a time", replace(greedy, stop=last), progress=False)
        assert (whole.finish_reason, whole.stop_reason) == ("length", None)
        assert (cut.finish_reason, cut.stop_reason) == ("stop", last) and cut.text == whole.text.removesuffix(last)
        assert 0 < whole.metrics.ttft_s <= whole.metrics.end_to_end_s
        (drawn,) = llm.generate("Once upon a time", SamplingParams(max_tokens=2), progress=False)
        assert len(drawn.token_ids) == 2


def test_the_embedded_model_tells_the_same_stories_alone_packed_chunked_and_preempted():
    from nanodrift import LLM

    beginnings = (
        "Once upon a time there was a little fox",
        "A bear and an owl",
        "In a small house by the sea",
        "The frog",
    )
    prompts = [text + " who lived in the woods. " * number for number, text in enumerate(beginnings, 1)]
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=120, ignore_eos=True) for seed in range(len(prompts))
    ]
    options = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 4}

    def stories(**more) -> tuple[list[list[int]], int]:
        with LLM(**options | more) as llm:
            outputs = llm.generate(prompts, params, progress=False)
            scheduler = llm.engine.scheduler
            assert scheduler.num_leaked_blocks == scheduler.pool.num_used_blocks == 0
            return [output.token_ids for output in outputs], scheduler.num_preemptions

    alone, _ = stories(max_num_seqs=1, prefix_caching=False)
    assert stories() == (alone, 0)  # packed into one prefill, one decode batch
    assert stories(max_prefill_tokens=7, prefill_layers=2) == (alone, 0)
    preempted, num_preemptions = stories(num_kv_blocks=4)
    assert preempted == alone and num_preemptions > 0
