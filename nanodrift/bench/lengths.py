"""Writes lengths.json, the length quantiles behind the named workloads, from trace files: facts only, a few KB.

    python -m nanodrift.bench.lengths FOLDER     with sharegpt_8k_llama2tok.csv, azure2023_conv.csv and
                                                 mooncake_conversation_sess8.jsonl in it

Where no file is given, the published percentiles of the data set stand in PUBLISHED, and what lies between two of them
is interpolated log-linearly; their lowest value is not published, so it is chosen such that the mean comes right, as
far as a value of at least one token can do that. A quantile function is a list of [percent, value], percent rising.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

PERCENTS = (0, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 98, 99, 99.5, 99.9, 100)
PUBLISHED = {  # (mean, {percent: tokens})
    "code": {
        "source": "Azure LLM inference trace 2023, code (CC-BY-4.0): published percentiles",
        "input": (2048, {50: 1469, 90: 5188, 99: 7436, 100: 7437}),
        "output": (28, {50: 13, 90: 55, 99: 251, 100: 1899}),
    },
    "reasoning": {
        "source": "ServeGen deepseek-r1 (Apache-2.0): published percentiles of the rate-weighted clients",
        "input": (1268, {50: 208, 90: 2092, 99: 23423, 100: 57284}),
        "output": (1527, {50: 792, 90: 3432, 99: 12607, 100: 32768}),
    },
}


def quantiles(values) -> list[list[float]]:
    ordered = sorted(values)
    return [[percent, ordered[round(percent / 100 * (len(ordered) - 1))]] for percent in PERCENTS]


def mean_of(points: list) -> float:
    """Mean of the log-linear quantile function through the points: a sum of integrals of exponentials."""
    total = 0.0
    for (p, a), (q, b) in itertools.pairwise(points):
        total += (q - p) / 100 * ((b - a) / math.log(b / a) if b != a else a)
    return total


def with_lowest(mean: float, percentiles: dict[int, int]) -> list[list[float]]:
    """The published percentiles and the lowest value, at least 1, that brings the mean nearest to ``mean``."""
    rest = [list(point) for point in sorted(percentiles.items())]
    lowest = min(range(1, rest[0][1] + 1), key=lambda low: abs(mean_of([[0, low], *rest]) - mean))
    return [[0, lowest], *rest]


def conversations(rows: list[dict]) -> list[list[dict]]:
    """Turns with the same second prefix block (the first is the system prompt of all) belong together."""
    by_block = defaultdict(list)
    for row in rows:
        by_block[tuple(row["hash_ids"][1:2])].append(row)
    return list(by_block.values())


def main(folder: Path) -> None:
    sharegpt = list(csv.DictReader((folder / "sharegpt_8k_llama2tok.csv").open()))
    azure = list(csv.DictReader((folder / "azure2023_conv.csv").open()))
    mooncake = [json.loads(line) for line in (folder / "mooncake_conversation_sess8.jsonl").open()]
    talks = conversations(mooncake)
    pairs = [pair for talk in talks for pair in itertools.pairwise(talk)]
    growth = [later["input_length"] - earlier["input_length"] for earlier, later in pairs]
    gaps = [(later["timestamp"] - earlier["timestamp"]) / 1000 for earlier, later in pairs]
    span_s = (mooncake[-1]["timestamp"] - mooncake[0]["timestamp"]) / 1000
    data = {
        "sharegpt": {
            "source": "ShareGPT up to 8k tokens, lengths of sarathi-serve (Apache-2.0): measured from the file",
            "input": quantiles(int(row["num_prefill_tokens"]) for row in sharegpt),
            "output": quantiles(int(row["num_decode_tokens"]) for row in sharegpt),
        },
        "chat": {
            "source": "Azure LLM inference trace 2023, conversation (CC-BY-4.0): measured from the file",
            "input": quantiles(int(row["ContextTokens"]) for row in azure),
            "output": quantiles(int(row["GeneratedTokens"]) for row in azure),
        },
        "conversation": {
            "source": "Mooncake conversation trace, every 8th conversation (Apache-2.0): measured from the file",
            "input": quantiles(talk[0]["input_length"] for talk in talks),  # of a first turn
            "output": quantiles(row["output_length"] for row in mooncake),
            "growth": quantiles(tokens for tokens in growth if tokens > 0),  # of the prompt from turn to turn
            "turns": quantiles(len(talk) for talk in talks),
            "gap_s": quantiles(gaps),  # from one turn's arrival to the next
            "starts_per_s": round(len(talks) / span_s, 4),
        },
    }
    for name, published in PUBLISHED.items():
        data[name] = {"source": published["source"]}
        for side in ("input", "output"):
            data[name][side] = with_lowest(*published[side])
            print(f"{name} {side}: mean {mean_of(data[name][side]):.0f}, published {published[side][0]}")
    text = ",\n".join(
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
        + "\n }"
        for name, entry in data.items()
    )
    Path(__file__).with_name("lengths.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
