"""The routes beside OpenAI's: tokenising and back in vLLM's shapes, what a load balancer asks, the page for people.

``add_tools`` adds them to the application.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from nanodrift.server.protocol import ApiError, DetokenizeBody, TokenizeBody, plain_messages
from nanodrift.server.served import Served, in_thread
from nanodrift.server.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")


def add_tools(app: FastAPI, served: Served) -> None:
    client = served.client
    page_text = PAGE.read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _page_policy(page_text), "X-Content-Type-Options": "nosniff"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(page_text, media_type="text/html", headers=page_headers)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        tokenizer = _tokenizer(served, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "send either `prompt` or `messages`")
        tokens = await in_thread(_encode, tokenizer, body)
        answer = {"count": len(tokens), "max_model_len": served.max_model_len, "tokens": tokens, "token_strs": None}
        if body.return_token_strs:
            answer["token_strs"] = tokenizer.token_texts(tokens)
        return JSONResponse(answer)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        tokenizer = _tokenizer(served, body.model)
        return JSONResponse({"prompt": await in_thread(tokenizer.decode, body.tokens, False)})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer = _tokenizer(served, None)
        names = ("bos_token", "eos_token", "pad_token", "chat_template", "vocab_size")
        return JSONResponse({name: getattr(tokenizer, name) for name in names})

    @app.get("/load")
    async def load() -> Response:
        answer = {"server_load": client.num_in_flight, "engine": client.stats}
        if served.state == "ready":
            device = client.info["device_name"]
            answer |= {"device": device, "sharing": _sharing(device)}
        return JSONResponse(answer)


def _sharing(device_name: str) -> str:
    """What the page's bar means on this device, for people."""
    if device_name.startswith("cpu"):
        return f"lane time on {device_name}, which has no partitions"
    return device_name


def _page_policy(text: str) -> str:
    """The page may run its own script and talk to this server; nothing else, whatever a model says."""
    script = re.search("<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _tokenizer(served: Served, name: str | None) -> Tokenizer:
    """Raises ApiError if there is none, or not of the model ``name``."""
    served.check_ready()
    if name is not None:
        served.check_model(name)
    if served.tokenizer is None:
        raise ApiError(400, "this model has no tokenizer")
    return served.tokenizer


def _encode(tokenizer: Tokenizer, body: TokenizeBody) -> list[int]:
    if body.messages is None:
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    text = tokenizer.render_chat(plain_messages(body.messages), body.add_generation_prompt is not False)
    return tokenizer.encode(text, add_special_tokens=body.add_special_tokens is True)
