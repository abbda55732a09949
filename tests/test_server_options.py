"""serve.py's options by flag and by file, its JSON log, and whom --slo-admission refuses."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import httpx
import pytest
from null_engine import SILENT
from running_server import PATIENCE_S, complete, error_of, eventually, program, running

from nanodrift.config import SLO, ConfigError, EngineConfig
from nanodrift.server import cli, options
from nanodrift.server.admission import MEASURED_S, Admission

CANARY = "xyzzy-plugh-42"
TOML = pytest.mark.skipif(sys.version_info < (3, 11), reason="the standard library reads TOML from 3.11 on")


# ---- flags and files -----------------------------------------------------------------------------------------------


def test_every_setting_of_the_engine_is_an_option_and_explained():
    said = " ".join(options.build_parser().format_help().split())
    for field in fields(EngineConfig):
        if field.name != "slo":
            assert f"--{field.name.replace('_', '-')}" in said
            assert options.ENGINE_HELP[field.name][1].split(":")[0] in said
    assert not any(line != line.rstrip() for line in said.splitlines()) and "SUPPRESS" not in said


@pytest.mark.parametrize("kind", ["json", pytest.param("toml", marks=TOML)])
def test_a_file_says_what_flags_do_not(kind, tmp_path):
    path = tmp_path / f"serve.{kind}"
    settings = {"port": 8123, "max-queue": 7, "slo_tbt_ms": 20.5, "prefix-caching": False, "log-json": True,
                "policy": "turns", "served-model-name": ["a", "b"], "num-kv-blocks": 12}  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path.write_text(json.dumps(settings) if kind == "json" else "\n".join(lines))
    args = options.parse(["--config", str(path), "--max-queue", "9", "--prefix-caching"])
    config = options.engine_config(args)
    assert (args.port, args.max_queue, args.log_json, args.served_model_name) == (8123, 9, True, ["a", "b"])
    assert (config.slo, config.policy, config.num_kv_blocks, config.prefix_caching) == (
        SLO(2000, 20.5),
        "turns",
        12,
        True,
    )
    assert not options.engine_config(options.parse(["--config", str(path)])).prefix_caching


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"max-que": 5}', "unknown option 'max-que'; did you mean 'max-queue'?"),
        ('{"config": "other.json"}', "unknown option 'config'"),
        ('{"help": true}', "unknown option 'help'"),
        ('{"frobnicate": 5}', "unknown option 'frobnicate'"),
        ('{"log-json": 1}', "'log-json' must be true or false, got 1"),
        ('{"port": true}', "'port' must be a value, got True"),
        ('{"port": null}', "'port' must be a plain value"),
        ('{"port": {"a": 1}}', "'port' must be a plain value"),
        ('{"port": [8000]}', "'port' must be a plain value"),
        ("[1]", "must hold an object"),
        ('{"port": 1', "is not valid"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(text, message, tmp_path, capsys):
    path = tmp_path / "serve.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="--config") as caught:
        options.parse(["--config", str(path)])
    assert message in str(caught.value)
    assert cli.main(["--config", str(path)]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"port": "high"}', '{"max-queue": -1}', '{"drain-timeout": "nan"}'])
def test_a_value_in_a_file_is_checked_like_a_flags(text, tmp_path, capsys):
    path = tmp_path / "serve.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        options.parse(["--config", str(path)])
    assert next(iter(json.loads(text))) in capsys.readouterr().err


@TOML
def test_toml_that_is_none_is_said_so(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text("port = = 5")
    with pytest.raises(ConfigError, match=r"is not valid: .*line 1"):
        options.parse(["--config", str(path)])


# ---- the log -------------------------------------------------------------------------------------------------------


def test_the_json_log_has_a_line_a_request_and_no_prompt():
    with program("--port", "0", "--log-json", engine=("--step-ms", "1")) as one:
        url = None
        for line in one.process.stderr:
            one.said += line
            if (event := json.loads(line))["event"] == "ready":
                url = event["url"]
                break
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
            complete(http, prompt=CANARY, max_tokens=5)
            http.post(
                "/v1/completions", json={"prompt": [7], "max_tokens": 3, "n": 2}, headers={"X-Request-Id": "me-1"}
            )
            complete(http, prompt=CANARY, max_tokens=0)
            http.get(f"/{CANARY[:5]}%0a{{")
            http.get("/health")
            with pytest.raises(httpx.ReadTimeout):
                complete(httpx.Client(base_url=url, timeout=0.3), prompt=[SILENT])
            eventually(lambda: http.get("/load").json()["server_load"] == 0)
        time.sleep(0.2)
        one.process.terminate()
        assert one.wait() == 0
    lines = [json.loads(line) for line in one.said.splitlines()]  # every one of them is JSON
    assert CANARY not in one.said
    whole, several, refused, nowhere, left = [line for line in lines if line["event"] == "request"]
    assert (whole["status"], whole["output_tokens"], whole["finish_reasons"]) == (200, 5, ["length"])
    assert whole["id"].startswith("cmpl-") and whole["prompt_tokens"] > 3 and whole["cached_tokens"] == 0
    assert 0 < whole["ttft_ms"] <= whole["total_ms"] and 0 < whole["max_tbt_ms"] < whole["total_ms"]
    assert (several["output_tokens"], several["prompt_tokens"], several["client_request_id"]) == (6, 2, "me-1")
    assert refused["status"] == 400 and "output_tokens" not in refused
    assert (nowhere["status"], nowhere["method"]) == (404, "GET") and "\n" in nowhere["path"]
    assert (left["status"], left["finish_reasons"]) == (499, ["abort"])
    for line in lines:
        assert set(line) >= {"time", "level", "event"} and line["time"].endswith("+00:00")


# ---- admission by promise ------------------------------------------------------------------------------------------


def test_where_nothing_waits_nobody_is_refused():
    door = Admission()
    assert door.predicted_ttft_s(10**6) == 0
    door.on_wait(100, 0.0)
    assert door.predicted_ttft_s(10**6) == 0  # nothing is known yet
    door.on_first_token(100, 0.1)
    assert door.tokens_per_s == pytest.approx(1000) and door.predicted_ttft_s(10**6) == 0
    door.on_wait(100, 1.0)
    assert door.predicted_ttft_s(400) == pytest.approx(0.5)
    door.on_leave(100)
    assert door.predicted_ttft_s(400) == 0


def test_only_a_stretch_of_waiting_makes_the_speed_lower():
    door = Admission()
    for now_s in range(20):  # one small prompt after the other: that they are few says nothing about the speed
        door.on_wait(1000 if now_s == 0 else 10, float(now_s))
        door.on_first_token(1000 if now_s == 0 else 10, now_s + 0.01)
    assert door.tokens_per_s == pytest.approx(100_000)
    for _ in range(20):
        door.on_wait(100, 100.0)
    for step in range(1, 20):
        door.on_first_token(100, 100 + step * MEASURED_S)  # 200 tokens per second
    assert door.tokens_per_s == pytest.approx(200, rel=0.01)
    assert door.predicted_ttft_s(100) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("is_enforced", [True, False])
def test_who_would_be_late_is_told_at_the_door(is_enforced):
    with running("--step-ms", "100", "--max-num-seqs", "1", is_slo_enforced=is_enforced) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http, ThreadPoolExecutor(3) as pool:
            ask = {"json": {"prompt": [7] * 100, "max_tokens": 12}, "timeout": PATIENCE_S}
            waiting = [pool.submit(httpx.post, f"{server.url}/v1/completions", **ask) for _ in range(3)]
            # the second has waited for the first to end: 100 tokens in more than a second
            eventually(
                lambda: sum(one.done() for one in waiting) >= 1 and server.client.admission.num_waiting_tokens == 100
            )
            assert 0 < server.client.admission.tokens_per_s < 200
            late = complete(http, prompt=[7] * 100, max_tokens=1, slo={"ttft_ms": 200})
            if is_enforced:
                error = error_of(late, 429)
                assert error["code"] == "slo_unmeetable" and "200 ms that are promised" in error["message"]
                assert 1 <= int(late.headers["retry-after"]) <= 30
                assert server.gauge("requests_refused_total") == 1 <= server.gauge("slo_violations_total")
            else:
                assert late.status_code == 200
            assert complete(http, prompt=[7] * 100, max_tokens=1, slo={"ttft_ms": 60_000}).status_code == 200
            assert all(one.result().status_code == 200 for one in waiting)
        eventually(lambda: server.client.admission.num_waiting_tokens == 0)


def test_a_lower_priority_goes_first():
    """A row for one: whoever comes later with a lower number is served before those that wait."""
    with running("--step-ms", "20", "--max-num-seqs", "1") as server, ThreadPoolExecutor(3) as pool:
        ended = []

        def ask(priority: int, max_tokens: int) -> None:
            body = {"prompt": [7], "max_tokens": max_tokens, "priority": priority}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S).status_code == 200
            ended.append(priority)

        waiting = []
        for number, (priority, max_tokens) in enumerate([(-9, 30), (5, 5), (-5, 5)]):
            waiting.append(pool.submit(ask, priority, max_tokens))
            eventually(lambda number=number: server.client.num_in_flight == number + 1)
        for one in waiting:
            one.result()
        assert ended == [-9, -5, 5]
