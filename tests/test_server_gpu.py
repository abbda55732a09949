"""``python serve.py --model llama-3-8b --load-format dummy`` on a GPU: 64 streams, start-up times, no process left.

And under people who do not behave: mixed requests, a cancellation storm, a flood, the engine killed in the middle. With
NANODRIFT_RESULTS set to a folder the figures are written there, serve.json and serve-storm.json, and what /load said
meanwhile as load-trace.json, which the page's tests replay:
``NANODRIFT_RESULTS=results/h200 pytest -m gpu -s tests/test_server_gpu.py``.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from running_server import request_bytes, status_of, talk

from nanodrift.bench import machine

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--model", "llama-3-8b", "--load-format", "dummy", "--max-model-len", "8192")
NUM_STREAMS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 64, 512, 128


class Serve:
    """serve.py as a process of its own, with its kernel cache in a folder of the test's."""

    def __init__(self, cache: Path, log: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url, self.log, self.seen = f"http://127.0.0.1:{port}", log, set()
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "serve.py", *OPTIONS, *options, "--port", str(port)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=log.open("w"),
            env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        )

    def wait_ready(self) -> float:
        """Seconds from the command to /health 200; on the way /health must say that it is loading."""
        saw_loading = False
        while time.monotonic() < self.started_s + 180:
            assert self.process.poll() is None, self.log.read_text()
            try:
                reply = httpx.get(f"{self.url}/health", timeout=5)
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if reply.status_code == 200:
                assert saw_loading
                return time.monotonic() - self.started_s
            assert reply.status_code == 503
            saw_loading = True
            time.sleep(0.05)
        raise AssertionError(f"not ready in time: {self.log.read_text()}")

    def phases_s(self) -> dict[str, float]:
        """What the start-up table says."""
        line = next(line for line in self.log.read_text().splitlines() if line.startswith("start-up"))
        return {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+)[,)]", line)}

    def processes(self) -> list[int]:
        """The server's live processes: itself, what it started, and what it was once seen to have started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended while we looked
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(stat.parent.name)] = int(parent)
        self.seen |= {pid for pid, parent in parents.items() if self.process.pid in (pid, parent)}
        return sorted(self.seen & parents.keys())

    def kill(self) -> None:
        """Whatever is left of it, should a test have failed."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def wait_end(self) -> int:
        status = self.process.wait(30)
        deadline_s = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert self.processes() == [], "a process was left behind"
        return status


async def stream_all(url: str) -> dict:
    """All streams at once from one Python process, which is slower than the engine: gaps between tokens say nothing."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def one(number: int):
        prompt = [(number * 131 + i * 7) % 100_000 for i in range(NUM_PROMPT_TOKENS)]
        sent_s, first_s, usage, reasons = time.monotonic(), None, None, []
        stream = await client.completions.create(
            model=OPTIONS[1],
            prompt=prompt,
            max_tokens=NUM_OUTPUT_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices:
                first_s = first_s or time.monotonic()
                reasons.append(chunk.choices[0].finish_reason)
            usage = chunk.usage or usage
        assert usage.completion_tokens == NUM_OUTPUT_TOKENS
        assert usage.prompt_tokens == NUM_PROMPT_TOKENS
        assert [reason for reason in reasons if reason] == ["length"]
        return first_s - sent_s

    started_s = time.monotonic()
    ttfts = await asyncio.gather(*(one(i) for i in range(NUM_STREAMS)))
    duration_s = time.monotonic() - started_s
    return {
        "num_streams": NUM_STREAMS,
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "duration_s": duration_s,
        "output_throughput": NUM_STREAMS * NUM_OUTPUT_TOKENS / duration_s,
        "median_ttft_ms": 1e3 * statistics.median(ttfts),
    }


@pytest.fixture
def start(tmp_path):
    started = []

    def start_one(name: str, *options: str) -> Serve:
        started.append(Serve(tmp_path / "kernels", tmp_path / f"{name}.log", *options))
        return started[-1]

    yield start_one
    for serve in started:
        serve.kill()


def test_serving_llama_3_8b(start):
    figures = {"startup": {}}
    for name in ("cold", "warm"):
        serve = start(name)
        ready_s = serve.wait_ready()
        figures["startup"][f"{name} kernel cache"] = {"ready_s": round(ready_s, 1)} | serve.phases_s()
        if name == "cold":
            print(serve.log.read_text())
            figures["streams"] = asyncio.run(asyncio.wait_for(stream_all(serve.url), 60))
            assert len(serve.processes()) >= 2, "server and engine are two processes"
            serve.process.send_signal(signal.SIGINT)
            assert serve.wait_end() == 0
        else:
            (engine,) = [
                pid for pid in serve.processes() if "engine_process" in Path(f"/proc/{pid}/cmdline").read_text()
            ]
            os.kill(engine, signal.SIGKILL)
            time.sleep(1.0)
            assert httpx.get(f"{serve.url}/health").status_code == 503
            assert serve.wait_end() == 1
            assert "engine has died" in " ".join(serve.log.read_text().split())
    print(json.dumps(figures, indent=2))
    assert figures["startup"]["cold kernel cache"]["ready_s"] < 120
    assert figures["startup"]["warm kernel cache"]["ready_s"] < 60
    write("serve", figures, [])


def write(name: str, figures: dict, options: list[str]) -> None:
    if folder := os.environ.get("NANODRIFT_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        figures |= machine.describe(torch.device("cuda")) | {"argv": ["serve.py", *OPTIONS, *options]}
        Path(folder, f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


# ---- people who do not behave --------------------------------------------------------------------------------------


def ask(num_prompt: int, max_tokens: int, number: int = 0, **more) -> bytes:
    prompt = [(number * 131 + i * 7) % 100_000 for i in range(num_prompt)]
    return request_bytes(prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)


def engine_of(url: str) -> dict:
    return httpx.get(f"{url}/load", timeout=30).json()["engine"]


def settled(url: str) -> float:
    """Seconds until nothing runs or waits; then no block may be missing."""
    started_s = time.monotonic()
    while (now := engine_of(url))["num_requests_running"] + now["num_requests_waiting"] > 0:
        assert time.monotonic() < started_s + 60
        time.sleep(0.02)
    assert now["kv_blocks_leaked"] == 0 and now["num_free_kv_blocks"] == now["num_kv_blocks"]
    return round(time.monotonic() - started_s, 2)


async def mixed(url: str, number: int, trace: list[dict]) -> dict:
    """30% leave at some moment, 5% ask nonsense, 5% ask for too much; chats and long prompts; 96 at a time."""
    draw, counts, todo = random.Random(1), {"answered": 0, "left": 0, "refused": 0}, iter(range(number))

    async def worker() -> None:
        for index in todo:
            kind = draw.random()
            message = ask(
                draw.choice((64, 300, 700, 2500)), draw.choice((8, 40, 120)), index % 300, stream=index % 2 == 0
            )
            if kind < 0.3:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(talk(url, message), draw.random() ** 2 * 1.5)
                counts["left"] += 1
                continue
            if kind < 0.4:
                message = ask(30, 8, top_p=7) if kind < 0.35 else ask(9000, 8)
            answer, _ = await talk(url, message)
            assert status_of(answer) == (400 if kind < 0.4 else 200), answer[:500]
            counts["refused" if kind < 0.4 else "answered"] += 1

    async def watch() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            while True:
                engine = (await client.get(f"{url}/load")).json()["engine"]
                trace.append(
                    {"at_s": round(time.monotonic() - started_s, 3)} | {k: engine[k] for k in SHOWN if k in engine}
                )
                await asyncio.sleep(0.25)

    started_s = time.monotonic()
    watching = asyncio.create_task(watch())
    await asyncio.gather(*(worker() for _ in range(96)))
    watching.cancel()
    return counts | {"seconds": round(time.monotonic() - started_s, 1)}


# What the page draws.
SHOWN = """num_sms has_partitions residency mode prefill_sms decode_sms prefill_busy_seconds_total watts sm_mhz
decode_busy_seconds_total num_requests_running num_requests_waiting kv_cache_usage_perc""".split()


async def cancelled(url: str) -> float:
    """200 requests of 7,000 tokens whose clients leave after half a second; seconds of the next answer."""

    async def impatient(number: int) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(talk(url, ask(300, 7000, number, stream=True)), 0.5)

    await asyncio.gather(*(impatient(number) for number in range(200)))
    started_s = time.monotonic()
    answer, _ = await talk(url, ask(20, 10))
    assert status_of(answer) == 200
    return round(time.monotonic() - started_s, 3)


async def killed(url: str, engine: int) -> dict:
    """64 streams in flight, then kill -9: what each is told, and when."""
    streams = [asyncio.create_task(talk(url, ask(300, 4000, number, stream=True))) for number in range(64)]
    while engine_of(url)["num_requests_running"] < 64:
        await asyncio.sleep(0.05)
    died_s = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    answers = await asyncio.gather(*streams)
    told_s = time.monotonic() - died_s
    assert all(b'"engine_dead"' in answer and answer.count(b"[DONE]") == 1 for answer, _ in answers)
    assert httpx.get(f"{url}/health").status_code == 503
    return {"streams": 64, "all_told_after_s": round(told_s, 2), "died_s": died_s}


def test_people_who_do_not_behave(start):
    options = ("--max-queue", "1000", "--policy", "mux")
    serve, figures, trace = start("storm", *options), {}, []
    serve.wait_ready()
    asyncio.run(mixed(serve.url, 100, []))  # warm
    figures["mixed"] = asyncio.run(mixed(serve.url, 1500, trace)) | {"freed_after_s": settled(serve.url)}
    engine = engine_of(serve.url)
    names = ("repartitions_total", "num_preemptions_total", "prefix_cache_hits_total", "kv_blocks_leaked", "residency")
    figures["mixed"] |= {name: engine[name] for name in names if name in engine}
    figures["storm of 200"] = {"next_answer_s": asyncio.run(cancelled(serve.url)), "all_freed_s": settled(serve.url)}

    async def flood() -> list[int]:
        answers = await asyncio.gather(*(talk(serve.url, ask(100, 20, number)) for number in range(3000)))
        return [status_of(answer) for answer, _ in answers]

    started_s = time.monotonic()
    statuses = asyncio.run(flood())
    assert set(statuses) == {200, 429}
    figures["flood of 3000"] = {"answered": statuses.count(200), "refused": statuses.count(429)}
    figures["flood of 3000"] |= {"seconds": round(time.monotonic() - started_s, 1), "freed_after_s": settled(serve.url)}

    (victim,) = [pid for pid in serve.processes() if "engine_process" in Path(f"/proc/{pid}/cmdline").read_text()]
    figures["engine killed"] = asyncio.run(killed(serve.url, victim))
    assert serve.wait_end() == 1
    died_s = figures["engine killed"].pop("died_s")
    figures["engine killed"]["gone_after_s"] = round(time.monotonic() - died_s, 2)
    print(json.dumps(figures, indent=1))
    write("serve-storm", figures, list(options))
    if folder := os.environ.get("NANODRIFT_RESULTS"):
        Path(folder, "load-trace.json").write_text("[\n" + ",\n".join(map(json.dumps, trace)) + "\n]\n")
