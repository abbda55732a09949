"""More than one GPU or machine: a Ray Serve application with one engine per GPU (``pip install 'nanodrift[cluster]'``).

    serve run nanodrift.server.cluster:build num_replicas=8 model=llama-3.1-8b max_queue=500

``num_replicas`` (default: a replica for each GPU of the cluster) aside, the arguments are serve.py's options about the
engine, its promises, names and keys. Ray starts replicas, watches them, replaces a dead one and carries the streams;
each replica is a whole server of this package without its socket, so that requests, errors, keys and limits are those
of serve.py. ``Front`` decides one thing: a conversation goes to the replica that has served its beginning, whose cache
holds it, by Ray's consistent hashing; when that replica is full or gone, to the next one.

/metrics and /load speak of the one replica that ``X-Replica`` names. Ray's own ports have no key and run what they are
sent: keep them on a network of your own (.github/SECURITY.md).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from nanodrift.server.app import build_app
from nanodrift.server.client import EngineClient, EngineDead
from nanodrift.server.generation import DONE
from nanodrift.server.guard import MAX_BODY_BYTES
from nanodrift.server.options import api_keys, as_flags, build_parser, engine_config, parse
from nanodrift.server.protocol import ApiError
from nanodrift.server.replies import error_response
from nanodrift.server.served import Served
from nanodrift.server.telemetry import Telemetry

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
BEGINNING = {"chars": 2048, "tokens": 512}  # of a prompt: what tells one conversation from another
RETRIES_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # before each try of a request that no replica has taken yet


def build(settings: dict) -> serve.Application:
    """What ``serve run`` deploys. Raises ConfigError for an option that serve.py does not have."""
    settings = {key: {"true": True, "false": False}.get(value, value) for key, value in settings.items()}
    num_replicas = int(settings.pop("num_replicas", 0))
    argv = list(as_flags(build_parser(), settings, "of the cluster"))
    is_cpu = engine_config(parse(argv)).device == "cpu"
    replicas = Replica.options(
        num_replicas=num_replicas or max(1, int(ray.cluster_resources().get("GPU", 0))),
        ray_actor_options={"num_cpus": 1, "num_gpus": 0 if is_cpu else 1},
    )
    return Front.bind(replicas.bind(argv))


@serve.deployment(
    max_ongoing_requests=1024,
    health_check_period_s=1.0,
    health_check_timeout_s=30.0,
    graceful_shutdown_timeout_s=25.0,
    request_router_config=RequestRouterConfig(request_router_class=ROUTER),
)
class Replica:
    """serve.py without a socket: the application of app.py and its engine process."""

    async def __init__(self, argv: list[str]):
        args = parse(argv)
        config = engine_config(args)
        names = tuple(getattr(args, "served_model_name", ())) or (args.model or "nanodrift-storyteller",)
        telemetry = Telemetry(names[0], args.metrics_prefix)
        self._client = EngineClient(telemetry, args.max_queue)
        self._name = serve.get_replica_context().replica_id.unique_id
        served = Served(names, self._client, telemetry, config.slo, root=args.model, api_keys=api_keys(args))
        served.is_slo_enforced = args.slo_admission
        self._app = build_app(served)
        await self._client.start(args.model, config)
        await served.finish_loading()

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has died."""
        if self._client.state != "ready":
            raise EngineDead(self._client.death or f"the engine is {self._client.state}")

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[tuple | bytes | None]:
        """Status and headers, then the body in pieces as they come; or None: ask another replica."""
        if self._client.state != "ready":
            yield None
            return
        gone, sent = asyncio.Event(), asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.create_task(self._app(scope, receive, sent.put))
        work.add_done_callback(lambda _: sent.put_nowait(None))
        is_open = True
        try:
            while is_open:
                messages = [await sent.get()]
                while not sent.empty():  # what piled up goes in one piece
                    messages.append(sent.get_nowait())
                is_open = messages[-1] is not None
                for message in messages:
                    if message is not None and message["type"] == "http.response.start":
                        yield message["status"], [*message["headers"], (b"x-replica", self._name.encode())]
                if piece := b"".join(message.get("body", b"") for message in messages if message is not None):
                    yield piece
        finally:
            gone.set()
            await work


@serve.deployment(max_ongoing_requests=4096)
class Front:
    """Takes requests in and passes each to a replica."""

    def __init__(self, replicas: DeploymentHandle):
        self._replicas = replicas.options(stream=True, method_name="answer")

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return error_response(ApiError(413, f"the body is over the limit of {MAX_BODY_BYTES} bytes"))
        wanted = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
        scope = {name: request.scope[name] for name in wanted if name in request.scope}
        conversation = conversation_of(bytes(body)) if request.method == "POST" else None
        for pause_s in RETRIES_S:
            await asyncio.sleep(pause_s)
            handle = self._replicas.options(session_id=conversation) if conversation else self._replicas
            parts = handle.remote(scope, bytes(body))
            try:
                head = await anext(parts)
            except asyncio.CancelledError:  # the client has gone
                parts.cancel()
                raise
            except Exception:  # the replica died with it
                return error_response(died())
            if head is not None:
                answer = StreamingResponse(passed_on(parts), head[0])
                answer.raw_headers = list(head[1])
                return answer
            conversation = None  # another replica may take it
        return error_response(ApiError(503, "no engine is ready", kind="server_error", headers={"Retry-After": "5"}))


async def passed_on(parts) -> AsyncIterator[bytes]:
    """The rest of an answer. A replica that dies meanwhile is said as an event; a client that goes ends the request."""
    try:
        async for part in parts:
            yield part
    except asyncio.CancelledError:
        raise
    except Exception:
        yield f"data: {json.dumps(died().body)}\n\n{DONE}".encode()
    finally:
        parts.cancel()


def died() -> ApiError:
    return ApiError(500, "the engine of this request has died; ask again", kind="server_error", code="engine_dead")


def conversation_of(body: bytes) -> str | None:
    """A name for what the prompt begins with: of a chat, all up to the first answer. None: nothing to go by."""
    try:
        content = json.loads(body)
        if "messages" in content:
            messages = content["messages"]
            roles = [message["role"] for message in messages]
            beginning = messages[: roles.index("assistant") if "assistant" in roles else len(roles)]
        else:
            prompt = content["prompt"]
            beginning = prompt[: BEGINNING["chars" if isinstance(prompt, str) else "tokens"]]
        name = json.dumps([beginning, content.get("cache_salt")]).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # whatever it is, the replica will say so
    return hashlib.sha256(name).hexdigest()
