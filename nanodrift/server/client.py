"""The HTTP process's end of the engine: starts it, sends it requests, hands out their tokens, notices its death.

Everything here runs on one asyncio loop. Knows nothing about HTTP or text.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field

from nanodrift.config import SLO, EngineConfig
from nanodrift.metrics import RequestTimes
from nanodrift.server import logs
from nanodrift.server.admission import Admission
from nanodrift.server.engine_process import DUMP_SIGNAL
from nanodrift.server.frames import READ_BYTES, FrameDecoder, encode

ENGINE_COMMAND = (sys.executable, "-m", "nanodrift.server.engine_process")
CLOSE_GRACE_S = 5.0
DUMP_GRACE_S = 0.5
MAX_QUEUE = 4096
MAX_RETRY_AFTER_S = 30
PROGRESS_STATS = ("prefill_busy_seconds_total", "decode_busy_seconds_total")  # grow with every piece of work done


class EngineDead(RuntimeError):
    """The engine process has ended; the text says why as far as it is known."""


class RequestRefused(ValueError):
    """The engine can never serve this request."""


class QueueFull(RuntimeError):
    """As many requests as are allowed are in flight; ``retry_after_s`` says when to try again."""

    def __init__(self, num_in_flight: int, retry_after_s: int):
        super().__init__(
            f"the server is busy: {num_in_flight} requests are running or waiting, and the queue is full. Try again in "
            f"{retry_after_s} seconds."
        )
        self.retry_after_s = retry_after_s


@dataclass
class Output:
    """Tokens of one request since the last look: a slow reader gets several steps' tokens together."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: list[list] = field(default_factory=list)  # of token_ids, as plan.Logprobs; empty if not asked for
    prompt_logprobs: list[list] = field(default_factory=list)  # of the prompt's second token onward, with the first


class _Stream:
    """Where one request's tokens wait for its reader."""

    def __init__(self, arrival_s: float, slo: SLO, num_prompt_tokens: int):
        self.output = Output()
        self.error: Exception | None = None
        self.wake = asyncio.Event()
        self.arrival_s, self.slo, self.num_prompt_tokens = arrival_s, slo, num_prompt_tokens
        self.token_s = array("d")  # when each token was seen here
        self.queued_s: float | None = None  # of the time to its first token, in the engine's queue
        self.facts = logs.facts.get()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake.set()

    def times(self, is_completed: bool) -> RequestTimes:
        return RequestTimes(self.arrival_s, self.token_s, self.slo, is_completed, self.num_prompt_tokens)

    async def take(self) -> Output:
        await self.wake.wait()
        self.wake.clear()
        if self.error is not None and not self.output.token_ids:
            raise self.error
        output, self.output = self.output, Output(num_cached_tokens=self.output.num_cached_tokens)
        if self.error is not None:
            self.wake.set()
        return output


class EngineClient:
    """One engine process. ``state``: loading, ready, stopping (told to close), stalled or dead.

    At most ``max_queue`` requests wait behind those that the engine runs at once.
    """

    def __init__(self, telemetry=None, max_queue: int = MAX_QUEUE):
        self.state = "loading"
        self.death = ""  # why, once the state is dead
        self.info: dict = {}  # of the ready frame
        self.phase = ""  # of the start-up, and how far it is
        self.stats: dict[str, float] = {}
        self.telemetry = telemetry
        self.max_queue = max_queue
        self.admission = Admission()
        self.process: subprocess.Popen | None = None
        self._streams: dict[str, _Stream] = {}
        self._ready = asyncio.Event()  # or dead
        self.ended = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task | None = None
        self._progress_s = 0.0  # when the engine last did something for a request
        self._finished_s: float | None = None
        self._finish_gap_s = 0.0  # between ends of requests, a running mean

    async def start(
        self, model: str | None, config: EngineConfig, command=ENGINE_COMMAND, trace: str | None = None
    ) -> None:
        """Starts the process and sends it its settings; loading goes on after this returns.

        At its end the process writes what it did to the file ``trace``.
        """
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        # A session of its own: Ctrl-C in the terminal reaches this process only, which then closes the pair. Threads of
        # torch that wait for each other sleep instead of spinning: this process needs the processors too.
        self.process = subprocess.Popen(
            [*command, "--fd", str(fd)],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ,
        )
        theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._send(["start", {"model": model, "config": asdict(config), "trace": trace}])
        self._reading = asyncio.create_task(self._read(reader))

    async def wait_ready(self) -> None:
        """Returns once requests can be sent. Raises EngineDead if loading failed."""
        await self._ready.wait()
        if self.state != "ready":
            raise EngineDead(self.death or "the engine was stopped while loading")

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: dict,
        *,
        slo: SLO | None = None,
        arrival_s: float | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[Output]:
        """Tokens as they come, the last Output with a finish_reason. Closing the iterator early frees the request.

        Raises RequestRefused, QueueFull or EngineDead. ``params`` are SamplingParams' fields; the engine sees no stop
        strings.
        """
        if self.state != "ready":
            raise EngineDead(self.death or f"the engine is {self.state}")
        self.check_room(1)
        now_s = time.perf_counter()
        arrival_s = now_s if arrival_s is None else arrival_s
        if not self._streams:
            self._progress_s = now_s
        stream = self._streams[request_id] = _Stream(arrival_s, slo or SLO(), len(prompt))
        body = {"id": request_id, "prompt": prompt, "params": params, "arrival_s": arrival_s, "cache_salt": cache_salt}
        body |= {"slo": asdict(slo) if slo is not None else None, "priority": priority}
        self._send(["add", body])
        self.admission.on_wait(len(prompt), now_s)
        if self.telemetry is not None:
            self.telemetry.on_prompt(len(prompt))
        try:
            finish_reason = None
            while finish_reason is None:
                output = await stream.take()
                finish_reason = output.finish_reason
                yield output
        finally:
            self.abort(request_id)

    @property
    def num_in_flight(self) -> int:
        """Requests the engine has not finished, as far as is known here."""
        return len(self._streams)

    def check_room(self, num_requests: int) -> None:
        """Raises QueueFull if that many more are too many."""
        most = self.info["max_num_seqs"] + self.max_queue
        if len(self._streams) + num_requests > most:
            seconds = math.ceil(self._finish_gap_s * most / 10)  # until a tenth of them has ended
            raise QueueFull(len(self._streams), min(max(seconds, 1), MAX_RETRY_AFTER_S))

    async def watch(self, stall_timeout_s: float) -> None:
        """Ends an engine that has had requests for ``stall_timeout_s`` and done nothing for any of them."""
        while self.state in ("loading", "ready"):
            await asyncio.sleep(min(1.0, stall_timeout_s / 4))
            if self._streams and time.perf_counter() - self._progress_s > stall_timeout_s:
                self.state = "stalled"
                self.death = f"no progress for {stall_timeout_s:g} seconds while {self.num_in_flight} requests waited"
                self.fail_all(EngineDead(self.death))
                self.process.send_signal(DUMP_SIGNAL)  # every thread's stack, to stderr
                await asyncio.sleep(DUMP_GRACE_S)
                self.process.kill()

    def abort(self, request_id: str, reason: str = "abort", stop_reason: str | None = None) -> None:
        """Ends a request that is still running; what has ended already is left alone."""
        stream = self._streams.pop(request_id, None)
        if stream is not None and self.state == "ready":
            self._send(["abort", request_id, reason, stop_reason])
            self._end(request_id, stream, reason, time.perf_counter(), is_completed=reason == "stop")

    def fail_all(self, error: Exception) -> None:
        """Ends every request in flight with ``error``."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)

    async def close(self) -> int | None:
        """Stops the engine, by force if need be, and returns its exit status. Nothing is left running after this."""
        if self.state in ("loading", "ready"):
            self.state = "stopping"
        self.fail_all(EngineDead("the server is shutting down"))
        self._ready.set()
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        if self.process is None:
            return None
        try:
            return await asyncio.to_thread(self.process.wait, CLOSE_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return await asyncio.to_thread(self.process.wait)

    def _send(self, message: list) -> None:
        self._writer.write(encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = FrameDecoder()
        try:
            while data := await reader.read(READ_BYTES):
                now_s = time.perf_counter()
                for message in decoder.feed(data):
                    self._on_message(message, now_s)
        except (ConnectionError, ValueError) as error:
            self.death = self.death or f"the connection to the engine broke: {error}"
        await self._on_end()

    async def _on_end(self) -> None:
        if not self.death:
            try:
                status = await asyncio.to_thread(self.process.wait, CLOSE_GRACE_S)
                how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
            except subprocess.TimeoutExpired:
                how = "closed its connection"
            self.death = f"the engine process {how}"
        self.state = "dead"
        self.fail_all(EngineDead(self.death))
        self._ready.set()
        self.ended.set()

    def _on_message(self, message: list, now_s: float) -> None:
        kind, *rest = message
        if kind == "step":
            rows, stats = rest
            for row in rows:
                self._on_tokens(now_s, *row)
            if stats is not None:
                if any(stats.get(name) != self.stats.get(name) for name in PROGRESS_STATS):
                    self._progress_s = now_s
                self.stats = stats
        elif kind == "refused":
            stream = self._streams.pop(rest[0], None)
            if stream is not None:
                self.admission.on_leave(stream.num_prompt_tokens)
                stream.fail(RequestRefused(rest[1]))
        elif kind == "phase":
            self.phase = f"{rest[0]} {rest[1]:.0%}"
        elif kind == "ready":
            self.info, self.state = rest[0], "ready"
            self._ready.set()
        elif kind == "error":
            self.death, self.state = rest[0], "dead"
            self.fail_all(EngineDead(self.death))
        else:
            raise ValueError(f"unknown frame {kind!r}")

    def _on_tokens(
        self,
        now_s,
        request_id,
        token_ids,
        finish_reason,
        stop_reason,
        num_cached_tokens,
        queued_s=None,
        logprobs=(),
        prompt_logprobs=(),
    ) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return  # aborted while the step was under way
        self._progress_s = now_s
        output = stream.output
        output.token_ids += token_ids
        output.logprobs += logprobs
        output.prompt_logprobs += prompt_logprobs
        output.finish_reason, output.stop_reason = finish_reason, stop_reason
        output.num_cached_tokens = max(output.num_cached_tokens, num_cached_tokens)
        if token_ids:
            if not stream.token_s:
                stream.queued_s = queued_s
                self.admission.on_first_token(stream.num_prompt_tokens, now_s)
            if self.telemetry is not None:
                since_s = stream.token_s[-1] if stream.token_s else stream.arrival_s
                self.telemetry.on_tokens(len(token_ids), now_s - since_s, is_first=not stream.token_s)
            stream.token_s.extend([now_s] * len(token_ids))
        if finish_reason is not None:
            del self._streams[request_id]
            if self._finished_s is not None:
                self._finish_gap_s += 0.1 * (now_s - self._finished_s - self._finish_gap_s)
            self._finished_s = now_s
            self._end(request_id, stream, finish_reason, now_s, is_completed=True)
        stream.wake.set()

    def _end(self, request_id: str, stream: _Stream, reason: str, now_s: float, is_completed: bool) -> None:
        """Counts a request that has ended, and writes it down."""
        times = stream.times(is_completed)
        if not stream.token_s:
            self.admission.on_leave(stream.num_prompt_tokens)
        if self.telemetry is not None:
            self.telemetry.on_finish(reason, now_s, times, stream.queued_s)
        logs.note(stream.facts, request_id, reason, times, stream.output.num_cached_tokens)
