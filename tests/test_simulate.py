"""``bench.py sim``: policies side by side on the simulated machine; the same seed prints the same bytes."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from nanodrift.bench import simulate, workloads
from nanodrift.bench.load import run_workload
from nanodrift.config import SLO
from nanodrift.dispatch import Mode
from nanodrift.metrics import percentile

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--num-prompts", "30", "--rates", "6")


def told(capsys, *argv):
    assert simulate.main([*SMALL, *argv]) == 0
    return capsys.readouterr().out


def test_the_same_seed_prints_the_same_bytes_and_another_seed_others(capsys):
    text = told(capsys)
    assert text == told(capsys)
    assert text != told(capsys, "--seed", "1")


def test_every_line_of_figures_says_that_it_is_simulated(capsys):
    lines = told(capsys, "--policy", "mux,turns").splitlines()
    assert lines[0].startswith("SIMULATED")
    rows = [line for line in lines if line.startswith(("mux", "turns"))]
    assert len(rows) == 2
    assert all(line.endswith("SIMULATED") for line in rows)


@pytest.mark.parametrize("policy", ["mux", "chunked-auto", "chunked", "static", "turns"])
def test_all_requests_complete_with_all_their_tokens(policy):
    workload = workloads.named("sharegpt", 25, 0)
    records = run_workload(simulate.simulated_engine(policy, SLO()), workload, 8.0, 0)
    assert [len(r.token_s) for r in records] == [sample.num_output_tokens for sample in workload.samples]


def test_the_dispatcher_keeps_a_promise_that_taking_turns_breaks():
    slo = SLO(ttft_ms=5000, tbt_ms=20)
    workload = workloads.named("sharegpt", 60, 0)
    worst_ms = {}
    for policy in ("mux", "turns"):
        records = run_workload(simulate.simulated_engine(policy, slo), workload, 8.0, 0, slo=slo)
        worst_ms[policy] = 1e3 * percentile([gap for record in records for gap in record.tbt_s], 99)
    assert worst_ms["mux"] <= 20 < 2 * worst_ms["mux"] < worst_ms["turns"]


def test_serving_makes_no_garbage_that_only_the_collector_finds():
    """Else it could not be off while requests run, where one walk through all prompts takes longer than a TBT."""
    engine, slo = simulate.simulated_engine("mux", SLO(tbt_ms=15)), SLO(tbt_ms=15)
    workload = workloads.named("conversation", 30, 0)
    gc.unfreeze()
    gc.collect()
    gc.disable()
    try:
        records = run_workload(engine, workload, 8.0, 0, slo=slo, drain_s=2)
        gc.unfreeze()
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert any(record.error for record in records), "some were cut off"


def test_modes_restrict_the_dispatcher():
    slo = SLO(tbt_ms=15)
    workload = workloads.named("sharegpt", 20, 0)
    engine = simulate.simulated_engine("mux", slo, modes=(Mode.EXCLUSIVE,))
    run_workload(engine, workload, 8.0, 0, slo=slo)
    assert all(span.ticket.partition.is_shared for span in engine.executor.timeline)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--policy", "best"), "chunked-auto"),
        (("--workload", "poems"), "sharegpt"),
        (("--policy", "static:48"), "32, 40, 64"),
        (("--policy", "mux:sideways"), "sideways"),
        (("--policy", "chunked:few"), "chunked:TOKENS"),
        (("--rates", "fast"), "requests/s"),
        (("--max-num-seqs", "3"), "--max-num-seqs"),
    ],
)
def test_mistakes_are_named_before_anything_runs(capsys, argv, message):
    try:
        code = simulate.main([*SMALL, *argv])
    except SystemExit as exit:  # argparse found it
        code = exit.code
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_it_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None; from nanodrift.bench import simulate\n"
        "simulate.main(['--num-prompts', '5', '--rates', '4', '--policy', 'mux'])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mux" in result.stdout
