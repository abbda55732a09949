"""What serve.py says on stderr: the table of what is served, and failures as one paragraph."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console
from rich.table import Table

from nanodrift.config import SLO

LOG_COLUMNS = 120  # where stderr is no terminal
REAL_MODEL_LINE = "python serve.py --model qwen3-0.6b"


def print_table(info: dict, total_s: float, url: str, name: str, slo: SLO, needs_key: bool) -> None:
    """``info`` is the engine's ready frame; ``total_s`` the time from the command to ready."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = LOG_COLUMNS
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in describe(info, total_s, slo, name):
        table.add_row(label, text)
    console.print()
    console.print(table)
    console.print()
    for label, line in lines_to_copy(info, url, name, needs_key):
        console.print(f"[bold]{label}[/bold]")
        console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print()


def describe(info: dict, total_s: float, slo: SLO, name: str) -> list[tuple[str, str]]:
    """The rows of the table."""
    toy = ", a toy that tells little stories" if info["is_embedded"] else ""
    phases_s = {"imports": total_s - sum(info["phases_s"].values())} | info["phases_s"]
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases_s.items())
    return [
        ("model", f"{name} ({info['description']}{toy})"),
        ("device", info["device_name"]),
        ("weights", f"{info['weights_bytes'] / 2**30:.3g} GiB, {info['dtype']}"),
        ("KV cache", f"{info['kv_tokens']:,} tokens, {info['kv_bytes'] / 2**30:.3g} GiB"),
        ("window", f"{info['max_model_len']:,} tokens of prompt and answer, {info['max_num_seqs']} requests at once"),
        ("SLO", f"first token within {slo.ttft_ms:g} ms, then a token every {slo.tbt_ms:g} ms"),
        ("policy", info["policy"]),
        ("start-up", f"{total_s:.1f} s ({phases})"),
    ]


def lines_to_copy(info: dict, url: str, name: str, needs_key: bool) -> list[tuple[str, str]]:
    """Command lines that work as they stand."""
    key = " -H 'Authorization: Bearer '$NANODRIFT_API_KEY" if needs_key else ""
    prompt = '"Once upon a time"' if info["has_tokenizer"] else "[1, 2, 3]"
    body = f'{{"model": "{name}", "prompt": {prompt}, "max_tokens": 120, "temperature": 0.7}}'
    curl = f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
    lines = [("serving at, also for a browser", url), ("try", curl)]
    if info["is_embedded"]:
        lines.append(("for a real model", REAL_MODEL_LINE))
    return lines


def warn(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold yellow]warning:[/bold yellow] {text}", soft_wrap=True)


def fail(text: str) -> None:
    """One paragraph, no trace."""
    print(f"serve.py: {' '.join(text.split())}", file=sys.stderr, flush=True)
