"""Answers that end early when the client leaves: one JSON body, or a stream of server-sent events.

A client that goes away cancels the work behind its answer, which frees what the request holds in the engine. An error
before the first byte is a plain error answer; one after it is an event, followed by the end of the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing

from starlette.responses import JSONResponse, Response

from nanodrift.server.generation import DONE
from nanodrift.server.protocol import ApiError

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


class _Reply(Response):
    """Runs ``_work`` until it is done or the client leaves, whichever is first."""

    _work: Callable[..., Coroutine[None, None, None]]  # (scope, receive, send); each subclass has its own

    def __init__(self, on_disconnect: Callable[[], None]):
        super().__init__()
        self._on_disconnect = on_disconnect

    async def __call__(self, scope, receive, send) -> None:
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                self._on_disconnect()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class JsonReply(_Reply):
    def __init__(self, answer: Callable[[], Awaitable[dict]], on_disconnect: Callable[[], None]):
        super().__init__(on_disconnect)
        self._answer = answer

    async def _work(self, scope, receive, send) -> None:
        try:
            response = JSONResponse(await self._answer())
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, send)


class EventReply(_Reply):
    def __init__(self, events: AsyncIterator[str], on_disconnect: Callable[[], None]):
        super().__init__(on_disconnect)
        self._events = events

    async def _work(self, scope, receive, send) -> None:
        has_started = False
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    if not has_started:
                        await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
                        has_started = True
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except ApiError as error:
            if not has_started:
                await error_response(error)(scope, receive, send)
                return
            last = f"data: {json.dumps(error.body)}\n\n{DONE}"
            await send({"type": "http.response.body", "body": last.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
