"""The HTTP server around the null engine (null_engine.py): shapes, streams, errors, keys, clients that leave, death."""

import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import httpx
import openai
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from null_engine import CRASH, DIE, HOT, KV_TOKENS, SILENT, WINDOW
from running_server import (
    PATIENCE_S,
    TOKENIZER,
    complete,
    echo,
    error_of,
    eventually,
    running,
    stream,
    text_of,
)

from nanodrift.config import SLO
from nanodrift.server import frames, protocol
from nanodrift.server.logprobs import TokenBytes
from nanodrift.server.telemetry import Telemetry
from nanodrift.server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def server():
    with running("--step-ms", "0.5") as one:
        yield one


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


# ---- answers -------------------------------------------------------------------------------------------------------


def test_completion(http):
    answer = complete(http).json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == "echo"
    assert abs(answer["created"] - time.time()) < 600
    (choice,) = answer["choices"]
    assert choice["text"] == echo("the fox ran", 8)
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    num_prompt = len(TOKENIZER.encode("the fox ran"))
    assert answer["usage"]["prompt_tokens"] == num_prompt and answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == num_prompt + 8


def test_chat(http):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "fox"}]},
    ]
    answer = http.post(
        "/v1/chat/completions", json={"messages": messages, "stop_token_ids": [TOKENIZER.token_id("x")]}
    ).json()
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "stop"
    assert choice["message"]["content"].strip() == "be brief"  # up to the end token of the first message
    assert choice["stop_reason"] is None


def test_default_lengths(http):
    assert complete(http, max_tokens=None).json()["usage"]["completion_tokens"] == protocol.DEFAULT_COMPLETION_TOKENS
    body = {"messages": [{"role": "user", "content": "fox"}], "ignore_eos": True}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == KV_TOKENS  # a chat may use all the room there is
    longest = complete(http, prompt=[7] * (KV_TOKENS - 3), max_tokens=None).json()["usage"]
    assert longest["completion_tokens"] == 3


def test_streams_say_the_same_as_whole_answers(http):
    body = {"prompt": "the fox 你好 👋🏽 ran", "max_tokens": 50}
    chunks = stream(http, "/v1/completions", **body)
    assert text_of(chunks) == complete(http, **body).json()["choices"][0]["text"]
    assert not any("\ufffd" in text_of([chunk]) for chunk in chunks[:-1])
    assert "usage" not in chunks[-1]

    chat = {"messages": [{"role": "user", "content": "a 你好"}], "stream_options": {"include_usage": True}}
    chunks = stream(http, "/v1/chat/completions", **chat)
    whole = http.post("/v1/chat/completions", json={"messages": chat["messages"]}).json()
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    first, *rest = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert first == {"role": "assistant", "content": ""} and not any("role" in delta for delta in rest)
    assert rest[-1] == {}  # the finish_reason comes alone
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_continuous_usage_counts_every_token(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(http, "/v1/completions", prompt="the fox", max_tokens=20, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 20 and counts[0] >= 1


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "options, text, stop_reason",
    [
        ({"stop": " ran"}, "the fox", " ran"),
        ({"stop": ["zebra", "x r", "fox ran"]}, "the fo", "x r"),
        ({"stop": "x r", "include_stop_str_in_output": True}, "the fox r", "x r"),
        ({"stop_token_ids": [TOKENIZER.encode(" fox", add_special_tokens=False)[-1]]}, "the", "id"),
    ],
)
def test_stops(http, is_stream, options, text, stop_reason):
    body = {"prompt": "the fox ran", "max_tokens": 50} | options
    if is_stream:
        chunks = stream(http, "/v1/completions", **body)
        shown, choice = text_of(chunks), chunks[-1]["choices"][0]
    else:
        choice = complete(http, **body).json()["choices"][0]
        shown = choice["text"]
    assert (shown, choice["finish_reason"]) == (text, "stop")
    assert choice["stop_reason"] == (options["stop_token_ids"][0] if stop_reason == "id" else stop_reason)


def test_a_stop_string_counts_tokens_up_to_it_and_ends_the_request(server, http):
    answer = complete(http, prompt="the fox ran", max_tokens=1500, stop=" ran").json()
    assert answer["usage"]["completion_tokens"] == len(TOKENIZER.encode("the fox ran"))
    eventually(lambda: server.gauge("num_requests_running") == 0)


def test_eos_and_min_tokens(http):
    ids = [TOKENIZER.encode("fox", add_special_tokens=False)[0], 2]
    choice = complete(http, prompt=ids).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (TOKENIZER.decode(ids[:1]), "stop", None)
    assert complete(http, prompt=ids, min_tokens=3).json()["usage"]["completion_tokens"] == 4
    assert complete(http, prompt=ids, ignore_eos=True).json()["choices"][0]["finish_reason"] == "length"
    kept = complete(http, prompt=ids, ignore_eos=True, skip_special_tokens=False, max_tokens=2).json()
    assert kept["choices"][0]["text"].endswith(TOKENIZER.decode([2], skip_special_tokens=False))


def test_several_prompts_are_several_choices(http):
    prompts = ["the fox", "a bear", "tea"]
    answer = complete(http, prompt=prompts, max_tokens=20).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert [c["text"] for c in answer["choices"]] == [echo(prompt, 20) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 60
    chunks = stream(http, "/v1/completions", prompt=prompts, max_tokens=20)
    assert [text_of(chunks, index) for index in range(3)] == [echo(prompt, 20) for prompt in prompts]
    as_ids = complete(http, prompt=[[7, 8], [9]], max_tokens=2).json()
    assert [c["text"] for c in as_ids["choices"]] == [TOKENIZER.decode([7, 8]), TOKENIZER.decode([9, 9])]


def test_n_choices_of_one_prompt(http):
    """The null engine adds a request's seed to what it echoes when it is asked to be hot."""
    body = {"prompt": ["the fox", "tea"], "n": 3, "max_tokens": 10, "seed": 5, "temperature": HOT}
    answer = complete(http, **body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    texts = [c["text"] for c in answer["choices"]]
    assert len(set(texts)) == 6  # each choice of a prompt has another seed
    alone = [complete(http, **body | {"prompt": p, "n": 1}).json()["choices"][0]["text"] for p in body["prompt"]]
    assert [texts[0], texts[3]] == alone  # the first has the request's own
    assert complete(http, **body).json()["choices"] == answer["choices"]
    num_prompt = sum(len(TOKENIZER.encode(prompt)) for prompt in body["prompt"])
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (num_prompt, 60)

    chunks = stream(http, "/v1/completions", **body)
    assert [text_of(chunks, index) for index in range(6)] == texts
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert sorted(order) != order  # they come side by side, not one after the other
    chat = CHAT | {"n": 2, "max_tokens": 5, "stream_options": {"include_usage": True}}
    chunks = stream(http, "/v1/chat/completions", **chat)
    roles = [c["index"] for chunk in chunks for c in chunk["choices"] if c["delta"].get("role") == "assistant"]
    assert sorted(roles) == [0, 1] and chunks[-1]["usage"]["completion_tokens"] == 10
    whole = http.post("/v1/chat/completions", json=chat).json()
    assert [c["message"]["content"] for c in whole["choices"]] == [text_of(chunks, 0), text_of(chunks, 1)]
    assert chunks[-1]["usage"] == whole["usage"]


def test_tokenize_and_back(http):
    answer = http.post("/tokenize", json={"prompt": "the fox 你好", "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER.encode("the fox 你好") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == WINDOW and len(answer["token_strs"]) == answer["count"]
    bare = http.post("/tokenize", json={"prompt": "the fox", "add_special_tokens": False, "model": "echo"}).json()
    assert bare["tokens"] == TOKENIZER.encode("the fox", add_special_tokens=False) and bare["token_strs"] is None
    chat = http.post("/tokenize", json=CHAT).json()["tokens"]
    assert chat == TOKENIZER.encode_chat(CHAT["messages"])
    usage = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(chat)
    shorter = http.post("/tokenize", json=CHAT | {"add_generation_prompt": False}).json()["tokens"]
    assert chat[: len(shorter)] == shorter != chat
    back = http.post("/detokenize", json={"tokens": bare["tokens"]}).json()
    assert back == {"prompt": "the fox"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == TOKENIZER.eos_token and info["chat_template"] == TOKENIZER.chat_template
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [-1]}),
    ]:
        assert error_of(http.post(path, json=body), 400)
    assert error_of(http.post("/tokenize", json={"prompt": "a", "model": "nope"}), 404)
    assert http.post("/detokenize", json={"tokens": [2**30]}).status_code == 200


def test_ping_and_load(server, http):
    assert http.get("/ping").status_code == 200
    with http.stream("POST", "/v1/completions", json={"prompt": [7], "max_tokens": 1500, "stream": True}) as response:
        reader = response.iter_bytes()  # kept: httpx hangs up when the iterator goes
        next(reader)
        assert httpx.get(f"{server.url}/load").json()["server_load"] >= 1
    eventually(lambda: http.get("/load").json()["server_load"] == 0)
    eventually(lambda: http.get("/load").json()["engine"]["num_requests_running"] == 0)


def test_a_model_without_a_tokenizer_takes_token_ids():
    with running(model="no-tokenizer") as bare, httpx.Client(base_url=bare.url) as http:
        assert complete(http, prompt=[7, 8], max_tokens=3).json()["choices"][0]["text"] == " 7 8 7"
        assert "token ids" in error_of(complete(http), 400)["message"]
        assert "stop strings" in error_of(complete(http, prompt=[7], stop="x"), 400)["message"]
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert "no tokenizer" in error_of(chat, 400)["message"]


def test_models_health_version(http):
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["echo", "second/name"]
    assert cards[0]["object"] == "model" and cards[0]["max_model_len"] == WINDOW
    assert http.get("/v1/models/second/name").json()["id"] == "second/name"
    assert complete(http, model="second/name").json()["model"] == "second/name"
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    assert http.get("/version", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"


# ---- what is refused -----------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BAD_COMPLETIONS = [
    ({"prompt": []}, "empty list"),
    ({"prompt": ""}, None),  # one token, BOS: fine
    ({"prompt": [[]]}, "prompt is empty"),
    ({"prompt": None}, "`prompt` must be"),
    ({"prompt": [1, "a"]}, "`prompt` must be"),
    ({"prompt": [-1]}, "`prompt` must be"),
    ({"prompt": [True]}, "`prompt` must be"),
    ({"prompt": [2**40]}, "`prompt` must be"),
    ({"prompt": [5000]}, "outside the vocabulary"),
    ({"prompt": {"text": "a"}}, "`prompt` must be"),
    ({"prompt": ["a"] * (protocol.MAX_CHOICES + 1)}, "the limit is"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": -5}, "max_tokens must be at least 1"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**30}, str(10**30)),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -1}, "temperature must lie"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e308}, "temperature must lie"),
    ({"top_p": 0}, "top_p must lie"),
    ({"top_p": 1.5}, "top_p must lie"),
    ({"top_k": -2}, "top_k must be"),
    ({"top_k": -1}, None),
    ({"min_p": 2}, "min_p must lie"),
    ({"min_tokens": 9}, "min_tokens must lie"),
    ({"seed": 2**64}, "seed must be"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "non-empty"),
    ({"stop": ["a"] * 17}, "at most 16 stop strings"),
    ({"stop": "a" * 1001}, "at most 1000 characters"),
    ({"stop": 5}, "`stop` must be"),
    ({"stop": []}, None),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
    ({"slo": {"tpot_ms": 5}}, "slo.tpot_ms"),
    ({"slo": 5}, "slo"),
    ({"slo": {"ttft_ms": 5.0, "tbt_ms": 7}}, None),
    ({"n": 0}, "`n`"),
    ({"n": protocol.MAX_N + 1}, "`n`"),
    ({"n": 10**12}, "`n`"),
    ({"n": True}, "`n`"),
    ({"n": 16, "prompt": ["a"] * 17}, "16 choices each; the limit is"),
    ({"priority": 2**31}, "priority"),
    ({"priority": -5}, None),
    ({"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "logit_bias": {}, "best_of": 1}, None),
    ({"logprobs": 21}, "logprobs must be an integer between 0 and 20"),
    ({"logprobs": -1}, "logprobs must be"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 2}, "`top_logprobs` is not supported"),
    ({"prompt_logprobs": 2}, "`prompt_logprobs` is not supported"),
    ({"echo": 1}, "echo"),
    ({"echo": True, "max_tokens": 0}, None),
    ({"echo": True, "max_tokens": 0, "logprobs": 20, "n": 16, "prompt": [[7] * 1000] * 4}, "too many for one answer"),
    ({"suffix": "x"}, "`suffix` is not supported"),
    ({"presence_penalty": 2.1}, "presence_penalty must lie between -2 and 2"),
    ({"frequency_penalty": -3}, "frequency_penalty must lie"),
    ({"repetition_penalty": 0}, "repetition_penalty must lie"),
    ({"presence_penalty": 2, "frequency_penalty": -2.0, "repetition_penalty": 1.1}, None),
    ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "`response_format` is not supported"),
    ({"logit_bias": {"5": 1, "6": -100.0}}, None),
    ({"logit_bias": {"5": 101}}, "between -100 and 100"),
    ({"logit_bias": {"fox": 1}}, "`logit_bias` must map token ids"),
    ({"logit_bias": {"-5": 1}}, "`logit_bias` must map token ids"),
    ({"logit_bias": {"9" * 5000: 1}}, "`logit_bias` must map token ids"),
    ({"logit_bias": {"5": "much"}}, "`logit_bias`: Input should be a valid number"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias may name 300 tokens"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"request_id": "a b"}, "request_id"),
]
BAD_CHATS = [
    ({"messages": []}, "empty list"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "needs `content`"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "role 'robot' is not known"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "text only"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "`tool_calls`"),
    ({"messages": [{"role": "assistant", "content": None}, {"role": "user", "content": "hi"}], "max_tokens": 2}, None),
    ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
    ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "max_completion_tokens": 2}, None),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must lie between 0 and 20"),
    ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`"),
    ({"logprobs": False, "top_logprobs": 0}, None),
    ({"echo": True}, "`echo` is not supported"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, None),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "`chat_template_kwargs` may hold enable_thinking (bool)"),
    ({"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs` may hold"),
    ({"continue_final_message": True}, "needs a last message of the assistant's"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "cannot both be true"),
    ({"max_completion_tokens": 0}, "max_tokens must be at least 1"),
]


@pytest.mark.parametrize("options, message", BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_completion_values(http, options, message):
    response = complete(http, **options)
    if message is None:
        assert response.status_code == 200, response.text
    else:
        error = error_of(response, 400)
        assert message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("options, message", BAD_CHATS, ids=lambda value: str(value)[:40])
def test_chat_values(http, options, message):
    response = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4} | options)
    if message is None:
        assert response.status_code == 200, response.text
    else:
        assert message in error_of(response, 400)["message"]


def test_a_chat_that_cannot_be_rendered(server, http, monkeypatch):
    monkeypatch.setattr(server.served, "tokenizer", Tokenizer(TOKENIZER._backend))
    assert "no chat template" in error_of(http.post("/v1/chat/completions", json=CHAT), 400)["message"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the body"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b"null", "the body"),
        (b'"prompt"', "must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "slo": {"tbt_ms": Infinity}}', "slo.tbt_ms"),
        (b'{"prompt": "\xff"}', "body"),
        (b"[" * 10_000, "body"),
        (b'{"prompt": ' + b"[" * 10_000, "body"),
    ],
    ids=range(12),
)
def test_bodies_that_are_no_completion(http, content, message):
    response = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert message in error_of(response, 400)["message"]


def test_lone_surrogates_do_no_harm(http):
    body = b'{"prompt": "a\\ud800b", "stop": "\\udfff", "max_tokens": 4, "model": "echo"}'
    response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text
    assert complete(http).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_requests_longer_than_the_window_name_both_numbers(http, is_stream):
    asked = complete(http, prompt=[7] * 2000, max_tokens=100, stream=is_stream)
    message = error_of(asked, 400)["message"]
    assert f"maximum context length is {WINDOW} tokens" in message and "you requested 2100 tokens" in message
    message = error_of(complete(http, prompt=[7] * 3000, max_tokens=None, stream=is_stream), 400)["message"]
    assert "3000 tokens" in message
    message = error_of(complete(http, prompt=[7] * 1500, max_tokens=500, stream=is_stream), 400)["message"]
    assert "the cache has room for" in message  # within the window, refused by the engine: before the first byte


def test_wrong_paths_methods_kinds_and_sizes(server, http):
    assert error_of(http.get("/nope"), 404)
    assert error_of(http.get("/v1/completions"), 405)
    assert error_of(http.get("/v1/models/nope"), 404)["code"] == "model_not_found"
    assert error_of(complete(http, model="nope"), 404)["code"] == "model_not_found"
    assert error_of(http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    assert error_of(http.post("/v1/completions", data={"prompt": "a"}), 415)
    with running(max_body_bytes=1000) as small:
        body = json.dumps({"prompt": "a" * 2000}).encode()
        headers = {"Content-Type": "application/json"}
        assert error_of(httpx.post(f"{small.url}/v1/completions", content=body, headers=headers), 413)
        in_parts = httpx.post(f"{small.url}/v1/completions", content=iter([body[:900], body[900:]]), headers=headers)
        assert error_of(in_parts, 413)
        assert httpx.post(f"{small.url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_unknown_fields_are_ignored_and_logged_once(http, caplog):
    for _ in range(2):
        assert complete(http, frobnicate=1, user="me").status_code == 200
    assert [record.getMessage() for record in caplog.records if "frobnicate" in record.getMessage()] == [
        "request field 'frobnicate' is not known and is ignored"
    ]
    assert not any("'user'" in record.getMessage() for record in caplog.records)


def test_keys_guard_every_route_but_health():
    with running(api_keys=("right-key", "other-key")) as guarded, httpx.Client(base_url=guarded.url) as http:
        paths = [
            "/v1/models",
            "/metrics",
            "/version",
            "/openapi.json",
            "/nope",
            "/v1/../v1/models",
            "/health/",
        ]
        for path in [*paths, "/%68ealth%2f..%2fmetrics", "/HEALTH"]:
            error = error_of(http.get(path), 401)
            assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert error_of(http.get("/v1/models", headers={"Host": "localhost/health?"}), 401)
        assert error_of(http.options("/v1/models"), 401)
        assert http.get("/health").status_code == 200
        for value in ["right-key", "Basic right-key", "Bearer", "Bearer wrong", "Bearer right-key2", "Bearer right-ke"]:
            assert error_of(http.get("/v1/models", headers={"Authorization": value}), 401)
        for key in ("right-key", "other-key"):
            assert complete(http, headers=None).status_code == 401
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0).models.list()


# Every field of the API that serving clients send, and what becomes of it: h honoured, r refused by name, - nothing is
# asked for (and nothing is refused). First of completions, then of chats.
FIELDS = {
    "hh": "model max_tokens temperature top_p top_k min_p n seed stop stop_token_ids include_stop_str_in_output "
    "ignore_eos min_tokens presence_penalty frequency_penalty repetition_penalty logit_bias logprobs stream "
    "stream_options skip_special_tokens truncate_prompt_tokens return_token_ids request_id priority slo cache_salt",
    "hr": "prompt echo add_special_tokens",
    "rh": "messages max_completion_tokens top_logprobs chat_template_kwargs continue_final_message "
    "add_generation_prompt",
    "rr": "best_of use_beam_search prompt_logprobs suffix tools tool_choice functions function_call response_format "
    "guided_json guided_regex guided_choice guided_grammar structured_outputs modalities audio prediction "
    "web_search_options return_tokens_as_token_ids chat_template documents allowed_token_ids "
    "bad_words",
    "--": "user metadata store service_tier parallel_tool_calls safety_identifier",
}


@pytest.mark.parametrize("kind, body", [(0, protocol.CompletionBody), (1, protocol.ChatBody)])
def test_every_field_is_honoured_or_refused_by_name(http, kind, body):
    path, minimal = [("/v1/completions", {"prompt": "a", "max_tokens": 2}), ("/v1/chat/completions", CHAT)][kind]
    fields = {name: fates[kind] for fates, names in FIELDS.items() for name in names.split()}
    assert {name for name, fate in fields.items() if fate == "h"} == set(body.model_fields)
    assert not set(protocol.NOT_HONOURED) - set(fields) and protocol.HARMLESS <= set(fields)
    for name, fate in fields.items():
        response = http.post(path, json=minimal | {name: ["something", {"odd": 1}]}) if fate != "h" else None
        if fate == "r":
            assert f"`{name}` is not supported" in error_of(response, 400)["message"]
            assert error_of(response, 400)["param"] == name
            assert http.post(path, json=minimal | {name: None}).status_code == 200
        elif fate == "-":
            assert response.status_code == 200


# ---- logprobs and echo ---------------------------------------------------------------------------------------------
# The null engine's logprob of a token is its number over -1000; see logprobs_of in null_engine.py.


def spelled(token_id: int) -> str:
    text = TOKENIZER.decode([100, token_id], skip_special_tokens=False)[len(TOKENIZER.decode([100])) :]
    return text if "\ufffd" not in text else "bytes:"


def check_completion_logprobs(choice, token_ids, num_top, text, first_is_null=False):
    columns = choice["logprobs"]
    assert {len(column) for column in columns.values()} == {len(token_ids)}
    for i, token_id in enumerate(token_ids):
        token, offset = columns["tokens"][i], columns["text_offset"][i]
        assert token.startswith(spelled(token_id))
        if token_id > 5 and not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
        if first_is_null and i == 0:
            assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
            continue
        assert columns["token_logprobs"][i] == -token_id / 1000
        top = columns["top_logprobs"][i]
        assert top[token] == -token_id / 1000  # the token itself is always among them
        assert len(top) <= max(num_top, 1) and max(top.values()) == -max(token_id - max(num_top, 1) + 1, 0) / 1000


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_completion_logprobs(http, num_top):
    prompt = TOKENIZER.encode("the fox 你好 ran")
    body = {"prompt": "the fox 你好 ran", "max_tokens": 2 * len(prompt), "logprobs": num_top}
    (choice,) = complete(http, **body).json()["choices"]
    check_completion_logprobs(choice, prompt * 2, num_top, choice["text"])
    chunks = stream(http, "/v1/completions", **body)
    assert text_of(chunks) == choice["text"]
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    assert all(
        (part is None) == (c["choices"][0]["text"] == "") for part, c in zip(parts[:-1], chunks[:-1], strict=True)
    )
    joined = {name: list(chain.from_iterable(part[name] for part in parts if part)) for name in choice["logprobs"]}
    assert joined == choice["logprobs"]  # what came in pieces says the same, offsets too


def test_chat_logprobs(http):
    chat = {"messages": [{"role": "user", "content": "a 你好 fox"}], "logprobs": True, "top_logprobs": 3}
    chat["skip_special_tokens"] = False
    whole = http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == whole["message"]["content"]
    assert whole["logprobs"]["refusal"] is None
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 3
        assert {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]} in entry["top_logprobs"]
    assert any(entry["token"].startswith("bytes:") for entry in entries)
    chunks = [chunk["choices"][0] for chunk in stream(http, "/v1/chat/completions", **chat)]
    assert chunks[0]["logprobs"] is None and chunks[-1]["logprobs"] is None  # of the role, of the finish_reason
    streamed = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert streamed == entries
    bare = http.post("/v1/chat/completions", json=chat | {"top_logprobs": None}).json()["choices"][0]["logprobs"]
    assert [entry | {"top_logprobs": []} for entry in entries] == bare["content"]


def test_logprobs_of_several_choices_and_of_stops(http):
    body = {"prompt": ["the fox", "tea"], "n": 2, "max_tokens": 4, "logprobs": 0, "temperature": HOT, "seed": 3}
    choices = complete(http, **body).json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4] * 4
    assert len({tuple(choice["logprobs"]["token_logprobs"]) for choice in choices}) == 4
    chunks = stream(http, "/v1/completions", **body)
    for index, choice in enumerate(choices):
        parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == index and c["logprobs"]]
        values = chain.from_iterable(part["token_logprobs"] for part in parts)
        assert list(values) == choice["logprobs"]["token_logprobs"]
    fox = TOKENIZER.encode(" fox", add_special_tokens=False)[-1]
    for stop in ({"stop_token_ids": [fox]}, {"stop": " ran"}):
        answer = complete(http, prompt="the fox ran", max_tokens=50, logprobs=1, **stop).json()
        (choice,) = answer["choices"]
        assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]  # a stop token not shown, too
        assert choice["finish_reason"] == "stop"
    ids = [TOKENIZER.encode(" fox", add_special_tokens=False)[-1], 2]
    (choice,) = complete(http, prompt=ids, max_tokens=5, echo=True, logprobs=1).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, *(-token_id / 1000 for token_id in (2, *ids))]


def test_echo(http):
    prompt = "the fox 你好 ran"
    ids = TOKENIZER.encode(prompt)
    plain = complete(http, prompt=prompt, max_tokens=5).json()
    echoed = complete(http, prompt=prompt, max_tokens=5, echo=True).json()
    assert echoed["choices"][0]["text"] == prompt + plain["choices"][0]["text"] and echoed["usage"] == plain["usage"]
    assert echoed["choices"][0]["logprobs"] is None
    assert complete(http, prompt=ids, max_tokens=5, echo=True).json()["choices"] == echoed["choices"]
    assert (
        text_of(stream(http, "/v1/completions", prompt=prompt, max_tokens=5, echo=True)) == echoed["choices"][0]["text"]
    )
    (scored,) = complete(http, prompt=prompt, max_tokens=2, echo=True, logprobs=2).json()["choices"]
    check_completion_logprobs(scored, [*ids, *ids[:2]], 2, scored["text"], first_is_null=True)
    alone = complete(http, prompt=[prompt, "tea"], max_tokens=0, echo=True, logprobs=1, n=2).json()
    assert [choice["text"] for choice in alone["choices"]] == [prompt, prompt, "tea", "tea"]
    assert alone["usage"]["completion_tokens"] == 0 and alone["choices"][0]["finish_reason"] == "length"
    check_completion_logprobs(alone["choices"][0], ids, 1, prompt, first_is_null=True)
    streamed = stream(http, "/v1/completions", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert streamed[-1]["choices"][0]["logprobs"] == alone["choices"][0]["logprobs"]


def test_logprobs_without_a_tokenizer():
    with running(model="no-tokenizer") as bare, httpx.Client(base_url=bare.url) as http:
        (choice,) = complete(http, prompt=[7, 8], max_tokens=2, logprobs=1, echo=True).json()["choices"]
        assert choice["text"] == " 7 8 7 8" and choice["logprobs"]["tokens"] == [" 7", " 8", " 7", " 8"]
        assert choice["logprobs"]["text_offset"] == [0, 2, 4, 6]


def test_prompts_can_be_cut_and_requests_named(http):
    answer = complete(http, prompt=[7, 8, 9], truncate_prompt_tokens=2, request_id="mine-1", max_tokens=3).json()
    assert answer["id"] == "cmpl-mine-1" and answer["usage"]["prompt_tokens"] == 2
    assert answer["choices"][0]["text"] == TOKENIZER.decode([8, 9, 8])
    with ThreadPoolExecutor(4) as pool:  # the same name several times at once
        same = list(pool.map(lambda _: complete(http, request_id="mine-1", max_tokens=30).status_code, range(8)))
    assert set(same) == {200}


def test_token_ids_come_back(http):
    body = {"prompt": "the fox 你好", "max_tokens": 20, "return_token_ids": True, "n": 2}
    ids = TOKENIZER.encode(body["prompt"])
    for choice in complete(http, **body).json()["choices"]:
        assert choice["prompt_token_ids"] == ids and choice["token_ids"] == (ids * 20)[:20]
    chunks = [c for chunk in stream(http, "/v1/completions", **body) for c in chunk["choices"] if c["index"] == 1]
    assert chunks[0]["prompt_token_ids"] == ids and not any("prompt_token_ids" in c for c in chunks[1:])
    assert list(chain.from_iterable(c["token_ids"] for c in chunks)) == (ids * 20)[:20]
    chat = [c["choices"][0] for c in stream(http, "/v1/chat/completions", **CHAT, return_token_ids=True)]
    assert chat[0]["prompt_token_ids"] == TOKENIZER.encode_chat(CHAT["messages"])
    assert TOKENIZER.decode(list(chain.from_iterable(c.get("token_ids", ()) for c in chat))) == "hi"
    assert "token_ids" not in complete(http).json()["choices"][0]


def test_an_unfinished_message_goes_on(http):
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "Once upon"}]
    body = {"messages": chat, "max_tokens": 2, "add_generation_prompt": False}
    closed = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
    open_ended = http.post("/v1/chat/completions", json=body | {"continue_final_message": True}).json()
    rendered = TOKENIZER.render_chat(chat, add_generation_prompt=False)
    cut = rendered[: rendered.rindex("Once upon") + len("Once upon")]
    assert open_ended["usage"]["prompt_tokens"] == len(TOKENIZER.encode(cut, add_special_tokens=False)) < closed


@pytest.mark.parametrize("text", ["Once upon a time", "你好 👋🏽 naïve", "  two\n\ttabs "])
def test_tokens_know_their_bytes(text):
    known = TokenBytes(TOKENIZER)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert b"".join(known[token_id] for token_id in ids).decode() == text
    assert known.is_special(1) and not any(known.is_special(token_id) for token_id in ids)


def test_sentencepiece_tokens_know_their_bytes():
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {"<unk>": 0, "<0xE4>": 1, "<0xBD>": 2, "<0xA0>": 3, "▁": 4, "a": 5, "▁a": 6, "b": 7},
            [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True,
        )
    )  # fmt: skip
    decoders = tokenizers.decoders
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = TokenBytes(Tokenizer(backend))
    assert [known[i] for i in (1, 2, 3, 5, 6, 7)] == [b"\xe4", b"\xbd", b"\xa0", b"a", b" a", b"b"]


# ---- clients that leave, slow ones, many ---------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_request():
    with running("--step-ms", "10", "--max-num-seqs", "2") as slow:
        url = f"{slow.url}/v1/completions"
        body = {"prompt": "the fox", "max_tokens": 1500, "stream": True}
        with contextlib.ExitStack() as stack:
            readers = []  # kept: httpx hangs up when the iterator goes
            for _ in range(2):  # two run, ...
                response = stack.enter_context(httpx.stream("POST", url, json=body, timeout=PATIENCE_S))
                readers.append(response.iter_text())
                next(readers[-1])
            for is_stream in (True, False):  # ... and two wait in the queue
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url, json=body | {"stream": is_stream}, timeout=0.3)
            eventually(lambda: slow.gauge("num_requests_waiting") == 0)
            assert slow.gauge("num_requests_running") == 2
        eventually(lambda: slow.gauge("num_requests_running") == 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body | {"stream": False, "prompt": ["a", "b"]}, timeout=0.3)
        eventually(lambda: slow.gauge("num_requests_running") == 0)
        eventually(lambda: slow.gauge("http_requests_client_disconnected_total") == 5)
        assert slow.gauge("request_success_total") == 6  # all by abort
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_client_that_does_not_read_delays_nobody(server, http):
    body = json.dumps({"prompt": "the fox 你好", "max_tokens": 1500, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for _ in range(5):
            assert complete(http, max_tokens=50).json()["choices"][0]["text"] == echo("the fox ran", 50)
        eventually(lambda: server.gauge("num_requests_running") == 0)  # its tokens were generated all the same
        sock.settimeout(PATIENCE_S)
        answer = b""
        while b"[DONE]" not in answer and (part := sock.recv(65536)):
            answer += part
    chunks = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
    assert text_of(chunks) == echo("the fox 你好", 1500)
    assert len(chunks) < 1400  # what piled up came in one piece


def test_many_streams_at_once_do_not_mix(server):
    async def one(client: httpx.AsyncClient, number: int) -> bool:
        prompt, pieces = f"story {number} of the fox", []
        body = {"prompt": prompt, "max_tokens": 40, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(pieces) == echo(prompt, 40)

    async def all_of_them() -> list[bool]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    assert all(asyncio.run(all_of_them()))
    eventually(lambda: server.gauge("num_requests_running") == 0)


def test_a_storm_of_impatient_clients(server, http):
    def impatient(number: int) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            body = {"prompt": [number % 100 + 6] * 20, "max_tokens": 1500, "stream": number % 2 == 0}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.2) as response:
                next(response.iter_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(impatient, range(40)))
    assert complete(http).status_code == 200
    eventually(lambda: server.gauge("num_requests_running") + server.gauge("num_requests_waiting") == 0)


def test_missing_blocks_are_noticed_when_the_engine_is_idle(capfd):
    with running("--leak", "3") as leaky, httpx.Client(base_url=leaky.url) as http:
        assert complete(http).status_code == 200
        eventually(lambda: http.get("/load").json()["engine"].get("kv_blocks_leaked") == 3)
        eventually(lambda: leaky.gauge("num_requests_running") == 0)
    assert "idle, and 3 of 100 KV blocks are missing" in capfd.readouterr().err
    with running() as tight, httpx.Client(base_url=tight.url) as http:
        assert complete(http).status_code == 200
        eventually(lambda: http.get("/load").json()["engine"].get("kv_blocks_leaked") == 0)
    assert "missing" not in capfd.readouterr().err


def test_metrics_add_up():
    with running() as fresh, httpx.Client(base_url=fresh.url) as http:
        complete(http, prompt=[7, 8, 9], max_tokens=5)
        complete(http, prompt=[7, 8, 9], max_tokens=5, stop_token_ids=[8])
        assert fresh.gauge("prompt_tokens_total") == 6 and fresh.gauge("generation_tokens_total") == 7
        assert fresh.gauge("time_to_first_token_seconds_count") == fresh.gauge("e2e_request_latency_seconds_count") == 2
        assert fresh.gauge("inter_token_latency_seconds_count") == 5
        assert fresh.gauge("request_time_per_output_token_seconds_count") == 2
        assert (fresh.gauge("request_prompt_tokens_sum"), fresh.gauge("request_generation_tokens_sum")) == (6, 7)
        assert fresh.gauge("slo_violations_total") == 0
        complete(http, prompt=[7], slo={"ttft_ms": 1e-6})
        complete(http, prompt=[7], slo={"tbt_ms": 1e-6})
        complete(http, prompt=[7], slo={"tbt_ms": 1e-6}, max_tokens=1)  # no gap, no miss
        text = http.get("/metrics").text
        for kind in ("ttft", "tbt"):
            assert f'nanodrift:slo_violations_total{{kind="{kind}",model_name="echo"}} 1.0' in text
        for reason, count in (("stop", 1), ("length", 4), ("abort", 0)):
            line = f'nanodrift:request_success_total{{finished_reason="{reason}",model_name="echo"}} {count}.0'
            assert line in text
        for name in ("kv_cache_usage_perc", "num_requests_waiting", "num_preemptions_total"):
            assert fresh.gauge(name) == 0


VLLM_NAMES = """num_requests_running num_requests_waiting kv_cache_usage_perc
prompt_tokens_total generation_tokens_total request_success_total
num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
http_requests_client_disconnected_total time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket"""


def test_metrics_under_another_prefix():
    telemetry = Telemetry("m", "vllm")
    stats = {"num_preemptions_total": 2, "prefix_cache_hits_total": 3, "kv_blocks_leaked": 1}
    for _ in range(2):  # the engine's totals are taken over, not added up
        text = telemetry.render(stats).decode()
    for name in VLLM_NAMES.split():
        assert f"\nvllm:{name}{{" in text and "nanodrift" not in text
    assert 'vllm:num_preemptions_total{model_name="m"} 2.0' in text
    assert 'vllm:prefix_cache_hits_total{model_name="m"} 3.0' in text


# ---- the engine's life ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order, reason", [(CRASH, "the script says crash"), (DIE, "killed by signal 9")])
def test_a_dead_engine_ends_what_is_in_flight(order, reason):
    with running("--step-ms", "5") as doomed, httpx.Client(base_url=doomed.url, timeout=PATIENCE_S) as http:
        body = {"prompt": [SILENT], "max_tokens": 10}
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(http.post, "/v1/completions", json=body)
            streams = [
                pool.submit(http.post, "/v1/completions", json=body | {"prompt": p, "max_tokens": 1500, "stream": True})
                for p in ([SILENT], [7])
            ]
            eventually(lambda: doomed.gauge("num_requests_running") == 3)
            eventually(lambda: doomed.gauge("generation_tokens_total") >= 3)
            killer = complete(http, prompt=[order])
            assert reason in error_of(killer, 500)["message"]
            assert error_of(whole.result(), 500)["code"] == "engine_dead"
            assert error_of(streams[0].result(), 500)  # not a byte had been sent
            lines = streams[1].result().text.strip().split("\n\n")
            assert lines[-1] == "data: [DONE]" and reason in json.loads(lines[-2][6:])["error"]["message"]
        assert http.get("/health").status_code == 503 and http.get("/health").json()["status"] == "dead"
        assert error_of(complete(http), 503)["type"] == "server_error"


def test_while_loading():
    with running("--load-s", "60", wait=False) as loading, httpx.Client(base_url=loading.url) as http:
        assert http.get("/health").status_code == 503 and http.get("/health").json()["status"] == "loading"
        refused = complete(http)
        assert error_of(refused, 503)["code"] == "engine_loading" and refused.headers["retry-after"]
        assert http.get("/metrics").status_code == http.get("/v1/models").status_code == 200


# ---- openai's own client -------------------------------------------------------------------------------------------


def test_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "echo"
    done = client.completions.create(model="echo", prompt="the fox", max_tokens=9, temperature=0, seed=1)
    assert done.choices[0].text == echo("the fox", 9) and done.usage.completion_tokens == 9
    messages = [{"role": "user", "content": "tea"}]
    chat = client.chat.completions.create(model="echo", messages=messages)
    assert chat.choices[0].message.content == "tea" and chat.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "tea"
    scored = client.chat.completions.create(model="echo", messages=messages, logprobs=True, top_logprobs=2)
    entries = scored.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries).endswith("tea")
    assert all(entry.logprob < 0 and len(entry.top_logprobs) == 2 for entry in entries)
    scored = client.completions.create(
        model="echo", prompt="tea", max_tokens=2, logprobs=3, echo=True, logit_bias={7: 1}
    )
    columns, num_prompt = scored.choices[0].logprobs, len(TOKENIZER.encode("tea"))
    assert columns.token_logprobs[0] is None and len(columns.tokens) == num_prompt + 2
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt="a")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="echo", messages=messages, max_completion_tokens=5000)


# ---- frames --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_frames_survive_any_cutting(data):
    json_values = st.recursive(
        st.integers() | st.text() | st.none(), lambda inner: st.lists(inner, max_size=4), max_leaves=8
    )
    messages = data.draw(st.lists(st.lists(json_values, max_size=4), max_size=5))
    wire = b"".join(frames.encode(message) for message in messages)
    decoder, seen = frames.FrameDecoder(), []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        seen += decoder.feed(wire[:size])
        wire = wire[size:]
    assert seen == messages


def test_a_frame_of_absurd_length_is_refused():
    with pytest.raises(ValueError, match="over the limit"):
        frames.FrameDecoder().feed(b"\xff\xff\xff\xff")


def test_the_engines_end_never_waits_for_a_slow_reader():
    ours, theirs = socket.socketpair()
    link, message = frames.FrameLink(ours), ["step", [["id", [1] * 1000, None, None, 0]] * 20, None]
    for _ in range(50):  # several times what the pair's buffers hold
        link.send(message)
    decoder, seen = frames.FrameDecoder(), []
    theirs.setblocking(False)
    while len(seen) < 50:
        with contextlib.suppress(BlockingIOError):
            seen += decoder.feed(theirs.recv(1 << 20))
        assert link.receive(0) == []
    assert seen == [message] * 50
    theirs.close()
    with pytest.raises(EOFError):
        link.receive(1)
    ours.close()


def test_a_requests_own_slo_fills_up_from_the_servers():
    body = protocol.CompletionBody(prompt="a", slo={"tbt_ms": 20})
    assert body.promise(SLO(1000, 50)) == SLO(1000, 20)
    assert protocol.CompletionBody(prompt="a").promise(SLO(1000, 50)) == SLO(1000, 50)


def test_choices_have_seeds_of_their_own():
    seeds = [protocol.choice_seed(7, number) for number in range(protocol.MAX_N)]
    assert seeds[0] == 7 and len(set(seeds)) == protocol.MAX_N
    assert protocol.choice_seed(None, 3) is None
    for seed in (-(2**63), 2**63 - 1):
        assert all(-(2**63) <= protocol.choice_seed(seed, number) < 2**63 for number in range(protocol.MAX_N))
