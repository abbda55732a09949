"""Putting load on engines and servers: a scripted server plays each trap, the real ones give the real answers.

The scripted server speaks HTTP/1.1 in a thread of this process; what it answers is a function of the request's number.
"""

import asyncio
import contextlib
import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from nanodrift.bench import cli, compare, load_cli, plots, report
from nanodrift.bench.client import FORMS, Server, TokenTimes
from nanodrift.bench.load import INTERRUPTED, Record, run_workload
from nanodrift.bench.workloads import Sample, Workload, named
from nanodrift.config import SLO, EngineConfig
from nanodrift.startup import load_engine

ROOT = Path(__file__).resolve().parents[1]


def planned(count):
    return Workload("planned", (Sample((), 20),) * count)


def chunk(text="x", total=None, finish=None, choices=True):
    entry = {"choices": [{"index": 0, "text": text, "finish_reason": finish}] if choices else []}
    return entry | ({"usage": {"prompt_tokens": 8, "completion_tokens": total}} if total is not None else {})


def one_by_one(count, gap_s=0.002):
    """``count`` tokens, a chunk each, usage all along."""
    chunks = [(gap_s, chunk("x", i + 1, "length" if i == count - 1 else None)) for i in range(count)]
    return [*chunks, (0, chunk(total=count, choices=False)), (0, "[DONE]")]


class ScriptedServer:
    """Answers POST number n (0 is the client's probe) with ``script(n, body)``: a status, or (delay_s, event) pairs."""

    def __init__(self, script, lists_models=True):
        self.script, self.lists_models, self.bodies = script, lists_models, []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                body = json.loads(await reader.readexactly(int(length))) if length else None
                if body is None and not self.lists_models:  # and it drops the connection
                    await self._whole(writer, 500, {})
                    return writer.close()
                if body is None:
                    await self._whole(writer, 200, {"data": [{"id": "scripted", "max_model_len": 4096}]})
                    continue
                self.bodies.append(body)
                answer = self.script(len(self.bodies) - 1, body)
                if isinstance(answer, int):
                    await self._whole(writer, answer, {"error": {"message": "no"}})
                    continue
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
                for delay_s, event in answer:
                    await asyncio.sleep(delay_s)
                    data = event if isinstance(event, str) else json.dumps(event)
                    writer.write(f"data: {data}\n\n".encode())
                    await writer.drain()
                return writer.close()

    async def _whole(self, writer, status, content):
        data = json.dumps(content).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)


@contextlib.contextmanager
def scripted(*arguments):
    server = ScriptedServer(*arguments)
    try:
        yield server
    finally:
        server.close()


def measure(script, count=5, output_len=6, rate=200.0, slo=None, **options):
    """Records of a small run against the script, and the server that saw it."""
    with scripted(script) as server:
        target = Server(server.url, **options)
        target.connect(ready_timeout_s=10)
        records = run_workload(target, named("random", count, input_len=8, output_len=output_len), rate, slo=slo)
    return records, server


# --- counting tokens -------------------------------------------------------------------------------------------------


def times_of(*events):
    times = TokenTimes()
    for now_s, event in events:
        times.feed(event, now_s)
    return times.token_s()


def test_a_chunk_of_several_tokens_counts_as_several():
    assert times_of((1, chunk("a", 1)), (2, chunk("bcd", 4)), (3, chunk("e", 5, "length"))) == (
        (1, 2, 2, 2, 3),
        "usage",
    )


def test_the_empty_role_chunk_is_not_the_first_token():
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": {"completion_tokens": 0}}
    text = {"choices": [{"delta": {"content": "hi"}}], "usage": {"completion_tokens": 1}}
    assert times_of((1, role), (2, text)) == ((2,), "usage")
    role.pop("usage"), text.pop("usage")
    assert times_of((1, role), (2, text)) == ((2,), "chunks")
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    assert times_of((1, role), (3, thought)) == ((3,), "chunks")


def test_a_token_without_text_counts_when_usage_tells_of_it():
    assert times_of((1, chunk("", 1)), (2, chunk("ab", 2, "stop"))) == ((1, 2), "usage")


def test_a_total_at_the_end_is_spread_over_the_chunks():
    assert times_of((1, chunk("a")), (2, chunk("b", finish="length")), (3, chunk(total=4, choices=False))) == (
        (1, 1, 2, 2),
        "usage",
    )
    assert times_of((1, chunk("a")), (2, chunk("b")), (3, chunk("c")), (4, chunk(total=2, choices=False))) == (
        (1, 2),
        "usage",
    )
    assert times_of((1, chunk("", finish="stop")), (2, chunk(total=1, choices=False))) == ((2,), "usage")


# --- the client against the script -----------------------------------------------------------------------------------


def test_every_request_is_sent_and_counted():
    records, server = measure(lambda number, body: one_by_one(body["max_tokens"]), count=8)
    assert [len(r.token_s) for r in records] == [6] * 8 and all(r.is_completed for r in records)
    assert [r.arrival_s for r in records] == sorted(r.arrival_s for r in records)
    assert all(r.counted_by == "usage" and r.num_prompt_tokens == 8 and r.error is None for r in records)
    assert all(0 <= r.arrival_s <= r.sent_s <= r.token_s[0] <= r.end_s for r in records)
    body = server.bodies[3]
    assert body["model"] == "scripted" and body["ignore_eos"] is True and body["min_tokens"] == 6
    assert len(body["prompt"]) == 8 and all(isinstance(token, int) for token in body["prompt"])
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_probe_and_warm_up_are_not_in_the_numbers(capsys):
    with scripted(lambda number, body: one_by_one(body["max_tokens"], gap_s=0.3 if number <= 3 else 0.001)) as server:
        options = f"--base-url {server.url} --num-prompts 4 --num-warmups 3 --input-len 8 --output-len 3"
        assert cli.main(["serve", *options.split()]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(server.bodies) == 1 + 3 + 4 and result["issued"] == result["completed"] == 4
    assert result["max_ttft_ms"] < 300 and result["total_output_tokens"] == 12


def test_a_stall_shows_in_every_request_that_fell_into_it():
    """Coordinated omission: a client that waits for the server before it sends would see one slow request."""
    lock = threading.Lock()

    def stalls(number, body):
        with lock:  # the server's one thread stands still
            time.sleep(0.6 if number == 5 else 0)
        return one_by_one(2, gap_s=0)

    records, _ = measure(stalls, count=100, output_len=2, rate=100.0)
    slow = [r for r in records if r.ttft_s > 0.1]
    assert len(slow) >= 30 and max(r.ttft_s for r in slow) > 0.5
    assert all(r.send_lag_s < 0.5 for r in records), "the sender did not wait"


def test_failures_and_refusals_count_as_misses():
    def script(number, body):
        answers = {1: 429, 2: 500, 3: [(0, chunk("x", 1))], 4: [(0, {"error": {"message": "died"}}), (0, "[DONE]")]}
        return answers.get(number, one_by_one(6))

    slo = SLO(ttft_ms=60_000, tbt_ms=60_000)
    records, _ = measure(script, count=8, slo=slo)
    assert [r.is_completed for r in records].count(False) == 4 and [r.is_refused for r in records].count(True) == 1
    assert sorted(r.error[:8] for r in records if r.error) == ["HTTP 429", "HTTP 500", "died", "the stre"]
    result = report.result_of(records, slo, planned(8))
    assert (result["completed"], result["failed"], result["shed"], result["issued"]) == (4, 4, 1, 8)
    assert result["slo_attainment"] == 0.5 and "1 x died" in report.frame(result)


def test_a_request_that_takes_too_long_is_given_up():
    slow = [(0, chunk("x", 1)), (30, "[DONE]")]
    records, _ = measure(lambda n, body: slow if n == 2 else one_by_one(6), count=4, timeout_s=0.5)
    assert [r.error for r in records if r.error] == ["timed out after 0.5 s"]
    assert report.result_of(records, SLO(), planned(4))["timeouts"] == 1


def test_a_closed_loop_never_has_more_under_way():
    running, most = 0, 0

    def script(number, body):
        nonlocal running, most
        running += number > 0
        most = max(most, running)

        def events():
            nonlocal running
            yield from one_by_one(4)
            running -= number > 0

        return events()

    with scripted(script) as server:
        target = Server(server.url)
        target.connect(ready_timeout_s=10)
        workload = named("random", 12, input_len=8, output_len=4)
        records = run_workload(target, workload, math.inf, max_concurrency=3)
    assert most == 3 and len(records) == 12
    assert all(r.send_lag_s < 0.5 for r in records) and records[-1].arrival_s > 0, "due when a slot was free"


@pytest.mark.parametrize("accepts, expected", [(lambda b: isinstance(b["prompt"], str), 1),
                                               (lambda b: "ignore_eos" not in b, 2),
                                               (lambda b: "stream_options" not in b, 3)])  # fmt: skip
def test_the_client_asks_for_less_where_a_server_takes_less(accepts, expected):
    records, server = measure(lambda n, body: one_by_one(2) if accepts(body) else 422, count=2, output_len=2)
    assert all(r.is_completed for r in records) and len(server.bodies) == expected + 1 + 2
    assert len(server.bodies[-1]["prompt"].split()) == 64, "the script says 8 tokens, whatever is sent: 8 words a token"
    assert ("ignore_eos" in server.bodies[-1]) == (expected == 1)


def test_a_server_that_cannot_list_its_models_is_still_measured():
    with scripted(lambda n, body: one_by_one(2), False) as server:
        target = Server(server.url)
        target.connect(ready_timeout_s=10)
    assert target.model is None and target.max_model_len is None and len(server.bodies) == 1


def test_chat_sends_messages():
    records, server = measure(lambda n, body: one_by_one(2), count=2, output_len=2, endpoint="/v1/chat/completions")
    assert len(server.bodies[-1]["messages"][0]["content"].split()) == 64 and "prompt" not in server.bodies[-1]
    assert len(FORMS) == 4 and all(r.is_completed for r in records)


def test_a_server_that_is_not_there_or_says_no_is_a_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert cli.main(["serve", "--port", str(port)]) == 2
    with scripted(lambda n, body: 401) as server, pytest.raises(ValueError, match="401"):
        Server(server.url).connect()
    assert "cannot be used" in capsys.readouterr().err.replace("\n", " ")


def test_stopped_half_way_it_still_writes_what_it_has(tmp_path):
    """SIGTERM while requests are under way and others are not yet sent."""
    path = tmp_path / "run.json"
    with scripted(
        lambda n, body: one_by_one(4, 0.01) if n % 2 or not n else [(0, chunk("x", 1)), (30, "[DONE]")]
    ) as server:
        options = f"--base-url {server.url} --num-prompts 200 --request-rate 20 --input-len 8 --output-len 4"
        command = [sys.executable, "bench.py", "serve", *options.split(), "--output", str(path), "--save-detailed"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline_s = time.monotonic() + 60
        while len(server.bodies) < 12 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    result = json.loads(path.read_text())
    assert process.returncode == 130 and result["interrupted"], err
    assert 0 < result["issued"] == result["completed"] < 200 and result["unfinished"] > 0
    assert len(result["ttfts"]) == result["issued"] and "stopped early" in err


# --- the same load in this process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    loaded = load_engine(None, EngineConfig(device="cpu", max_num_seqs=8, max_prefill_tokens=128, max_model_len=512))
    yield loaded.engine
    loaded.engine.close()


def test_the_engine_takes_requests_when_they_are_due(engine):
    workload = named("random", 6, input_len=20, output_len=5)
    records = run_workload(engine, workload, 20.0, seed=1)
    assert [len(r.token_s) for r in records] == [5] * 6 and not engine.has_work
    assert all(r.arrival_s <= r.token_s[0] and r.counted_by == "engine" for r in records)
    assert records[-1].arrival_s == pytest.approx(6 / 20.0, abs=1e-6)
    assert records == sorted(records, key=lambda r: r.arrival_s)


def test_what_can_never_fit_is_refused_and_counted(engine):
    samples = (Sample((("a", 20),), 4), Sample((("b", 600),), 4))
    records = run_workload(engine, Workload("two", samples), math.inf)
    assert [r.is_completed for r in records] == [True, False] and records[1].is_refused
    assert report.result_of(records, SLO(), planned(2))["shed"] == 1


def test_a_closed_loop_in_process(engine):
    records = run_workload(engine, named("random", 7, input_len=10, output_len=4), math.inf, max_concurrency=2)
    assert (
        all(r.is_completed for r in records)
        and report.result_of(records, SLO(), planned(7))["max_concurrent_requests"] == 2
    )
    with pytest.raises(ValueError, match="max_concurrency"):
        run_workload(engine, named("random", 1), 1.0, max_concurrency=0)
    with pytest.raises(ValueError, match="request rate"):
        run_workload(engine, named("random", 1))


def test_interrupted_in_process_it_returns_what_it_has(engine):
    done = []

    def advance(record):
        done.append(record)
        if len(done) == 3:
            raise KeyboardInterrupt

    workload = named("random", 40, input_len=10, output_len=4)
    records = run_workload(engine, workload, 40.0, advance=advance)
    assert not engine.has_work and 3 <= sum(r.is_completed for r in records) < 40
    assert {r.error for r in records if not r.is_completed} <= {INTERRUPTED} and len(records) < 40


def test_the_whole_command_in_process(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps([i * 0.05, 20 + i, 4]) for i in range(9)) + "\n[0.5, 900, 4]\n")
    path, table = tmp_path / "run.json", tmp_path / "runs.csv"
    rest = f"--trace {trace} --time-scale 0.5 --device cpu --max-model-len 512 --output {path} --csv {table} --label x"
    for _ in range(2):
        assert cli.main(["run", *rest.split(), "--metadata", "where=here"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(path.read_text())
    assert (result["completed"], result["workload"], result["where"]) == (9, "trace.jsonl", "here")
    assert any("dropped 1 of 10" in note for note in result["notes"]) and "arrival times times 0.5" in err
    assert "Serving Benchmark Result" in err and "P99 TBT (ms)" in err and json.loads(out.splitlines()[-1])
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 and rows[0]["completed"] == "9"


def test_goodput_on_the_embedded_model(capsys):
    options = "--device cpu --max-model-len 256 --num-prompts 6 --input-len 16 --output-len 4 --seeds 1 --max-points 3"
    slo = "--request-rate 20 --slo-ttft-ms 60000 --slo-tbt-ms 60000"
    assert cli.main(["goodput", *options.split(), *slo.split()]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [point["request_rate"] for point in result["points"]] == [20, 40, 80] and not result["is_complete"]
    assert result["max_rate_at_99"] == 80 and "goodput at 99%" in err and "no miss was found" in err


def test_an_interrupted_search_keeps_its_points(capsys, monkeypatch):
    rates = []

    def run(target, workload, rate, seed, **options):
        rates.append(rate)
        records = [record(i) for i in range(len(workload.samples))]
        return records if len(rates) < 3 else records[:2]

    monkeypatch.setattr(load_cli, "run_workload", run)
    options = "--device cpu --max-model-len 256 --num-prompts 6 --input-len 16 --output-len 4 --seeds 1"
    assert cli.main(["goodput", *options.split()]) == 130
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"] and [point["request_rate"] for point in result["points"]] == [1, 2]


def test_a_mistake_is_a_sentence(capsys):
    for mistake in ("run --device cpu --workload longdoc --max-model-len 512", "run --device cpu --trace /no/such/file",
                    "compare /no/a.json /no/b.json", "plot cdf /no/a.json"):  # fmt: skip
        assert cli.main(mistake.split()) == 2
    err = capsys.readouterr().err
    assert err.count("bench.py:") == 4 and "Traceback" not in err


# --- serve.py, for real ----------------------------------------------------------------------------------------------


def test_both_command_lines_together(tmp_path, capsys):
    """serve.py with the embedded model on the CPU, and bench.py serve against it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as server:
        try:
            load = "--workload chat --length-scale 0.1 --num-prompts 12 --request-rate 20 --ready-check-timeout-sec 60"
            code = cli.main(["serve", "--port", str(port), *load.split()])
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert code in (0, 1) and result["completed"] == result["issued"] == 12, err
    assert result["tokens_counted_by"] == ["usage"] and result["request_form"]["prompt"] == "ids"
    expected = named("chat", 12, 0, max_model_len=2048, length_scale=0.1).samples
    assert result["total_output_tokens"] == sum(sample.num_output_tokens for sample in expected)
    assert result["total_input_tokens"] == sum(sample.num_prompt_tokens for sample in expected)
    assert result["model_id"] and result["cached_tokens"] is not None


# --- reports, comparisons, plots -------------------------------------------------------------------------------------


def record(number, ttft_s=0.05, gap_s=0.01, count=20, **more):
    token_s = tuple(number * 0.1 + ttft_s + i * gap_s for i in range(count))
    more = {"num_prompt_tokens": 10 + number} | more
    return Record(number * 0.1, token_s, SLO(100, 20), sent_s=number * 0.1, end_s=token_s[-1], **more)


def result_file(path, records, **more):
    conditions = {"gpu": None, "cpu": "a CPU", "torch": "2", "git": "abc", "model_id": "m", "workload": "chat",
                  "seed": 0, "benchmark": "run"}  # fmt: skip
    slo = SLO(100, 20)
    path.write_text(json.dumps({**conditions, **report.result_of(records, slo, planned(len(records)), True), **more}))
    return path


def test_a_late_sender_makes_a_run_void():
    records = [record(i) for i in range(10)]
    late = [Record(**{**vars(r), "sent_s": r.arrival_s + 0.02}) for r in records]
    assert report.result_of(records, SLO(100, 20), planned(10))["void"] is None
    result = report.result_of(late, SLO(100, 20), planned(10))
    assert "sent late: P99 20 ms" in result["void"] and "void" in report.frame(result)


def test_too_few_requests_for_a_p99_are_a_warning():
    few, enough = (report.result_of([record(i) for i in range(n)], SLO(), planned(n))["warnings"] for n in (499, 500))
    assert len(few) == 1 and "499 requests" in few[0] and enough == []


def test_answers_of_other_lengths_and_a_cache_of_another_run_are_warnings():
    def warnings(**changes):
        records = [record(i, **({"num_cached_tokens": 3} | changes)) for i in range(500)]
        workload = Workload("w", tuple(Sample(((f"p{i % 250}", 10 + i),), 20) for i in range(500)))
        return report.result_of(records, SLO(), workload)["warnings"]

    assert warnings() == []
    assert "asked for 10000 tokens out and got 5000" in warnings(count=10)[0]
    assert "remembers an earlier run" in warnings(num_cached_tokens=1000)[0]


def test_the_frame_is_vllms_with_every_gap_beside_the_mean():
    text = report.frame(
        report.result_of([record(i) for i in range(30)], SLO(100, 20), planned(30)) | {"request_rate": "4"}
    )
    for line in ("============ Serving Benchmark Result ============", "Successful requests:                     30",
                 "---------------Time to First Token----------------",
                 "-----Time per Output Token (excl. 1st token)------", "Mean TPOT (ms):                          10.00",
                 "P99 TBT (ms):                            10.00", "Good requests, of all issued:            100.00%",
                 "Request rate configured (RPS):           4", "=" * 50):  # fmt: skip
        assert line in text.splitlines(), line


def test_peaks_are_counted():
    result = report.result_of([record(i, count=100) for i in range(30)], SLO(), planned(30))
    assert result["max_concurrent_requests"] == 11  # 1.04 s each, one every 0.1 s
    assert result["max_output_tokens_per_s"] > result["output_throughput"]


def test_a_detailed_result_reads_back(tmp_path):
    records = [record(i) for i in range(5)] + [record(5, count=1, is_completed=False, error="HTTP 500")]
    back = report.records_of(json.loads(result_file(tmp_path / "a.json", records).read_text()))
    assert [r.is_good() for r in back] == [r.is_good() for r in records]
    assert back[1].token_s == pytest.approx(records[1].token_s, abs=1e-4)
    with pytest.raises(ValueError, match="--save-detailed"):
        report.records_of({})


def test_a_csv_of_other_columns_is_not_touched(tmp_path):
    path = tmp_path / "runs.csv"
    report.append_csv(path, {"a": 1, "nested": {}})
    report.append_csv(path, {"a": 2})
    assert path.read_text().split() == ["a", "1", "2"]
    with pytest.raises(ValueError, match="other columns"):
        report.append_csv(path, {"b": 2})


def test_compare_finds_a_difference_and_none(tmp_path):
    slow = [record(i, ttft_s=0.05 + 0.001 * (i % 7)) for i in range(80)]
    fast = [record(i, ttft_s=0.025 + 0.0005 * (i % 7)) for i in range(80)]
    a, b = (str(result_file(tmp_path / name, records)) for name, records in (("a.json", slow), ("b.json", fast)))
    rows = {row["figure"]: row for row in compare.compare(compare.load(a), compare.load(b))["rows"]}
    assert (
        rows["p99_ttft_ms"]["ratio"] == pytest.approx(0.5, abs=0.01) and rows["p99_ttft_ms"]["verdict"] == "B is better"
    )
    assert rows["p99_ttft_ms"]["low"] <= rows["p99_ttft_ms"]["ratio"] <= rows["p99_ttft_ms"]["high"] < 1
    assert rows["p99_tbt_ms"]["verdict"] == "same" and rows["slo_attainment"]["ratio"] == 1
    same = compare.compare(compare.load(f"{a},{b}"), compare.load(f"{a},{b}"))
    assert same["paired"] and all(row["verdict"] in ("same", "2 runs") for row in same["rows"])


def test_figures_of_compare_are_those_of_the_metrics(tmp_path):
    records = [record(i, ttft_s=0.01 * (i % 13), gap_s=0.001 * (1 + i % 5), count=3 + i % 11) for i in range(60)]
    path = result_file(tmp_path / "a.json", records)
    side, result = compare.load(str(path)), json.loads(path.read_text())
    for row in compare.compare(side, side)["rows"]:
        key = {"median_tbt_ms": "median_itl_ms"}.get(row["figure"], row["figure"])
        assert row["a"] == pytest.approx(result[key], rel=1e-3), row["figure"]


def test_pairing_narrows_the_interval_and_needs_the_same_requests(tmp_path):
    """Both sides see the same uneven requests, B a little slower: only the pairing shows that it always is."""
    a = [record(i, ttft_s=0.02 + 0.1 * ((i * 37) % 50) / 50) for i in range(100)]
    b = [record(i, ttft_s=(0.02 + 0.1 * ((i * 37) % 50) / 50) * 1.03) for i in range(100)]
    other = [Record(**{**vars(r), "num_prompt_tokens": 7}) for r in b]
    sides = [compare.load(str(result_file(tmp_path / f"{n}.json", rs))) for n, rs in (("a", a), ("b", b), ("c", other))]
    paired, unpaired = (compare.compare(sides[0], side) for side in sides[1:])
    width = [
        next(row["high"] - row["low"] for row in c["rows"] if row["figure"] == "mean_e2el_ms")
        for c in (paired, unpaired)
    ]
    assert paired["paired"] and not unpaired["paired"] and width[0] < width[1] / 3


def test_a_ratio_over_nothing_is_not_a_number(tmp_path):
    bad = [record(i, ttft_s=5.0) for i in range(20)]
    a, b = (
        compare.load(str(result_file(tmp_path / n, rs)))
        for n, rs in (("a", bad), ("b", [record(i) for i in range(20)]))
    )
    result = compare.compare(a, b)
    row = next(row for row in result["rows"] if row["figure"] == "slo_attainment")
    assert (row["a"], row["b"], row["ratio"], row["verdict"]) == (0.0, 1.0, None, "n/a")
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    console.print(compare.table(result))
    assert "n/a" in console.export_text()
    json.dumps(result, allow_nan=False)


POINTS = [{"request_rate": rate, "slo_attainment": share, "slo_attainment_ttft": min(1, share + 0.02),
           "slo_attainment_tbt": min(1, share + 0.01), "slo_attainment_min": share - 0.01,
           "slo_attainment_max": min(1, share + 0.01)} for rate, share in ((1, 1.0), (2, 0.98), (4, 0.5))]  # fmt: skip


def test_plots_of_every_kind(tmp_path):
    fast = result_file(tmp_path / "a.json", [record(i) for i in range(40)], label="ours")
    slow = result_file(tmp_path / "b.json", [record(i, gap_s=0.02) for i in range(40)])
    sweep = result_file(tmp_path / "s.json", [record(0)], points=POINTS, label="ours")
    other = result_file(tmp_path / "o.json", [record(0)], points=POINTS, label="theirs", request_rate=1.0)
    console = Console(file=open(os.devnull, "w"))
    for kind, files in (("cdf", [fast, slow]), ("attainment", [sweep]), ("attainment", [sweep, other])):
        written = plots.draw(kind, files, tmp_path / "out" / kind, console)
        assert [path.suffix for path in written] == [".csv", ".png", ".svg"]
        assert all(path.stat().st_size > 100 for path in written)
        assert "a CPU" in written[2].read_text() and "SLO" in written[2].read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "cdf.csv").open()))
    assert {row["label"] for row in rows} == {"ours", "b"} and len(rows) == 2 * len(report.CDF_PERCENTS)
    with pytest.raises(ValueError, match="no request rate"):
        plots.draw("attainment", [fast], tmp_path / "x", console)
    with pytest.raises(ValueError, match="no distributions"):
        (tmp_path / "empty.json").write_text("{}")
        plots.draw("cdf", [tmp_path / "empty.json"], tmp_path / "x", console)


def test_without_matplotlib_there_is_still_a_csv(tmp_path, monkeypatch, capsys):
    path = result_file(tmp_path / "a.json", [record(i) for i in range(40)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", "cdf", str(path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["written"] == [str(tmp_path / "a-cdf.csv")] and (tmp_path / "a-cdf.csv").exists()
    assert "pip install" in err


def test_every_mode_has_help(capsys):
    for mode in load_cli.MODES:
        with pytest.raises(SystemExit) as leaving:
            cli.main([mode, "--help"])
        assert leaving.value.code == 0 and "usage: bench.py" in capsys.readouterr().out
