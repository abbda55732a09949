"""Writes the tables and figures of the READMEs from the files in results/, so that no number is typed by hand.

A pair of comments names what stands between them, and ``python bench.py tables`` fills it in:

    <!-- table: decode results/run.json results/peers.json -->
    <!-- /table -->

Kinds: ``decode`` and ``prefill`` (a latency run, and peers to stand beside it), ``throughput`` (any number of runs),
``serve`` (the server's start-up and streams), ``campaign`` (sweeps, each by its sweep.json and its points: what each
kind of policy carries), ``memory`` (a trace with the prefix cache and without, a long prompt among users), ``online``
(arrival lists that peers were measured on, collected by bench.py peers), ``conditions`` (what runs and peers were
measured on), ``kernels`` (rows of bench.py kernels beside limit and library), ``figure`` (decode and prefill drawn as
results/<run>.svg).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean

from nanodrift.bench.peers import HEADER, table

ROOT = Path(__file__).parent.parent.parent
SPAN = re.compile(r"(<!-- table: (\w+) ([^>]+?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def main(check: bool = False, root: Path = ROOT) -> int:
    """Rewrites the READMEs and their figures; with ``check`` only says whether they are up to date."""
    stale = [path for path, text in regenerate(root).items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(root)} is not what results/ says: run python bench.py tables", file=sys.stderr)
        else:
            path.write_text(regenerate(root)[path])
            print(f"wrote {path.relative_to(root)}", file=sys.stderr)
    return 1 if check and stale else 0


def regenerate(root: Path) -> dict[Path, str]:
    """What the READMEs and the figures they name should hold now."""
    files = {}

    def fill(match: re.Match) -> str:
        opening, kind, names, _, closing = match.groups()
        runs = [read(root / name) for name in names.split()]
        if kind == "figure":
            path = (root / names.split()[0]).with_suffix(".svg")
            files[path] = figure(*runs)
            text = f"![Decode step and prefill times beside the roofline and vLLM]({path.relative_to(root)})\n"
        else:
            text = KINDS[kind](*runs)
        return f"{opening}{text}{closing}"

    readmes = [root / "README.md", root / "kernels" / "README.md", root / "results" / "README.md"]
    texts = {readme: SPAN.sub(fill, readme.read_text()) for readme in readmes if readme.exists()}
    return texts | files


def read(path: Path):
    """A JSON file, or a list of the lines of a .jsonl file."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def peer_rows(peers: dict | None, kind: str, key: str) -> tuple[str, dict]:
    """(the peer's name, its rows by batch or shape); one peer a table."""
    if not peers:
        return "", {}
    name, peer = next(iter(peers["engines"].items()))
    return name, {str(row[key]): row for row in peer[kind]}


def latency_table(kind: str, key: str, title: str, worst: str, run: dict, peers: dict | None) -> str:
    name, beside = peer_rows(peers, kind, key)
    has_context = "mean_context" in run[kind][0]  # prompts that came first have decoded meanwhile
    header = [title, *["mean context"] * has_context, "ms", WORST[worst], "tokens/s", "roofline ms", "share of it"]
    rows = []
    for row in run[kind]:
        figures = f"{row['ms']:.2f}", f"{row[worst]:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['roofline_ms']:.2f}"
        context = [f"{row['mean_context']:,.0f}"] if has_context else []
        cells = [str(row[key]), *context, *figures, f"{row['roofline_share']:.0%}"]
        peer = beside.get(str(row[key]))
        if name:
            cells += [f"{peer['ms']:.2f}", f"{peer['ms'] / row['ms']:.2f}x"] if peer else ["", ""]
        rows.append(cells)
    return markdown(header + ([f"{name} ms", "its time / ours"] if name else []), rows)


WORST = {"p99_ms": "P99 ms", "max_ms": "longest ms"}


def decode_table(run: dict, peers: dict | None = None) -> str:
    return latency_table("decode", "batch", "decode batch", "p99_ms", run, peers)


def prefill_table(run: dict, peers: dict | None = None) -> str:
    return latency_table("prefill", "shape", "prompt tokens", "max_ms", run, peers)


def throughput_table(*runs: dict) -> str:
    header = ["requests", "tokens in / out", "output tokens/s", "all tokens/s", "P50 TTFT ms", "P99 TBT ms"]
    rows = [
        [str(run["num_prompts"]), f"{run['input_len']} / {run['output_len']}", f"{run['output_throughput']:,.0f}",
         f"{run['total_token_throughput']:,.0f}", f"{run['median_ttft_ms']:,.0f}", f"{run['p99_tbt_ms']:,.1f}"]
        for run in runs
    ]  # fmt: skip
    return markdown(header, rows)


def serve_table(run: dict) -> str:
    """Start-up and a burst of streams over HTTP, from the GPU test of the server."""
    ready = [f"{what} {phases['ready_s']:.1f} s" for what, phases in run["startup"].items()]
    s = run["streams"]
    return (
        f"Start to ready: {', '.join(ready)}. {s['num_streams']} streams at once over HTTP, {s['num_prompt_tokens']} "
        f"tokens in and {s['num_output_tokens']} out:\n{s['output_throughput']:,.0f} output tokens/s, as many as one "
        f"Python client takes in; P50 TTFT {s['median_ttft_ms']:,.0f} ms.\n"
    )


def conditions(*runs: dict) -> str:
    """One line a run; of peers, what they were measured under."""
    lines = []
    for run in runs:
        if "runs" in run:
            lines.append(conditions(*run["runs"]).rstrip())
            continue
        if "engines" in run:
            engines = {name: peer for name, peer in run["engines"].items() if peer["decode"]}
            lines += [f"- {name}: {run['conditions']}; {peer['options']}" for name, peer in engines.items()]
            continue
        where = f"{run['gpu']}, driver {run['driver']}" if run["gpu"] else f"{run['cpu']}, {run['num_threads']} used"
        engine = run.get("engine", {})
        draw = f"; dummy weights drawn {engine['dummy_draw']}" if engine.get("load_format") == "dummy" else ""
        command = " ".join(run["argv"] if run["argv"][0].endswith(".py") else ["bench.py", *run["argv"]])
        tools = f"torch {run['torch']}, triton {run['triton']}{draw}; commit {run['git']}"
        more = f", after {len(run['earlier'])} others that are named there" if run.get("earlier") else ""
        lines.append(f"- {where}; {tools}; `python {command}`{more}")
    return "\n".join(lines) + "\n"


def online_table(ours: dict, peers: dict) -> str:
    """What bench.py peers has collected, beside the peers; under it what is special about these."""
    lines = markdown(HEADER, table(ours, peers)).replace("| ---: | ---: |", "| :--- | :--- |", 1)
    return lines + "".join(f"\n{name}: {peer['options']}.\n" for name, peer in peers["engines"].items())


KINDS_OF_POLICY = {  # a column each in ``campaign_table``; of several policies the best
    "`mux`": lambda name: name == "mux",
    "`chunked-auto`": lambda name: name == "chunked-auto",
    "fixed budget": lambda name: name.startswith("chunked:"),
    "static split": lambda name: name.startswith("static"),
    "`prefill-first`": lambda name: name == "prefill-first",
}


CAMPAIGN_FIGURES = {"slo_attainment": "{:.1%}", "median_ttft_ms": "{:,.0f}", "p99_tbt_ms": "{:,.1f}"}


def campaign_table(*runs) -> str:
    """Of each sweep (its sweep.json, then its points) a row for every rate and promise; figures: means over seeds."""
    rows = []
    for about, points in zip(runs[::2], runs[1::2], strict=True):
        cells: dict[tuple, dict[str, list[dict]]] = {}
        for point in points:
            cell = cells.setdefault((point["rate"], point["slo"]["tbt_ms"]), {})
            cell.setdefault(point["policy"], []).append(point)
        for (_, tbt_ms), cell in cells.items():
            most = max(len(seeds) for seeds in cell.values())
            figures = {
                policy: {name: fmean(point[name] for point in seeds) for name in CAMPAIGN_FIGURES}
                for policy, seeds in cell.items()
            }
            best = [
                max(filter(is_one, figures), key=lambda policy: figures[policy]["slo_attainment"], default=None)
                for is_one in KINDS_OF_POLICY.values()
            ]
            columns = [
                [text.format(figures[policy][name]) if policy else None for policy in best]
                for name, text in CAMPAIGN_FIGURES.items()
            ]
            good = []
            for policy, text in zip(best, columns[0], strict=True):
                few = policy and len(cell[policy]) < most and f"{len(cell[policy])} of {most} seeds"
                notes = [note for note in (policy and policy.partition(":")[2], few) if note]
                good.append(text and text + (f" ({', '.join(notes)})" if notes else ""))
            name, rate = about["workload"].removesuffix(".jsonl"), next(iter(cell.values()))[0]["request_rate"]
            latencies = [" / ".join(text or "-" for text in column) for column in columns[1:]]
            seeds = f", {most} seeds" if most > 1 else ""
            rows.append([f"{name}, {rate:.3g}/s, {tbt_ms:g} ms{seeds}", *(text or "" for text in good), *latencies])
    header = ["workload, requests/s, TBT promised", *KINDS_OF_POLICY, "P50 TTFT ms, same order", "P99 TBT ms"]
    return markdown(header, rows).replace("| ---: |", "| :--- |", 1)


def memory_table(on: dict, off: dict, long: dict) -> str:
    """What the prefix cache finds and saves on a trace, and what a long prompt does to its neighbours."""
    rate, ideal = (count / on["total_input_tokens"] for count in (on["cached_tokens"], on["ideal_hit_tokens"]))
    header = ["prefix cache", "hit rate", "of an ideal", "mean TTFT ms", "P50 TTFT ms", "P99 TBT ms"]
    rows = [
        [name, *hits, f"{d['mean_ttft_ms']:,.0f}", f"{d['median_ttft_ms']:,.0f}", f"{d['p99_tbt_ms']:.1f}"]
        for name, hits, d in (("on", (f"{rate:.1%}", f"{ideal:.1%}"), on), ("off", ("", ""), off))
    ]
    (alone,) = long["ttft_alone_s"].values()
    return markdown(header, rows) + (
        f"\nA prompt of {long['prompt_tokens']:,} tokens among {long['chat_users']} chat users promised "
        f"{long['slo_tbt_ms']:g} ms: their P99 TBT\nis {long['chat_tbt_ms']['99']:.1f} ms meanwhile, its first token "
        f"comes after {long['ttft_s']:.1f} s ({alone:.1f} s on an idle machine).\n"
    )


KERNEL_ROWS = (  # operator, its case in bench.py kernels, SMs of the partition beside the whole chip
    ("rmsnorm", "T=8192", 100), ("rope_kv_write", "T=8192 S=1", 100), ("gemm", "down M=2048", 100),
    ("gemm", "qkv M=512", 100), ("gemm", "o M=256", 100), ("gemm_skinny", "down M=1", 32),
    ("gemm_skinny", "head M=1", 32), ("gemm_skinny", "qkv M=128", 64), ("swiglu", "M=2048", 100),
    ("swiglu", "M=1", 32), ("attn_prefill", "1 x 8192", 100), ("attn_prefill", "1 x 512 over 32768", 100),
    ("attn_decode", "16 x 8192", 32), ("attn_decode", "16 x 1024", 32), ("sample", "greedy B=64", 32),
)  # fmt: skip


def kernels_table(run: dict) -> str:
    """One row a kernel and shape: time, share of the limit, and the library's time over ours; all SMs, then some."""
    found = {(row["op"], row["case"], row["sms"]): row for row in run["rows"]}

    def cells(op: str, case: str, sms: int, where: str = "") -> list[str]:
        row = found[op, case, sms]
        us = f"{row['us']:,.0f}" if row["us"] >= 100 else f"{row['us']:.1f}"
        return [f"{us} us{where}", f"{row['limit_share']:.0%}", f"{row['ratio']:.2f}" if row["ratio"] else ""]

    whole = run["num_sms"]
    header = ["operator, shape", f"{whole} SMs", "share of limit", "library / ours", "in a partition", "share of limit",
              "library / ours"]  # fmt: skip
    rows = [
        [f"`{op}` {case}", *cells(op, case, whole), *cells(op, case, sms, f", {sms} SMs")]
        for op, case, sms in KERNEL_ROWS
    ]
    return markdown(header, rows).replace("| ---: |", "| :--- |", 1)


KINDS = {
    "kernels": kernels_table,
    "campaign": campaign_table,
    "memory": memory_table,
    "online": online_table,
    "decode": decode_table,
    "prefill": prefill_table,
    "throughput": throughput_table,
    "serve": serve_table,
    "conditions": conditions,
}

COLORS = ("#b8bec7", "#2563a8", "#c9863a")  # roofline, ours, peer
INK, LINE = "#2b2f36", "#d9dde3"


def figure(run: dict, peers: dict | None = None) -> str:
    """Two groups of bars as SVG text, the same bytes for the same results."""
    width, height = 860, 300
    name = peer_rows(peers, "decode", "batch")[0]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, label in enumerate(["roofline", "nanodrift", *([name] if name else [])]):
        x = 300 + 120 * index
        out.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLORS[index]}"/>')
        out.append(f'<text x="{x + 18}" y="20" fill="{INK}">{label}</text>')
    for left, kind, key, title in ((20, "decode", "batch", "decode step, ms, by batch"),
                                   (450, "prefill", "shape", "prefill, ms, by prompt tokens")):  # fmt: skip
        beside = peer_rows(peers, kind, key)[1]
        groups = [(str(row[key]), [row["roofline_ms"], row["ms"], beside.get(str(row[key]), {}).get("ms")])
                  for row in run[kind]]  # fmt: skip
        out += bars(left, 50, 390, 205, title, groups)
    return "\n".join([*out, "</svg>"]) + "\n"


def bars(left: int, top: int, width: int, height: int, title: str, groups: list) -> list[str]:
    most = max(value for _, values in groups for value in values if value is not None)
    pitch = width / len(groups)
    bar = min(26.0, pitch / 4)
    base = top + height
    out = [f'<text x="{left}" y="{top - 8}" fill="{INK}" font-weight="bold">{title}</text>',
           f'<path d="M{left} {base}H{left + width}" stroke="{LINE}"/>']  # fmt: skip
    for group, (label, values) in enumerate(groups):
        start = left + pitch * group + (pitch - 3 * bar) / 2
        for index, value in enumerate(values):
            if value is None:
                continue
            tall = (height - 24) * value / most
            x, y = start + bar * index, base - tall
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{tall:.1f}" fill="{COLORS[index]}"/>'
            )
            text = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
            out.append(f'<text x="{x + bar / 2 - 1:.1f}" y="{y - 4:.1f}" font-size="9" text-anchor="middle" '
                       f'fill="{INK}">{text}</text>')  # fmt: skip
        middle = left + pitch * (group + 0.5)
        out.append(f'<text x="{middle:.1f}" y="{base + 18}" text-anchor="middle" fill="{INK}">{label}</text>')
    return out
