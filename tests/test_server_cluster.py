"""Two replicas of the embedded model under Ray Serve: spread, affinity, streams, and one of them killed.

Slow tier, where ray is installed: ``pip install -e '.[cluster]'``. With NANODRIFT_RESULTS set to a folder the figures
go to server-cluster.json there.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import openai
import pytest
from running_server import PATIENCE_S, ROOT, error_of, eventually, figures_of

pytestmark = pytest.mark.slow
NAME = "nanodrift-storyteller"
TROUBLE_S = 90.0  # for a replica to be replaced: an interpreter, an engine and Ray's own rounds


@pytest.fixture(scope="module")
def figures():
    with figures_of("server-cluster") as taken:
        yield taken


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("ray", reason="pip install -e '.[cluster]' brings ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray
    from ray import serve

    from nanodrift.server.cluster import build

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"num_replicas": "2", "device": "cpu", "max-model-len": "1024", "prefix-caching": "true"}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, text: str = "Once upon a time", **body) -> httpx.Response:
    options = {"prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=options | body, timeout=PATIENCE_S)


def replicas(url: str) -> set[str]:
    """Those that answer, by their names."""
    return {ask(url, f"Tale {number}", max_tokens=1).headers["x-replica"] for number in range(24)}


def engines() -> dict[int, int]:
    """Processes of this session's replicas: engine -> its replica."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"nanodrift.server.engine_process" in (path / "cmdline").read_bytes():
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if b"ray::ServeReplica" in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found[int(path.name)] = parent
    return found


def num_running(url: str) -> float:
    """Requests that the two engines run at this moment."""
    loads = {}
    while len(loads) < 2:
        answer = httpx.get(f"{url}/load", timeout=PATIENCE_S)
        loads[answer.headers["x-replica"]] = answer.json()["engine"]["num_requests_running"]
    return sum(loads.values())


async def stream(url: str, number: int, num_tokens: int) -> dict:
    """One stream of a conversation of its own: who served it, what came, and how it ended."""
    body = {"prompt": f"Story {number}", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    text, errors, first_s, is_whole = "", [], None, False
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                first_s = first_s or time.monotonic()
                is_whole |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    errors += [chunk["error"]] if "error" in chunk else []
                    text += chunk["choices"][0]["text"] if "choices" in chunk else ""
                elif line.startswith("{"):
                    errors.append(json.loads(line)["error"])
    took_s = time.monotonic() - (first_s or time.monotonic())
    return {"replica": response.headers.get("x-replica"), "status": response.status_code, "text": text,
            "errors": errors, "is_whole": is_whole, "stream_s": took_s}  # fmt: skip


async def streams(url: str, num_streams: int, num_tokens: int) -> list[dict]:
    return await asyncio.gather(*(stream(url, number, num_tokens) for number in range(num_streams)))


def test_streams_spread_and_conversations_stay(url, figures):
    eventually(lambda: len(replicas(url)) == 2)
    answers = asyncio.run(streams(url, 40, 40))
    counts = Counter(answer["replica"] for answer in answers)
    assert len(counts) == 2 and min(counts.values()) >= 5, counts
    assert all(answer["is_whole"] and not answer["errors"] for answer in answers)
    assert max(answer["stream_s"] for answer in answers) > 0.02  # the text came bit by bit
    for number, answer in enumerate(answers[:3]):
        assert ask(url, f"Story {number}", max_tokens=40).json()["choices"][0]["text"] == answer["text"]

    seen, cached = {}, 0
    for name in ("fox", "owl", "bear", "frog"):
        messages = [{"role": "user", "content": f"Tell me a long story about a {name}. " * 12}]
        for _turn in range(3):
            body = {"messages": messages, "max_tokens": 60, "temperature": 0}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
            seen.setdefault(name, set()).add(answer.headers["x-replica"])
            cached += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    assert all(len(names) == 1 for names in seen.values()) and cached > 4 * 64
    figures["spread"] = {"streams": len(answers), "by_replica": sorted(counts.values()), "cached_tokens": cached}


def test_it_is_the_same_server(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    assert client.models.list().data[0].id == NAME
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt="a")
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True)
    assert sum(len(chunk.choices[0].delta.content or "") for chunk in chat) > 10
    assert error_of(httpx.get(f"{url}/nope"), 404)
    assert error_of(httpx.post(f"{url}/v1/completions", content=b"x" * 9_000_000), 413)
    assert httpx.get(url).headers["content-type"].startswith("text/html")


def test_a_client_that_leaves_frees_its_request(url):
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
        reader = response.iter_bytes()
        next(reader)
        eventually(lambda: num_running(url) == 1)
    eventually(lambda: num_running(url) == 0)


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_one_of_two_is_killed(url, figures, victim):
    eventually(lambda: len(engines()) == 2 and len(replicas(url)) == 2)
    before = replicas(url)
    statuses, is_over, started_s = Counter(), threading.Event(), time.monotonic()

    def keep_asking() -> None:
        """Short requests after the death: none of them may be lost."""
        number = 0
        while not is_over.is_set():
            answer, number = ask(url, f"Riddle {number}", max_tokens=4), number + 1
            statuses[answer.status_code if answer.status_code == 200 else answer.text] += 1

    async def in_flight() -> list[dict]:
        running = asyncio.create_task(streams(url, 24, 400))
        await asyncio.to_thread(eventually, lambda: num_running(url) == 24)
        engine, replica = next(iter(engines().items()))
        os.kill({"engine": engine, "replica": replica}[victim], signal.SIGKILL)
        await asyncio.sleep(0.3)  # until the death is known: what comes before is in flight like the others
        asker.start()
        return await running

    asker = threading.Thread(target=keep_asking, daemon=True)
    answers = asyncio.run(in_flight())
    lost = [answer for answer in answers if answer["errors"]]
    assert lost and len({answer["replica"] for answer in lost} - {None}) <= 1  # those of one replica, and they are told
    assert all(answer["is_whole"] and not answer["errors"] for answer in answers if answer not in lost)
    assert len(lost) < len(answers) and all(a["errors"][0]["code"] == "engine_dead" for a in lost)

    deadline_s = time.monotonic() + TROUBLE_S
    while len(now := replicas(url)) < 2 or now == before:
        assert time.monotonic() < deadline_s, "the service was never whole again"
        time.sleep(0.5)
    whole_s = time.monotonic() - started_s
    is_over.set()
    asker.join(PATIENCE_S)
    assert set(statuses) == {200}, statuses
    figures[f"{victim} killed"] = {
        "streams": len(answers),
        "told_of_the_death": len(lost),
        "others_whole": len(answers) - len(lost),
        "asked_meanwhile": statuses[200],
        "of_these_lost": 0,
        "whole_again_after_s": round(whole_s, 1),
    }
