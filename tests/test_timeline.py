"""bench/timeline.py and bench/residency.py: a trace as a picture, a run's books as lines."""

import itertools
import json

import pytest

from nanodrift.bench import cli, explain, residency, timeline
from nanodrift.config import SLO
from nanodrift.dispatch import Mode
from nanodrift.server.trace import Trace


def slice_of(name, mode, start_ms, length_ms, sms, track=1, **more):
    event = {"ph": "X", "pid": 1, "tid": track, "name": name, "cat": mode, "args": {"sms": sms, **more}}
    return event | {"ts": 1e3 * start_ms, "dur": 1e3 * length_ms}


def test_a_band_of_the_chip_for_every_piece():
    events = [
        slice_of("decode 4", "split", 1, 2, 32, batch=4),
        slice_of("prefill 512", "split", 1, 5, 100),
        slice_of("decode 4", "exclusive", 6, 1, 132, batch=4),
        slice_of("prefill 512", "fused", 7, 3, 100, first_tokens=1),
        slice_of("decode 5", "fused", 7, 3, 32, batch=5),
        {"ph": "C", "name": "SMs", "ts": 0, "args": {"decode": 32, "prefill": 100}},
    ]
    assert timeline.bars(events, 132) == [
        timeline.Bar(timeline.DECODE, 1, 2, 0, 32, "4"),
        timeline.Bar(timeline.PREFILL, 1, 5, 32, 100),
        timeline.Bar(timeline.DECODE, 6, 1, 0, 132, "4"),
        timeline.Bar(timeline.FUSED, 7, 3, 0, 132, "5", 1),
    ]


@pytest.fixture
def trace(tmp_path):
    """Of the six requests, with made-up watts."""
    run = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=12))
    path = tmp_path / "run.json"
    run.trace.write(path, [(0.1 * i, 1500.0, 650.0 + i) for i in range(9)], simulated=True)
    return path


def test_the_lanes_of_a_trace_never_overlap_themselves(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    for track in (1, 2):
        own = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == track)
        assert len(own) > 50
        assert all(a + length <= b + 0.2 for (a, length), (b, _) in itertools.pairwise(own))


def test_it_is_drawn(trace, capsys):
    pytest.importorskip("matplotlib")
    assert timeline.main([str(trace), "--from-ms", "100", "--to-ms", "300"]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [str(trace.with_suffix(".png")), str(trace.with_suffix(".svg"))]
    svg = trace.with_suffix(".svg").read_text()
    assert "SIMULATED" in svg and ">MHz<" in svg and ">SMs<" in svg


def test_mistakes_are_named(tmp_path, trace, capsys):
    pytest.importorskip("matplotlib")
    assert timeline.main([str(tmp_path / "none.json")]) == 2
    assert timeline.main([str(trace), "--from-ms", "90000"]) == 2
    said = capsys.readouterr().err
    assert "none.json" in said and "nothing ran between" in said


def test_the_policy_block_is_about_the_run_alone():
    engine = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=12)).engine
    stats = engine.stats()
    assert residency.figures(stats, before=stats)["residency"] == []
    found = residency.figures(stats)
    assert sum(found[f"{mode}_share"] for mode in ("split", "fused", "exclusive")) == pytest.approx(1.0)
    assert found["merges"] == 6 and 0 < found["mean_merge_gap_ms"] < 30
    assert 0 <= found["decode_bubble_ratio"] < 0.2 and "watts" not in found
    json.dumps(found)


def test_what_is_not_known_has_no_line():
    engine = explain.simulate("chunked", tuple(Mode), SLO(tbt_ms=12)).engine
    text = "\n".join(residency.block(engine.stats()))
    assert "watts" not in text and "Predicted" not in text and "fused, whole chip" in text
    seen = {"decode": {"error_p95": 0.05, "violations": 0.01, "guarded_over_actual": 1.1}}
    power = {"watts": 650.0, "sm_mhz": 1500.0, "joules": 100.0, "tokens_per_joule": 12.34}
    text = "\n".join(residency.block(engine.stats(), predictions=seen, power=power))
    assert "5.0%, 1.00%, 1.10" in text and "1500, 650; 12.3" in text


def test_a_cpu_says_that_it_has_no_partitions():
    stats = {"num_sms": 1, "has_partitions": False, "residency": [["exclusive", 1, 1, 2.0]]}
    assert any("no partitions" in line for line in residency.block(stats))


def test_a_trace_listens_from_when_it_is_made():
    engine = explain.simulate("mux", tuple(Mode), SLO(tbt_ms=12)).engine
    assert not Trace(engine).lines


def test_a_run_writes_its_trace_and_shows_the_policy_block(tmp_path, capsys):
    path = tmp_path / "run.json"
    options = ["--num-prompts", "5", "--input-len", "300", "--output-len", "5", "--request-rate", "20"]
    assert cli.main(["run", "--device", "sim", *options, "--timeline", str(path)]) == 0
    trace = json.loads(path.read_text())
    assert trace["otherData"]["simulated"] and trace["otherData"]["policy"] == "mux"
    firsts = [event["args"].get("first_tokens", 0) for event in trace["traceEvents"] if event["ph"] == "X"]
    assert sum(firsts) == 5
    said = capsys.readouterr()
    assert "Device time by mode:" in said.err + said.out
