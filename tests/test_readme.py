"""README.md says what runs: its marked commands are run, its links lead somewhere, its tables are those of results/.

A fenced block with ``<!-- test -->`` on the line above is run by bash at the root. If a fenced block under
``<!-- output -->`` comes next, its first words must come out again.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanodrift.bench import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.compile(r"<!-- test -->\n```\w*\n(.*?)```\n(?:\s*<!-- output -->\n```\w*\n(.*?)```\n)?", re.DOTALL)


def commands_of(text: str) -> list[tuple[str, str]]:
    """(script, expected output or '') of every marked block."""
    return COMMANDS.findall(text)


def test_marked_blocks_are_found():
    text = "a\n<!-- test -->\n```bash\necho hi\n```\n\n<!-- output -->\n```text\nhi\nthere\n```\n```bash\nrm x\n```\n"
    assert commands_of(text) == [("echo hi\n", "hi\nthere\n")]
    assert commands_of(text.replace("<!-- output -->", "so:")) == [("echo hi\n", "")]
    assert len(commands_of(README)) == README.count("<!-- test -->") >= 1


@pytest.mark.parametrize("script, output", commands_of(README), ids=lambda text: text.strip().partition("\n")[0][:40])
def test_the_commands_work(script, output):
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    shell = subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=True, **pipes)
    try:
        out, err = shell.communicate(timeout=60)
    finally:  # whatever the block has started and left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, err[-3000:]
    assert out.strip() and output.strip()[:60] in out


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 200
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []


def test_the_file_tree_names_files_that_exist():
    tree = README.partition("<!-- tree -->")[2].partition("```text\n")[2].partition("```")[0]
    names = re.findall(r"[\w./]+\.(?:py|md)\b", tree)
    missing = [n for n in names if not any((ROOT / folder / n).exists() for folder in ("", "nanodrift"))]
    assert names and missing == []


def test_tables_and_figures_are_those_of_the_results():
    assert tables.main(check=True) == 0, "run python bench.py tables and commit what it wrote"


def test_every_result_is_listed_with_its_command():
    listed = (ROOT / "results" / "README.md").read_text()
    files = {str(path.relative_to(ROOT / "results")) for path in (ROOT / "results").rglob("*.json")}
    assert len(files) >= 2 and sorted(name for name in files if f"`{name}`" not in listed) == []
