"""The house rules that a reader may rely on: who imports whom, what is blocked from what, and how large things are.

The table ``MAY_IMPORT`` is the architecture diagram. Each checker is itself shown an example that breaks its rule.
"""

import ast
import contextlib
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanodrift/**/*.py"), *ROOT.glob("kernels/**/*.py")])
EVERYTHING = sorted([*SOURCES, *ROOT.glob("tests/*.py")])

# --- who may import whom -------------------------------------------------------------------------------------------

VOCABULARY = {"config", "plan", "request"}
SERVICES = VOCABULARY | {"kvcache", "cost", "metrics", "executor"}
POLICY = SERVICES | {"decision", "waiting", "flight", "dispatch"}
MODEL = {"kernels", "ops", "model", "weights", "batch", "penalties", "runner"}
ENGINE = POLICY | {"scheduler", "baselines", "telemetry", "engine"}
EVERY_PART = ENGINE | MODEL | {"partition", "graphs", "cpu", "gpu", "sim", "hub"}

MAY_IMPORT = {  # module: modules of nanodrift that it may import
    "config": set(),
    "plan": {"config"},
    "request": {"config", "plan"},
    "kvcache": VOCABULARY,
    "cost": VOCABULARY | {"metrics"},
    "metrics": VOCABULARY,
    "executor": VOCABULARY,
    "waiting": VOCABULARY,
    "flight": VOCABULARY,
    "decision": VOCABULARY | {"cost"},
    "dispatch": SERVICES | {"decision"},
    "scheduler": POLICY,
    "baselines": POLICY | {"scheduler"},
    "telemetry": VOCABULARY | {"decision"},
    "engine": POLICY | {"scheduler", "baselines", "telemetry"},
    "ops": {"kernels", "config"},
    "weights": {"config"},
    "batch": {"penalties"} | VOCABULARY,
    "model": {"ops", "weights", "batch", "config"},
    "penalties": {"ops"} | VOCABULARY,
    "runner": {"ops", "model", "batch", "penalties"} | VOCABULARY,
    "graphs": {"batch"} | VOCABULARY,
    "partition": VOCABULARY,
    "sim": SERVICES,
    "cpu": SERVICES | MODEL,
    "gpu": SERVICES | MODEL | {"graphs", "partition"},
    "hub": {"config"},
    "startup": EVERY_PART,
    "llm": EVERY_PART | {"startup", "server"},  # of server: the tokenizer
    "__init__": VOCABULARY | {"llm"},
    "kernels": set(),
    "embedded": set(),
    "server": EVERY_PART | {"startup", "llm", "server"},
    "bench": EVERY_PART | {"startup", "llm", "server", "bench"},  # of server: trace, power, tokenizer
}
# Modules that decide. They see neither a tensor nor a clock, so that a simulator can drive the very same objects.
PURE = {
    "config",
    "request",
    "plan",
    "kvcache",
    "cost",
    "metrics",
    "executor",
    "waiting",
    "flight",
    "decision",
    "dispatch",
    "scheduler",
    "baselines",
    "telemetry",
    "sim",
}
CLOCKS = {"time", "datetime", "random", "secrets"}
CLOCK_OWNERS = {"executor"}
PACKAGES = {"embedded", "server", "bench"}


def imports_of(source: str, package: str = "") -> list[tuple[int, str]]:
    """Every (line, dotted module) a source imports, wherever the statement stands; relative ones resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, node.module] if node.module else parts)
            # `from nanodrift import x` may name a module x: keep the longer name, the checks look at its first parts.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def module_of(path: Path) -> tuple[str, str]:
    """(the table's name of a file, its package): nanodrift/server/app.py is ("server", "nanodrift.server")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels/*", "nanodrift.kernels"
    if len(parts) > 2 or (len(parts) == 2 and parts[1] in PACKAGES):
        return parts[1], f"nanodrift.{parts[1]}"
    return parts[-1], "nanodrift" if len(parts) == 2 else ""


def direction_errors(module: str, source: str, package: str = "nanodrift") -> list[str]:
    """What the imports of one file do against the tables above."""
    errors = []
    for line, name in imports_of(source, package):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if module == "kernels/*":
            is_sibling = name.startswith("nanodrift.kernels.")
            is_safe = root in sys.stdlib_module_names and root not in CLOCKS | {"os"}
            if root not in ("torch", "triton") and not is_sibling and not is_safe:
                errors.append(f"line {line}: a kernel file may import torch and triton only, not {name}")
        elif root == "nanodrift":
            if module not in MAY_IMPORT:
                errors.append(f"line {line}: {module} is not in the table of tests/test_layout.py")
            elif target in MAY_IMPORT and target not in MAY_IMPORT[module]:
                errors.append(f"line {line}: {module} may not import {name}")
        if module in PURE and root not in sys.stdlib_module_names and root != "nanodrift":
            errors.append(f"line {line}: {module} decides, so it may import the standard library only, not {name}")
        if module in PURE - CLOCK_OWNERS and root in CLOCKS:
            errors.append(f"line {line}: {module} may not read a clock or draw random numbers ({name})")
    return errors


def bare_kernels_errors(source: str) -> list[str]:
    """Imports of the published package whose name our folder shares."""
    return [f"line {line}: import nanodrift.kernels, never {name}" for line, name in imports_of(source)
            if name.split(".")[0] == "kernels"]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module, package = module_of(path)
    if package:  # the command lines at the root may import what they like
        assert module in MAY_IMPORT or module == "kernels/*", "name the new module in the table"
        assert direction_errors(module, path.read_text(), package) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("config", "from nanodrift.request import Request"),
        ("config", "from nanodrift import request"),
        ("request", "from . import engine"),
        ("scheduler", "import torch"),
        ("scheduler", "def f():\n    import torch.nn"),
        ("scheduler", "from nanodrift.engine import Engine"),
        ("scheduler", "import time"),
        ("dispatch", "from nanodrift.scheduler import Scheduler"),
        ("metrics", "from datetime import datetime"),
        ("kvcache", "import numpy"),
        ("model", "from nanodrift.cpu import CpuExecutor"),
        ("engine", "from nanodrift.server import app"),
        ("server", "import nanodrift.bench.offline"),
        ("nouveau", "import nanodrift.config"),
        ("kernels/*", "import nanodrift.ops"),
        ("kernels/*", "import numpy"),
        ("kernels/*", "import os"),
    ],
)
def test_the_direction_checker_catches(module, source):
    assert len(direction_errors(module, source)) == 1


def test_the_direction_checker_lets_pass():
    assert direction_errors("scheduler", "import math\nfrom nanodrift.plan import Lane") == []
    assert direction_errors("executor", "import time") == []
    assert direction_errors("kernels/*", "import torch, triton\nfrom . import gemm", "nanodrift.kernels") == []
    assert (
        direction_errors("gpu", "import torch\nfrom nanodrift import partition\nfrom nanodrift.kernels import gemm")
        == []
    )


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_bare_kernels(path):
    assert bare_kernels_errors(path.read_text()) == []


def test_kernels_is_not_a_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list(ROOT.glob("tests/**/__init__.py"))
    for source in ("import kernels", "from kernels import gemm", "import kernels.gemm as g", "if 1:\n  import kernels"):
        assert len(bare_kernels_errors(source)) == 1
    assert bare_kernels_errors("from nanodrift.kernels import gemm\nfrom nanodrift import kernels") == []


# --- sizes ---------------------------------------------------------------------------------------------------------

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}  # fmt: skip


def count_code(source: str) -> int:
    """Lines that carry code: comments, docstrings and blank lines are free."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_counter_counts_code_only():
    source = '''
    """Module
    docstring."""

    # comment
    import math  # trailing comment


    def f(
        x,
    ):
        """One line."""
        text = """two
        lines"""
        return math.pi, f"{x}", text  # code
    '''
    assert count_code(textwrap.dedent(source)) == 7
    assert count_code("") == 0
    assert count_code('x = 1\n"""a string that is no docstring"""\n') == 2


CODE_LINES = {path: count_code(path.read_text()) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_outgrows_a_sitting(path):
    assert CODE_LINES[path] <= 500, "find the noun that is missing"


def test_the_engine_stays_readable_in_an_afternoon():
    """The front end, the benches and the making of the embedded model (data, with its recipe) are not the engine.

    5,000 lines were meant; penalties, logprobs of prompts, two open chunks, padding, kernels that overlap and a
    simulated clock are in what is beyond.
    """
    others = {"server", "bench", "embedded"}
    core = {path: lines for path, lines in CODE_LINES.items()
            if path.parent != ROOT and not others & set(path.relative_to(ROOT).parts)}  # fmt: skip
    policy = sum(lines for path, lines in core.items() if path.name in ("scheduler.py", "dispatch.py"))
    print(f"code lines: scheduler + dispatch {policy}, nanodrift + kernels {sum(core.values())}")
    assert policy <= 550
    assert sum(core.values()) <= 5603


# --- what runs without what ------------------------------------------------------------------------------------------

BLOCK = """
import sys
class Without:  # hides top-level packages from a real finder, as if they were not installed
    def __init__(self, finder, is_hidden): self.finder, self.is_hidden = finder, is_hidden
    def find_spec(self, name, path=None, target=None):
        return None if self.is_hidden(name.partition(".")[0]) else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
def block(is_hidden):
    sys.meta_path[:] = [Without(finder, is_hidden) for finder in sys.meta_path]
"""


def run_python(script: str, hidden=()) -> str:
    """Runs a script in a fresh interpreter at the root, where the ``hidden`` packages seem not to be installed.

    Returns what the script printed.
    """
    script = f"{BLOCK}block({set(hidden)!r}.__contains__)\n{textwrap.dedent(script)}"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_blocking_blocks():
    run_python(
        """
        import importlib.util
        assert importlib.util.find_spec("torch") is None
        try:
            import torch
        except ModuleNotFoundError:
            import rich
        else:
            raise SystemExit("torch was imported")
        """,
        hidden=["torch"],
    )


def test_the_deciding_side_imports_without_torch():
    modules = sorted(m for m in PURE if (ROOT / "nanodrift" / f"{m}.py").exists())
    out = run_python(
        f"""
        import importlib
        for name in {modules!r}:
            print(importlib.import_module("nanodrift." + name).__name__)
        """,
        hidden=["torch", "triton", "cuda", "numpy", "transformers"],
    )
    assert out.split() == [f"nanodrift.{m}" for m in modules]


def test_transformers_and_nanodrift_live_in_one_process():
    run_python(
        """
        import nanodrift, transformers.modeling_utils
        from nanodrift import kernels
        assert kernels.__path__[0].endswith("kernels"), kernels.__path__
        """
    )


GENERATE = """
from nanodrift import LLM, SamplingParams
with LLM(device="cpu", max_num_seqs=4) as llm:
    out = llm.generate(["Once upon a time", [1, 2, 3]], SamplingParams(temperature=0, max_tokens=8), progress=False)
print([len(one.token_ids) for one in out], bool(out[0].text))
"""


def test_the_cpu_engine_runs_without_triton_and_cuda():
    out = run_python(f"{GENERATE}\nimport sys; print('triton._C' in sys.modules)", hidden=["triton", "cuda", "pynvml"])
    assert out.split("\n")[:2] == ["[8, 8] True", "False"]


def packages_needed_by(distributions: set[str]) -> set[str]:
    """Top-level packages of these distributions and of all that they require, as their metadata says."""
    wanted, queue = set(), list(distributions)
    while queue:
        name = normal(queue.pop())
        if name not in wanted:
            wanted.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):
                queue += [re.match(r"[\w.-]+", r)[0] for r in metadata.requires(name) or () if "extra ==" not in r]
    owners = metadata.packages_distributions().items()
    return {package for package, names in owners if {normal(name) for name in names} & wanted}


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_python_api_needs_the_core_packages_only():
    """Web server, hub client, templates, transformers: whoever only calls LLM().generate can do without all of them."""
    core = packages_needed_by({"torch", "triton", "cuda-python", "rich", "numpy"})
    core |= {"safetensors", "tokenizers", "nanodrift"}  # tokenizers also declares a hub client, for another purpose
    installed = set(metadata.packages_distributions())
    hidden = {name for name in installed - core if name.isidentifier()}
    assert {"torch", "rich", "jinja2"} <= core and {"transformers", "fastapi", "huggingface_hub"} <= hidden
    assert run_python(GENERATE, hidden).split("\n")[0] == "[8, 8] True"
