"""What serve.py says on stderr: the table of what is served, and failures as one paragraph."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console
from rich.table import Table

from nanodrift.config import SLO, EngineConfig
from nanodrift.cost import CostModel, DecodeLoad, PrefillLoad
from nanodrift.plan import Partition

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


def slo_warnings(slo: SLO, cost: CostModel) -> list[str]:
    """Promises that cannot be kept even for one short request on an idle device, as the cost model predicts it."""
    num_sms = cost.profile.num_sms
    bare_tbt_ms = 1e3 * cost.decode_s(DecodeLoad(1, 1), num_sms)
    bare_ttft_ms = 1e3 * cost.prefill_s(PrefillLoad.of_chunk(1, 0), num_sms)
    found = []
    for name, promised_ms, bare_ms in (("tbt", slo.tbt_ms, bare_tbt_ms), ("ttft", slo.ttft_ms, bare_ttft_ms)):
        if promised_ms < bare_ms:
            what = "a decode step of one request" if name == "tbt" else "a prompt of one token"
            found.append(
                f"--slo-{name}-ms {promised_ms:g} cannot be kept: {what}, alone on this device, is predicted to take "
                f"{bare_ms:.1f} ms. Every request will miss it, and prompts get their least share of the time."
            )
    return found


def split_warnings(config: EngineConfig, split) -> list[str]:
    """``split``: a GPU executor's partition.DeviceSplit, None elsewhere. Says so where its halves are none."""
    if split is None or not split.reason or not split.streams or config.policy == "overlap":
        return []
    return [
        f"the SMs cannot be divided: {split.reason}. Both lanes run on plain streams instead, where they slow each "
        "other more than the measured costs say; --policy chunked or turns promises nothing that depends on them."
    ]


def policy_line(config: EngineConfig, partitions: tuple[Partition, ...], cost: CostModel) -> str:
    """How prompts and tokens share the device, in a line."""
    splits = sorted(partition.decode_sms for partition in partitions if not partition.is_shared)
    name = config.policy if config.policy != "auto" else "mux" if splits else "turns"
    if name == "turns":
        return "turns: prompts and tokens alternate on the whole device"
    known = "measured costs" if cost.profile.is_measured else "costs not measured yet (bench.py calibrate)"
    modes = f" ({config.modes})" if name == "mux" else ""
    where = f"; decode on {', '.join(map(str, splits))} or all {partitions[0].decode_sms} SMs" if splits else ""
    return f"{name}{modes}{where}; {known}"


def warn(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold yellow]warning:[/bold yellow] {text}", soft_wrap=True)


def fail(text: str) -> None:
    """One paragraph, no trace."""
    print(f"serve.py: {' '.join(text.split())}", file=sys.stderr, flush=True)
