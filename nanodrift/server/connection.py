"""uvicorn as this server uses it: no signal handlers of its own, and connections that may not idle or clog for ever.

A connection has ``header_timeout_s`` from its opening, or from the first byte of a further request, to a whole head; a
client that lets the kernel's and our buffers fill up has ``write_timeout_s`` to make room. Both end in a closed
connection, and the request behind it ends as with any client that leaves. Bodies are guard.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 32 * 1024
MAX_OPEN_FILES = 65536  # what the limit is raised to where the system lets us
RESERVED_FILES = 128  # not for connections
GOODBYE_S = 1.0  # for answers in flight to be told that the server stops


class Connection(H11Protocol):
    header_timeout_s = 20.0
    write_timeout_s = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(self.header_timeout_s, transport.abort)
        self._write_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # a head is complete
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer = _cancelled(self._write_timer)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()  # closing waits until all is sent

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head_timer, self._write_timer = _cancelled(self._head_timer), _cancelled(self._write_timer)

    def _expect_reading(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: cli.py decides how the whole program ends."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield

    @property
    def num_answering(self) -> int:
        """HTTP requests that have not had their whole answer."""
        return len(self.server_state.tasks)


def http_server(app, connection: type[Connection] = Connection) -> HttpServer:
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        limit_concurrency=_raise_file_limit() - RESERVED_FILES,
        timeout_graceful_shutdown=GOODBYE_S,
    )
    return HttpServer(config)


def _raise_file_limit() -> int:
    """A connection is a file: as many as the system grants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # some systems grant less than they say
        return soft
    return wanted


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
