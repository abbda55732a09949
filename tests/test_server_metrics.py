"""/metrics through Prometheus' own parser, and the dashboard as text: both from stats that a simulated engine gave."""

import asyncio
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from nanodrift.bench import explain
from nanodrift.config import SLO, EngineConfig, ModelConfig
from nanodrift.cost import CostModel, DecodeLoad, h200_prior
from nanodrift.dispatch import Mode
from nanodrift.metrics import RequestTimes
from nanodrift.plan import Partition
from nanodrift.server import dashboard
from nanodrift.server.startup import policy_line, slo_warnings, split_warnings
from nanodrift.server.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[1]
SEEN = {
    "decode": {"num_steps": 9, "error_p50": 0.01, "error_p95": 0.05, "violations": 0.01, "guarded_over_actual": 1.1}
}
POWER = {"watts": 690.5, "sm_mhz": 1500.0, "joules_total": 1234.0}
INFO = {"description": "Llama-3.1-8B", "device_name": "a simulated GPU"}


@pytest.fixture(scope="module")
def stats():
    return explain.simulate("mux", (Mode.SPLIT, Mode.EXCLUSIVE), SLO(tbt_ms=12)).engine.stats()


def samples_of(text: bytes) -> dict[tuple, float]:
    """(name, label values but the model's) -> value, as Prometheus reads it."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "model_name")
            found[(sample.name, *labels)] = sample.value
    return found


def test_what_the_device_did(stats):
    telemetry = Telemetry("m")
    for _ in range(2):  # totals are taken over, not added up
        found = samples_of(telemetry.render(stats | POWER | {"predictions": SEEN}))
    for name in ("repartitions_total", "merges_total", "unmeetable_steps_total", "decode_bubble_seconds_total",
                 "prefill_bubble_seconds_total", "merge_gap_seconds_total", "num_sms", "decode_sms", "watts",
                 "joules_total", "tbt_predicted_seconds"):  # fmt: skip
        assert found[(f"nanodrift:{name}",)] == pytest.approx((stats | POWER)[name])
    residency = {key[1:]: value for key, value in found.items() if key[0] == "nanodrift:residency_seconds_total"}
    assert residency == {(str(d), mode, str(p)): pytest.approx(s) for mode, p, d, s in stats["residency"]}
    assert len(residency) >= 2
    modes = [found[("nanodrift:mode", mode)] for mode in ("split", "fused", "exclusive")]
    assert sum(modes) == 1 and found[("nanodrift:mode", stats["mode"])] == 1
    assert found[("nanodrift:prediction_error_p95", "decode")] == 0.05
    assert found[("nanodrift:prediction_violations", "decode")] == 0.01


def test_what_cannot_be_read_is_blank():
    found = samples_of(Telemetry("m").render({}))
    assert math.isnan(found[("nanodrift:watts",)]) and math.isnan(found[("nanodrift:sm_mhz",)])


def test_the_phases_of_a_request_add_up():
    telemetry = Telemetry("m", "vllm")
    times = RequestTimes(10.0, (10.5, 10.6, 11.0), SLO(), True, 7)
    telemetry.on_finish("stop", 11.1, times, queued_s=0.2)
    telemetry.on_finish("stop", 11.1, times)  # of an engine that does not say
    telemetry.on_finish("abort", 11.1, RequestTimes(10.0, (), SLO(), False, 7))
    found = samples_of(telemetry.render({}))
    sums = {phase: found[(f"vllm:request_{phase}_time_seconds_sum",)] for phase in ("queue", "prefill", "decode")}
    assert sums == {"queue": 0.2, "prefill": pytest.approx(0.3), "decode": pytest.approx(1.0)}
    counts = [found[(f"vllm:request_{phase}_time_seconds_count",)] for phase in ("queue", "prefill", "decode")]
    assert counts == [1, 1, 2]


def shown(stats, before=None, recent=None):
    console = Console(record=True, width=110, file=io.StringIO())
    recent = recent or {"ttft": [0.1, 0.3], "tbt": [0.004] * 98 + [0.011, 0.013]}
    console.print(dashboard.render(stats, before or {}, INFO, recent, SLO(2000, 12)))
    return console.export_text()


def test_the_dashboard_shows_the_split_and_the_promises(stats):
    text = shown(stats | {"mode": "split", "decode_sms": 32, "prefill_sms": 100} | POWER)
    assert "decode 32" in text and "prefill 100" in text and "of 132" in text
    assert "690 W, 1500 MHz" in text and "a simulated GPU" in text
    assert "P50 4.0, P99 11.0 of 12 ms" in text and "P50 100.0, P99 300.0 of 2000 ms" in text
    assert f"{stats['repartitions_total']} repartitions" in text


def test_the_dashboard_names_the_mode(stats):
    assert "whole chip" in shown(stats | {"mode": "exclusive", "decode_sms": 132, "prefill_sms": 132})
    side_by_side = stats | {"mode": "fused", "decode_sms": 32, "prefill_sms": 100, "tbt_predicted_seconds": 0.0108}
    assert "fused; attention 32 + 100" in shown(side_by_side)
    assert "fused, gap guarded to 10.8 ms" in shown(side_by_side)


def test_a_device_without_partitions_says_so():
    stats = {"mode": "exclusive", "num_sms": 1, "has_partitions": False, "decode_batch": 2}
    assert "no partitions" in shown(stats)


def test_before_the_first_frame_there_is_a_picture_too():
    assert "idle" in shown({}, recent={"ttft": [], "tbt": []})


def test_promises_below_a_bare_step_are_named():
    cost = CostModel(ModelConfig.from_folder(ROOT / "nanodrift" / "configs" / "llama-3.1-8b"), h200_prior())
    assert slo_warnings(SLO(), cost) == []
    [text] = slo_warnings(SLO(tbt_ms=2), cost)
    bare_ms = 1e3 * cost.decode_s(DecodeLoad(1, 1), 132)
    assert "--slo-tbt-ms 2 cannot" in text and f"{bare_ms:.1f} ms" in text
    assert [text.split()[0] for text in slo_warnings(SLO(ttft_ms=1, tbt_ms=1), cost)] == [
        "--slo-tbt-ms",
        "--slo-ttft-ms",
    ]


def test_the_policy_in_a_line():
    cost = CostModel(ModelConfig.from_folder(ROOT / "nanodrift" / "configs" / "llama-3.1-8b"), h200_prior())
    whole, half = Partition(132, 132, is_shared=True), Partition(100, 32)
    assert policy_line(EngineConfig(), (whole,), cost).startswith("turns: ")
    text = policy_line(EngineConfig(modes="split,fused"), (whole, half), cost)
    assert text.startswith("mux (split,fused); decode on 32 or all 132 SMs") and "not measured" in text


def test_halves_that_are_plain_streams_are_said_to_be():
    plain = SimpleNamespace(reason="the driver refuses green contexts", streams=["half"])
    [text] = split_warnings(EngineConfig(), plain)
    assert "the driver refuses green contexts" in text
    assert split_warnings(EngineConfig(policy="overlap"), plain) == []  # asked for
    for split in (None, SimpleNamespace(reason="", streams=["half"]), SimpleNamespace(reason="none", streams=[])):
        assert split_warnings(EngineConfig(), split) == []


def test_it_runs_until_it_is_told_to_stop(stats):
    async def watch():
        client = SimpleNamespace(stats=stats, info=INFO)
        console = Console(file=io.StringIO(), width=110, force_terminal=True)
        task = asyncio.create_task(dashboard.show(console, client, Telemetry("m"), SLO()))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return console.file.getvalue()

    assert "a simulated GPU" in asyncio.run(watch())
