"""The cost model and the simulated executor: arithmetic that can be checked by hand, and time that adds up."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodrift.baselines import Turns
from nanodrift.config import ModelConfig
from nanodrift.cost import Cell, CostModel, Curve, DecodeLoad, Guard, PrefillLoad, find_profile, h200_prior
from nanodrift.engine import Engine
from nanodrift.plan import DecodeWork, FusedWork, Lane, Partition, PrefillSlice, PrefillWork, RowParams
from nanodrift.request import SamplingParams
from nanodrift.scheduler import Scheduler
from nanodrift.sim import SimExecutor

ROOT = Path(__file__).resolve().parents[1]
LLAMA = ModelConfig.from_folder(ROOT / "nanodrift" / "configs" / "llama-3-8b")
SPLIT = Partition(prefill_sms=100, decode_sms=32)


@pytest.fixture(scope="module")
def cost():
    return CostModel(LLAMA, h200_prior())


def prefill(num_tokens=1024, first=0, last=32, batch_id=1):
    piece = PrefillSlice("p", 0, 0, (0,) * num_tokens, RowParams())
    return PrefillWork(batch_id, (piece,), first, last, is_last=last == 32)


def decode(batch=16, context=1000):
    return DecodeWork(tuple(f"d{i}" for i in range(batch)), tuple(range(batch)), (context - 1,) * batch)


def machine(cost, guard=None, **options):
    options = {"num_blocks": 4000, "num_rows": 64, "max_prefill_tokens": 2048, "partitions": (SPLIT,), **options}
    return SimExecutor(cost, guard=guard, **options)


def test_curves_interpolate():
    curve = Curve(((16, 2.0), (32, 3.0), (64, 4.0)))
    assert [curve.at(n) for n in (8, 16, 24, 64, 132)] == [1.0, 2.0, 2.5, 4.0, 4.0]


@pytest.mark.parametrize(
    "batch, measured_ms", [(1, 4.52), (16, 5.39), (64, 7.49), (128, 11.18), (256, 19.03)]
)  # results/h200/latency.json
def test_the_prior_is_near_the_measured_decode_step(cost, batch, measured_ms):
    assert 1e3 * cost.decode_s(DecodeLoad(batch, batch * 1128), 132) == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize("num_tokens, measured_ms", [(512, 13.8), (2048, 48.61), (8000, 213.19)])
def test_the_prior_is_near_the_measured_prefill(cost, num_tokens, measured_ms):
    load = PrefillLoad(num_tokens, num_tokens**2 / 2, 1)
    assert 1e3 * cost.prefill_s(load, 132) == pytest.approx(measured_ms, rel=0.2)


def test_the_clock_follows_what_runs():
    """Prefill after prefill takes what the profile says; the first, and one after a pause, end before it settles."""
    cost = CostModel(LLAMA, replace(h200_prior(), settled_clock=Curve(((1, 1.0), (64, 0.8)))))
    sim = machine(cost)
    solo_s = cost.work_s(prefill(), 132, 132)

    def busy_s():
        sim.launch(prefill(), sim.partitions[0])
        return sim.wait(None)[0].busy_s

    times_s = [busy_s() for _ in range(12)]
    assert times_s == sorted(times_s) and times_s[-1] == pytest.approx(solo_s, rel=1e-3)
    assert 0.83 * solo_s < times_s[0] < 0.97 * solo_s  # a fifth less of what goes with the clock at best, and it falls
    sim.wait(sim.clock.now() + 1.0)
    assert busy_s() == pytest.approx(times_s[0])
    sim.launch(decode(), sim.partitions[0])
    assert sim.wait(None)[0].busy_s == pytest.approx(cost.decode_s(DecodeLoad(16, 16_000), 132))  # waits for memory


SHIPPED = find_profile("NVIDIA H200", LLAMA, "bfloat16")


def test_a_decode_step_takes_what_its_graph_takes():
    """33 to 48 rows run in a graph of 48."""
    cost = CostModel(LLAMA, SHIPPED)
    least, *same, most = (cost.decode_s(DecodeLoad(batch, 0), 32) for batch in (32, 33, 40, 48, 49))
    assert least < same[0] == same[1] == same[2] < most


@pytest.mark.parametrize(
    "batch, measured_ms", [(1, 4.45), (16, 5.06), (64, 7.02), (128, 9.82), (256, 16.5)]
)  # results/h200/latency.json
def test_the_shipped_profile_gives_the_measured_decode_step(batch, measured_ms):
    sim = machine(CostModel(LLAMA, SHIPPED))
    sim.launch(decode(batch, 1100), sim.partitions[0])
    (step,) = sim.wait(None)
    assert 1e3 * step.busy_s == pytest.approx(measured_ms, rel=0.05)


@pytest.mark.parametrize("num_tokens, measured_ms", [(512, 13.86), (2048, 48.3), (8000, 213.3)])
def test_the_shipped_profile_gives_the_measured_prefill(num_tokens, measured_ms):
    """8,000 tokens lie far beyond the table's last row."""
    cost = CostModel(LLAMA, SHIPPED)
    assert 1e3 * cost.work_s(prefill(num_tokens), 132, 132) == pytest.approx(measured_ms, rel=0.08)


def test_the_shipped_profile_knows_what_the_lanes_cost_each_other():
    """results/h200/calibration.json: 64 requests at 1k on 32 SMs beside chunks of 2,048 tokens on 100."""
    sim = machine(CostModel(LLAMA, SHIPPED), num_rows=128)
    sim.launch(decode(64, 1074), SPLIT)
    sim.launch(prefill(2048), SPLIT)
    (step,) = sim.wait(None)
    assert 1e3 * step.busy_s == pytest.approx(16.0, rel=0.05)


@given(batch=st.integers(1, 256), context=st.integers(1, 32768), sms=st.sampled_from([16, 32, 48, 64]))
@settings(derandomize=True, deadline=None)
def test_more_sms_and_less_work_never_take_longer(batch, context, sms):
    cost = CostModel(LLAMA, h200_prior())
    step_s = cost.decode_s(DecodeLoad(batch, batch * context), sms)
    assert cost.decode_s(DecodeLoad(batch, batch * context), sms + 16) <= step_s
    assert cost.decode_s(DecodeLoad(batch + 1, (batch + 1) * context), sms) >= step_s


def test_layer_chunks_add_up_to_the_whole(cost):
    whole = cost.work_s(prefill(), 132, 132)
    parts = sum(cost.work_s(prefill(first=i, last=i + 8), 132, 132) for i in range(0, 32, 8))
    assert parts == pytest.approx(whole)


def test_fused_reads_the_weights_once(cost):
    prefill_load, decode_load = PrefillLoad.of_chunk(1024, 16384), DecodeLoad(64, 64 * 4096)
    separate = cost.prefill_s(prefill_load, 132) + cost.decode_s(decode_load, 132)
    assert cost.fused_s(prefill_load, decode_load, 132, 132) < separate


def test_whole_chip_lanes_take_turns(cost):
    sim = machine(cost)
    solo = cost.work_s(prefill(), 132, 132), cost.work_s(decode(), 132, 132)
    sim.launch(prefill(), sim.partitions[0])
    sim.launch(decode(), sim.partitions[0])
    (first,) = sim.wait(None)
    assert first.finished_s == pytest.approx(solo[0])
    (second,) = sim.wait(None)
    assert second.finished_s == pytest.approx(sum(solo))


def test_lanes_on_disjoint_sms_run_at_once_and_slow_each_other(cost):
    guard = Guard()
    prefill_work, decode_work = prefill(4096), decode()
    cell = Cell.of(PrefillLoad.of(prefill_work.slices), DecodeLoad.of(decode_work), 32)
    guard.observe(Lane.DECODE, cell, 1.0, 1.5)
    guard.observe(Lane.PREFILL, cell, 1.0, 1.25)
    sim = machine(cost, guard)
    sim.launch(decode_work, SPLIT)
    sim.launch(prefill_work, SPLIT)
    (step,) = sim.wait(None)
    decode_s, prefill_s = cost.work_s(decode_work, 100, 32), cost.work_s(prefill_work, 100, 32)
    assert step.finished_s == pytest.approx(1.5 * decode_s)
    (chunk,) = sim.wait(None)  # beside the step it ran at 1 / 1.25, alone at full speed
    assert chunk.finished_s == pytest.approx(1.5 * decode_s + prefill_s - 1.5 * decode_s / 1.25)
    assert sim.busy_s[Lane.DECODE] == pytest.approx(step.finished_s)


def test_work_that_would_share_sms_waits_for_the_other_lane(cost):
    wider = Partition(prefill_sms=116, decode_sms=16)
    sim = machine(cost)
    sim.launch(decode(), SPLIT)
    sim.launch(prefill(64), wider)  # 116 + 32 SMs do not fit
    (step,) = sim.wait(None)
    assert step.finished_s == pytest.approx(cost.work_s(decode(), 100, 32))
    (chunk,) = sim.wait(None)
    assert chunk.finished_s == pytest.approx(step.finished_s + cost.work_s(prefill(64), 116, 16))


def test_a_fused_step_occupies_both_lanes(cost):
    sim = machine(cost)
    fused = FusedWork(prefill(256), decode())
    sim.launch(fused, SPLIT)
    sim.launch(decode(), SPLIT)
    (first,) = sim.wait(None)
    assert [request_id for request_id, _ in first.tokens] == ["p", *(f"d{i}" for i in range(16))]
    assert first.finished_s == pytest.approx(cost.work_s(fused, 100, 32))
    (second,) = sim.wait(None)
    assert second.finished_s > first.finished_s


def test_wait_stops_at_its_limit_and_goes_on_from_there(cost):
    sim = machine(cost)
    sim.launch(decode(), SPLIT)
    solo_s = cost.work_s(decode(), 100, 32)
    assert sim.wait(solo_s / 3) == []
    assert sim.clock.now() == pytest.approx(solo_s / 3)
    (step,) = sim.wait(None)
    assert step.finished_s == pytest.approx(solo_s)


def test_the_guard_learns_forgives_and_borrows():
    guard = Guard()
    cell = Cell.of(PrefillLoad(1024), DecodeLoad(16, 16000), 32)
    assert guard.factor(Lane.DECODE, cell).worst == guard.prior_worst
    for _ in range(300):
        guard.observe(Lane.DECODE, cell, 1.0, 1.1)
    settled = guard.factor(Lane.DECODE, cell)
    assert settled.mean == pytest.approx(1.1)
    assert 1.1 < settled.worst < guard.prior_worst
    guard.observe(Lane.DECODE, cell, 1.0, 1.6)
    assert guard.factor(Lane.DECODE, cell).worst == 1.6
    near = Cell(cell.decode_sms + 16, cell.log_batch, cell.log_context, cell.log_prefill)
    busier = Cell(cell.decode_sms, cell.log_batch + 3, cell.log_context, cell.log_prefill)
    far = Cell(cell.decode_sms + 48, cell.log_batch, cell.log_context, cell.log_prefill)
    assert guard.factor(Lane.DECODE, near).worst == 1.6
    assert guard.factor(Lane.DECODE, busier).worst == 1.6, "no neighbour, but as many SMs"
    assert guard.factor(Lane.DECODE, far).worst == guard.prior_worst
    assert guard.factor(Lane.PREFILL, cell).worst == guard.prior_worst


def simulate(seed=0, num_requests=50, policy=None):
    sim = machine(CostModel(LLAMA, h200_prior()))
    scheduler = Scheduler(
        num_blocks=4000,
        num_rows=64,
        num_layers=32,
        max_model_len=8192,
        max_prefill_tokens=2048,
        policy=policy(sim) if policy else Turns(sim.partitions[0], 2048, 32),
    )
    engine = Engine(scheduler, sim, vocab_size=LLAMA.vocab_size)
    requests = []
    for i in range(num_requests):
        params = SamplingParams(max_tokens=20 + (i * 7 + seed) % 60, ignore_eos=True)
        prompt = [(i + seed) % 1000] * (100 + (i * 131) % 3000)
        requests.append(engine.new_request(prompt, params, arrival_s=0.03 * i))
        engine.add(requests[-1])
    while engine.has_work:
        engine.step()
    return requests


def test_a_simulated_run_is_deterministic_and_plausible():
    def stamps(requests):
        return [request.token_s for request in requests]

    requests = simulate()
    assert stamps(requests) == stamps(simulate())
    assert stamps(requests) != stamps(simulate(seed=1))
    for request in requests:
        assert len(request.token_s) == request.params.max_tokens
        assert request.first_token_s - request.arrival_s > 0.004  # no prefill is faster than a read of the weights
        assert request.token_s == sorted(request.token_s)


def test_simulation_needs_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tests')\n"
        "import types; sys.modules['pytest'] = types.SimpleNamespace(fixture=lambda *a, **k: (lambda f: f),"
        " mark=types.SimpleNamespace(parametrize=lambda *a, **k: (lambda f: f)), approx=None)\n"
        "import test_sim; assert len(test_sim.simulate()) == 50; print('done')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr
