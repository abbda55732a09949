"""``python serve.py --model llama-3-8b --load-format dummy`` on a GPU: 64 streams, start-up times, no process left.

With NANODRIFT_RESULTS set to a folder the figures are written there as serve.json:
``NANODRIFT_RESULTS=results/h200 pytest -m gpu -s tests/test_server_gpu.py``.
"""

import asyncio
import contextlib
import json
import os
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

from nanodrift.bench import machine

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--model", "llama-3-8b", "--load-format", "dummy", "--max-model-len", "8192")
NUM_STREAMS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 64, 512, 128


class Serve:
    """serve.py as a process of its own, with its kernel cache in a folder of the test's."""

    def __init__(self, cache: Path, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url, self.log, self.seen = f"http://127.0.0.1:{port}", log, set()
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "serve.py", *OPTIONS, "--port", str(port)],
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

    def start_one(name: str) -> Serve:
        started.append(Serve(tmp_path / "kernels", tmp_path / f"{name}.log"))
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
    if folder := os.environ.get("NANODRIFT_RESULTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        figures |= machine.describe(torch.device("cuda")) | {"argv": ["serve.py", *OPTIONS]}
        Path(folder, "serve.json").write_text(json.dumps(figures, indent=2) + "\n")
