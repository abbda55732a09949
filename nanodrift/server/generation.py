"""From token events to an answer: one HTTP request, its choices, their text, as one JSON body or as an event stream.

Each prompt of the request becomes ``n`` engine requests and ``n`` choices. Knows nothing about sockets: ``whole``
returns a body and ``events`` yields the lines of a stream; closing the iterator frees what the request holds in the
engine.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field

from nanodrift.config import SLO
from nanodrift.request import SamplingParams
from nanodrift.server.client import EngineClient, EngineDead, QueueFull, RequestRefused
from nanodrift.server.logprobs import Scored, TokenBytes, scored
from nanodrift.server.protocol import ApiError, ChatShape, CompletionShape, GenerationBody, usage
from nanodrift.server.tokenizer import Detokenizer, Tokenizer

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Piece:
    """What a choice gained: text that is certain, and how many tokens it has by now."""

    text: str
    num_tokens: int
    is_first: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tokens: list[Scored] = field(default_factory=list)  # those whose text came since the last piece, if asked for
    token_ids: list[int] = field(default_factory=list)  # likewise, but without an echoed prompt's


class IdText:
    """Stands in for a Detokenizer where the model has no tokenizer: the text of a token is its number."""

    stopped_by = None

    def push(self, token_ids: list[int]) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def finish(self) -> str:
        return ""


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: Tokenizer | None) -> TokenBytes:
    """One for each model, since it remembers what it has looked up."""
    return TokenBytes(tokenizer)


def queue_full(error: QueueFull) -> ApiError:
    headers = {"Retry-After": str(error.retry_after_s)}
    return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)


class Generation:
    """The work behind one request to /v1/completions or /v1/chat/completions."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        shape: type[CompletionShape] | type[ChatShape],
        model_name: str,
        body: GenerationBody,
        prompts: list[list[int]],
        params: list[SamplingParams],
        slo: SLO,
        arrival_s: float,
    ):
        """``prompts`` and ``params`` have an entry for each choice: the ``n`` choices of a prompt stand together."""
        unique = uuid.uuid4().hex
        self.request_id = shape.prefix + (body.request_id or unique)
        self._engine_id = shape.prefix + unique
        self._client, self._tokenizer, self._shape, self._body = client, tokenizer, shape, body
        self._prompts, self._params, self._slo, self._arrival_s = prompts, params, slo, arrival_s
        self._num_tokens = [0] * len(prompts)
        self._num_cached = [0] * len(prompts)
        self._head = {"created": int(time.time()), "model": model_name}

    async def whole(self) -> dict:
        """The answer as one JSON body. Raises ApiError."""
        texts: list[list[str]] = [[] for _ in self._prompts]
        tokens: list[list[Scored]] = [[] for _ in self._prompts]
        token_ids: list[list[int]] = [[] for _ in self._prompts]
        ends: list[Piece | None] = [None] * len(self._prompts)
        async with aclosing(self._merged()) as pieces:
            async for index, piece in pieces:
                texts[index].append(piece.text)
                tokens[index] += piece.tokens
                token_ids[index] += piece.token_ids
                if piece.finish_reason is not None:
                    ends[index] = piece
        if self._has_logprobs:
            logprobs = await asyncio.to_thread(lambda: [self._logprobs_of()(of_choice) for of_choice in tokens])
        else:
            logprobs = [None] * len(ends)
        choices = [
            self._shape.whole_choice(index, "".join(texts[index]), logprobs[index], end.finish_reason, end.stop_reason)
            for index, end in enumerate(ends)
        ]
        if self._body.return_token_ids:
            for index, choice in enumerate(choices):
                choice |= {"prompt_token_ids": self._prompts[index], "token_ids": token_ids[index]}
        head = {"id": self.request_id, "object": self._shape.whole} | self._head
        return head | {"choices": choices, "usage": self._usage(), "system_fingerprint": None}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events. Raises ApiError, possibly after the first event."""
        options = self._body.stream_options
        has_usage = bool(options and options.include_usage)
        is_continuous = has_usage and bool(options.continuous_usage_stats)
        head = _json({"id": self.request_id, "object": self._shape.chunk} | self._head)
        logprobs_of = [self._logprobs_of() for _ in self._prompts] if self._has_logprobs else []

        def counted(counts: dict | None) -> str:
            return f',"usage":{_json(counts)}' if has_usage else ""

        async with aclosing(self._merged()) as pieces:
            async for index, piece in pieces:
                if not (piece.text or piece.is_first or piece.finish_reason or is_continuous):
                    continue  # everything new is held back
                logprobs = logprobs_of[index](piece.tokens) if piece.tokens else None
                chunks = self._shape.chunk_choices(
                    index, piece.text, logprobs, piece.is_first, piece.finish_reason, piece.stop_reason
                )
                if self._body.return_token_ids:
                    chunks[-1] |= {"token_ids": piece.token_ids}
                    if piece.is_first:
                        chunks[0] |= {"prompt_token_ids": self._prompts[index]}
                for choice in chunks:
                    yield _event(head, [choice], counted(self._usage() if is_continuous else None))
        if has_usage:
            yield _event(head, [], counted(self._usage()))
        yield DONE

    @property
    def _has_logprobs(self) -> bool:
        return self._params[0].logprobs is not None

    def _logprobs_of(self):
        """For one choice: its new tokens -> what the answer says of them."""
        return self._shape.logprobs_of(token_bytes(self._tokenizer), self._body.skip_special_tokens is not False)

    def _echoed(self, index: int) -> str:
        """The text of a choice's prompt."""
        asked, prompt = self._body.prompts()[index // (self._body.n or 1)], self._prompts[index]
        if isinstance(asked, str) and not self._body.truncate_prompt_tokens:
            return asked
        if self._tokenizer is None:
            return IdText().push(prompt)
        return self._tokenizer.decode(prompt, self._body.skip_special_tokens is not False)

    def _usage(self) -> dict:
        """A prompt counts once, however many choices it has."""
        n = self._body.n or 1
        return usage(sum(map(len, self._prompts[::n])), sum(self._num_tokens), sum(self._num_cached[::n]))

    async def _merged(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all choices as they come. A choice that is not read holds back only itself."""
        if len(self._prompts) == 1:
            async with aclosing(self._pieces(0)) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        queue: asyncio.Queue = asyncio.Queue(maxsize=len(self._prompts))

        async def pump(index: int) -> None:
            try:
                async with aclosing(self._pieces(index)) as pieces:
                    async for piece in pieces:
                        await queue.put((index, piece))
            except Exception as error:
                await queue.put((index, error))

        tasks = [asyncio.create_task(pump(index)) for index in range(len(self._prompts))]
        num_open = len(tasks)
        try:
            while num_open:
                index, piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                yield index, piece
                num_open -= piece.finish_reason is not None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pieces(self, index: int) -> AsyncIterator[Piece]:
        """One choice's text, up to its stop string or stop token (not shown, unless asked for) or its last token."""
        engine_id = f"{self._engine_id}-{index}" if len(self._prompts) > 1 else self._engine_id
        prompt, params, body = self._prompts[index], self._params[index], self._body
        include_stop = bool(body.include_stop_str_in_output)
        text = IdText()
        if self._tokenizer is not None:
            text = Detokenizer(
                self._tokenizer,
                params.stop_strings,
                include_stop,
                prompt_token_ids=prompt if self._shape is CompletionShape else (),
                min_tokens=params.min_tokens,
                skip_special_tokens=body.skip_special_tokens is not False,
            )
        wire_params = asdict(params) | {"stop": None}  # stop strings are this side's business
        outputs = self._client.generate(
            engine_id,
            prompt,
            wire_params,
            slo=self._slo,
            arrival_s=self._arrival_s,
            cache_salt=body.cache_salt,
            priority=body.priority or 0,
        )
        must_echo = self._shape is CompletionShape and bool(body.echo)
        pending: list[Scored] = []  # their text has not been shown yet
        pending_ids: list[int] = []
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    is_first = self._num_tokens[index] == 0
                    self._num_cached[index] = output.num_cached_tokens
                    shown = ""
                    if must_echo and output.token_ids:
                        must_echo, shown = False, self._echoed(index)
                        if self._has_logprobs and len(output.prompt_logprobs) == len(prompt) - 1:
                            pending = [Scored(prompt[0], None), *scored(prompt[1:], output.prompt_logprobs)]
                    if body.is_only_echo:
                        yield Piece(shown, 0, is_first, "length", None, pending)
                        return
                    hides_last = output.finish_reason == "stop" and not include_stop
                    text_of_tokens, num_taken = self._show(index, text, output.token_ids, hides_last)
                    shown += text_of_tokens
                    if body.return_token_ids:
                        pending_ids += output.token_ids[:num_taken]
                    if output.logprobs:
                        if hides_last and self._shape is ChatShape:  # completions tell of every token that they count
                            num_taken = min(num_taken, len(output.token_ids) - 1)
                        pending += scored(output.token_ids[:num_taken], output.logprobs[:num_taken])
                    if output.finish_reason is not None:
                        shown += text.finish()
                    reason, stop_reason = output.finish_reason, output.stop_reason
                    if text.stopped_by is not None:
                        reason, stop_reason = "stop", text.stopped_by
                        self._client.abort(engine_id, reason, stop_reason)
                    if reason == "stop" and stop_reason in self._client.info.get("eos_token_ids", ()):
                        stop_reason = None  # the model's own end is no news
                    tokens, token_ids = [], []
                    if shown or reason is not None:
                        tokens, pending = pending, []
                        token_ids, pending_ids = pending_ids, []
                    yield Piece(shown, self._num_tokens[index], is_first, reason, stop_reason, tokens, token_ids)
                    if reason is not None:
                        return
        except QueueFull as error:
            raise queue_full(error) from error
        except RequestRefused as error:
            raise ApiError(400, str(error)) from error
        except EngineDead as error:
            raise ApiError(500, str(error), kind="server_error", code="engine_dead") from error

    def _show(self, index: int, text, token_ids: list[int], hides_last: bool) -> tuple[str, int]:
        """Text of new tokens, counting them up to the one that completed a stop string; and how many were counted."""
        num_shown = len(token_ids) - hides_last
        shown, num_taken = "", 0
        for position, token_id in enumerate(token_ids):
            self._num_tokens[index] += 1
            num_taken += 1
            if position < num_shown:
                shown += text.push([token_id])
            if text.stopped_by is not None:
                break
        return shown, num_taken


def _json(content) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _event(head: str, choices: list[dict], tail: str) -> str:
    """One chunk: ``head`` is the JSON object that all chunks of an answer begin with, ``tail`` what follows choices."""
    return f'data: {head[:-1]},"choices":{_json(choices)}{tail}}}\n\n'
