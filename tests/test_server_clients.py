"""Other people's clients against the server: openai's, langchain's, and the requests that vLLM's benchmark sends.

The null engine answers in the fast tier, the embedded model under ``-m slow``; with NANODRIFT_RESULTS set to a folder
its figures go to server-clients.json there. langchain runs where langchain-openai is installed.
"""

import asyncio
import itertools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from null_engine import SILENT
from running_server import PATIENCE_S, TOKENIZER, echo, eventually, figures_of, gauge, is_quiet, program, running

from nanodrift.metrics import percentile

EMBEDDED = "nanodrift-storyteller"


@pytest.fixture(scope="module")
def figures():
    with figures_of("server-clients") as taken:
        yield taken


@pytest.fixture(scope="module")
def server():
    with running("--step-ms", "1") as one:
        yield one


@pytest.fixture(scope="module")
def embedded():
    with program("--port", "0", "--device", "cpu") as one:
        yield one.wait_url()


# ---- openai's own --------------------------------------------------------------------------------------------------


def test_openai_async_streams_side_by_side(server):
    async def one(client, number: int) -> bool:
        text = ""
        stream = await client.completions.create(model="echo", prompt=f"fox {number}", max_tokens=20, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].text
        return text == echo(f"fox {number}", 20)

    async def all_of_them() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            chat = await client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "tea"}])
            assert chat.choices[0].message.content == "tea"
            return await asyncio.gather(*(one(client, number) for number in range(20)))

    assert all(asyncio.run(all_of_them()))


def test_openai_comes_back_after_a_429():
    """A row for one and no queue: the client is told when to try again, does, and is served."""
    with running("--step-ms", "20", "--max-num-seqs", "1", max_queue=0) as small, ThreadPoolExecutor(1) as pool:
        long = {"prompt": [7], "max_tokens": 40}
        occupant = pool.submit(httpx.post, f"{small.url}/v1/completions", json=long, timeout=PATIENCE_S)
        eventually(lambda: small.client.num_in_flight == 1)
        options = {"model": "echo", "prompt": "the fox", "max_tokens": 3}
        hasty = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            hasty.completions.create(**options)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=20)
        assert patient.completions.create(**options).choices[0].text == echo("the fox", 3)
        assert occupant.result().status_code == 200


def test_openai_gives_up_and_hangs_up(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="echo", prompt=[SILENT])
    with client.with_options(timeout=PATIENCE_S).completions.create(
        model="echo", prompt="the fox", max_tokens=1500, stream=True
    ) as stream:
        next(iter(stream))
    eventually(lambda: server.client.num_in_flight == 0)


# ---- langchain's ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_langchain(embedded, figures):
    langchain = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    options = {"base_url": f"{embedded}/v1", "api_key": "none", "model": EMBEDDED, "temperature": 0, "max_retries": 0}
    chat = langchain.ChatOpenAI(**options, max_tokens=40)
    whole = chat.invoke("Tell me a story about a fox.")
    assert len(whole.content.split()) > 10 and whole.response_metadata["finish_reason"] in ("stop", "length")
    assert whole.usage_metadata["output_tokens"] == 40
    pieces = list(chat.stream("Tell me a story about a fox."))
    assert "".join(piece.content for piece in pieces) == whole.content and len(pieces) > 10
    batch = chat.batch(["Tell me a story about an owl.", [("system", "Be brief."), ("human", "Tell me of tea.")]])
    assert all(answer.content for answer in batch)

    async def streamed() -> str:
        return "".join([piece.content async for piece in chat.astream("Tell me a story about a fox.")])

    assert asyncio.run(streamed()) == whole.content
    stopped = chat.bind(stop=[whole.content.split()[4]]).invoke("Tell me a story about a fox.")
    assert whole.content.startswith(stopped.content) and stopped.response_metadata["finish_reason"] == "stop"
    llm = langchain.OpenAI(**options, max_tokens=12)
    assert len(llm.invoke("Once upon a time").split()) > 5
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat.invoke("fox " * 5000)
    figures["langchain-openai"] = {"invoke, stream, astream, batch, stop, completion, error": "as expected"}


# ---- vLLM's benchmark ----------------------------------------------------------------------------------------------


async def bench_request(
    client: httpx.AsyncClient, number: int, model: str, prompt: str, num_tokens: int, is_chat
) -> dict:
    """A request as ``vllm bench serve`` sends it (backend openai or openai-chat), and read as it reads the answer."""
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    if is_chat:
        body |= {"messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]}
        body["max_completion_tokens"] = num_tokens
    else:
        body |= {"prompt": prompt, "max_tokens": num_tokens, "repetition_penalty": 1.0, "logprobs": None}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    sent_s, times_s, text, usage = time.perf_counter(), [], "", None
    async with client.stream("POST", path, json=body, headers={"x-request-id": f"bench-{number}"}) as response:
        assert response.status_code == 200 and response.headers["x-request-id"] == f"bench-{number}"
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"]:
                times_s.append(time.perf_counter())
                choice = chunk["choices"][0]
                text += (choice["delta"].get("content") if is_chat else choice["text"]) or ""
            elif chunk["usage"]:
                usage = chunk["usage"]
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    return {"ttft_s": times_s[0] - sent_s, "gaps_s": gaps_s, "text": text, "usage": usage}


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [False, True], ids=["openai", "openai-chat"])
def test_vllm_bench_traffic(embedded, figures, is_chat):
    """Its order of things: the model's name, one request to see that it works, then many at random moments."""
    num_requests, num_input, num_output, rate = 60, 64, 24, 6.0
    draw = random.Random(4)
    prompts = [TOKENIZER.decode([draw.randrange(300, 2000) for _ in range(num_input)]) for _ in range(num_requests)]

    async def run() -> list[dict]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=embedded, timeout=PATIENCE_S, limits=limits) as client:
            card = (await client.get("/v1/models")).json()["data"][0]
            assert {"id", "root", "max_model_len"} <= card.keys()
            model = card["id"]
            counted = (await client.post("/tokenize", json={"model": model, "prompt": prompts[0]})).json()["count"]
            first = await bench_request(client, 0, model, prompts[0], num_output, is_chat)
            assert first["usage"]["prompt_tokens"] >= counted - 1
            tasks, due_s = [], time.perf_counter()
            for number, prompt in enumerate(prompts):
                due_s += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                tasks.append(asyncio.create_task(bench_request(client, number, model, prompt, num_output, is_chat)))
            return await asyncio.gather(*tasks)

    started_s = time.perf_counter()
    answers = asyncio.run(run())
    duration_s = time.perf_counter() - started_s
    assert all(answer["usage"]["completion_tokens"] == num_output and answer["text"] for answer in answers)
    eventually(lambda: is_quiet(embedded))
    assert gauge(embedded, "kv_blocks_leaked") == 0
    figures[f"vllm bench serve --backend {'openai-chat' if is_chat else 'openai'}, its requests"] = {
        "completed": len(answers),
        "failed": 0,
        "request_rate": rate,
        "output_throughput": round(num_requests * num_output / duration_s, 1),
        "median_ttft_ms": round(1e3 * percentile([a["ttft_s"] for a in answers], 50), 1),
        "p99_itl_ms": round(1e3 * percentile([gap for a in answers for gap in a["gaps_s"]], 99), 1),
    }
