"""What the routes share: the names, the engine, the tokenizer; whether it may serve now; prompts to token ids.

Knows no route and no socket.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from nanodrift.config import SLO
from nanodrift.server.client import MAX_RETRY_AFTER_S, EngineClient, QueueFull
from nanodrift.server.generation import queue_full
from nanodrift.server.guard import MAX_BODY_BYTES
from nanodrift.server.protocol import ApiError, ChatBody, CompletionBody, GenerationBody, plain_messages
from nanodrift.server.telemetry import Telemetry
from nanodrift.server.tokenizer import ChatError, Tokenizer


@dataclass
class Served:
    """What the routes serve. ``tokenizer`` (None for a model without one) arrives when the engine is ready."""

    names: tuple[str, ...]  # the first is the one answers carry
    client: EngineClient
    telemetry: Telemetry
    slo: SLO
    root: str | None = None  # what the first name stands for: an alias, a hub id or a folder
    tokenizer: Tokenizer | None = None
    is_ready: bool = False
    is_draining: bool = False  # what is in flight may end; nothing new begins
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    is_slo_enforced: bool = False  # requests whose first token would come too late are refused

    @property
    def state(self) -> str:
        """loading, ready, draining, stopping, stalled or dead: the client's, except that this side has a say too."""
        state = self.client.state
        if state == "ready":
            return "loading" if not self.is_ready else "draining" if self.is_draining else "ready"
        return state

    async def finish_loading(self) -> None:
        """Waits until the engine is ready and its tokenizer is read. Raises EngineDead."""
        await self.client.wait_ready()
        if self.client.info["has_tokenizer"]:
            self.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, self.client.info["folder"])
        self.is_ready = True

    @property
    def max_model_len(self) -> int:
        return self.client.info["max_model_len"]

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and output together that one request can reach."""
        return min(self.max_model_len, self.client.info["kv_tokens"])

    def check(self, body: GenerationBody) -> None:
        """Raises ApiError if the server cannot serve now, or not this body."""
        self.check_ready()
        if body.model is not None:
            self.check_model(body.model)
        body.check_extra()
        try:
            self.client.check_room(body.n or 1)
        except QueueFull as error:  # before its prompt costs anything
            self.telemetry.on_refused("queue")
            raise queue_full(error) from error

    def check_promise(self, num_prompt_tokens: int, slo: SLO) -> None:
        """Raises ApiError if the first token would come later than promised, where that is a reason to refuse."""
        late_s = self.client.admission.predicted_ttft_s(num_prompt_tokens) - slo.ttft_ms / 1e3
        if self.is_slo_enforced and late_s > 0:
            self.telemetry.on_refused("slo")
            raise ApiError(
                429,
                f"the first token would come {late_s:.1f} seconds later than the {slo.ttft_ms:g} ms that are promised: "
                f"{self.client.admission.num_waiting_tokens} prompt tokens wait already",
                kind="rate_limit_error",
                code="slo_unmeetable",
                headers={"Retry-After": str(min(max(math.ceil(late_s), 1), MAX_RETRY_AFTER_S))},
            )

    def check_ready(self) -> None:
        state = self.state
        if state != "ready":
            message = "the model is still loading" if state == "loading" else "the server is stopping"
            raise ApiError(503, message, kind="server_error", code=f"engine_{state}", headers={"Retry-After": "1"})

    def check_model(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {known}",
                param="model",
                code="model_not_found",
            )

    def max_tokens(self, prompt: list[int], asked: int | None, default: int) -> int:
        """Output tokens the request may have. Raises ApiError, naming both numbers, if the window is too small."""
        window, num_prompt = self.max_model_len, len(prompt)
        room = self.most_tokens - num_prompt
        if asked is not None and num_prompt + asked > window:
            raise ApiError(
                400,
                f"This model's maximum context length is {window} tokens. However, you requested {num_prompt + asked} "
                f"tokens ({num_prompt} in the prompt, {asked} for the completion). Shorten the prompt or lower "
                "max_tokens.",
                code="context_length_exceeded",
            )
        if room < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.most_tokens} tokens. However, your prompt has "
                f"{num_prompt} tokens, which leaves no room for an answer. Shorten the prompt.",
                code="context_length_exceeded",
            )
        return asked if asked is not None else min(default, room)


async def in_thread(function, *arguments):
    """Tokenising and templates take time that belongs to the other requests' streams."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except ChatError as error:
        raise ApiError(400, str(error), param="messages") from error


def encode_prompts(tokenizer: Tokenizer | None, body: CompletionBody) -> list[list[int]]:
    if tokenizer is None and body.stop:
        raise ApiError(400, "this model has no tokenizer: stop strings are not possible", param="stop")
    encoded = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ApiError(400, "this model has no tokenizer: send the prompt as token ids", param="prompt")
            prompt = tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
        prompt = body.truncated(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty: at least one token is needed", param="prompt")
        encoded.append(prompt)
    body.check_echo(sum(map(len, encoded)))
    return encoded


def encode_chat(tokenizer: Tokenizer | None, body: ChatBody) -> list[int]:
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer: use /v1/completions with token ids", param="messages")
    messages, options = plain_messages(body.messages), body.template_options()
    if body.continue_final_message:
        prompt = tokenizer.encode(open_ended(tokenizer.render_chat(messages, **options), messages), False)
    else:
        prompt = tokenizer.encode_chat(messages, **options)
    return body.truncated(prompt)


def open_ended(rendered: str, messages: list[dict]) -> str:
    """A rendered chat up to the end of its last message's content, so that the answer goes on from there."""
    final = messages[-1]["content"].strip()
    start = rendered.rfind(final)
    if not final or start < 0:
        raise ChatError("the last message is empty, or the chat template changes it: it cannot be continued")
    return rendered[: start + len(final)]
