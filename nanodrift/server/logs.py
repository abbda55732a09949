"""--log-json: stderr as JSON lines, one for each request that has ended and one for each other event.

A line holds a request's id, path, status, token counts and times; never a prompt, an answer or a key. Successful GETs
(health, metrics, the page) are left out. Without the option nothing is said of requests at all.
"""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from datetime import datetime, timezone

from nanodrift.config import SLO
from nanodrift.metrics import RequestTimes

log = logging.getLogger("nanodrift.server")
CLIENT_LEFT = 499  # the status, as nginx writes it, of a request whose client did not wait for one
MAX_PATH_CHARS = 200

# What is known of the HTTP request that the running task works for; None where nobody will write it down.
facts: ContextVar[dict | None] = ContextVar("facts", default=None)


class JsonFormatter(logging.Formatter):
    """One line a record: its fields are those of ``extra={"facts": {...}}`` beside time, level and event."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


class RequestLog:
    """ASGI middleware around everything: writes the line when the request has ended, however it ended."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        known = {"method": scope["method"], "path": scope["path"][:MAX_PATH_CHARS]}
        status, started_s = CLIENT_LEFT, time.perf_counter()

        async def sending(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message.get("headers", ()))
                if b"x-request-id" in headers:  # the client's own, which the guard has found harmless
                    known["client_request_id"] = headers[b"x-request-id"].decode("latin-1")
            await send(message)

        token = facts.set(known)
        try:
            await self._app(scope, receive, sending)
        finally:
            facts.reset(token)
            if scope["method"] != "GET" or status >= 400:
                known |= {"status": status, "total_ms": _ms(time.perf_counter() - started_s)}
                log.info("request", extra={"facts": known})


def note(known: dict | None, request_id: str, reason: str, times: RequestTimes, num_cached_tokens: int) -> None:
    """Adds an engine request that has ended to what is known of its HTTP request, which may have several."""
    if known is None:
        return
    known.setdefault("id", request_id)
    counts = {"prompt_tokens": times.num_prompt_tokens, "cached_tokens": num_cached_tokens}
    for name, count in (counts | {"output_tokens": len(times.token_s)}).items():
        known[name] = known.get(name, 0) + count
    reasons = known.setdefault("finish_reasons", [])
    if reason not in reasons:
        reasons.append(reason)
    if times.ttft_s is not None:
        known["ttft_ms"] = max(known.get("ttft_ms", 0.0), _ms(times.ttft_s))
    if gaps_s := times.tbt_s:
        known["max_tbt_ms"] = max(known.get("max_tbt_ms", 0.0), _ms(max(gaps_s)))


def set_up() -> None:
    """Every record of this process as a JSON line on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)


# What startup.py says to people, as lines.


def print_table(info: dict, total_s: float, url: str, name: str, slo: SLO, needs_key: bool) -> None:
    about = {"url": url, "model": name, "seconds": round(total_s, 2), "needs_key": needs_key}
    log.info("ready", extra={"facts": about | {"slo_ttft_ms": slo.ttft_ms, "slo_tbt_ms": slo.tbt_ms, "engine": info}})


def warn(text: str) -> None:
    log.warning(text)


def fail(text: str) -> None:
    log.error(" ".join(text.split()))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
