"""What stands before every route: the API key, the body's size and kind, the request id.

Default deny: every path but the public ones needs a key once keys are set. The path is the one the server parsed
(``scope["path"]``), never one rebuilt from headers the client controls.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from nanodrift.server.protocol import ApiError
from nanodrift.server.replies import error_response

PUBLIC_PATHS = frozenset({"/", "/health", "/ping"})  # a page that asks for the key; whether the server is alive
MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_TIMEOUT_S = 60.0
MAX_REQUEST_ID_CHARS = 128


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app, api_keys: tuple[str, ...] = (), max_body_bytes: int = MAX_BODY_BYTES):
        self._app = app
        self._key_hashes = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no other protocol is served
        headers = dict(scope["headers"])
        send = _with_request_id(send, headers.get(b"x-request-id"))
        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            if scope["method"] == "POST":
                body = await asyncio.wait_for(self._read_body(headers, receive), BODY_TIMEOUT_S)
                receive = _replay(body, receive)
        except asyncio.TimeoutError:
            error = ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} seconds")
            return await error_response(error)(scope, receive, send)
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        except _Disconnected:
            return None
        return await self._app(scope, receive, send)

    def _check_key(self, path: str, header: bytes) -> None:
        if not self._key_hashes or path in PUBLIC_PATHS:
            return
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        is_known = False
        for known in self._key_hashes:  # every key is compared, in constant time
            is_known |= hmac.compare_digest(digest, known)
        if scheme.lower() != b"bearer" or not is_known:
            raise ApiError(
                401,
                "a valid API key is needed: send it as `Authorization: Bearer <key>`",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive) -> bytes:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "the body must be JSON: send it with `Content-Type: application/json`")
        length = headers.get(b"content-length", b"0")
        too_long = ApiError(413, f"the body is over the limit of {self._max_body_bytes} bytes")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_long
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise too_long
            if not message.get("more_body"):
                return bytes(body)


class _Disconnected(Exception):
    """The client left while sending."""


def _replay(body: bytes, receive):
    """A ``receive`` that gives out the body that was read, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return messages.pop() if messages else await receive()

    return replayed


def _with_request_id(send, request_id: bytes | None):
    """Echoes the client's X-Request-Id if it is one."""
    text = (request_id or b"").decode("latin-1")
    if not text or len(text) > MAX_REQUEST_ID_CHARS or not (text.isascii() and text.isprintable()):
        return send

    async def sending(message):
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
        await send(message)

    return sending
