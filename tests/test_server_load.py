"""The server under people who do not behave: floods, storms, slow readers, half-open connections, malformed bodies.

Small counts in the fast tier, full ones under ``-m slow`` against serve.py as a program. Slow tests print their
figures; with NANODRIFT_RESULTS set to a folder these are written there as server-load.json.
"""

import asyncio
import itertools
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from null_engine import HANG, SILENT
from running_server import (
    PATIENCE_S,
    complete,
    error_of,
    eventually,
    figures_of,
    gauge,
    is_quiet,
    place_of,
    program,
    request_bytes,
    rss_mib,
    running,
    status_of,
    talk,
)

from nanodrift.metrics import percentile
from nanodrift.server import protocol
from nanodrift.server.connection import Connection

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def figures():
    with figures_of("server-load") as taken:
        yield taken


# ---- the queue -----------------------------------------------------------------------------------------------------


def test_a_full_queue_says_so_and_when_to_come_back():
    with running("--max-num-seqs", "1", max_queue=1) as small, httpx.Client(base_url=small.url) as http:
        with ThreadPoolExecutor(2) as pool:
            options = {"json": {"prompt": [SILENT], "max_tokens": 5}, "timeout": 1.5}
            waiting = [pool.submit(httpx.post, f"{small.url}/v1/completions", **options) for _ in range(2)]
            eventually(lambda: small.gauge("num_requests_waiting") == 1)
            for body in ({}, {"stream": True}, {"n": 2}, {"prompt": ["a", "b"]}):
                refused = complete(http, **body)
                error = error_of(refused, 429)
                assert error["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
            assert http.get("/health").status_code == 200  # busy is not ill
            assert small.gauge("requests_refused_total") == small.gauge("slo_violations_total") == 4
            for one in waiting:
                with pytest.raises(httpx.ReadTimeout):
                    one.result()
        eventually(lambda: complete(http).status_code == 200)
        assert error_of(complete(http, n=3), 429)  # more than can ever be there at once


def flood(url: str, num_requests: int, **body) -> list[tuple[bytes, list[float]]]:
    async def all_of_them():
        return await asyncio.gather(*(talk(url, request_bytes(**body)) for _ in range(num_requests)))

    return asyncio.run(all_of_them())


def check_flood(answers: list[tuple[bytes, list[float]]], num_room: int) -> dict:
    """Every request has exactly one answer: 200, or 429 with a time to come back."""
    statuses = [status_of(answer) for answer, _ in answers]
    assert set(statuses) <= {200, 429}
    refused = [answer for answer, _ in answers if status_of(answer) == 429]
    assert all(b"retry-after: " in answer.lower() and b'"queue_full"' in answer for answer in refused)
    assert num_room <= statuses.count(200)
    return {"answered": statuses.count(200), "refused": len(refused)}


def test_a_flood_is_answered_to_the_last():
    with running("--step-ms", "2", "--max-num-seqs", "8", max_queue=32) as small:
        counts = check_flood(flood(small.url, 200, prompt=[7, 8], max_tokens=30), num_room=40)
        assert counts["refused"] > 0
        eventually(lambda: small.gauge("num_requests_running") + small.gauge("num_requests_waiting") == 0)


# ---- connections ---------------------------------------------------------------------------------------------------


class Hasty(Connection):
    header_timeout_s = 0.5
    write_timeout_s = 0.5


def test_half_open_connections_are_closed_and_delay_nobody():
    with running(connection=Hasty) as server:
        socks = [socket.create_connection(place_of(server.url)) for _ in range(60)]
        for index, sock in enumerate(socks):
            sock.sendall([b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: "][index % 3])
        assert httpx.get(f"{server.url}/health").status_code == 200
        for sock in socks:
            sock.settimeout(PATIENCE_S)
            try:
                assert sock.recv(100) == b""
            except ConnectionResetError:
                pass
            sock.close()
        with httpx.Client(base_url=server.url) as http:  # nobody is closed in the middle of a request
            assert complete(http, max_tokens=1000).status_code == 200


def test_a_further_request_must_come_whole_too():
    with running(connection=Hasty) as server, socket.create_connection(place_of(server.url)) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += sock.recv(4096)
        assert b"200 OK" in answer
        sock.sendall(b"GET /version HT")
        try:
            assert sock.recv(100) == b""
        except ConnectionResetError:
            pass


def test_a_reader_that_never_reads_is_cut_off():
    with running("--step-ms", "0.2", "--window", "200000", connection=Hasty) as server:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(place_of(server.url))
            sock.sendall(request_bytes(prompt=[7] * 50, max_tokens=150_000, stream=True))
            eventually(lambda: server.gauge("num_requests_running") == 1)
            eventually(lambda: server.gauge("num_requests_running") == 0)  # its request ended with it
        assert server.gauge("http_requests_client_disconnected_total") == 1
        assert server.gauge("generation_tokens_total") < 150_000


# ---- malformed bodies ----------------------------------------------------------------------------------------------

ODD_VALUES = [
    b"null", b"true", b"-1", b"0", b"1e308", b"1e999", b"-1e999", b"NaN", b"Infinity", b"9223372036854775808",
    b"1e-320", b'""', b'"a"', b'"\\u0000"', b'"\\ud800"', b"[]", b"[null]", b"[[]]", b"[[[1]]]", b"{}",
    b'{"a": {"b": []}}',
]  # fmt: skip
FIELDS = ["prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stop_token_ids", "stream",
          "stream_options", "slo", "model", "min_tokens", "logprobs", "echo", "logit_bias", "priority", "request_id",
          "repetition_penalty", "presence_penalty", "truncate_prompt_tokens", "cache_salt"]  # fmt: skip


def corpus() -> list[bytes]:
    """Bodies that are no proper request, and some that are: what matters is that none of them is a server error."""
    bodies = [
        b'{"prompt": [7], "max_tokens": 2, "%s": %s}' % (field.encode(), value)
        for field in FIELDS
        for value in ODD_VALUES
    ]
    whole = b'{"prompt": [7, 8, 9], "max_tokens": 2, "stop": ["a", "b"]}'
    bodies += [whole[:length] for length in range(len(whole))]
    bodies += [b"[" * depth for depth in (100, 10_000, 100_000)]
    bodies += [b'{"prompt": %s1%s}' % (b"[" * depth, b"]" * depth) for depth in (3, 500, 900, 5_000, 100_000)]
    bodies += [b'{"a":' * depth + b"1" + b"}" * depth for depth in (500, 5_000, 100_000)]
    bodies += [b'{"prompt": "a", "prompt": 5}', b"\xff\xfe\x00", b'{"prompt": "\xc3("}', b"\x00" * 1000, b"a=b"]
    bodies += [b'{"prompt": "%s", "max_tokens": 1}' % (b"a" * 100_000), b'{"prompt": "' + b"a" * 9_000_000 + b'"}']
    bodies += [b'{"prompt": [' + b"7," * 200_000 + b'7], "max_tokens": 1}', b'{"x%d": 1}' * 100]
    bodies += [b"{" + b",".join(b'"x%d": 1' % i for i in range(20_000)) + b', "prompt": "a", "max_tokens": 1}']
    return bodies


def test_malformed_bodies_are_never_a_server_error(figures, monkeypatch):
    monkeypatch.setattr(protocol, "_logged_fields", set())
    bodies = corpus()
    assert len(bodies) >= 200
    with running() as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        engine, times_s = server.client.process.pid, []
        for body in bodies:
            started_s = time.perf_counter()
            response = http.post("/v1/completions", content=body, headers=JSON)
            times_s.append(time.perf_counter() - started_s)
            assert response.status_code < 500, (body[:100], response.text)
            if response.status_code != 200:
                error_of(response, response.status_code)
            response = http.post("/v1/chat/completions", content=body, headers=JSON)
            assert 400 <= response.status_code < 500, (body[:100], response.text)
        for path in ("/tokenize", "/detokenize"):
            for body in bodies[::7]:
                assert http.post(path, content=body, headers=JSON).status_code < 500, body[:100]
        assert len(protocol._logged_fields) <= protocol.MAX_LOGGED_FIELDS
        assert server.client.process.pid == engine and server.client.process.poll() is None
        assert complete(http).status_code == 200
    figures["R7 malformed bodies"] = {"bodies": len(bodies), "p99_ms": round(percentile(times_s, 99) * 1e3, 1)}


# ---- the slow tier: full counts, serve.py as a program --------------------------------------------------------------


@pytest.mark.slow
def test_r3_cancellation_storm(figures):
    """200 requests of 10,000 tokens whose clients leave after half a second, then one that wants an answer."""
    with program("--port", "0", engine=("--step-ms", "10", "--window", "20000")) as one:
        url = one.wait_url()

        async def impatient(number: int):
            body = {"prompt": [7 + number, 8], "max_tokens": 10_000, "min_tokens": 10_000, "stream": number % 2 == 0}
            try:
                await asyncio.wait_for(talk(url, request_bytes(**body)), 0.5)
            except asyncio.TimeoutError:
                return True

        async def storm():
            return await asyncio.gather(*(impatient(number) for number in range(200)))

        assert all(asyncio.run(storm()))
        started_s = time.perf_counter()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": [7], "max_tokens": 10}, timeout=PATIENCE_S)
        answer_s = time.perf_counter() - started_s
        eventually(lambda: is_quiet(url))
        freed_s = time.perf_counter() - started_s
    figures["R3 storm of 200"] = {"next_answer_s": round(answer_s, 3), "all_freed_s": round(freed_s, 3)}
    assert answer.status_code == 200 and answer_s < 10


@pytest.mark.slow
def test_r9_slow_readers(figures):
    """64 normal streams beside 64 more of them, and beside 64 that read a byte a second."""
    message = request_bytes(prompt=[7] * 8, max_tokens=500, stream=True)
    endless = request_bytes(prompt=[7] * 8, max_tokens=15_000, stream=True)

    async def gaps_s(url, others) -> list[float]:
        beside = [asyncio.create_task(talk(url, endless, **others)) for _ in range(64)]
        await asyncio.sleep(2)
        answers = await asyncio.gather(*(talk(url, message) for _ in range(64)))
        grown_mib.append(rss_mib(one))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        assert all(b"[DONE]" in answer for answer, _ in answers)
        return [b - a for _, times_s in answers for a, b in itertools.pairwise(times_s)]

    with program("--port", "0", engine=("--step-ms", "30", "--window", "20000", "--max-num-seqs", "256")) as one:
        url, grown_mib = one.wait_url(), [0.0]
        grown_mib[0] = rss_mib(one)
        p99_ms = {}
        for name, others in (("normal", {}), ("slow", {"read_bytes": 1, "pause_s": 1.0})) * 2:
            p99_ms.setdefault(name, []).append(round(percentile(asyncio.run(gaps_s(url, others)), 99) * 1e3, 2))
            eventually(lambda: is_quiet(url))
    figures["R9 64 slow readers"] = {"p99_tbt_ms_beside": p99_ms, "server_rss_mib": [round(mib) for mib in grown_mib]}
    assert max(grown_mib) - grown_mib[0] < 200


@pytest.mark.slow
def test_r10_a_thousand_idle_connections(figures):
    with program("--port", "0", engine=()) as one:
        url = one.wait_url()
        socks = [socket.create_connection(place_of(url)) for _ in range(1000)]
        for sock in socks[::2]:
            sock.sendall(b"GET /health HTTP/1.1\r\n")
        times_s = []
        with httpx.Client(base_url=url, headers={"Connection": "close"}) as http:  # a connection of its own each time
            for _ in range(20):
                started_s = time.perf_counter()
                assert http.get("/health").status_code == 200
                times_s.append(time.perf_counter() - started_s)
        opened_s = time.perf_counter()
        for sock in socks:
            sock.settimeout(PATIENCE_S)
            try:
                assert sock.recv(100) == b""
            except ConnectionResetError:
                pass
            sock.close()
        closed_s = time.perf_counter() - opened_s
    figures["R10 1000 idle connections"] = {
        "health_worst_ms": round(max(times_s) * 1e3, 1),
        "all_closed_after_s": round(closed_s, 1),
    }


@pytest.mark.slow
def test_r11_flood_of_ten_thousand(figures):
    with program("--port", "0", "--max-queue", "2000", engine=("--step-ms", "2", "--max-num-seqs", "256")) as one:
        url = one.wait_url()
        check_flood(flood(url, 200, prompt=[7, 8], max_tokens=4), 200)  # warm
        before_mib, started_s = rss_mib(one), time.perf_counter()
        counts = check_flood(flood(url, 10_000, prompt=[7, 8], max_tokens=100), num_room=256)
        seconds = time.perf_counter() - started_s
        eventually(lambda: is_quiet(url))
        after_mib = rss_mib(one)
        again = flood(url, 10_000, prompt=[7, 8], max_tokens=100)
        assert check_flood(again, 256) and rss_mib(one) < after_mib + 100  # what the first took is used again
    figures["R11 flood of 10000"] = counts | {
        "seconds": round(seconds, 1),
        "rss_before_mib": round(before_mib),
        "rss_after_mib": round(after_mib),
    }


@pytest.mark.slow
def test_a_thousand_streams(figures):
    with program("--port", "0", engine=("--step-ms", "1", "--max-num-seqs", "1024")) as one:
        url = one.wait_url()
        flood(url, 100, prompt=[7, 8], max_tokens=10, stream=True)  # warm
        started_s = time.perf_counter()
        answers = flood(url, 1000, prompt=[7, 8], max_tokens=200, stream=True)
        seconds = time.perf_counter() - started_s
        assert all(status_of(answer) == 200 and b"[DONE]" in answer for answer, _ in answers)
        assert gauge(url, "generation_tokens_total") == 201_000
    figures["R22 1000 streams"] = {"tokens_s": round(200_000 / seconds), "seconds": round(seconds, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("num_signals", [1, 2])
def test_r14_ends(figures, num_signals):
    """How long it takes from the last signal to a program that is gone, with a stream of three seconds under way."""
    body = {"prompt": [7], "max_tokens": 150, "stream": True}
    with program("--port", "0", engine=("--step-ms", "20")) as one, ThreadPoolExecutor(1) as pool:
        url = one.wait_url()
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        eventually(lambda: gauge(url, "num_requests_running") == 1)
        for _ in range(num_signals):
            signalled_s = time.perf_counter()
            one.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert one.wait() == 0
        end_s = time.perf_counter() - signalled_s
        assert ("shutting down" in answer.result().text) is (num_signals == 2)
    figures[f"R14 {num_signals} x SIGTERM"] = {"gone_after_s": round(end_s, 2)}


@pytest.mark.slow
def test_r15_stall(figures):
    with program("--port", "0", "--stall-timeout", "2", engine=()) as one, ThreadPoolExecutor(1) as pool:
        url, hung_s = one.wait_url(), time.perf_counter()
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": [HANG]}, timeout=PATIENCE_S)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        noticed_s = time.perf_counter() - hung_s
        assert one.wait() == 1
        end_s = time.perf_counter() - hung_s
        assert answer.result().status_code == 500
    figures["R15 stall after 2 s"] = {"health_503_after_s": round(noticed_s, 2), "gone_after_s": round(end_s, 2)}
