"""serve.py's command line: checks it, takes the port, starts the engine, serves until told to stop.

    python serve.py                          the embedded model, on whatever device there is
    python serve.py --model qwen3-0.6b --device cuda --api-key ...
    python -m nanodrift.server.cli           the same where nanodrift is installed

The order matters to people: settings are checked first, then the port, and only then do weights load. While they load
the server answers, /health with 503. SIGTERM lets answers in flight end, refusing new ones; a second SIGTERM, or
Ctrl-C, does not wait. Exit status: 0 after a signal, 1 when the engine failed, died or stalled, 2 for a bad command
line or a port that is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import time

from rich.console import Console

from nanodrift.config import ConfigError, EngineConfig
from nanodrift.server import dashboard, logs, startup
from nanodrift.server.app import build_app
from nanodrift.server.client import ENGINE_COMMAND, EngineClient, EngineDead
from nanodrift.server.connection import HttpServer, http_server
from nanodrift.server.options import KEY_VARIABLE, api_keys, engine_config, parse
from nanodrift.server.served import Served
from nanodrift.server.telemetry import Telemetry

EMBEDDED_NAME = "nanodrift-storyteller"
LINGER_S = 2.0  # after the engine has died: whoever asks /health meanwhile learns it


def listen(host: str, port: int) -> socket.socket:
    """Takes the port now. Raises OSError if it cannot be had."""
    if not 0 <= port <= 65535:
        raise OSError(f"--port must lie between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror or error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. If another server has it, stop that one "
            f"or choose another port, for example --port {port + 1 if port < 65535 else port - 1}."
        ) from error
    return sock


def main(argv: list[str] | None = None, engine_command=ENGINE_COMMAND) -> int:
    voice = startup
    try:
        args = parse(argv)
        if args.log_json:
            voice = logs
            logs.set_up()
        else:
            logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        config, keys = engine_config(args), api_keys(args)
        listener = listen(args.host, args.port)
    except (ConfigError, OSError) as error:
        voice.fail(str(error))
        return 2
    with listener:
        return asyncio.run(_serve(args, config, keys, listener, engine_command))


async def _serve(args: argparse.Namespace, config: EngineConfig, keys, listener: socket.socket, engine_command) -> int:
    started_s = time.perf_counter()
    names = tuple(getattr(args, "served_model_name", ())) or (args.model or EMBEDDED_NAME,)
    telemetry = Telemetry(names[0], args.metrics_prefix)
    client = EngineClient(telemetry, args.max_queue)
    served = Served(names, client, telemetry, config.slo, root=args.model or "embedded", api_keys=keys)
    served.is_slo_enforced = args.slo_admission
    app, voice = build_app(served), logs if args.log_json else startup
    server = http_server(logs.RequestLog(app) if args.log_json else app)
    told_to_stop, told_to_drain = asyncio.Event(), asyncio.Event()
    _on_signals(served, told_to_stop, told_to_drain)
    url = _url(args.host, listener)
    if not keys and not _is_loopback(listener.getsockname()[0]):
        voice.warn(
            f"--host {args.host} can be reached from other machines and no API key is set: anyone there can use the "
            f"model. Set ${KEY_VARIABLE}."
        )
    await client.start(args.model, config, engine_command, getattr(args, "trace", None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping, draining = asyncio.create_task(told_to_stop.wait()), asyncio.create_task(told_to_drain.wait())
    loading = asyncio.create_task(_load(client, served))
    ended = asyncio.create_task(client.ended.wait())
    tasks = [stopping, draining, loading, ended]
    if args.stall_timeout > 0:
        tasks.append(asyncio.create_task(client.watch(args.stall_timeout)))
    status = 0
    try:
        await _first_of(loading, stopping, draining, serving)
        if loading.done():
            await loading
            voice.print_table(client.info, time.perf_counter() - started_s, url, names[0], config.slo, bool(keys))
            for text in client.info.get("warnings", ()):
                voice.warn(text)
            if args.dashboard:
                tasks.append(asyncio.create_task(dashboard.show(Console(stderr=True), client, telemetry, config.slo)))
            await _first_of(ended, stopping, draining, serving)
            if draining.done():
                tasks.append(asyncio.create_task(_all_answered(server)))
                await _first_of(tasks[-1], ended, stopping, timeout_s=args.drain_timeout)
        if ended.done():
            raise EngineDead(f"the engine has died: {client.death}")
    except (EngineDead, ConfigError) as error:
        voice.fail(str(error))
        status = 1
        if served.is_ready:
            await asyncio.wait((stopping,), timeout=LINGER_S)
    finally:
        server.should_exit = True
        await asyncio.gather(client.close(), serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return status


def _on_signals(served: Served, told_to_stop: asyncio.Event, told_to_drain: asyncio.Event) -> None:
    """Ctrl-C stops at once. SIGTERM lets what is in flight end first; the second one does not."""

    def on_term() -> None:
        (told_to_stop if served.is_draining else told_to_drain).set()
        served.is_draining = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, told_to_stop.set)
    loop.add_signal_handler(signal.SIGTERM, on_term)


async def _first_of(*tasks: asyncio.Task, timeout_s: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def _all_answered(server: HttpServer) -> None:
    while server.num_answering:
        await asyncio.sleep(0.05)


async def _load(client: EngineClient, served: Served) -> None:
    """Waits until the engine is ready and its tokenizer is read. Raises EngineDead or ConfigError."""
    console = Console(stderr=True)  # a person's terminal, or nothing is shown
    with console.status("loading") if console.is_terminal else contextlib.nullcontext() as status:
        waiting = asyncio.create_task(served.finish_loading())
        while not waiting.done():
            if status is not None:
                status.update(f"loading: {client.phase}")
            await asyncio.wait((waiting,), timeout=0.2)
        await waiting


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
