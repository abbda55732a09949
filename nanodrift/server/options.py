"""serve.py's options: flags, and a file of the same names beside them; what they mean for the engine; the API keys.

    python serve.py --config serve.toml --port 8001        flags win over the file

The file is TOML or, with the ending .json, JSON: option names without their dashes, ``max-queue = 100``. The engine's
options are the fields of nanodrift/config.py's EngineConfig, and so is everything that says what they default to.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from nanodrift import __version__
from nanodrift.config import POLICIES, SLO, ConfigError, EngineConfig
from nanodrift.server.client import MAX_QUEUE
from nanodrift.server.telemetry import PREFIX

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

KEY_VARIABLE = "NANODRIFT_API_KEY"
ENGINE_HELP = {  # field of EngineConfig: (metavar, help)
    "device": ("DEVICE", "auto, cpu, cuda or cuda:N"),
    "dtype": ("DTYPE", "auto, bfloat16, float16 or float32; auto: the model's own, float32 on a CPU"),
    "load_format": ("FORMAT", "auto, or dummy: weights of the right shape, made up"),
    "dummy_draw": ("DRAW", "of dummy weights: unit_rms or uniform"),
    "max_model_len": ("TOKENS", "prompt and answer together; default: the model's window"),
    "max_num_seqs": ("N", "requests that run at once"),
    "max_prefill_tokens": ("TOKENS", "prompt tokens of one launch"),
    "prefill_layers": ("N", "layers of one launch, where the policy does not choose; default: all"),
    "memory_fraction": ("SHARE", "of the GPU's memory, for weights, cache and scratch together"),
    "num_kv_blocks": ("N", "blocks of 64 tokens in the cache; default: as many as fit"),
    "prefix_caching": ("", "prompts start behind what the cache holds of them"),
    "deterministic": ("", "answers do not depend on what else is running"),
    "policy": ("POLICY", f"how prompts and tokens share the device: {', '.join(POLICIES)}; mux divides its SMs"),
    "modes": ("MODES", "what mux may choose from"),
    "chunk_tokens": ("TOKENS", "of every step under the policy chunked"),
    "decode_sms": ("SMS", "of the decode half under the policies static and overlap"),
    "profile": ("FILE", "measured costs, of bench.py calibrate; default: those shipped for GPU and model"),
    "seed": ("SEED", "of requests that bring none"),
}
ALIASES = {"memory_fraction": ("--gpu-memory-utilization",)}


def build_parser() -> argparse.ArgumentParser:
    """Engine options without a value given are left out of the result, so that EngineConfig's defaults hold."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Serves a model over an OpenAI-compatible API. Without arguments: the small embedded model, on "
        "whatever device there is, at http://127.0.0.1:8000.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="options by name, TOML or .json; flags win")
    _add_model(parser.add_argument_group("model and engine").add_argument)
    _add_promises(parser.add_argument_group("promises").add_argument)
    _add_network(parser.add_argument_group("network").add_argument)
    _add_operation(parser.add_argument_group("operation").add_argument)
    return parser


def _add_model(add) -> None:
    add("--model", default=None, help="alias (qwen3-0.6b, llama-3.1-8b, ...), hub id or folder; none: the embedded one")
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call the model (several allowed)")
    for field in fields(EngineConfig):
        if field.name == "slo":
            continue
        metavar, text = ENGINE_HELP.get(field.name, ("VALUE", "see nanodrift/config.py"))
        if field.default not in (None, MISSING):
            shown = ("no", "yes")[field.default] if field.type == "bool" else field.default
            text = f"{text} ({shown})"
        flags = (_flag(field.name), *ALIASES.get(field.name, ()))
        if field.type == "bool":
            add(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = {"int": int, "float": float}.get(field.type.partition(" ")[0], str)
            add(*flags, type=kind, metavar=metavar, help=text)


def _add_promises(add) -> None:
    add("--slo-ttft-ms", type=float, metavar="MS", help=f"to the first token ({SLO.ttft_ms:g})")
    add("--slo-tbt-ms", type=float, metavar="MS", help=f"between tokens ({SLO.tbt_ms:g})")
    add(
        "--slo-admission",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="requests whose first token would come too late get a 429 at once (no)",
    )
    add(
        "--max-queue",
        type=_count,
        default=MAX_QUEUE,
        metavar="N",
        help=f"requests that may wait; more get a 429 ({MAX_QUEUE})",
    )


def _add_network(add) -> None:
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on, 0: any that is free (8000)")
    add(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help=f"keys clients must send; other users of this machine can read them here, so better in ${KEY_VARIABLE}",
    )
    add("--api-key-file", metavar="FILE", help="the same, one key a line")


def _add_operation(add) -> None:
    add(
        "--metrics-prefix",
        type=_name,
        default=PREFIX,
        metavar="NAME",
        help=f"of /metrics; vllm fits its dashboards ({PREFIX})",
    )
    add(
        "--log-json",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="stderr as JSON lines, one for each request: id, status, tokens, times; never a prompt (no)",
    )
    add("--trace", metavar="FILE", help="what ran when, for ui.perfetto.dev and bench.py timeline; written at the end")
    add(
        "--dashboard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the SM split, batch sizes, queue and latencies, live on stderr (no)",
    )
    add("--drain-timeout", type=_seconds, default=25.0, metavar="S", help="for answers in flight after SIGTERM (25)")
    add(
        "--stall-timeout",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="after which an engine that has requests and makes no progress is ended, 0: never (300)",
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises ConfigError for a file that cannot be used; a bad value ends the program, as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if path := getattr(args, "config", None):
        args = parser.parse_args([*as_flags(parser, read_file(path), path), *argv])  # of two values the last one holds
    return args


def read_file(path: str) -> dict:
    """Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        if path.endswith(".json"):
            content = json.loads(text)
        elif tomllib is not None:
            content = tomllib.loads(text)
        else:
            raise ConfigError(
                f"--config {path}: TOML needs Python 3.11 or later; write it as JSON, with the ending .json"
            )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--config {path} is not valid: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold an object: option names and their values")
    return content


def as_flags(parser: argparse.ArgumentParser, content: dict, path: str) -> Iterator[str]:
    """The content of a file as the flags it stands for. Raises ConfigError for a name that is no option."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "version", "config")}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise ConfigError(f"--config {path}: unknown option {key!r}{hint}")
        takes_switch = isinstance(actions[name], argparse.BooleanOptionalAction)
        if takes_switch != isinstance(value, bool):
            needed = "true or false" if takes_switch else "a value"
            raise ConfigError(f"--config {path}: {key!r} must be {needed}, got {value!r}")
        if takes_switch:
            yield _flag(name) if value else _flag(f"no_{name}")
        elif isinstance(value, list) and actions[name].nargs == "+":
            yield from (_flag(name), *map(str, value))
        elif isinstance(value, str | int | float):
            yield f"{_flag(name)}={value}"
        else:
            raise ConfigError(f"--config {path}: {key!r} must be a plain value, got {value!r}")


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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
