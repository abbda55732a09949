"""Reads request traces by looking at them: lengths, arrival times and prefix blocks become a Workload.

=================  ==================================================================================================
plain              a JSON list a line: [arrival_s, prompt tokens, output tokens]
Mooncake, Bailian  a JSON object a line: timestamp, input_length, output_length, hash_ids (a prefix block each: 512
                   tokens and milliseconds, or 16 tokens and seconds; told apart by how many there are)
vLLM custom        a JSON object a line: prompt (a text), output_tokens
Azure              CSV: TIMESTAMP (a date), ContextTokens, GeneratedTokens
BurstGPT           CSV: Timestamp (seconds), Request tokens, Response tokens
lengths only       CSV: num_prefill_tokens, num_decode_tokens (ShareGPT and arXiv as sarathi-serve and Vidur keep them)
=================  ==================================================================================================

Nothing is downloaded. The traces: github.com/kvcache-ai/Mooncake (FAST25-release/traces),
github.com/Azure/AzurePublicDataset (data), github.com/HPMLL/BurstGPT (releases).
"""

from __future__ import annotations

import csv
import json
import math
from datetime import datetime
from pathlib import Path

from nanodrift.bench.workloads import Sample, Workload

DEFAULT_OUTPUT_TOKENS = 128  # of a text prompt that names no length
INPUT_NAMES = ("input_length", "contexttokens", "num_prefill_tokens", "request tokens", "input_len", "prompt_tokens")
OUTPUT_NAMES = (
    "output_length", "generatedtokens", "num_decode_tokens", "response tokens", "output_len", "output_tokens",
)  # fmt: skip
TIME_NAMES = ("timestamp", "arrival_s", "arrival_time")
TALK_NAMES = ("session_id", "session id", "conversation_id", "chat_id")


def read(path: Path) -> Workload:
    """Every row of the file, in order of arrival. Raises ValueError that names the line it cannot use."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "").lstrip()
    if not first:
        raise ValueError(f"{path} is empty")
    rows = _json_rows(path) if first[0] in "[{" else _csv_rows(path)
    workload = Workload(path.stem, tuple(_sample(row, number, path) for number, row in rows))
    if not workload.has_arrivals:
        return workload
    ordered = sorted(workload.samples, key=lambda sample: sample.arrival_s)
    changed = "rows were not in order of arrival: sorted" if tuple(ordered) != workload.samples else ""
    return workload._changed(ordered, changed)


def _json_rows(path: Path):
    """(line number, row) with lower-case keys."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if isinstance(row, list):
                if len(row) != 3:
                    raise ValueError(f"{path}, line {number}: expected [arrival_s, prompt tokens, output tokens]")
                row = dict(zip(("arrival_s", "input_length", "output_length"), row, strict=True))
            yield number, {key.lower(): value for key, value in row.items()}


def _csv_rows(path: Path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield number, {key.strip().lower(): value for key, value in row.items() if key}


def _sample(row: dict, number: int, path: Path) -> Sample:
    try:
        arrival_s = _arrival_s(row)
        talk = _first(row, TALK_NAMES)
        if isinstance(row.get("prompt"), str):
            count = _first(row, OUTPUT_NAMES)
            return Sample((), int(count or DEFAULT_OUTPUT_TOKENS), str(talk or number), arrival_s, row["prompt"])
        num_prompt, num_output = int(_first(row, INPUT_NAMES)), int(_first(row, OUTPUT_NAMES))
        if num_prompt < 1 or num_output < 1:
            raise ValueError(f"{num_prompt} prompt and {num_output} output tokens")
        hashes = row.get("hash_ids")
        segments = _blocks(hashes, num_prompt) if hashes else ((f"row-{number}", num_prompt),)
        if talk is None:  # of a trace with prefix blocks, the second tells conversations apart: all share the first
            talk = f"block-{hashes[min(1, len(hashes) - 1)]}" if hashes else number
        return Sample(segments, num_output, str(talk), arrival_s)
    except (TypeError, ValueError) as error:
        known = "see nanodrift/bench/traces.py for the formats"
        raise ValueError(f"{path}, line {number}: {error}; {known}") from error


def _first(row: dict, names: tuple[str, ...]):
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _block_tokens(hashes: list, num_prompt: int) -> int:
    """512 or 16: whichever explains how many blocks there are."""
    fits = [size for size in (512, 16) if math.ceil(num_prompt / size) == len(hashes)]
    if not fits:
        raise ValueError(f"{len(hashes)} hash_ids for {num_prompt} tokens: blocks of neither 512 nor 16 tokens")
    return fits[0]


def _blocks(hashes: list, num_prompt: int) -> tuple[tuple[str, int], ...]:
    size = _block_tokens(hashes, num_prompt)
    return tuple((f"block-{block}", min(size, num_prompt - size * i)) for i, block in enumerate(hashes))


def _arrival_s(row: dict) -> float | None:
    """Dates count from the epoch; a Mooncake timestamp is in milliseconds, any other number in seconds."""
    value = _first(row, TIME_NAMES)
    if value is None:
        return None
    if isinstance(value, str) and "-" in value[1:]:
        date, _, fraction = value.partition("+")[0].rstrip("Z").partition(".")  # seven digits: too many for datetime
        return datetime.fromisoformat(f"{date}+00:00").timestamp() + float(f"0.{fraction or 0}")
    value = float(value)
    if "arrival_s" in row or "input_length" not in row:
        return value
    hashes = row.get("hash_ids")
    return value if hashes and _block_tokens(hashes, int(row["input_length"])) == 16 else value / 1000
