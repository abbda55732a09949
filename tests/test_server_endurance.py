"""The server and the embedded model on the CPU: limits to the token, what leaving frees and how fast, deaths, a soak.

Names begin with the figure they take, R2 to R20. Slow tests print theirs; with NANODRIFT_RESULTS set to a folder these
go to server-endurance.json there. The soak is tests/soak.py, which takes minutes.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from null_engine import CRASH, OOM
from running_server import (
    PATIENCE_S,
    ROOT,
    error_of,
    eventually,
    figures_of,
    place_of,
    program,
    request_bytes,
    status_of,
    stream,
    talk,
)

from nanodrift.metrics import percentile

WINDOW = 256


@pytest.fixture(scope="module")
def figures():
    with figures_of("server-endurance") as taken:
        yield taken


def serve(*options: str):
    return program("--port", "0", "--device", "cpu", *options)


def engine_of(url: str) -> dict:
    return httpx.get(f"{url}/load", timeout=PATIENCE_S).json()["engine"]


# ---- limits --------------------------------------------------------------------------------------------------------


def test_r6_the_windows_edge_to_the_token():
    """(prompt tokens, max_tokens) -> the answer's length, or None for a 400."""
    cases = {
        (WINDOW - 1, 1): 1, (WINDOW - 1, None): 1, (WINDOW - 1, 2): None, (WINDOW, None): None, (WINDOW, 1): None,
        (WINDOW + 1, 1): None, (WINDOW + 1, None): None, (1, WINDOW - 1): WINDOW - 1, (1, WINDOW): None, (1, 0): None,
        (1, -1): None, (1, 1): 1, (1, 10**9): None, (1, 10**18): None, (1, None): 16, (WINDOW - 10, None): 10,
    }  # fmt: skip
    with serve("--max-model-len", str(WINDOW)) as one, httpx.Client(timeout=PATIENCE_S) as http:
        http.base_url = one.wait_url()
        for (num_prompt, max_tokens), length in cases.items():
            body = {"prompt": [7] * num_prompt, "max_tokens": max_tokens, "ignore_eos": True}
            whole = http.post("/v1/completions", json=body)
            if length is None:
                assert error_of(whole, 400)
                assert error_of(http.post("/v1/completions", json=body | {"stream": True}), 400)
                continue
            assert whole.json()["choices"][0]["finish_reason"] == "length"
            assert whole.json()["usage"]["completion_tokens"] == length
            chunks = stream(http, "/v1/completions", **body, stream_options={"include_usage": True})
            assert chunks[-1]["usage"]["total_tokens"] == whole.json()["usage"]["total_tokens"] == num_prompt + length
        chat = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        usage = http.post("/v1/chat/completions", json=chat).json()["usage"]
        assert usage["total_tokens"] == WINDOW  # a chat may use all that is left


def test_r5_what_is_larger_than_the_pool_is_refused_at_once():
    with serve("--max-model-len", str(WINDOW), "--num-kv-blocks", "2") as one:
        with httpx.Client(base_url=one.wait_url(), timeout=PATIENCE_S) as http, ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                http.post, "/v1/completions", json={"prompt": [7], "max_tokens": 120, "ignore_eos": True}
            )
            for prompt, max_tokens in (([7] * 200, 10), ([7] * 10, 200), ([7] * 200, None), ([7] * 128, 1)):
                body = {"prompt": prompt, "max_tokens": max_tokens}
                assert "tokens" in error_of(http.post("/v1/completions", json=body), 400)["message"]
            assert running.result().json()["usage"]["completion_tokens"] == 120
            fitting = http.post("/v1/completions", json={"prompt": [7] * 100, "max_tokens": 28, "ignore_eos": True})
            assert fitting.json()["usage"]["completion_tokens"] == 28


@pytest.mark.slow
def test_r5_how_long_a_refusal_takes(figures):
    with serve("--max-model-len", "2048", "--num-kv-blocks", "8") as one:
        times_s = []
        with httpx.Client(base_url=one.wait_url(), timeout=PATIENCE_S) as http:
            for number in range(200):
                body = {"prompt": [7 + number % 50] * 600, "max_tokens": 10}
                started_s = time.perf_counter()
                assert http.post("/v1/completions", json=body).status_code == 400
                times_s.append(time.perf_counter() - started_s)
            assert http.post("/v1/completions", json={"prompt": [7], "max_tokens": 2}).status_code == 200
    p99_ms = round(percentile(times_s, 99) * 1e3, 1)
    figures["R5 larger than the pool"] = {"requests": 200, "refused": 200, "p99_ms": p99_ms}
    assert p99_ms < 500


# ---- what leaving frees --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["queued", "prefilling", "decoding"])
def test_r2_from_leaving_to_free(figures, phase):
    """The client's last byte to the engine's own word that nothing is held any more, seen through /load."""
    options = ("--max-model-len", "2048", "--max-prefill-tokens", "32", "--no-prefix-caching")
    options += ("--max-num-seqs", "1" if phase == "queued" else "8")

    async def leave_once(url: str, client: httpx.AsyncClient, number: int) -> float:
        async def engine() -> dict:
            return (await client.get("/load")).json()["engine"]

        prompt = [7 + number % 90] * (1800 if phase == "prefilling" else 40)
        _, writer = await asyncio.open_connection(*place_of(url))
        writer.write(request_bytes(prompt=prompt, max_tokens=100, ignore_eos=True, stream=True))
        while True:
            now = await engine()
            if phase == "queued" and now["num_requests_waiting"] == 1:
                break
            if phase != "queued" and now["num_free_kv_blocks"] < now["num_kv_blocks"]:
                break
        writer.transport.abort()
        left_s = time.perf_counter()
        while True:
            now = await engine()
            if (
                now["num_requests_waiting"] == 0
                if phase == "queued"
                else now["num_free_kv_blocks"] == now["num_kv_blocks"]
            ):
                return time.perf_counter() - left_s

    async def all_of_them(url: str) -> list[float]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            times_s = []
            for number in range(40):
                occupant = None
                if phase == "queued":
                    endless = request_bytes(prompt=[9] * 5, max_tokens=2000, ignore_eos=True, stream=True)
                    occupant = asyncio.create_task(talk(url, endless))
                    while (await client.get("/load")).json()["engine"]["num_requests_running"] == 0:
                        pass
                times_s.append(await leave_once(url, client, number))
                if occupant is not None:
                    occupant.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await occupant
                    while (await client.get("/load")).json()["engine"]["num_requests_running"] > 0:
                        pass
            return times_s

    with serve(*options) as one:
        times_s = asyncio.run(all_of_them(one.wait_url()))
    ms = {f"p{p}_ms": round(percentile(times_s, p) * 1e3, 1) for p in (50, 99)}
    figures[f"R2 {phase}"] = {"times": len(times_s)} | ms
    assert ms["p99_ms"] < 2500  # ten times the bound on an idle machine


# ---- deaths --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["killed", "raised", "out of memory"])
def test_r13_the_engine_dies(figures, cause):
    """Ten streams in flight. What they are told and when, what /health says, how the program ends, what is left."""
    engine = ("--step-ms", "20")
    with program("--port", "0", engine=engine) as one, ThreadPoolExecutor(11) as pool:
        url, victim = one.wait_url(), one.engine_pid()
        told_s = []

        def read_on(number: int) -> str:
            body = {"prompt": [7 + number], "max_tokens": 1500, "stream": True}
            text = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).text
            told_s.append(time.perf_counter())
            return text

        answers = [pool.submit(read_on, number) for number in range(10)]
        eventually(lambda: httpx.get(f"{url}/load").json()["server_load"] == 10)
        time.sleep(0.2)
        died_s = time.perf_counter()
        if cause == "killed":
            os.kill(victim, signal.SIGKILL)
        else:
            order = {"prompt": [{"raised": CRASH, "out of memory": OOM}[cause]]}
            pool.submit(httpx.post, f"{url}/v1/completions", json=order, timeout=PATIENCE_S)
        eventually(lambda: is_ill(url))
        ill_s = time.perf_counter() - died_s
        assert one.wait() == 1
        end_s = time.perf_counter() - died_s
        for answer in answers:
            assert answer.result().endswith("data: [DONE]\n\n") and '"engine_dead"' in answer.result()
        assert not Path(f"/proc/{victim}").exists() and "the engine has died" in one.said
        with socket.create_server(place_of(url)):
            pass  # the port is free again
    figures[f"R13 engine {cause}"] = {
        "streams_told_within_s": round(max(told_s) - died_s, 2),
        "health_503_after_s": round(ill_s, 2),
        "gone_after_s": round(end_s, 2),
        "exit_status": 1,
    }


def is_ill(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 503
    except httpx.TransportError:
        return True


# ---- long prompts, long runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_r20_a_long_prompt_among_chats(figures):
    """Six chats stream; three prompts of 1,900 tokens come in between, in token chunks of 32."""
    chat = request_bytes(prompt=[11] * 30, max_tokens=300, ignore_eos=True, stream=True)
    long = request_bytes(prompt=[13] * 1900, max_tokens=4, ignore_eos=True, stream=True)

    async def run(url: str, num_long: int) -> tuple[list[float], list[float]]:
        chats = [asyncio.create_task(talk(url, chat)) for _ in range(6)]
        await asyncio.sleep(0.3)
        firsts_s = []
        for _ in range(num_long):
            started_s = time.perf_counter()
            answer, times_s = await talk(url, long)
            assert status_of(answer) == 200
            firsts_s.append(times_s[0] - started_s)
        gaps_s = []
        for one in chats:
            answer, times_s = await one
            assert b"[DONE]" in answer
            gaps_s += [b - a for a, b in itertools.pairwise(times_s)]
        return gaps_s, firsts_s

    with serve("--max-prefill-tokens", "32", "--no-prefix-caching") as one:
        url = one.wait_url()
        asyncio.run(run(url, 1))  # warm
        alone, _ = asyncio.run(run(url, 0))
        beside, firsts_s = asyncio.run(run(url, 3))
        started_s = time.perf_counter()
        lone = asyncio.run(talk(url, long))[1][0] - started_s
    figures["R20 a long prompt among chats"] = figure = {
        "chat_p99_tbt_ms_alone": round(percentile(alone, 99) * 1e3, 1),
        "chat_p99_tbt_ms_beside": round(percentile(beside, 99) * 1e3, 1),
        "chat_worst_tbt_ms_beside": round(max(beside) * 1e3, 1),
        "long_ttft_s_alone": round(lone, 2),
        "long_ttft_s_among_chats": [round(s, 2) for s in firsts_s],
    }
    assert figure["chat_worst_tbt_ms_beside"] < lone * 1e3  # nobody waits for a whole prompt


@pytest.mark.slow
def test_r12_a_minute_of_the_soak(tmp_path):
    """The script itself; its long run is committed as results/server-soak.json."""
    path = tmp_path / "soak.json"
    command = [sys.executable, ROOT / "tests" / "soak.py", "--minutes", "1", "--output", path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    figure = json.loads(path.read_text())["R12 soak"]
    assert figure["errors"] == 0 and figure["kv_blocks_leaked"] == 0 and figure["requests"] > 50
    assert figure["fds_most"][1] <= figure["fds_most"][0] + 5 and isinstance(figure["rss_slope_mib_per_h"], float)
