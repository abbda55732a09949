"""The checklist of .github/SECURITY.md: what it says a test holds is held here, or in the test that it names."""

import ast
import asyncio
import contextlib
import hmac
import logging
import re
import socket
from pathlib import Path

import httpx
import pytest
from running_server import PATIENCE_S, ROOT, TOKENIZER, complete, error_of, eventually, program, running

from nanodrift.server import cli, options
from nanodrift.server.tokenizer import ChatError, Tokenizer

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanodrift/**/*.py"), *ROOT.glob("kernels/**/*.py")])
KEY = "right-key"
CANARY = "xyzzy-plugh-42"


# ---- no code from data ---------------------------------------------------------------------------------------------

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
MODULES |= {"multiprocessing", "xmlrpc", "zmq"}
OFFLINE = "nanodrift/bench/"  # tools for one's own machine: they may start workers, and read what they wrote themselves
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"torch.load", "yaml.load", "os.system", "os.popen", "numpy.load", "np.load", "torch.jit.load"}
TRANSFORMERS = {"transformers", "sentencepiece"}  # they can run a repository's Python


def dangers(source: str) -> list[str]:
    """What a source does that could turn data into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in MODULES | TRANSFORMERS]
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ATTRIBUTES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and (node.arg == "trust_remote_code" or ast.unparse(node) == "shell=True"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_data_becomes_code(path):
    is_offline = path.is_relative_to(ROOT / OFFLINE)
    assert [found for found in dangers(path.read_text()) if not (is_offline and found == "multiprocessing")] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import multiprocessing.shared_memory",
        "x = eval('1')",
        "run = exec",
        "__import__('os')",
        "torch.load(path)",
        "yaml.load(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "from transformers import AutoConfig",
    ],
)
def test_the_checker_catches(source):
    assert dangers(source)


def test_the_checker_lets_pass():
    assert dangers("import re, json\nre.compile('a')\nmodel.eval()\njson.loads('1')\nsubprocess.run(['ls'])") == []


def chat_of(template: str) -> str:
    return Tokenizer(TOKENIZER._backend, {}, template).render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__closure__ }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * messages }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_can_neither_reach_out_nor_run_away(template):
    try:
        assert chat_of(template) == ""  # undefined, and so nothing
    except ChatError:
        pass


def test_an_ordinary_template_counts_and_multiplies():
    assert chat_of("{% for i in range(3) %}{{ i * 2 }}{{ '-' * 3 }}{% endfor %}{{ 1.5 * 2 }}") == "0---2---4---3.0"


def test_a_request_brings_no_template_of_its_own():
    with running() as server, httpx.Client(base_url=server.url) as http:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        refused = http.post("/v1/chat/completions", json=chat | {"chat_template": "{{ 1 }}"})
        assert "`chat_template` is not supported" in error_of(refused, 400)["message"]
        for options in (
            {"tokenize": False},
            {"messages": []},
            {"enable_thinking": "{{ 1 }}"},
            {"date_string": "a" * 101},
        ):
            refused = http.post("/v1/chat/completions", json=chat | {"chat_template_kwargs": options})
            assert "may hold" in error_of(refused, 400)["message"]
        assert http.post("/tokenize", json=chat | {"chat_template": "{{ 1 }}"}).json()["count"] > 1  # ignored


# ---- who may ask ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded():
    with running(api_keys=("other-key", KEY)) as one:
        yield one


def raw(url: str, message: bytes) -> bytes:
    """The status line and whatever else comes for bytes that no client library would send."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        with contextlib.suppress(OSError):  # it has closed already
            sock.sendall(message)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it did not care to read all
            while part := sock.recv(65536):
                answer += part
        return answer


HOSTS = [b"localhost/health?", b"localhost/health#", b"a/health", b"127.0.0.1:8000/health?x=", b"[::1]/health", b""]


@pytest.mark.parametrize("host", HOSTS)
def test_a_hostile_host_header_opens_nothing(guarded, host):
    for path in (b"/v1/models", b"/metrics", b"/openapi.json"):
        answer = raw(guarded.url, b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (path, host))
        assert answer.split(b" ")[1] in (b"401", b"400")
    answer = raw(guarded.url, b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Forwarded-Host: a/health\r\n"
                 b"X-Original-URL: /health\r\nX-Rewrite-URL: /health\r\nConnection: close\r\n\r\n")  # fmt: skip
    assert answer.split(b" ")[1] == b"401"


@pytest.mark.parametrize(
    "target",
    [
        b"//v1/models",
        b"//health",
        b"/health/",
        b"/health/../metrics",
        b"/health%2f..%2fmetrics",
        b"/health%00",
        b"/health;/metrics",
        b"/metrics?/health",
        b"/metrics#/health",
        b"http://a/health",
        b"http://a/metrics",
        b"/v1/../v1/models",
        b"/./metrics",
        b"/HEALTH",
        b"*",
        b"/\xe2\x80\xae",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"HEAD", b"TRACE", b"BREW"])
def test_odd_paths_and_methods_open_nothing(guarded, target, method):
    answer = raw(guarded.url, b"%s %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % (method, target))
    assert answer.split(b" ")[1] in (b"401", b"400"), answer[:300]


def test_the_public_paths_say_nothing_secret(guarded):
    for path in ("/health", "/ping"):
        answer = httpx.get(f"{guarded.url}{path}")
        assert answer.status_code == 200 and answer.text in ('{"status":"ok"}', "")
    assert httpx.get(guarded.url).headers["content-type"].startswith("text/html")  # see test_server_page
    assert error_of(httpx.post(f"{guarded.url}/health", json={}), 405)


def test_every_key_is_compared_in_constant_time(guarded, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a) == len(b)) or compare(a, b))
    for key, status in (("other-key", 200), (KEY, 200), ("wrong", 401), ("x", 401)):
        compared.clear()
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == status
        assert compared == [True, True]  # both keys, whichever was right, and equal lengths: hashes


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    path = tmp_path / "keys"
    path.write_text(f"one\n\n  {KEY} \n")
    monkeypatch.setenv(options.KEY_VARIABLE, "two,")
    assert options.api_keys(options.parse(["--api-key-file", str(path)])) == ("two", "one", KEY)
    monkeypatch.delenv(options.KEY_VARIABLE)
    path.write_text("\n")
    for file in (path, tmp_path / "none"):  # never open by mistake
        assert cli.main(["--port", "0", "--api-key-file", str(file)]) == 2
        assert "serve.py: " in capsys.readouterr().err


def test_it_listens_on_loopback_only_and_on_one_port():
    assert options.parse([]).host == "127.0.0.1"
    with program("--port", "0", engine=()) as one:
        one.wait_url()
        tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6", "udp", "udp6")]
        inodes = {fields[9]: fields for table in tables for line in table if (fields := line.split())}

        def inet_sockets(pid: int) -> list[list[str]]:
            links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
            return [inodes[n] for link in links if (n := link.removeprefix("socket:[").rstrip("]")) in inodes]

        assert inet_sockets(one.engine_pid()) == []  # the engine has none at all
        (listening,) = [fields for fields in inet_sockets(one.process.pid) if fields[3] == "0A"]
        assert listening[1].startswith("0100007F:")


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_no_trace_no_path_and_no_prompt_comes_out(monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with running() as server, httpx.Client(base_url=server.url) as http:
        complete(http, prompt=CANARY)
        complete(http, prompt=CANARY, max_tokens=-1)
        complete(http, prompt=[CANARY])
        complete(http, prompt={"a": CANARY})
        chat = {"messages": [{"role": "user", "content": CANARY}, {"role": CANARY, "content": CANARY}]}
        http.post("/v1/chat/completions", json=chat)
        http.post("/tokenize", json={"prompt": CANARY})
        complete(http, **{CANARY[:5] + "\n2026 ERROR fake\x1b[2J": CANARY})

        def broken(stats):
            raise RuntimeError(f"{CANARY} /srv/secret.py")

        monkeypatch.setattr(server.served.telemetry, "render", broken)
        response = http.get("/metrics")
        assert error_of(response, 500)["message"] == "internal error"
        assert CANARY not in response.text and "Traceback" not in response.text
    said = [record.getMessage() for record in caplog.records]
    assert not any(CANARY in text for text in said)
    assert not any("\n2026" in text or "\x1b" in text for text in said)  # names of fields are escaped
    assert any("\\n2026 ERROR fake\\x1b" in text for text in said)
    assert "Authorization" not in "".join(said)


def test_request_ids_cannot_split_headers(guarded):
    head = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Id: %s\r\n\r\n"
    for value in (b"a\x00b", b"a" * 200, "é".encode("latin-1"), b"a\tb"):
        assert b"x-request-id" not in raw(guarded.url, head % value).lower()
    assert b"x-request-id: abc-1" in raw(guarded.url, head % b"abc-1").lower()


def test_nothing_but_the_named_routes_is_served():
    with running() as server, httpx.Client(base_url=server.url) as http:
        paths = set(http.get("/openapi.json").json()["paths"])
        assert paths == {
            "/health",
            "/ping",
            "/load",
            "/version",
            "/metrics",
            "/v1/models",
            "/v1/models/{name}",
            "/v1/completions",
            "/v1/chat/completions",
            "/tokenize",
            "/detokenize",
            "/tokenizer_info",
        }
        for path in ("/docs", "/redoc", "/debug", "/flush_cache", "/start_profile", "/shutdown", "/static/../app.py"):
            assert error_of(http.get(path), 404)
        answer = http.get("/v1/models", headers={"Origin": "http://evil.example"})
        assert not any(name.startswith("access-control") for name in answer.headers)
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert error_of(http.options("/v1/completions", headers=preflight), 405)
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "a",
            "Sec-WebSocket-Version": "13",
        }
        assert http.get("/v1/models", headers=upgrade).status_code == 200  # answered as plain HTTP
        assert complete(http).status_code == 200


# ---- limits --------------------------------------------------------------------------------------------------------


def test_huge_and_broken_heads_end_their_connection_only(guarded):
    long = b"X: " + b"a" * 100_000 + b"\r\n"
    many = b"".join(b"X-%d: a\r\n" % i for i in range(20_000))
    for head in (long, many):
        assert raw(guarded.url, b"GET /health HTTP/1.1\r\n" + head + b"\r\n")[:12] in (b"HTTP/1.1 400", b"")
    for line in (b"\x16\x03\x01\x02\x00", b"GET /health\r\n\r\n", b"GET  /health HTTP/1.1\r\n\r\n", b"\r\n" * 100):
        assert raw(guarded.url, line)[:12] in (b"HTTP/1.1 400", b"")
    both = b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    both += b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    assert b" 200 " not in raw(guarded.url, both)
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_long_chats_are_refused():
    message = {"role": "user", "content": "a"}
    with running() as server, httpx.Client(base_url=server.url) as http:
        for messages, text in (
            ([message] * 5000, "at most 4096 messages"),
            ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 300}], "at most 256 parts"),
            ([{"role": "user", "content": "a " * 5000}], "maximum context length"),
        ):
            response = http.post("/v1/chat/completions", json={"messages": messages})
            assert text in error_of(response, 400)["message"]


def test_tokenising_does_not_hold_up_the_others():
    """Most of a megabyte is tokenised in a thread: /health answers meanwhile."""
    with running() as server:

        async def both() -> int:
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
                long = asyncio.create_task(client.post("/tokenize", json={"prompt": "the fox ran " * 60_000}))
                await asyncio.sleep(0.05)
                num_answers = 0
                while not long.done():
                    num_answers += (await client.get("/health")).status_code == 200
                assert long.result().status_code == 200
                return num_answers

        assert asyncio.run(both()) >= 2


def test_security_md_names_tests_that_exist():
    text = (ROOT / ".github" / "SECURITY.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    sources = {path.stem: path.read_text() for path in ROOT.glob("tests/test_*.py")}
    known = {*sources, *(name for source in sources.values() for name in re.findall(r"def (test_\w+)", source))}
    assert len(named) >= 15 and [name for name in named if name not in known] == []


def test_answers_are_made_of_their_own_prompt(guarded):
    """Many tenants, one engine: each answer is made of its own prompt's tokens only."""
    headers = {"Authorization": f"Bearer {KEY}"}

    async def ask(client, token: int) -> bool:
        body = {"prompt": [token], "max_tokens": 20}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        return answer.json()["choices"][0]["text"].split() == TOKENIZER.decode([token] * 20).split()

    async def all_of_them() -> list[bool]:
        async with httpx.AsyncClient(base_url=guarded.url, timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(ask(client, token) for token in range(500, 600)))

    assert all(asyncio.run(all_of_them()))
    eventually(lambda: guarded.client.num_in_flight == 0)
