"""The examples in nanodrift/server/deploy: what they start exists, with the options they use."""

import configparser
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import ROOT

from nanodrift.server import guard, options

DEPLOY = ROOT / "nanodrift" / "server" / "deploy"


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(DEPLOY / "nanodrift.service")
    return parser["Service"]


def arguments_of(command: list[str]) -> list[str]:
    """What follows ``python -m nanodrift.server.cli``."""
    assert re.fullmatch(r"(.*/)?python", command[0]) and command[1:3] == ["-m", "nanodrift.server.cli"]
    return command[3:]


def test_the_unit_starts_the_server_and_lets_it_drain(tmp_path):
    service, config = unit(), tmp_path / "serve.json"
    config.write_text("{}")
    command = service["ExecStart"].replace("/etc/nanodrift/serve.toml", str(config)).replace("%d", "/run/credentials")
    args = options.parse(arguments_of(shlex.split(command)))
    assert args.log_json and args.host == "127.0.0.1" and args.api_key_file == "/run/credentials/keys"
    assert float(service["TimeoutStopSec"]) > args.drain_timeout + 10
    assert service["RestartPreventExitStatus"] == "2"  # a bad command line does not get better
    assert service["KillMode"] == "mixed"  # SIGTERM to the server alone: it is the one that drains


def test_the_image_starts_the_server_and_asks_for_its_health():
    text = (DEPLOY / "Dockerfile").read_text()
    entry, check = (
        json.loads(re.search(rf"^{name} .*?(\[.*\])$", text, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "HEALTHCHECK")
    )
    args = options.parse([*arguments_of(entry), "--model", "llama-3.1-8b"])
    assert args.host == "0.0.0.0" and f"EXPOSE {args.port}\n" in text
    port, path = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check[2]).groups()
    assert int(port) == args.port and path in guard.PUBLIC_PATHS
    compile(check[2], "HEALTHCHECK", "exec")
    assert "USER nanodrift" in text and options.KEY_VARIABLE in text
    assert not re.search(r"(KEY|TOKEN|SECRET)=[^.\s]", text)
    for flag in re.findall(r"--model (\S+)", text):
        assert flag in options.build_parser().format_help()


@pytest.mark.parametrize("name", ["nanodrift.service", "Dockerfile"])
def test_they_are_short(name):
    assert len((DEPLOY / name).read_text().splitlines()) <= 40


def test_the_module_they_start_is_the_program():
    command = [sys.executable, "-m", "nanodrift.server.cli", "--version"]
    done = subprocess.run(command, cwd=Path(ROOT), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and re.fullmatch(r"[\d.]+\n", done.stdout)
