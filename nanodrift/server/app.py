"""The routes of OpenAI's API: completions, chat completions, models; health, metrics, version; errors of every route.

``build_app`` needs an EngineClient, which may still be loading, and later the tokenizer; it starts nothing itself.
"""

from __future__ import annotations

import time
from dataclasses import replace

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from nanodrift import __version__
from nanodrift.server.generation import Generation
from nanodrift.server.guard import Guard
from nanodrift.server.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    ChatBody,
    ChatShape,
    CompletionBody,
    CompletionShape,
    GenerationBody,
    choice_seed,
    describe_invalid,
)
from nanodrift.server.replies import EventReply, JsonReply, error_response
from nanodrift.server.served import Served, encode_chat, encode_prompts, in_thread
from nanodrift.server.tools import add_tools

ERRORS = {
    400: "the request is not valid, or asks for what this server does not do",
    401: "no valid API key",
    404: "no such model or path",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full",
    500: "the engine died, or a bug",
    503: "not ready",
}
EITHER_KIND = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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

    @app.get("/ping")
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
        served.check_model(name)
        return JSONResponse(card(name))

    @app.post("/v1/completions", responses=EITHER_KIND)
    async def completions(body: CompletionBody) -> Response:
        arrival_s = time.perf_counter()
        served.check(body)
        prompts = await in_thread(encode_prompts, served.tokenizer, body)
        asked = 1 if body.is_only_echo else body.max_tokens
        limits = [served.max_tokens(prompt, asked, DEFAULT_COMPLETION_TOKENS) for prompt in prompts]
        return _reply(served, CompletionShape, body, prompts, limits, arrival_s)

    @app.post("/v1/chat/completions", responses=EITHER_KIND)
    async def chat_completions(body: ChatBody) -> Response:
        arrival_s = time.perf_counter()
        served.check(body)
        prompt = await in_thread(encode_chat, served.tokenizer, body)
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        limit = served.max_tokens(prompt, asked, served.max_model_len)
        return _reply(served, ChatShape, body, [prompt], [limit], arrival_s)

    add_tools(app, served)

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


def _reply(served: Served, shape, body: GenerationBody, prompts, limits: list[int], arrival_s: float) -> Response:
    first, n = body.sampling(limits[0]), body.n or 1
    served.check_promise(sum(map(len, prompts)), body.promise(served.slo))
    generation = Generation(
        served.client,
        served.tokenizer,
        shape,
        body.model or served.names[0],
        body,
        [prompt for prompt in prompts for _ in range(n)],
        [replace(first, max_tokens=limit, seed=choice_seed(first.seed, i)) for limit in limits for i in range(n)],
        body.promise(served.slo),
        arrival_s,
    )
    if body.stream:
        return EventReply(generation.events(), served.telemetry.on_disconnect)
    return JsonReply(generation.whole, served.telemetry.on_disconnect)
