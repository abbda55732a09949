"""A server around the null engine (null_engine.py) in a thread of the test's process, and what tests ask of it.

The server listens on a free port, the engine runs in its own process as always. A completion's text is its prompt over
and over; a chat's is its last user message and then the end token.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import torch

from nanodrift.bench import machine
from nanodrift.config import SLO, EngineConfig
from nanodrift.server.app import build_app
from nanodrift.server.cli import _load, listen
from nanodrift.server.client import MAX_QUEUE, EngineClient
from nanodrift.server.connection import Connection, http_server
from nanodrift.server.served import Served
from nanodrift.server.telemetry import Telemetry
from nanodrift.server.tokenizer import Tokenizer

NULL_ENGINE = (sys.executable, str(Path(__file__).with_name("null_engine.py")))
ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.from_folder(ROOT / "nanodrift" / "embedded")
PATIENCE_S = 60.0  # for things that take milliseconds, or a second for a program to start, on an idle machine


class RunningServer:
    """A server and its null engine, both running until ``close``."""

    def __init__(
        self,
        *engine_options: str,
        model: str | None = None,
        wait: bool = True,
        max_queue: int = MAX_QUEUE,
        connection: type[Connection] = Connection,
        **served_options,
    ):
        self._started, self._failure = threading.Event(), None
        self._arguments = (engine_options, model, wait, max_queue, connection, served_options)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        if self._failure is not None:
            raise self._failure

    async def _run(self):
        engine_options, model, wait, max_queue, connection, served_options = self._arguments
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        telemetry = Telemetry("echo")
        self.client = EngineClient(telemetry, max_queue)
        self.served = Served(("echo", "second/name"), self.client, telemetry, SLO(), **served_options)
        listener = listen("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that slow readers are felt
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = http_server(build_app(self.served), connection)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await self.client.start(model, EngineConfig(), [*NULL_ENGINE, *engine_options])
            loading = asyncio.create_task(_load(self.client, self.served))
            if wait:
                await loading
        except Exception as error:
            self._failure = error
        self._started.set()
        await self._stop.wait()
        await self.client.close()
        server.should_exit = True
        await asyncio.gather(serving, loading, return_exceptions=True)

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.client.process.poll() is not None  # the engine process is gone, whatever happened

    def gauge(self, name: str) -> float:
        """One number of /metrics, summed over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"nanodrift:{name}{{")]
        assert values, f"{name} is not exported"
        return sum(values)


@contextlib.contextmanager
def running(*engine_options: str, **options):
    server = RunningServer(*engine_options, **options)
    try:
        yield server
    finally:
        server.close()


def eventually(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.02)


def complete(http, **body):
    return http.post("/v1/completions", json={"prompt": "the fox ran", "max_tokens": 8} | body)


def echo(prompt: str, num_tokens: int) -> str:
    ids = TOKENIZER.encode(prompt)
    return TOKENIZER.decode((ids * (num_tokens // len(ids) + 1))[:num_tokens])


def stream(http, path: str, **body) -> list[dict]:
    """The chunks of a streamed answer, after the checks that hold for every stream."""
    with http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        text = "".join(response.iter_text())
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    chunks = [json.loads(line[len("data: ") :]) for line in lines[:-2]]
    for key in ("id", "object", "created", "model"):
        assert len({chunk[key] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in {choice["index"] for choice in choices}:
        reasons = [choice["finish_reason"] for choice in choices if choice["index"] == index]
        assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) <= {None}
    return chunks


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


class Program:
    """serve.py in a process of its own. ``engine`` options choose the null engine instead of the real one."""

    def __init__(self, *arguments: str, engine: tuple[str, ...] | None = None, **environment: str):
        command = [sys.executable, str(ROOT / "serve.py")]
        if engine is not None:
            code = "import sys; from nanodrift.server.cli import main; sys.exit(main(sys.argv[1:], {!r}))"
            command = [sys.executable, "-c", code.format([*NULL_ENGINE, *engine])]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = ""

    def wait_url(self) -> str:
        """Reads stderr up to the address it serves at."""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"^  (http://\S+)$", line):
                return found[1]
        raise AssertionError(f"it ended with {self.process.wait()} and said: {self.said}")

    def wait(self) -> int:
        """Its exit status; ``said`` is complete after this, and nothing of it is left running."""
        out, rest = self.process.communicate(timeout=PATIENCE_S)
        self.said += rest
        assert out == ""
        return self.process.returncode

    def engine_pid(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def program(*arguments, **options):
    one = Program(*arguments, **options)
    try:
        yield one
    finally:
        one.kill()


# ---- figures, and requests on sockets of their own: clients in numbers, some of which do not behave ------------------


@contextlib.contextmanager
def figures_of(name: str):
    """What tests measured: printed, and with NANODRIFT_RESULTS set to a folder kept there as ``name``.json."""
    taken = {}
    yield taken
    print("\n" + json.dumps(taken, indent=1))
    if taken and (folder := os.environ.get("NANODRIFT_RESULTS")):
        path = Path(folder) / f"{name}.json"
        about = machine.describe(torch.device("cpu")) | {"argv": ["pytest", f"tests/test_{name.replace('-', '_')}.py"]}
        before = (json.loads(path.read_text()) if path.exists() else {}) | about
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(before | taken, indent=1) + "\n")


def place_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def request_bytes(path: str = "/v1/completions", **body) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def talk(url: str, message: bytes, read_bytes: int = 65536, pause_s: float = 0.0) -> tuple[bytes, list[float]]:
    """Sends one request on a connection of its own. Returns the whole answer and when each part of it came."""
    reader, writer = await asyncio.open_connection(*place_of(url), limit=read_bytes)
    try:
        writer.write(message)
        parts, times_s = [], []
        while part := await reader.read(read_bytes):
            parts.append(part)
            times_s.append(time.perf_counter())
            if pause_s:
                await asyncio.sleep(pause_s)
        return b"".join(parts), times_s
    finally:
        writer.transport.abort()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"nanodrift:{name}{{"))


def rss_mib(one: Program) -> float:
    status = Path(f"/proc/{one.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def is_quiet(url: str) -> bool:
    return gauge(url, "num_requests_running") + gauge(url, "num_requests_waiting") == 0
