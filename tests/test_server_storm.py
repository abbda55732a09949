"""The server and the embedded model on the CPU, under people who leave, ask nonsense or ask for too much.

What must hold: no KV block is lost, every request ends exactly once, and an answer is the one that its prompt gets
alone, whatever was preempted, evicted, shared or aborted around it. Small counts in the fast tier, full ones under
``-m slow``; these print their figures, and with NANODRIFT_RESULTS set to a folder write server-storm.json there.
"""

import asyncio
import json
import random
import time

import httpx
import pytest
from running_server import PATIENCE_S, eventually, figures_of, gauge, place_of, program, request_bytes, status_of, talk

from nanodrift.metrics import percentile

WINDOW = 256  # --max-model-len
SMALL_POOL = ("--device", "cpu", "--max-model-len", str(WINDOW), "--max-num-seqs", "32", "--num-kv-blocks", "12")
SHARES = {"left": 0.30, "invalid": 0.05, "too long": 0.05}  # the others want their answer
INVALID = [
    {"temperature": -1}, {"prompt": []}, {"prompt": "a", "max_tokens": 0}, {"n": 99}, {"stop": [""]}, {"top_p": 7},
    {"prompt": [5000]}, {"stream": "yes"}, {"slo": {"ttft_ms": -5}}, {"seed": 2**70}, {"model": 5}, {"tools": [{}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    with figures_of("server-storm") as taken:
        yield taken


def questions(number: int) -> list[dict]:
    """Bodies that share some beginnings, of 1 to 4 blocks with their answers; the first of 50 has a long answer."""
    draw = random.Random(5)
    heads = [[draw.randrange(10, 2000) for _ in range(draw.choice((20, 64, 128, 150)))] for _ in range(6)]
    asked = []
    for i in range(number):
        tail = [draw.randrange(10, 2000) for _ in range(draw.randrange(1, 40))]
        prompt, max_tokens = draw.choice(heads) + tail, draw.choice((1, 2, 4, 8, 12, 30))
        if i % 50 == 0:
            prompt, max_tokens = tail, 200
        asked.append({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True})
    return asked


def text_and_end(answer: bytes) -> tuple[str, list[str]]:
    """The text of a whole or streamed answer and its finish_reasons, of which there must be one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"text/event-stream" in head:
        events = [event for event in body.split(b"data: ")[1:] if event.startswith(b"{")]
        assert answer.count(b"data: [DONE]") == 1
        choices = [json.loads(event[: event.rindex(b"}") + 1])["choices"][0] for event in events]
    else:
        choices = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["choices"]
    return "".join(c["text"] for c in choices), [c["finish_reason"] for c in choices if c["finish_reason"]]


async def leave(url: str, message: bytes, draw: random.Random, longest_s: float) -> None:
    """Sends a request and hangs up: after a while, or after some bytes of the answer."""
    reader, writer = await asyncio.open_connection(*place_of(url))
    writer.write(message)
    await writer.drain()
    if draw.random() < 0.5:
        await asyncio.sleep(draw.random() ** 2 * longest_s)
    else:
        for _ in range(draw.randrange(1, 6)):
            if not await reader.read(400):
                break
    writer.transport.abort()


async def mixed(url: str, number: int, asked: list[dict], known: dict[int, str], num_at_once: int) -> dict:
    """``number`` requests, ``num_at_once`` at a time; checks every answer and counts what happened."""
    draw, counts, times_s = random.Random(11), {"answered": 0, "left": 0, "invalid": 0, "too long": 0}, []
    counts["unlike the answer alone"] = 0
    todo = iter(range(number))

    async def worker() -> None:
        for _ in todo:
            what, index = draw.random(), draw.randrange(len(asked))
            body = asked[index] | {"stream": draw.random() < 0.5}
            if (what := what - SHARES["left"]) < 0:
                await leave(url, request_bytes(**body), draw, 2 * (times_s[-1] if times_s else 0.1))
                counts["left"] += 1
            elif (what := what - SHARES["invalid"]) < 0:
                answer, _ = await talk(url, request_bytes(**body | draw.choice(INVALID)))
                assert status_of(answer) == 400, answer
                counts["invalid"] += 1
            elif what - SHARES["too long"] < 0:
                long = draw.choice([{"prompt": [7] * (WINDOW + draw.randrange(300))}, {"max_tokens": WINDOW}])
                answer, _ = await talk(url, request_bytes(**body | long))
                assert status_of(answer) == 400 and b"maximum context length" in answer, answer
                counts["too long"] += 1
            else:
                started_s = time.perf_counter()
                answer, _ = await talk(url, request_bytes(**body))
                times_s.append(time.perf_counter() - started_s)
                assert status_of(answer) == 200, answer
                text, ends = text_and_end(answer)
                assert ends == ["length"]
                counts["unlike the answer alone"] += text != known[index]
                counts["answered"] += 1

    await asyncio.gather(*(worker() for _ in range(num_at_once)))
    return counts | {"p99_s": round(percentile(times_s, 99), 3)}


def storm(number: int, num_at_once: int, num_questions: int) -> dict:
    with program("--port", "0", *SMALL_POOL) as one:
        url = one.wait_url()
        asked = questions(num_questions)
        alone = {i: httpx.post(f"{url}/v1/completions", json=q, timeout=PATIENCE_S) for i, q in enumerate(asked)}
        known = {i: answer.json()["choices"][0]["text"] for i, answer in alone.items()}
        before = httpx.get(f"{url}/load").json()["engine"]
        ended_before, started_s = gauge(url, "request_success_total"), time.perf_counter()
        counts = asyncio.run(mixed(url, number, asked, known, num_at_once))
        seconds = time.perf_counter() - started_s

        def at_rest() -> bool:
            load = httpx.get(f"{url}/load").json()
            engine = load["engine"]
            return load["server_load"] == engine["num_requests_running"] + engine["num_requests_waiting"] == 0

        eventually(at_rest)
        eventually(lambda: httpx.get(f"{url}/load").json()["engine"]["kv_cache_usage_perc"] == 0)
        engine = httpx.get(f"{url}/load").json()["engine"]
        ended = gauge(url, "request_success_total") - ended_before
        in_engine = {
            reason: engine[f"num_finished_{reason}_total"] - before[f"num_finished_{reason}_total"]
            for reason in ("stop", "length", "abort")
        }
        assert engine["kv_blocks_leaked"] == 0 and engine["num_free_kv_blocks"] == engine["num_kv_blocks"]
        assert ended == sum(in_engine.values())  # both processes have seen the same ends, and each of them once
        assert counts["answered"] <= ended <= counts["answered"] + counts["left"]
        assert counts["answered"] <= in_engine["length"]
        preempted = engine["num_preemptions_total"] - before["num_preemptions_total"]
        again = httpx.post(f"{url}/v1/completions", json=asked[0], timeout=PATIENCE_S)
        assert again.json()["choices"][0]["text"] == known[0]
        one.process.terminate()
        assert one.wait() == 0
        assert "missing" not in one.said and "Traceback" not in one.said
    return {
        "requests": number,
        "seconds": round(seconds, 1),
        **counts,
        "ended in the engine": in_engine,
        "preemptions": preempted,
        "cached_prompt_tokens": engine["prefix_cache_hits_total"] - before["prefix_cache_hits_total"],
        "kv_blocks": engine["num_kv_blocks"],
        "kv_blocks_leaked": engine["kv_blocks_leaked"],
    }


def test_a_mixed_crowd_leaves_nothing_behind():
    counts = storm(200, num_at_once=24, num_questions=12)
    assert counts["unlike the answer alone"] == 0 and min(counts[kind] for kind in SHARES) > 0


@pytest.mark.slow
def test_r1_ten_thousand_mixed_requests(figures):
    figures["R1 mixed requests"] = counts = storm(10_000, num_at_once=64, num_questions=50)
    assert counts["unlike the answer alone"] == 0


@pytest.mark.slow
def test_r4_a_pool_of_twice_the_longest_request(figures):
    """200 requests at once in a pool for two of the longest: preempted, computed again, and answers alike."""
    draw = random.Random(3)
    asked = [
        {"prompt": [draw.randrange(10, 2000) for _ in range(draw.randrange(1, 60))], "max_tokens": WINDOW - 60}
        | {"temperature": 0, "ignore_eos": True}
        for _ in range(200)
    ]
    answers, figure = {}, {}
    for name, num_blocks in (("roomy", 1000), ("small", 2 * WINDOW // 64)):
        options = ("--max-model-len", str(WINDOW), "--max-num-seqs", "32", "--num-kv-blocks", str(num_blocks))
        with program("--port", "0", "--device", "cpu", *options) as one:
            url, started_s = one.wait_url(), time.perf_counter()

            async def all_of_them(url=url) -> list[tuple[bytes, list[float]]]:
                return await asyncio.gather(*(talk(url, request_bytes(**body)) for body in asked))

            answers[name] = [text_and_end(answer) for answer, _ in asyncio.run(all_of_them())]
            figure[f"seconds_{name}"] = round(time.perf_counter() - started_s, 1)
            engine = httpx.get(f"{url}/load").json()["engine"]
            assert engine["kv_blocks_leaked"] == 0 and engine["num_kv_blocks"] == num_blocks
    unlike = sum(a != b for a, b in zip(answers["roomy"], answers["small"], strict=True))
    figures["R4 pool of twice the longest"] = figure | {
        "requests": 200,
        "preemptions": engine["num_preemptions_total"],
        "unlike the roomy pool's": unlike,
    }
    assert engine["num_preemptions_total"] > 0 and unlike == 0
