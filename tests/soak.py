"""serve.py and the embedded model on the CPU, at work for some minutes: errors, memory, files, latency.

    python tests/soak.py --minutes 30 --output results/server-soak.json

So many clients as keep 70% of the rows busy, whatever else the machine does; requests of mixed lengths, a third of them
streamed; every tenth client leaves early. Every few seconds the resident memory of both processes and the server's open
files are read. The slope of memory is a least-squares line through what follows the warm-up, a third of the run.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

import httpx
import torch
from running_server import PATIENCE_S, Program, eventually, program, request_bytes, status_of, talk

from nanodrift.bench import machine
from nanodrift.metrics import percentile

NUM_ROWS = 16
SAMPLE_EVERY_S = 2.0
LEAVING_SHARE = 0.1


def question(draw: random.Random) -> dict:
    head = [draw.randrange(10, 2000)] * draw.choice((10, 70, 140))
    return {
        "prompt": head + [draw.randrange(10, 2000) for _ in range(20)],
        "max_tokens": draw.choice((4, 8, 16, 32)),
        "ignore_eos": True,
        "stream": draw.random() < 0.34,
    }


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line, per unit of x."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


async def soak(one: Program, url: str, num_clients: int, seconds: float) -> dict:
    draw, started_s = random.Random(2), time.perf_counter()
    errors, gaps, samples = [], [], []
    counts = {"requests": 0, "answered": 0, "left": 0}

    async def client() -> None:
        while time.perf_counter() < started_s + seconds:
            body, is_leaving = question(draw), draw.random() < LEAVING_SHARE
            counts["requests"] += 1
            try:
                patience_s = draw.random() * 0.5 if is_leaving else PATIENCE_S
                answer, times_s = await asyncio.wait_for(talk(url, request_bytes(**body)), patience_s)
            except asyncio.TimeoutError:
                counts["left"] += 1
                if not is_leaving:
                    errors.append("timed out")
                continue
            counts["answered"] += 1
            if status_of(answer) != 200 or b'"error"' in answer:
                errors.append(answer[-300:].decode(errors="replace"))
            if body["stream"]:
                gaps.extend((a - started_s, b - a) for a, b in itertools.pairwise(times_s))

    async def sample() -> None:
        pids = one.process.pid, one.engine_pid()
        while True:
            num_files = len(os.listdir(f"/proc/{pids[0]}/fd"))
            samples.append((time.perf_counter() - started_s, *map(rss_mib, pids), num_files))
            await asyncio.sleep(SAMPLE_EVERY_S)

    sampling = asyncio.create_task(sample())
    await asyncio.gather(*(client() for _ in range(num_clients)))
    sampling.cancel()

    late = [s for s in samples if s[0] > seconds / 3]
    first = [gap for at_s, gap in gaps if at_s < seconds / 5]
    last = [gap for at_s, gap in gaps if at_s > seconds * 4 / 5]
    return counts | {
        "errors": len(errors),
        "first_errors": errors[:3],
        "rss_server_mib": [round(s[1], 1) for s in (samples[0], late[0], late[-1])],
        "rss_engine_mib": [round(s[2], 1) for s in (samples[0], late[0], late[-1])],
        "rss_slope_mib_per_h": round(3600 * slope([(s[0], s[1] + s[2]) for s in late]), 2),
        "fds_most": [max(s[3] for s in half) for half in (late[: len(late) // 2], late[len(late) // 2 :])],
        "p99_gap_ms_first_fifth": round(1e3 * percentile(first, 99), 1),
        "p99_gap_ms_last_fifth": round(1e3 * percentile(last, 99), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the rows (0.7)")
    parser.add_argument("--output", type=Path, metavar="FILE")
    args = parser.parse_args()
    options = ("--port", "0", "--device", "cpu", "--max-model-len", "256", "--max-num-seqs", str(NUM_ROWS))
    with program(*options) as one:
        url = one.wait_url()
        num_clients = round(args.share * NUM_ROWS)
        figure = asyncio.run(soak(one, url, num_clients, 60 * args.minutes))

        def engine() -> dict:
            return httpx.get(f"{url}/load", timeout=PATIENCE_S).json()["engine"]

        eventually(lambda: engine()["num_requests_running"] + engine()["num_requests_waiting"] == 0)
        figure["kv_blocks_leaked"] = engine()["kv_blocks_leaked"]
        one.process.terminate()
        assert one.wait() == 0
    figure = {"minutes": args.minutes, "clients": num_clients, "rows": NUM_ROWS} | figure
    print(json.dumps(figure, indent=1))
    if args.output is not None:
        about = machine.describe(torch.device("cpu")) | {"argv": sys.argv}
        args.output.write_text(json.dumps(about | {"R12 soak": figure}, indent=1) + "\n")
    return 0 if figure["errors"] == 0 and figure["kv_blocks_leaked"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
