"""A wheel holds exactly the tree's files, and works from anywhere.

The kernels must arrive as nanodrift/kernels: a top-level ``kernels`` would overwrite another published package.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree, with the setuptools of this environment and no network."""
    pytest.importorskip("setuptools", minversion="77", reason="pip install -e '.[test]' brings setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("nanodrift", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    tree = {
        str(path.relative_to(ROOT)) if folder == "nanodrift" else f"nanodrift/{path.relative_to(ROOT)}"
        for folder in ("nanodrift", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert sorted(tree - shipped) == [], "in the tree, missing from the wheel: see package-data in pyproject.toml"
    assert sorted(shipped - tree) == [], "in the wheel, not in the tree"
    assert not any(name.startswith("kernels/") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for needed in (
        "nanodrift/kernels/gemm.py",
        "nanodrift/embedded/model.safetensors",
        "nanodrift/embedded/config.json",
    ):
        assert needed in shipped


def test_the_command_lines_are_left_out(wheel):
    """serve.py and bench.py are thin files of a checkout; a wheel must not put them at the top of site-packages."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "bench.py" not in names and "serve.py" not in names and not any(n.startswith("tests/") for n in names)


@pytest.mark.slow
def test_an_installed_wheel_tells_a_story_from_another_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    script = (
        "import nanodrift; from nanodrift import LLM, SamplingParams\n"
        "print(nanodrift.__file__)\n"
        "print(LLM(device='cpu').generate(['Once upon a time'], SamplingParams(max_tokens=24))[0].text)\n"
    )
    out = run(sys.executable, "-c", script, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)})
    place, story = out.split("\n", 1)
    assert place.startswith(str(target)), "the checkout was imported in place of the wheel"
    assert len(story.split()) >= 5
