"""``bench.py explain``: the scheduler's decisions as text, simulated, the same bytes every time, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanodrift.bench import explain
from nanodrift.config import SLO
from nanodrift.dispatch import Mode
from nanodrift.plan import DecodeWork, FusedWork, PrefillWork

ROOT = Path(__file__).resolve().parents[1]


def told(capsys, *argv):
    assert explain.main(list(argv)) == 0
    return capsys.readouterr().out


def test_it_is_labelled_and_prints_the_same_bytes_twice(capsys):
    text = told(capsys)
    assert text.startswith("SIMULATED")
    assert text == told(capsys)
    assert text != told(capsys, "--slo-tbt-ms", "30")


@pytest.mark.parametrize("policy", ["mux", "turns", "chunked", "chunked-auto", "static"])
def test_every_policy_answers_every_request(capsys, policy):
    lines = told(capsys, "--policy", policy).splitlines()
    for name, _, num_prompt, num_output in explain.REQUESTS:
        (line,) = [one for one in lines if one.split()[:3] == [name, str(num_prompt), str(num_output)]]
        assert line


def test_a_reader_that_leaves_early_gets_no_traceback():
    with subprocess.Popen(
        [sys.executable, ROOT / "bench.py", "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_no_request_finds_anothers_prefix():
    run = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=12))
    assert [request.num_cached_tokens for request in run.requests] == [0] * len(run.requests)


def test_split_runs_both_lanes_at_once_and_keeps_the_promise():
    run = explain.simulate("mux", (Mode.SPLIT, Mode.EXCLUSIVE), SLO(tbt_ms=12))
    spans = {kind: [s for s in run.timeline if isinstance(s.ticket.work, kind)] for kind in (DecodeWork, PrefillWork)}
    together_s = sum(
        max(0.0, min(a.finished_s, b.finished_s) - max(a.started_s, b.started_s))
        for a in spans[DecodeWork]
        for b in spans[PrefillWork]
    )
    assert together_s > 0.2
    gaps = [b - a for r in run.requests for a, b in zip(r.token_s[1:], r.token_s[2:], strict=False)]  # the first merges
    assert max(gaps) <= 0.012


def test_no_two_pieces_of_work_hold_the_same_sms():
    timeline = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=10)).timeline
    assert any(isinstance(span.ticket.work, FusedWork) for span in timeline)
    for i, a in enumerate(timeline):
        for b in timeline[i + 1 : i + 6]:
            if min(a.finished_s, b.finished_s) - max(a.started_s, b.started_s) > 1e-9:
                assert set(a.ticket.work.lanes).isdisjoint(b.ticket.work.lanes)
                decode, prefill = (a, b) if isinstance(a.ticket.work, DecodeWork) else (b, a)
                assert decode.ticket.partition.decode_sms + prefill.ticket.partition.prefill_sms <= 132


def test_the_sums_of_the_gantt_are_the_executors():
    executor = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=10)).engine.executor
    for lane, busy_s in executor.busy_s.items():
        held_s = sum(s.finished_s - s.started_s for s in executor.timeline if lane in s.ticket.work.lanes)
        assert held_s == pytest.approx(busy_s)


def test_late_tokens_are_those_whose_gap_breaks_the_promise():
    run = explain.simulate("turns", tuple(Mode), SLO(tbt_ms=12))
    rows = [line.split() for line in explain.outcome(run.requests, SLO(tbt_ms=12)).splitlines()[1:]]
    assert len(run.late_s()) == sum(int(row[-3]) for row in rows) > 0
    assert min(run.late_s()) > min(request.first_token_s for request in run.requests)


def test_the_figure_shows_four_policies_and_every_late_token(tmp_path):
    pytest.importorskip("matplotlib")
    assert explain.main(["--plot", str(tmp_path / "new" / "figure")]) == 0
    svg = (tmp_path / "new" / "figure.svg").read_text()
    assert all(f">{name}<" in svg for name in explain.PANELS) and "simulated" in svg
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000
    for name in explain.PANELS:
        assert explain.told(explain.simulate(name, tuple(Mode), SLO(tbt_ms=explain.TBT_MS))) in svg


def test_the_figure_of_the_readme_is_that_of_today():
    svg = (ROOT / "results" / "simulated" / "explain.svg").read_text()
    for name in explain.PANELS:
        run = explain.simulate(name, tuple(Mode), SLO(tbt_ms=explain.TBT_MS))
        assert explain.told(run) in svg, "run python bench.py explain --course --plot results/simulated/explain"


def test_mistakes_are_named(capsys):
    assert explain.main(["--modes", "sideways"]) == 2
    assert "sideways" in capsys.readouterr().err
    assert explain.main(["--policy", "best"]) == 2
    assert "chunked-auto" in capsys.readouterr().err


def test_it_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; from nanodrift.bench import explain; explain.main([])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "prefill" in result.stdout
