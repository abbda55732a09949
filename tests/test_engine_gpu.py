"""The engine on a GPU, whole Llama-3-8B shape with drawn weights, and the embedded model where text must make sense.

``pytest -m gpu tests/test_engine_gpu.py``: about four minutes and 60 GiB on an H200.
"""

import random

import pytest
import torch

from nanodrift import LLM, SamplingParams
from nanodrift.hub import EMBEDDED
from nanodrift.plan import Lane

pytestmark = pytest.mark.gpu


def mixed_work(vocab_size, num=256):
    """Prompts of odd and even lengths; every eighth answer is long enough to outgrow its blocks several times."""
    rng = random.Random(11)
    prompts, params = [], []
    for i in range(num):
        num_prompt = rng.choice((1, 63, 64, 65, rng.randint(2, 200)))
        num_output = rng.randint(200, 250) if i % 8 == 0 else rng.randint(4, 20)
        prompts.append([rng.randrange(vocab_size) for _ in range(num_prompt)])
        params.append(SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True))
    return prompts, params


def generate(llm, prompts, params):
    return [output.token_ids for output in llm.generate(prompts, params, progress=False)]


def test_deterministic_outputs_do_not_depend_on_company_or_preemption():
    llm = LLM("llama-3-8b", load_format="dummy", deterministic=True, num_kv_blocks=40, max_model_len=1024)
    prompts, params = mixed_work(llm.model_config.vocab_size, num=96)
    together = generate(llm, prompts, params)
    assert llm.engine.stats()["num_preemptions_total"] > 0, "the pool was meant to be too small"
    assert llm.engine.stats()["num_free_kv_blocks"] == 40
    alone = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone
    llm.close()


def test_nothing_is_compiled_or_allocated_after_start_up():
    llm = LLM("llama-3-8b", load_format="dummy", max_model_len=8192, num_kv_blocks=2000, max_prefill_tokens=2048)
    rng = random.Random(5)
    prompts, params = mixed_work(llm.model_config.vocab_size, num=100)
    prompts += [[rng.randrange(1000) for _ in range(n)] for n in (1, 5, 700, 2047, 2048, 2049, 5000, 8000)]
    params += [
        SamplingParams(temperature=0.7 * (i % 2), top_k=i, top_p=1.0 - i / 20, min_tokens=i, max_tokens=20, seed=i)
        for i in range(8)
    ]
    generate(llm, prompts, params)
    counters = llm.engine.executor.counters()
    assert (counters["num_compilations"], counters["num_cuda_mallocs"]) == (0, 0)
    llm.close()


def test_a_step_is_launched_before_the_last_one_is_read():
    llm = LLM("llama-3-8b", load_format="dummy", max_model_len=1024, num_kv_blocks=100, max_num_seqs=4)
    engine = llm.engine
    engine.add(engine.new_request([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True)))
    depths = []
    while engine.has_work:
        engine.step()
        depths.append(len(engine.executor._in_flight[Lane.DECODE]))
    assert max(depths) >= 1, "the GPU idles while the host reads"
    llm.close()


def near_tie(model, bf16_model, prompt, tokens, others):
    """The first place where two continuations part, and whether fp32 cannot tell the two candidates there apart.

    A near-tie: the fp32 logits of the two best tokens differ by less than twice the bf16 error of the logits there.
    """
    at = next(i for i, (a, b) in enumerate(zip([*tokens, None], [*others, None], strict=False)) if a != b)
    prefix = torch.tensor([prompt + tokens[:at]], device="cuda")
    with torch.inference_mode():
        exact = model(prefix).logits[0, -1].float()
        error = (bf16_model(prefix).logits[0, -1].float() - exact).abs().max().item()
    best, second = exact.topk(2).values.tolist()
    print(f"differ at token {at}: top-2 logits {best:.4f} {second:.4f}, bf16 error {error:.4f}")
    return best - second < 2 * error


def test_embedded_stories_with_and_without_company():
    """256 requests at once, with preemption, against each alone: equal but for near-ties, in at most 1% of requests."""
    from transformers import AutoModelForCausalLM

    llm = LLM(device="cuda", num_kv_blocks=100, max_num_seqs=256)
    openings = ["Once upon a time", "There was a little fox named", "One morning", "In a small village by the sea"]
    prompts = [
        llm.tokenizer.encode(f"{openings[i % 4]}{' ' * (i // 4 % 4)}{'and so ' * (i // 16)}") for i in range(256)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=100)
    together = generate(llm, prompts, params)
    assert llm.engine.stats()["num_preemptions_total"] > 0, "the pool was meant to be too small"
    alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    exact = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).cuda()
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16).cuda()
    different = [i for i in range(256) if together[i] != alone[i]]
    ties = [near_tie(exact, rounded, prompts[i], together[i], alone[i]) for i in different]
    print(f"{len(different)} of 256 differ")
    assert all(ties), "a difference that rounding does not explain"
    llm.close()
