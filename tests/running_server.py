"""A server around the null engine (null_engine.py) in a thread of the test's process, and what tests ask of it.

The server listens on a free port, the engine runs in its own process as always. A completion's text is its prompt over
and over; a chat's is its last user message and then the end token.
"""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import uvicorn

from nanodrift.config import SLO, EngineConfig
from nanodrift.server.app import Served, build_app
from nanodrift.server.cli import _load, _Server
from nanodrift.server.client import EngineClient
from nanodrift.server.telemetry import Telemetry
from nanodrift.tokenizer import Tokenizer

NULL_ENGINE = (sys.executable, str(Path(__file__).with_name("null_engine.py")))
TOKENIZER = Tokenizer.from_folder(Path(__file__).resolve().parents[1] / "nanodrift" / "embedded")
PATIENCE_S = 20.0  # for things that take milliseconds on an idle machine


class RunningServer:
    """A server and its null engine, both running until ``close``."""

    def __init__(self, *engine_options: str, model: str | None = None, wait: bool = True, **served_options):
        self._started, self._failure = threading.Event(), None
        self._arguments = (engine_options, model, wait, served_options)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE_S)
        if self._failure is not None:
            raise self._failure

    async def _run(self):
        engine_options, model, wait, served_options = self._arguments
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        telemetry = Telemetry("echo")
        self.client = EngineClient(telemetry)
        self.served = Served(("echo", "second/name"), self.client, telemetry, SLO(), **served_options)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # so that slow readers are felt
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(build_app(self.served), log_config=None, ws="none", lifespan="off")
        server = _Server(config)
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
