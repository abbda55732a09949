"""serve.py's command line: checks it, takes the port, starts the engine, serves until told to stop.

    python serve.py                          the embedded model, on whatever device there is
    python serve.py --model qwen3-0.6b --device cuda --api-key ...

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
import math
import os
import re
import signal
import socket
import time
from dataclasses import fields

from rich.console import Console

from nanodrift import __version__
from nanodrift.config import SLO, ConfigError, EngineConfig
from nanodrift.server import startup
from nanodrift.server.app import build_app
from nanodrift.server.client import ENGINE_COMMAND, MAX_QUEUE, EngineClient, EngineDead
from nanodrift.server.connection import HttpServer, http_server
from nanodrift.server.served import Served
from nanodrift.server.telemetry import PREFIX, Telemetry
from nanodrift.tokenizer import Tokenizer

EMBEDDED_NAME = "nanodrift-storyteller"
KEY_VARIABLE = "NANODRIFT_API_KEY"
LINGER_S = 2.0  # after the engine has died: whoever asks /health meanwhile learns it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options without a value given are left out, so that EngineConfig's defaults hold."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serves a model over an OpenAI-compatible API. Without arguments: the small embedded model, on "
        "whatever device there is, at http://127.0.0.1:8000.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--model", default=None, help="alias (qwen3-0.6b, llama-3.1-8b, ...), hub id or folder; none = the embedded one"
    )
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call the model (several allowed)")
    add("--device", help="auto, cpu, cuda or cuda:N (auto)")
    add("--dtype", help="auto, bfloat16, float16 or float32 (auto: the model's own, float32 on a CPU)")
    add("--load-format", help="auto or dummy (weights of the right shape, made up)")
    add("--max-model-len", type=int, metavar="TOKENS", help="prompt and answer together (the model's window)")
    add("--max-num-seqs", type=int, metavar="N", help="requests that run at once (256)")
    add("--max-prefill-tokens", type=int, metavar="TOKENS", help="prompt tokens of one launch (2048)")
    add("--memory-fraction", "--gpu-memory-utilization", type=float, metavar="SHARE", help="of the GPU's memory (0.9)")
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="prompts start behind what the cache holds of them (on a CPU: yes, on a GPU: no)",
    )
    add("--deterministic", action="store_true", help="answers do not depend on what else is running")
    add("--seed", type=int, help="of requests that bring none (0)")
    add("--slo-ttft-ms", type=float, metavar="MS", help="time promised to the first token (2000)")
    add("--slo-tbt-ms", type=float, metavar="MS", help="time promised between tokens (50)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on, 0 = any that is free (8000)")
    add(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help=f"keys clients must send; other users of this machine can read them here, so better in ${KEY_VARIABLE}",
    )
    add("--api-key-file", metavar="FILE", help="the same, one key a line")
    add(
        "--max-queue",
        type=_count,
        default=MAX_QUEUE,
        metavar="N",
        help=f"requests that may wait; more get a 429 ({MAX_QUEUE})",
    )
    add(
        "--metrics-prefix",
        type=_name,
        default=PREFIX,
        metavar="NAME",
        help=f"of /metrics; vllm fits its dashboards ({PREFIX})",
    )
    add("--drain-timeout", type=_seconds, default=25.0, metavar="S", help="for answers in flight after SIGTERM (25)")
    add(
        "--stall-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="after which an engine that has requests and makes no progress is ended, 0 = never (300)",
    )
    add("--version", action="version", version=__version__)
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise ValueError("a count is not negative")  # argparse says the rest
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"seconds are needed, not {text!r}")
    return seconds


def _name(text: str) -> str:
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", text):
        raise argparse.ArgumentTypeError(f"letters, digits and underscores are needed, not {text!r}")
    return text


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError."""
    given = vars(args)
    slo = {name: given[f"slo_{name}"] for name in ("ttft_ms", "tbt_ms") if f"slo_{name}" in given}
    names = {field.name for field in fields(EngineConfig)}
    return EngineConfig.from_options(**{k: v for k, v in given.items() if k in names}, slo=SLO(**slo))


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """From the command line, a file and, separated by commas, the environment. Raises OSError."""
    keys = [*args.api_key, *os.environ.get(KEY_VARIABLE, "").split(",")]
    if path := getattr(args, "api_key_file", None):
        with open(path, encoding="utf-8") as file:
            keys += file.read().splitlines()
        if not any(key.strip() for key in keys):
            raise OSError(f"--api-key-file {path} holds no key")
    return tuple(key.strip() for key in keys if key.strip())


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
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config, keys = engine_config(args), api_keys(args)
        listener = listen(args.host, args.port)
    except (ConfigError, OSError) as error:
        startup.fail(str(error))
        return 2
    with listener:
        return asyncio.run(_serve(args, config, keys, listener, engine_command))


async def _serve(args: argparse.Namespace, config: EngineConfig, keys, listener: socket.socket, engine_command) -> int:
    started_s = time.perf_counter()
    names = tuple(getattr(args, "served_model_name", ())) or (args.model or EMBEDDED_NAME,)
    telemetry = Telemetry(names[0], args.metrics_prefix)
    client = EngineClient(telemetry, args.max_queue)
    served = Served(names, client, telemetry, config.slo, root=args.model or "embedded", api_keys=keys)
    server = http_server(build_app(served))
    told_to_stop, told_to_drain = asyncio.Event(), asyncio.Event()
    _on_signals(served, told_to_stop, told_to_drain)
    url = _url(args.host, listener)
    if not keys and not _is_loopback(listener.getsockname()[0]):
        startup.warn(
            f"--host {args.host} can be reached from other machines and no API key is set: anyone there can use the "
            f"model. Set ${KEY_VARIABLE}."
        )
    await client.start(args.model, config, engine_command)
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
            startup.print_table(client.info, time.perf_counter() - started_s, url, names[0], config.slo, bool(keys))
            await _first_of(ended, stopping, draining, serving)
            if draining.done():
                tasks.append(asyncio.create_task(_all_answered(server)))
                await _first_of(tasks[-1], ended, stopping, timeout_s=args.drain_timeout)
        if ended.done():
            raise EngineDead(f"the engine has died: {client.death}")
    except (EngineDead, ConfigError) as error:
        startup.fail(str(error))
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
    console = Console(stderr=True)
    with console.status("loading") if console.is_terminal else contextlib.nullcontext() as status:
        waiting = asyncio.create_task(client.wait_ready())
        while not waiting.done():
            if status is not None:
                status.update(f"loading: {client.phase}")
            await asyncio.wait((waiting,), timeout=0.2)
        await waiting
    if client.info["has_tokenizer"]:
        served.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, client.info["folder"])
    served.is_ready = True


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
