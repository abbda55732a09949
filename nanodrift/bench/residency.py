"""The policy block under a run's figures: what shared the device how long, bubbles, merges, promises, watts.

``figures(stats)`` makes a flat dict out of Engine.stats() that goes into a result's JSON; ``block(stats)`` the lines
that people read. Pass the stats from before a run as ``before``, so that its warm-up does not count. What the run does
not know (watts on a CPU, predictions without a cost model) is left out, never zero. ``power``: sm_mhz, watts, joules,
tokens_per_joule, as machine.PowerLog gives them.
"""

from __future__ import annotations

LANES = ("decode", "prefill")
WIDTH = 50


def figures(
    stats: dict, before: dict | None = None, predictions: dict | None = None, power: dict | None = None
) -> dict:
    """Shares of the time the device worked, by mode; bubble ratios by lane; counts; ms; errors of the predictions."""
    before = before or {}

    def grown(key: str) -> float:
        return stats.get(key, 0) - before.get(key, 0)

    earlier = {tuple(row[:3]): row[3] for row in before.get("residency", ())}
    rows = [[*row[:3], row[3] - earlier.get(tuple(row[:3]), 0.0)] for row in stats.get("residency", ())]
    rows = sorted((row for row in rows if row[3] > 0), key=lambda row: -row[3])
    worked_s = sum(row[3] for row in rows)
    result = {"residency": [[mode, prefill, decode, round(s, 6)] for mode, prefill, decode, s in rows]}
    result |= {"has_partitions": stats.get("has_partitions", False)}
    for mode in ("split", "fused", "exclusive"):
        share = sum(row[3] for row in rows if row[0] == mode) / worked_s if worked_s else 0.0
        result[f"{mode}_share"] = share
    for lane in LANES:
        busy_s, bubble_s = grown(f"{lane}_busy_seconds_total"), grown(f"{lane}_bubble_seconds_total")
        result[f"{lane}_bubble_ratio"] = bubble_s / (busy_s + bubble_s) if busy_s + bubble_s > 0 else 0.0
    merges = grown("merges_total")
    result |= {name: grown(f"{name}_total") for name in ("repartitions", "unmeetable_steps", "merges")}
    result |= {"mean_merge_gap_ms": 1e3 * grown("merge_gap_seconds_total") / merges if merges else None}
    return result | {"predictions": predictions or {}} | (power or {})


def block(
    stats: dict, before: dict | None = None, predictions: dict | None = None, power: dict | None = None
) -> list[str]:
    """For the end of a table: no line for what is not known."""
    found = figures(stats, before, predictions, power)
    lines = ["Policy".center(WIDTH, "-")]

    def add(label: str, text: str) -> None:
        lines.append(f"{label + ':':<40} {text}")

    shares = [f"{mode} {found[f'{mode}_share']:.0%}" for mode in ("split", "fused", "exclusive")]
    add("Device time by mode", ", ".join(text for text in shares if not text.endswith(" 0%")) or "-")
    for mode, prefill_sms, decode_sms, seconds in found["residency"][:8]:
        where = "whole chip" if prefill_sms == decode_sms == stats["num_sms"] else f"{prefill_sms}+{decode_sms} SMs"
        add(f"  {mode}, {where if found['has_partitions'] else 'no partitions'} (s)", f"{seconds:.3f}")
    add("Repartitions", f"{found['repartitions']}")
    add("Bubbles, decode and prefill lane", ", ".join(f"{found[f'{lane}_bubble_ratio']:.2%}" for lane in LANES))
    if found["merges"]:
        add("Merges, mean first gap (ms)", f"{found['merges']}, {found['mean_merge_gap_ms']:.2f}")
    add("Steps whose TBT no mode could keep", f"{found['unmeetable_steps']}")
    for kind, seen in found["predictions"].items():
        text = f"{seen['error_p95']:.1%}, {seen['violations']:.2%}, {seen['guarded_over_actual']:.2f}"
        add(f"Predicted {kind}: P95 off, late, guard", text)
    if found.get("watts") is not None:
        per_joule = f"{found['tokens_per_joule']:.1f}" if found.get("tokens_per_joule") else "-"
        add("SM MHz, watts (median); tokens per J", f"{found['sm_mhz']:.0f}, {found['watts']:.0f}; {per_joule}")
    return lines
