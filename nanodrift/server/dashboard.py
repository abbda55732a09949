"""``serve.py --dashboard``: who has the SMs, what waits, and how the promises stand, live in the terminal.

Reads what every other view reads: the engine's stats (telemetry.py explains them) and the latencies of late. A device
that cannot be divided is said to have no partitions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nanodrift.config import SLO
from nanodrift.metrics import percentile

FRAME_S = 0.25
BAR_COLUMNS = 60
DECODE, PREFILL, BOTH, IDLE = "dodger_blue2", "orange1", "green4", "grey30"
MODES = ("split", "fused", "exclusive")


async def show(console: Console, client, telemetry, slo: SLO) -> None:
    """Until cancelled. Rates are those between two frames of the engine."""
    before, now = {}, {}
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if client.stats is not now:
                before, now = now, client.stats
            live.update(render(now, before, client.info, telemetry.recent, slo), refresh=True)
            await asyncio.sleep(FRAME_S)


def render(stats: dict, before: dict, info: dict, recent: dict[str, Collection[float]], slo: SLO) -> Panel:
    """``recent``: seconds, of first tokens (``ttft``) and of gaps (``tbt``)."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(no_wrap=True)
    for label, content in (
        ("SMs", sm_bar(stats)),
        ("mode", mode_line(stats)),
        ("decode", lane_line(stats, before, "decode", f"batch {stats.get('decode_batch', 0)}")),
        ("prefill", lane_line(stats, before, "prefill", f"chunk {stats.get('chunk_tokens', 0)}")),
        ("requests", f"{stats.get('num_requests_running', 0)} running, {stats.get('num_requests_waiting', 0)} waiting"),
        ("KV cache", meter(stats.get("kv_cache_usage_perc", 0.0), 1.0, f"{stats.get('kv_cache_usage_perc', 0.0):.0%}")),
        ("TTFT", latency(recent["ttft"], slo.ttft_ms)),
        ("TBT", latency(recent["tbt"], slo.tbt_ms)),
        ("so far", so_far(stats)),
    ):
        rows.add_row(label, content)
    power = [f"{stats['watts']:.0f} W", f"{stats['sm_mhz']:.0f} MHz"] if "watts" in stats else []
    title = ", ".join([info.get("description", "loading"), info.get("device_name", ""), *power]).strip(", ")
    return Panel(Group(rows), title=title, title_align="left", border_style="grey50", expand=False)


def sm_bar(stats: dict) -> Text:
    """The chip from left to right: decode's SMs, prefill's SMs; one colour where they share or take turns."""
    total = stats.get("num_sms", 0)
    if not stats.get("has_partitions"):
        return Text("this device has no partitions: prompts and tokens take turns on all of it")
    if stats["mode"] != "split":
        sides = [(stats["num_sms"], BOTH if stats["mode"] == "fused" else IDLE, "whole chip")]
        if stats["mode"] == "fused" and stats["decode_sms"] < total:
            sides[0] = (total, BOTH, f"fused; attention {stats['decode_sms']} + {stats['prefill_sms']}")
    else:
        sides = [(stats[f"{lane}_sms"], color, f"{lane} {stats[f'{lane}_sms']}")
                 for lane, color in (("decode", DECODE), ("prefill", PREFILL))]  # fmt: skip
    bar = Text()
    for sms, color, label in sides:
        bar.append(
            label[: (columns := round(BAR_COLUMNS * sms / total))].center(columns),
            style=f"{'black' if color == PREFILL else 'white'} on {color}",
        )
    return bar.append(f" of {total}")


def mode_line(stats: dict) -> str:
    promised_s = stats.get("tbt_predicted_seconds", 0.0)
    promise = f", gap guarded to {1e3 * promised_s:.1f} ms" if promised_s else ""
    return f"{stats.get('mode') or 'idle'}{promise}"


def lane_line(stats: dict, before: dict, lane: str, size: str) -> str:
    """Share of busy time since the last frame, bubbles since the start."""
    busy_s, bubble_s = (stats.get(f"{lane}_{name}_seconds_total", 0.0) for name in ("busy", "bubble"))
    worked_s = sum(row[3] for row in stats.get("residency", ())) - sum(row[3] for row in before.get("residency", ()))
    grown_s = busy_s - before.get(f"{lane}_busy_seconds_total", 0.0)
    busy = f"{min(1.0, grown_s / worked_s):4.0%} of the device's time" if worked_s > 0 else "idle"
    bubbles = bubble_s / (busy_s + bubble_s) if busy_s + bubble_s else 0.0
    return f"{size:<12} {busy}, bubbles {bubbles:.1%}"


def latency(values: Collection[float], slo_ms: float) -> Text:
    if not values:
        return Text(f"- of {slo_ms:g} ms")
    p50_ms, p99_ms = (1e3 * percentile(values, percent) for percent in (50, 99))
    return meter(p99_ms, slo_ms, f"P50 {p50_ms:.1f}, P99 {p99_ms:.1f} of {slo_ms:g} ms")


def meter(value: float, most: float, label: str) -> Text:
    columns = round(20 * min(1.0, value / most))
    color = "red3" if value > most else "yellow3" if value > 0.9 * most else "green4"
    return Text.assemble(("\u2588" * columns, color), ("\u2591" * (20 - columns), IDLE), f" {label}")


def so_far(stats: dict) -> str:
    worked_s = sum(row[3] for row in stats.get("residency", ()))
    shares = {mode: sum(row[3] for row in stats.get("residency", ()) if row[0] == mode) for mode in MODES}
    parts = [f"{mode} {share / worked_s:.0%}" for mode, share in shares.items() if share]
    parts.append(f"{stats.get('repartitions_total', 0)} repartitions")
    if stats.get("unmeetable_steps_total"):
        parts.append(f"{stats['unmeetable_steps_total']} steps whose TBT could not be met")
    return ", ".join(parts)
