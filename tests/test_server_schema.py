"""The server under requests made from its own /openapi.json by schemathesis, proper ones and broken ones.

Held are those checks that a server whose errors say more than its schema can pass: no server error, no status and no
content type that the schema does not name.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"


def run(folder: Path, num_examples: int) -> str:
    pytest.importorskip("schemathesis", reason="pip install -e '.[test]' brings schemathesis")
    with running("--step-ms", "0.2", "--max-num-seqs", "64") as server:
        engine = server.client.process.pid
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"]
        command += ["--checks", CHECKS, "--mode", "all", "--max-examples", str(num_examples), "--seed", "1"]
        command += ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--no-color"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
        assert server.client.process.pid == engine and server.client.process.poll() is None
    return result.stdout


@pytest.mark.slow
def test_r8_no_request_made_from_the_schema_is_a_server_error(tmp_path):
    said = run(tmp_path, 500)
    print(said[-1500:])
    assert re.search(r"\d+ generated", said), said[-1500:]
