"""A load client for any OpenAI-compatible server: sends when a request is due, streams, and counts tokens honestly.

Nothing is held back because the server is slow: there is no limit on connections, and latency counts from the moment a
request was due, so a stall shows in every request that fell into it. Tokens are counted from ``usage``, never from
chunks where that can be helped: one chunk may carry several tokens, or (the role) none. Needs httpx. Knows nothing
about the shapes of workloads or about figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

try:
    import httpx
except ModuleNotFoundError:  # said when a server is to be asked
    httpx = None

from nanodrift.bench.load import INTERRUPTED, Advance, Record
from nanodrift.bench.workloads import PromptMaker, Sample
from nanodrift.config import SLO

REFUSALS = (429, 503)
PROBE_TOKENS = 64
KEEP_ALIVE_S = 2.0  # of an idle connection: less than servers grant, or a request may meet one that is just closing
HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}
# What a server may not take, from the most to the least that is asked for: the probe finds the first form it accepts.
FORMS = (
    {"prompt": "ids", "extensions": True, "usage": True},
    {"prompt": "text", "extensions": True, "usage": True},
    {"prompt": "text", "extensions": False, "usage": True},
    {"prompt": "text", "extensions": False, "usage": False},
)


@dataclass
class TokenTimes:
    """When each token of one streamed answer was seen, from its chunks."""

    text_s: list[float] = field(default_factory=list)  # chunks with text
    totals: list[tuple[float, int]] = field(default_factory=list)  # (when, output tokens so far) of every usage seen
    is_continuous: bool = False  # usage came along with the chunks, not just at the end
    has_finished: bool = False
    error: str | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None

    def feed(self, chunk: dict, now_s: float) -> None:
        if chunk.get("error"):
            error = chunk["error"]
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)
        choices = chunk.get("choices") or []
        is_last = False
        for choice in choices:
            delta = choice.get("delta") or {}
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                self.text_s.append(now_s)
            is_last = is_last or bool(choice.get("finish_reason"))
        self.has_finished = self.has_finished or is_last
        usage = chunk.get("usage")
        if usage:
            self.totals.append((now_s, usage.get("completion_tokens") or 0))
            self.is_continuous = self.is_continuous or bool(choices and not is_last)
            self.num_prompt_tokens = usage.get("prompt_tokens")
            self.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def token_s(self) -> tuple[tuple[float, ...], str]:
        """(times, who counted). With a total only at the end, tokens are spread evenly over the chunks with text."""
        if not self.totals:
            return tuple(self.text_s), "chunks"
        if self.is_continuous:
            times: list[float] = []
            for now_s, total in self.totals:
                times += [now_s] * (total - len(times))
            return tuple(times), "usage"
        last_s, total = self.totals[-1]
        seen = self.text_s or [last_s]
        return tuple(seen[i * len(seen) // total] for i in range(total)), "usage"


@dataclass
class Server:
    """Where the server is, and how to ask it. ``connect`` fills in what it can find out."""

    base_url: str
    endpoint: str = "/v1/completions"
    model: str | None = None
    max_model_len: int | None = None
    extra_body: dict = field(default_factory=dict)
    headers: dict = field(default_factory=dict)
    timeout_s: float = 600.0  # of one request, from when it was due
    ignore_eos: bool = True
    form: dict = field(default_factory=lambda: FORMS[0])
    tokens_per_word: float = 1.0  # of a prompt sent as text

    @property
    def is_chat(self) -> bool:
        return "chat" in self.endpoint

    def connect(self, ready_timeout_s: float = 0.0) -> None:
        """Waits for the server, takes its model's name, and finds by trial what it accepts. Raises ValueError."""
        if httpx is None:
            raise ValueError("the load client needs httpx: pip install 'nanodrift[clients]'")
        deadline_s = time.monotonic() + ready_timeout_s
        fresh = httpx.Limits(max_keepalive_connections=0)  # some servers drop the connection after an error
        with httpx.Client(base_url=self.base_url, headers=self.headers, timeout=60.0, limits=fresh) as http:
            while (trouble := self._try_to_connect(http)) is not None:
                if time.monotonic() >= deadline_s:
                    raise ValueError(f"{self.base_url}{self.endpoint} cannot be used: {trouble}")
                time.sleep(0.2)

    def _try_to_connect(self, http) -> str | None:
        """Returns what is in the way, now and perhaps later. Raises ValueError for what waiting will not cure."""
        try:
            models = http.get("/v1/models")
            with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
                entry = models.json()["data"][0]
                self.model = self.model or entry["id"]
                self.max_model_len = entry.get("max_model_len")
            sample, prompts = Sample((("probe", PROBE_TOKENS),), 2), PromptMaker(seed=-1)
            for form in FORMS[1 if self.is_chat else 0 :]:
                self.form = form
                reply = http.post(self.endpoint, content=self.body(sample, prompts), headers=HEADERS)
                if reply.status_code not in (400, 422):
                    break
        except httpx.TransportError as error:
            return str(error)
        if reply.status_code == 200:
            self._learn(reply.text)
            return None
        answer = f"HTTP {reply.status_code}: {reply.text[:300]}"
        if reply.status_code < 500:
            raise ValueError(f"{self.base_url}{self.endpoint} answers {answer}")
        return answer

    def _learn(self, stream: str) -> None:
        """From the probe's answer: how many tokens a word of our text prompts takes."""
        times = TokenTimes()
        for line in stream.splitlines():
            if line.startswith("data: {"):
                times.feed(json.loads(line[5:]), 0.0)
        if self.form["prompt"] == "text" and times.num_prompt_tokens:
            self.tokens_per_word = times.num_prompt_tokens / PROBE_TOKENS

    def body(self, sample: Sample, prompts: PromptMaker) -> bytes:
        """The request as it goes over the wire."""
        is_ids = self.form["prompt"] == "ids" and sample.text is None
        prompt = prompts.token_ids(sample) if is_ids else prompts.text(sample, self.tokens_per_word)
        body = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        body |= {"model": self.model, "max_tokens": sample.num_output_tokens, "temperature": 0.0, "stream": True}
        if self.form["usage"]:
            body["stream_options"] = {"include_usage": True}
            if self.form["extensions"]:
                body["stream_options"]["continuous_usage_stats"] = True
        if self.form["extensions"] and self.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": sample.num_output_tokens}
        return json.dumps(body | self.extra_body).encode()

    def run(
        self,
        bodies: Sequence[bytes],
        lengths: Sequence[int],
        due_s: Sequence[float],
        slo: SLO,
        max_concurrency: int | None,
        is_closed: bool,
        advance: Advance,
    ) -> list[Record]:
        """Sends each body when it is due and returns the records of those that were issued, in that order."""
        gc.collect()
        gc.freeze()  # a collection over all the prompts would be a stall of our own making
        try:
            return asyncio.run(self._run(bodies, lengths, due_s, slo, max_concurrency, is_closed, advance))
        finally:
            gc.unfreeze()

    async def _run(self, bodies, lengths, due_s, slo, max_concurrency, is_closed, advance) -> list[Record]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(number, stop.set)
        slots = asyncio.Semaphore(max_concurrency if max_concurrency is not None else len(bodies) + 1)
        records: dict[int, Record] = {}
        tasks: list[asyncio.Task] = []
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S)
        async with httpx.AsyncClient(
            base_url=self.base_url, headers=self.headers, limits=limits, timeout=None, trust_env=False
        ) as http:
            start_s = time.perf_counter()

            async def one(index: int, arrival_s: float) -> None:
                try:
                    records[index] = await self._one(http, bodies[index], lengths[index], arrival_s, start_s, slo)
                    advance(records[index])
                finally:
                    slots.release()

            async def issue() -> None:
                for index, due in enumerate(due_s):
                    if (wait_s := start_s + due - time.perf_counter()) > 0:
                        await asyncio.sleep(wait_s)
                    await slots.acquire()
                    arrival_s = time.perf_counter() - start_s if is_closed else due
                    tasks.append(asyncio.create_task(one(index, arrival_s)))
                await asyncio.gather(*tasks)

            issuing, stopping = asyncio.create_task(issue()), asyncio.create_task(stop.wait())
            await asyncio.wait((issuing, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in (issuing, stopping, *tasks):
                task.cancel()
            done = await asyncio.gather(issuing, *tasks, return_exceptions=True)
            for failure in done:
                if isinstance(failure, Exception):
                    raise failure
        return [records[index] for index in sorted(records)]

    async def _one(self, http, body: bytes, num_prompt: int, arrival_s: float, start_s: float, slo: SLO) -> Record:
        times, error, is_refused = TokenTimes(), None, False
        sent_s = time.perf_counter() - start_s

        async def ask() -> None:
            nonlocal error, is_refused
            async with http.stream("POST", self.endpoint, content=body, headers=HEADERS) as reply:
                if reply.status_code != 200:
                    is_refused = reply.status_code in REFUSALS
                    error = f"HTTP {reply.status_code}: {(await reply.aread())[:300].decode(errors='replace')}"
                    return
                has_ended = False
                async for data in _events(reply.aiter_raw()):
                    if data == b"[DONE]":
                        has_ended = True
                    elif not has_ended:
                        times.feed(json.loads(data), time.perf_counter() - start_s)
                error = times.error
                if error is None and not (has_ended or times.has_finished):
                    error = "the stream broke off"

        left_s = arrival_s + self.timeout_s - sent_s if math.isfinite(self.timeout_s) else None
        try:
            await asyncio.wait_for(ask(), left_s)
        except (asyncio.TimeoutError, TimeoutError):
            error = f"timed out after {self.timeout_s:g} s"
        except (httpx.HTTPError, OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        except asyncio.CancelledError:
            error = INTERRUPTED
        token_s, counted_by = times.token_s()
        return Record(
            arrival_s=arrival_s,
            token_s=token_s,
            slo=slo,
            is_completed=error is None,
            num_prompt_tokens=times.num_prompt_tokens or num_prompt,
            sent_s=sent_s,
            end_s=time.perf_counter() - start_s,
            error=error,
            is_refused=is_refused,
            counted_by=counted_by,
            num_cached_tokens=times.num_cached_tokens,
        )


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, as soon as a line is complete."""
    buffer = b""
    async for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if buffer.startswith(b"data:"):
        yield buffer[5:].strip()
