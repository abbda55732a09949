"""The routes: OpenAI's completions, chat completions and models, and health, metrics, version.

``build_app`` needs an EngineClient, which may still be loading, and later the tokenizer; it starts nothing itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from nanodrift import __version__
from nanodrift.config import SLO
from nanodrift.request import SamplingParams
from nanodrift.server.client import EngineClient
from nanodrift.server.generation import Generation
from nanodrift.server.guard import MAX_BODY_BYTES, Guard
from nanodrift.server.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    ChatBody,
    ChatShape,
    CompletionBody,
    CompletionShape,
    GenerationBody,
    describe_invalid,
)
from nanodrift.server.replies import EventReply, JsonReply, error_response
from nanodrift.server.telemetry import Telemetry
from nanodrift.tokenizer import ChatError, Tokenizer

ERRORS = {
    400: "the request is not valid, or asks for what this server does not do",
    401: "no valid API key",
    404: "no such model or path",
    413: "the body is too large",
    415: "the body is not JSON",
    500: "the engine died, or a bug",
    503: "not ready",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def state(self) -> str:
        """The client's, except that this side must be ready too."""
        state = self.client.state
        return "loading" if state == "ready" and not self.is_ready else state

    @property
    def max_model_len(self) -> int:
        return self.client.info["max_model_len"]

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and output together that one request can reach."""
        return min(self.max_model_len, self.client.info["kv_tokens"])


def build_app(served: Served) -> Guard:
    app = FastAPI(
        title="nanodrift",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"description": text} for status, text in ERRORS.items()},
    )
    client, telemetry = served.client, served.telemetry
    created = int(time.time())

    def card(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "nanodrift",
            "root": served.root or name,
            "parent": None,
            "max_model_len": client.info.get("max_model_len"),
        }

    @app.get("/health")
    async def health() -> Response:
        if served.state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": served.state}, 503, headers={"Retry-After": "1"})

    @app.get("/version")
    async def get_version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(telemetry.render(client.stats), media_type=METRICS_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in served.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(served, name)
        return JSONResponse(card(name))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Response:
        arrival_s = time.perf_counter()
        _check(served, body)
        prompts = await _in_thread(_encode_prompts, served.tokenizer, body)
        asked = [body.max_tokens] * len(prompts)
        limits = [_max_tokens(served, prompt, asked[0], DEFAULT_COMPLETION_TOKENS) for prompt in prompts]
        return _reply(served, CompletionShape, body, prompts, limits, arrival_s)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody) -> Response:
        arrival_s = time.perf_counter()
        _check(served, body)
        prompt = await _in_thread(_encode_chat, served.tokenizer, body)
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        limit = _max_tokens(served, prompt, asked, served.max_model_len)
        return _reply(served, ChatShape, body, [prompt], [limit], arrival_s)

    @app.exception_handler(ApiError)
    async def on_api_error(request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request, error: RequestValidationError) -> Response:
        return error_response(describe_invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error: HTTPException) -> Response:
        message = {404: "there is no such path here", 405: "this path does not take this method"}
        text = message.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, text, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def on_bug(request, error: Exception) -> Response:  # the trace goes to the log, never to the client
        return error_response(ApiError(500, "internal error", kind="server_error"))

    return Guard(app, served.api_keys, served.max_body_bytes)


def _check(served: Served, body: GenerationBody) -> None:
    """Raises ApiError if the server cannot serve now, or not this body."""
    state = served.state
    if state != "ready":
        message = "the model is still loading" if state == "loading" else "the server is stopping"
        raise ApiError(503, message, kind="server_error", code=f"engine_{state}", headers={"Retry-After": "1"})
    if body.model is not None:
        _check_model(served, body.model)
    body.check_extra()


def _check_model(served: Served, name: str) -> None:
    if name not in served.names:
        known = ", ".join(served.names)
        raise ApiError(
            404,
            f"the model {name[:200]!r} does not exist here; this server has {known}",
            param="model",
            code="model_not_found",
        )


async def _in_thread(function, *arguments):
    """Tokenising and templates take time that belongs to the other requests' streams."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except ChatError as error:
        raise ApiError(400, str(error), param="messages") from error


def _encode_prompts(tokenizer: Tokenizer | None, body: CompletionBody) -> list[list[int]]:
    if tokenizer is None and body.stop:
        raise ApiError(400, "this model has no tokenizer: stop strings are not possible", param="stop")
    encoded = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ApiError(400, "this model has no tokenizer: send the prompt as token ids", param="prompt")
            prompt = tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
        if not prompt:
            raise ApiError(400, "the prompt is empty: at least one token is needed", param="prompt")
        encoded.append(prompt)
    return encoded


def _encode_chat(tokenizer: Tokenizer | None, body: ChatBody) -> list[int]:
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer: use /v1/completions with token ids", param="messages")
    return tokenizer.encode_chat(body.plain_messages())


def _max_tokens(served: Served, prompt: list[int], asked: int | None, default: int) -> int:
    """Output tokens the request may have. Raises ApiError, naming both numbers, if the window is too small."""
    window, num_prompt = served.max_model_len, len(prompt)
    room = served.most_tokens - num_prompt
    if asked is not None and num_prompt + asked > window:
        raise ApiError(
            400,
            f"This model's maximum context length is {window} tokens. However, you requested {num_prompt + asked} "
            f"tokens ({num_prompt} in the prompt, {asked} for the completion). Shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
        )
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {served.most_tokens} tokens. However, your prompt has "
            f"{num_prompt} tokens, which leaves no room for an answer. Shorten the prompt.",
            code="context_length_exceeded",
        )
    return asked if asked is not None else min(default, room)


def _reply(served: Served, shape, body: GenerationBody, prompts, limits: list[int], arrival_s: float) -> Response:
    first = body.sampling(limits[0])
    params: list[SamplingParams] = [replace(first, max_tokens=limit) for limit in limits]
    served.telemetry.on_prompt(sum(map(len, prompts)))
    generation = Generation(
        served.client,
        served.tokenizer,
        shape,
        body.model or served.names[0],
        body,
        prompts,
        params,
        body.slo(served.slo),
        arrival_s,
    )
    if body.stream:
        return EventReply(generation.events(), served.telemetry.on_disconnect)
    return JsonReply(generation.whole, served.telemetry.on_disconnect)
