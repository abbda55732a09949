"""Prompt logprobs of the served embedded model against transformers: what lm-eval's ``local-completions`` asks for.

The fast test sends requests of lm-eval's shape and reads the answers as it does; the slow one runs lm-eval itself.
"""

import json

import httpx
import pytest
import torch
from running_server import PATIENCE_S, ROOT, TOKENIZER, figures_of, program
from transformers import AutoModelForCausalLM

FOLDER = ROOT / "nanodrift" / "embedded"
STORIES = [
    ("Once upon a time there was a little fox who", [" lived in the woods.", " ate the moon.", " lives lives lives."]),
    ("The bear was hungry. He looked for", [" honey.", " something to eat.", " purple 你好."]),
    ("It was a sunny day and", [" the children went to the park.", " Tom was happy.", " fox ran the of."]),
    ("Lily had a red ball. She liked to", [" play with it.", " throw it.", " it it it."]),
    ('"Can I help you?" asked the', [" old man.", " girl.", " zebra."]),
]
PAIRS = [(context, continuation) for context, continuations in STORIES for continuation in continuations]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loglikelihood(model):
    """(context ids, continuation ids) -> (sum of logprobs, are all of them the likeliest?), by transformers in fp32."""

    def loglikelihood(context, continuation):
        with torch.inference_mode():
            logprobs = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(continuation)[:, None])
        return own.sum().item(), bool((own[:, 0] == logprobs.max(-1).values).all())

    return loglikelihood


@pytest.fixture(scope="module")
def url():
    with program("--port", "0", "--device", "cpu", "--max-num-seqs", "8") as one:
        yield one.wait_url()


def as_lm_eval_reads(choice, num_context):
    columns = choice["logprobs"]
    own, top = columns["token_logprobs"][num_context:-1], columns["top_logprobs"][num_context:-1]
    return sum(own), all(value == max(candidates.values()) for value, candidates in zip(own, top, strict=True))


@pytest.mark.parametrize("is_cached", [False, True])
def test_requests_as_lm_eval_sends_them(url, model, loglikelihood, is_cached):
    """Twice, since the second time the prefix cache knows the prompts."""
    pairs = [(TOKENIZER.encode(context), TOKENIZER.encode(more, add_special_tokens=False)) for context, more in PAIRS]
    story = TOKENIZER.encode(" ".join(context + more[0] for context, more in STORIES) * 6)
    pairs.append((story[:150], story[150:]))  # longer than a block, and than the memory for logits
    assert len(story) > 300
    story = story[:20]
    for _ in range(9):
        story.append(model(torch.tensor([story])).logits[0, -1].argmax().item())
    pairs.append((story[:20], story[20:]))  # all of it the likeliest
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    body["prompt"] = [context + more for context, more in pairs]
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
    found = []
    for choice, (context, more) in zip(sorted(answer["choices"], key=lambda c: c["index"]), pairs, strict=True):
        expected, is_greedy = loglikelihood(context, more)
        total, all_top = as_lm_eval_reads(choice, len(context))
        assert len(choice["logprobs"]["tokens"]) == len(context) + len(more) + 1
        assert total == pytest.approx(expected, abs=1e-3) and all_top == is_greedy
        found.append(all_top)
    assert found[-1] and not all(found)


@pytest.mark.slow
def test_lm_eval_scores_as_transformers(url, loglikelihood, tmp_path):
    """A multiple-choice task over the stories, by lm-eval's own code from request to score."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]'")
    from lm_eval.api.task import ConfigurableTask

    rows = [{"context": context, "choices": choices, "gold": 0} for context, choices in STORIES]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "stories.jsonl"), "cache_dir": str(tmp_path)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
    }
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": name,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(FOLDER),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_length": 512,
        },
        tasks=[ConfigurableTask(config=config)],
        log_samples=True,
        bootstrap_iters=0,
    )
    largest_error, num_right = 0.0, 0
    for sample in result["samples"]["stories"]:
        totals = []
        for (context, more), ((total, is_greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            whole = TOKENIZER.encode(context + more, add_special_tokens=False)
            num_context = len(TOKENIZER.encode(context, add_special_tokens=False))
            expected, all_top = loglikelihood(whole[:num_context], whole[num_context:])
            largest_error = max(largest_error, abs(total - expected))
            assert bool(is_greedy) == all_top
            totals.append(expected)
        num_right += totals.index(max(totals)) == 0
    accuracy = result["results"]["stories"]["acc,none"]
    with figures_of("loglikelihood") as figures:
        figures["lm-eval local-completions against transformers"] = {
            "loglikelihoods": len(PAIRS),
            "largest difference": float(f"{largest_error:.1e}"),
            "accuracy": accuracy,
        }
    assert largest_error < 1e-3
    assert accuracy == num_right / len(STORIES)
