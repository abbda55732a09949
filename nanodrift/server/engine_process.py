"""The engine's process: takes requests off the socket pair, steps the engine, sends one frame of tokens per step.

Started by client.py as ``python -m nanodrift.server.engine_process --fd N``; its settings come in the first frame. It
dies with the process that started it: the pair's end of file wakes the loop, and a watcher thread ends the process even
in the middle of loading. Knows nothing about HTTP or text.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from nanodrift.config import SLO, EngineConfig
from nanodrift.request import SamplingParams
from nanodrift.server.frames import FrameLink
from nanodrift.server.power import PowerLog
from nanodrift.server.startup import policy_line, slo_warnings, split_warnings
from nanodrift.server.trace import Trace

STATS_EVERY_S = 0.25
PREDICTIONS_EVERY_S = 10.0  # sorting them takes milliseconds
DUMP_SIGNAL = signal.SIGUSR1  # prints every thread's stack, also while a thread hangs in a library
ORPHAN_GRACE_S = 1.0  # for the loop to notice by itself that the HTTP process is gone


def run(fd: int, load) -> int:
    """Serves until the other side closes; returns the exit status.

    ``load(model, config, report)`` returns ``(engine, info)``: an Engine, and a dict for the ready frame.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the HTTP process, which then closes the pair
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    sock = socket.socket(fileno=fd)
    threading.Thread(target=_die_with, args=(fd,), daemon=True).start()
    link, is_loading = FrameLink(sock), True
    try:
        messages = link.receive(None)
        while not messages:
            messages = link.receive(None)
        _, start = messages.pop(0)
        settings = start["config"]
        config = EngineConfig.from_options(**(settings | {"slo": SLO(**settings["slo"])}))
        engine, info = load(start["model"], config, lambda name, done: link.send(["phase", name, done]))
        trace = Trace(engine) if start.get("trace") else None
        gc.collect()
        gc.freeze()
        gc.disable()  # the loop makes no cycles, and a walk through all prompts' tokens takes up to 19 ms
        link.send(["ready", info])
        is_loading = False
        try:
            _loop(link, engine, messages)
        finally:
            if trace is not None:
                trace.write(Path(start["trace"]), engine.power.samples if engine.power is not None else ())
            engine.close()
    except EOFError:
        return 0
    except Exception as error:
        is_plain = is_loading and _is_plain(error)
        if not is_plain:
            traceback.print_exc()
        with contextlib.suppress(OSError, EOFError):
            link.send(["error", str(error) if is_plain else f"{type(error).__name__}: {error}"])
            link.flush()
        return 1


def _loop(link: FrameLink, engine, messages: list[list]) -> None:
    stats_s, predicted_s, was_busy, predictions = 0.0, time.perf_counter(), True, {}
    tokenless = {}  # requests whose first token has not been sent
    while True:
        for message in messages:
            _handle(link, engine, message, tokenless)
        has_left = any(message[0] == "abort" for message in messages)  # what it held is free: say so at once
        events = engine.step() if engine.has_work else []
        is_busy, now_s = engine.has_work, time.perf_counter()
        stats = None
        if now_s - stats_s >= STATS_EVERY_S or is_busy != was_busy or (messages and not is_busy) or has_left:
            if now_s - predicted_s >= PREDICTIONS_EVERY_S or (was_busy and not is_busy):
                predictions, predicted_s = engine.predictions(), now_s
            stats = engine.stats() | {"predictions": predictions} | engine.executor.counters()
            if not is_busy:
                _account(stats, is_new=was_busy)
            stats_s, was_busy = now_s, is_busy
        if events or stats:
            rows = [_row(event, _queued_s(tokenless.pop(event.request_id, None))) for event in events]
            link.send(["step", rows, stats])
        if not is_busy:
            gc.collect()  # what cycles exceptions make, now that nobody waits
        messages = link.receive(0 if is_busy else None)


def _row(event, queued_s: float | None) -> list:
    """One token event on the wire; logprobs, which few ask for, only where there are any."""
    row = [event.request_id, event.token_ids, event.finish_reason, event.stop_reason, event.num_cached_tokens, queued_s]
    return [*row, event.logprobs, event.prompt_logprobs] if event.logprobs or event.prompt_logprobs else row


def _account(stats: dict, is_new: bool) -> None:
    """An idle engine has every KV block free or cached: what is missing has leaked, and is said on stderr."""
    num_blocks = stats.get("num_kv_blocks", 0)
    num_leaked = stats.setdefault("kv_blocks_leaked", num_blocks - stats.get("num_free_kv_blocks", 0))
    if num_leaked and is_new:
        print(f"engine: idle, and {num_leaked} of {num_blocks} KV blocks are missing", file=sys.stderr, flush=True)


def _queued_s(request) -> float | None:
    """With a request's first token: how long it was in the queue."""
    return request.scheduled_s - request.arrival_s if request is not None and request.scheduled_s is not None else None


def _handle(link: FrameLink, engine, message: list, tokenless: dict) -> None:
    kind, *rest = message
    if kind == "abort":
        tokenless.pop(rest[0], None)
        engine.abort(*rest)
    elif kind == "add":
        body = rest[0]
        try:
            request = engine.new_request(
                body["prompt"],
                SamplingParams(**body["params"]),
                request_id=body["id"],
                arrival_s=body["arrival_s"],
                slo=SLO(**body["slo"]) if body["slo"] else None,
                cache_salt=body["cache_salt"],
                priority=body["priority"],
            )
            engine.add(request)
            tokenless[body["id"]] = request
        except ValueError as error:
            link.send(["refused", body["id"], str(error)])
    else:
        raise ValueError(f"unknown frame {kind!r}")


def _die_with(fd: int) -> None:
    """Ends this process when the other end of the pair is gone, whatever the main thread is doing."""
    poll = select.poll()
    poll.register(fd, 0)  # hang-up and errors are reported always
    poll.poll()
    time.sleep(ORPHAN_GRACE_S)
    os._exit(0)


def _is_plain(error: Exception) -> bool:
    """True for errors of loading whose text says it all; of the others a trace goes to stderr."""
    return isinstance(error, ValueError | OSError) or type(error).__name__ == "OutOfMemoryError"


def _load(model: str | None, config: EngineConfig, report):
    from nanodrift import hub
    from nanodrift.server.tokenizer import load_tokenizer
    from nanodrift.startup import load_engine

    folder = hub.resolve_model(model, config.load_format)
    tokenizer = load_tokenizer(folder, config.load_format)  # to know before the weights are read that there is one
    loaded = load_engine(folder, config, report)
    loaded.engine.power = PowerLog.of(loaded.device)
    model_config, kv_tokens = loaded.model_config, loaded.num_kv_tokens
    made_up = ", made-up weights" if config.load_format == "dummy" else ""
    info = {
        "folder": str(folder),
        "description": f"{model_config.architecture}, {model_config.num_parameters / 1e6:,.0f}M parameters{made_up}",
        "is_embedded": folder == hub.EMBEDDED,
        "has_tokenizer": tokenizer is not None,
        "eos_token_ids": list(model_config.eos_token_ids),
        "device_name": loaded.engine.executor.device_name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "weights_bytes": loaded.weights_bytes,
        "kv_tokens": kv_tokens,
        "kv_bytes": kv_tokens * model_config.num_kv_values_per_token * loaded.dtype.itemsize,
        "max_model_len": loaded.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "policy": policy_line(config, loaded.engine.executor.partitions, loaded.cost),
        "warnings": split_warnings(config, getattr(loaded.engine.executor, "split", None))
        + (slo_warnings(config.slo, loaded.cost) if loaded.device.type == "cuda" else []),
        "phases_s": loaded.phases_s,
    }
    return loaded.engine, info


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="this process's end of the socket pair")
    return run(parser.parse_args().fd, _load)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without the interpreter's teardown, which is slow and, in native extensions, noisy
