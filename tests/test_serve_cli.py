"""serve.py as a program: its options, what it prints, how it ends; and the embedded model end to end on the CPU.

The embedded model runs in one server for the whole file; how programs end is tried with the null engine.
"""

import contextlib
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from null_engine import HANG
from running_server import PATIENCE_S, eventually, program

from nanodrift.config import ConfigError
from nanodrift.server import cli, options

EMBEDDED = "nanodrift-storyteller"


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---- the embedded model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "run.json"
    with program("--port", "0", "--device", "cpu", "--trace", str(trace)) as one:
        one.url = one.wait_url()
        yield one
        one.process.send_signal(signal.SIGINT)
        assert one.wait() == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {1, 2}  # both lanes have worked


@pytest.fixture(scope="module")
def client(embedded):
    return openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def test_the_table_says_what_is_served(embedded):
    eventually(lambda: httpx.get(f"{embedded.url}/health").status_code == 200)
    for text in (EMBEDDED, "toy", "cpu", "KV cache", "first token within 2000 ms", "start-up"):
        assert text in embedded.said


def test_embedded_completion(client):
    options = {"model": EMBEDDED, "prompt": "Once upon a time", "max_tokens": 30}
    first = client.completions.create(**options, temperature=0)
    assert first.usage.completion_tokens == 30 and first.choices[0].finish_reason == "length"
    words = re.findall(r"[A-Za-z']+", first.choices[0].text)
    assert len(words) >= 10
    assert client.completions.create(**options, temperature=0).choices[0].text == first.choices[0].text
    streamed = client.completions.create(**options, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == first.choices[0].text
    seeded = [client.completions.create(**options, seed=7).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1] != first.choices[0].text


def test_embedded_chat(client):
    options = {"model": EMBEDDED, "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}
    whole = client.chat.completions.create(**options, temperature=0, max_completion_tokens=200)
    text = whole.choices[0].message.content
    assert len(text.split()) >= 10 and "<|" not in text
    chunks = list(
        client.chat.completions.create(
            **options, temperature=0, max_completion_tokens=200, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    cut = client.chat.completions.create(**options, temperature=0, stop=text.split()[5]).choices[0]
    assert cut.finish_reason == "stop" and text.startswith(cut.message.content)
    assert text.split()[5] not in cut.message.content


def test_embedded_batch_equals_one_by_one(client):
    prompts = ["Once upon a time", "The bear", "In a small house by the sea there lived"]
    batch = client.completions.create(model=EMBEDDED, prompt=prompts, max_tokens=12, temperature=0)
    for prompt, choice in zip(prompts, batch.choices, strict=True):
        alone = client.completions.create(model=EMBEDDED, prompt=prompt, max_tokens=12, temperature=0)
        assert choice.text == alone.choices[0].text


def gauge_of(embedded, name):
    text = httpx.get(f"{embedded.url}/metrics").text
    return float(re.search(rf"^nanodrift:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])


def test_embedded_shares_prefixes_within_a_salt(client, embedded):
    prompt = "Once upon a time a fox and an owl went down to the river, and there they met a frog. " * 5

    def ask(salt):
        body = {"cache_salt": salt} if salt else {}
        answer = client.completions.create(model=EMBEDDED, prompt=prompt, max_tokens=9, temperature=0, extra_body=body)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens

    answers = [ask(salt) for salt in (None, None, "a", "a", "b")]
    texts, cached, (num_prompt, *_) = zip(*answers, strict=True)
    full = (num_prompt - 1) // 64 * 64
    assert full >= 64 and list(cached) == [0, full, 0, full, 0]
    assert len(set(texts)) == 1
    eventually(lambda: gauge_of(embedded, "prefix_cache_hits_total") >= 2 * full)
    assert gauge_of(embedded, "kv_blocks_leaked") == 0
    refused = httpx.post(f"{embedded.url}/v1/completions", json={"prompt": "Once", "cache_salt": ""})
    assert refused.status_code == 400 and "cache_salt" in refused.json()["error"]["message"]


def test_embedded_frees_what_a_client_leaves(embedded):
    def gauge(name):
        return gauge_of(embedded, name)

    for is_stream in (True, False):
        body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}
        with contextlib.suppress(httpx.ReadTimeout):
            with httpx.stream("POST", f"{embedded.url}/v1/completions", json=body, timeout=0.5) as response:
                next(response.iter_bytes())
    eventually(lambda: gauge("num_requests_running") == 0 and gauge("kv_cache_usage_perc") == 0)
    assert gauge("http_requests_client_disconnected_total") == 2


# ---- how it ends ---------------------------------------------------------------------------------------------------


def begin_stream(pool: ThreadPoolExecutor, url: str, max_tokens: int = 1500):
    """A stream of a null engine's, under way when this returns; the answer comes later."""
    body = {"prompt": [7], "max_tokens": max_tokens, "stream": True}
    answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    eventually(lambda: not re.search(r"generation_tokens_total\S* 0\.0", httpx.get(f"{url}/metrics").text))
    return answer


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["INT", "TERM-TERM"])
def test_signals_end_everything(numbers):
    """In the middle of a stream: the stream is told, the status is 0, the engine is gone."""
    with program("--port", "0", engine=("--step-ms", "100")) as one, ThreadPoolExecutor(1) as pool:
        url, engine = one.wait_url(), one.engine_pid()
        answer = begin_stream(pool, url)
        one.process.send_signal(numbers.pop(0))
        if numbers:  # the first one drains
            eventually(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
            assert not answer.done() and one.process.poll() is None
            one.process.send_signal(numbers.pop(0))
        assert one.wait() == 0
        assert not is_running(engine)
        assert answer.result().text.endswith("data: [DONE]\n\n") and "shutting down" in answer.result().text
        assert "Traceback" not in one.said


def test_sigterm_lets_what_is_in_flight_end():
    with program("--port", "0", engine=("--step-ms", "20")) as one, ThreadPoolExecutor(1) as pool:
        url, engine = one.wait_url(), one.engine_pid()
        answer = begin_stream(pool, url, max_tokens=100)  # two seconds
        one.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": [7]})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_draining"
        assert one.wait() == 0 and not is_running(engine)
        assert answer.result().text.count('"text"') >= 10 and "error" not in answer.result().text
        assert '"finish_reason":"length"' in answer.result().text


def test_a_drain_does_not_last_for_ever():
    with program("--port", "0", "--drain-timeout", "0.5", engine=("--step-ms", "100")) as one:
        with ThreadPoolExecutor(1) as pool:
            answer = begin_stream(pool, one.wait_url())
            one.process.send_signal(signal.SIGTERM)
            assert one.wait() == 0
            assert "shutting down" in answer.result().text and answer.result().text.endswith("data: [DONE]\n\n")


def test_a_stalled_engine_is_ended_and_shows_where_it_hangs():
    with program("--port", "0", "--stall-timeout", "1", engine=()) as one, ThreadPoolExecutor(1) as pool:
        url, engine = one.wait_url(), one.engine_pid()
        body = {"prompt": [HANG], "max_tokens": 10}
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert one.wait() == 1 and not is_running(engine)
        assert "no progress for 1 seconds while 1 requests waited" in answer.result().json()["error"]["message"]
        assert "no progress for 1 seconds" in one.said
        assert "null_engine.py" in one.said and "in _advance" in one.said  # the stack


def test_a_signal_while_loading_ends_it():
    with program("--port", "0", engine=("--load-s", "100")) as one:
        eventually(lambda: Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().strip())
        engine = one.engine_pid()
        eventually(lambda: b"null_engine" in Path(f"/proc/{engine}/cmdline").read_bytes())
        one.process.send_signal(signal.SIGTERM)
        assert one.wait() == 0 and not is_running(engine) and "Traceback" not in one.said


def test_a_killed_engine_is_noticed():
    with program("--port", "0", engine=()) as one:
        url = one.wait_url()
        os.kill(one.engine_pid(), signal.SIGKILL)
        eventually(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert one.wait() == 1
        assert "the engine has died: the engine process was killed by signal 9" in one.said
        assert "Traceback" not in one.said


def test_a_killed_server_leaves_no_engine_behind():
    with program("--port", "0", engine=("--step-ms", "1000")) as one:
        url, engine = one.wait_url(), one.engine_pid()
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": [7], "max_tokens": 1000}, timeout=0.2)
        one.process.kill()
        eventually(lambda: not is_running(engine))


# ---- what it refuses -----------------------------------------------------------------------------------------------


def refusal(*arguments, status: int, **options) -> str:
    """What it says before it ends: one line, no trace."""
    with program(*arguments, **options) as one:
        assert one.wait() == status, one.said
        assert "Traceback" not in one.said
        (line,) = [line for line in one.said.splitlines() if line.startswith("serve.py: ")]
        return line


def test_a_port_in_use_is_said_before_anything_loads():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started_s = time.monotonic()
        line = refusal("--port", str(port), engine=("--load-s", "100"), status=2)
        assert f"127.0.0.1 port {port}" in line and "another port" in line
        assert time.monotonic() - started_s < 90


def test_what_the_engine_cannot_load_is_one_paragraph(tmp_path):
    assert "no such thing" in refusal("--port", "0", engine=("--fail", "no such\nthing"), status=1)
    assert "'no-such-model'" in refusal("--port", "0", "--model", "no-such-model", status=1)
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal("--port", "0", "--device", "cuda", status=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["--device", "tpu"], "device must be"),
        (["--slo-tbt-ms", "-1"], "an SLO must be positive"),
        (["--gpu-memory-utilization", "7"], "memory_fraction must lie"),
        (["--port", "70000"], "--port must lie"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_settings_are_checked_first(arguments, message, capsys):
    assert cli.main(["--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_become_the_engines_settings(monkeypatch):
    arguments = "--max-model-len 512 --gpu-memory-utilization 0.5 --deterministic --slo-tbt-ms 20 --dtype float16"
    config = options.engine_config(options.parse([*arguments.split(), "--no-prefix-caching"]))
    assert (config.max_model_len, config.memory_fraction, config.deterministic) == (512, 0.5, True)
    assert not config.prefix_caching
    assert (config.slo.tbt_ms, config.slo.ttft_ms, config.dtype, config.max_num_seqs) == (20, 2000, "float16", 256)
    with pytest.raises(ConfigError, match="load_format"):
        options.engine_config(options.parse(["--load-format", "pickle"]))
    with pytest.raises(SystemExit):
        options.parse(["--no-such-flag"])
    for bad in (
        ["--max-queue", "-1"],
        ["--drain-timeout", "nan"],
        ["--stall-timeout", "-1"],
        ["--metrics-prefix", "a b"],
    ):
        with pytest.raises(SystemExit):
            options.parse(bad)
    monkeypatch.setenv(options.KEY_VARIABLE, "one, two,")
    assert options.api_keys(options.parse(["--api-key", "zero"])) == ("zero", "one", "two")


def test_an_open_address_without_a_key_is_warned_of():
    with program("--port", "0", "--host", "0.0.0.0", engine=()) as one:
        one.wait_url()
        assert "warning" in one.said and "no API key" in one.said
    with program("--port", "0", "--host", "0.0.0.0", engine=(), **{options.KEY_VARIABLE: "secret"}) as one:
        url = one.wait_url()
        assert "warning" not in one.said and "secret" not in one.said
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
