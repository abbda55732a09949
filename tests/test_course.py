"""nanodrift/README.md, the course: its numbers are those of explain, and what it tells to change is there."""

import re
from pathlib import Path

import pytest

from nanodrift.bench import course

ROOT = Path(__file__).resolve().parents[1]
TEXT = course.COURSE.read_text()
FILES = {path.name: path.read_text() for path in (ROOT / "nanodrift").glob("*.py")}


def test_its_numbers_are_those_of_explain():
    assert {match[2] for match in course.SECTION.finditer(TEXT)} == set(course.KINDS)
    assert course.regenerate(TEXT) == TEXT, "run python bench.py explain --course and commit what it wrote"


def test_numbers_that_are_not_are_noticed():
    broken = re.sub(r"(<!-- explain: layers -->\n)", r"\1off by one\n", TEXT)
    assert broken != TEXT and course.regenerate(broken) == TEXT


def test_it_is_short_and_names_every_file():
    assert len(TEXT.splitlines()) <= 200
    missing = [name for name in FILES if f"{name}" not in TEXT and name not in ("__init__.py", "kernels.py")]
    assert missing == []
    named = set(re.findall(r"\b(\w+\.py)\b", TEXT))
    known = set(FILES) | {path.name for path in ROOT.rglob("*.py")}
    assert named <= known


def test_its_order_is_that_of_the_file_tree():
    tree = (ROOT / "README.md").read_text().partition("<!-- tree -->")[2].partition("server/")[0]
    table = re.findall(r"^\| ([\w., ]+\.py) \|", TEXT, re.MULTILINE)
    listed = list(dict.fromkeys(name for cell in table for name in cell.split(", ")))
    in_tree = [name for name in re.findall(r"\b(\w+\.py)\b", tree) if name in FILES]
    assert sorted(listed, key=in_tree.index) == listed and set(listed) == set(in_tree)


@pytest.mark.parametrize(
    "row", [line for line in TEXT.splitlines() if re.match(r"\| \w+\.py", line)], ids=lambda row: row[:30]
)
def test_the_lines_it_tells_to_change_are_there(row):
    names, _, change, _ = (cell.strip() for cell in row.strip("|").split("|"))
    files = [FILES[name] for name in names.split(", ")]
    for quoted in re.findall(r"`([^`]+)` (?:to|swapped)", change) + re.findall(r"drop `([^`]+)`", change):
        assert sum(text.count(quoted) for text in files) == 1, quoted
