"""Profiles are found by what they were measured on; traffic corrects what they get wrong; the guard's word holds."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nanodrift.bench import calibrate
from nanodrift.bench import map as sharing
from nanodrift.bench.windows import Driver
from nanodrift.config import SLO, ConfigError, ModelConfig
from nanodrift.cost import (
    ATTENTION_ROWS_PER_SM,
    CUT_ROUND,
    CUT_TOKENS,
    LONE_TILE,
    MAX_PARTS,
    PART_TOKENS,
    RECOVERY_S,
    Cell,
    CostModel,
    Curve,
    DecodeLoad,
    Guard,
    Observer,
    PrefillLoad,
    Profile,
    find_profile,
    h200_prior,
    prior_for,
    read_profile,
)
from nanodrift.dispatch import Dispatcher
from nanodrift.engine import Engine
from nanodrift.kernels import attn_prefill
from nanodrift.plan import Completion, DecodeWork, FusedWork, Lane, Partition, PrefillSlice, PrefillWork, Ticket
from nanodrift.request import SamplingParams
from nanodrift.scheduler import Scheduler
from nanodrift.sim import SimExecutor

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "nanodrift" / "configs"
LLAMA = ModelConfig.from_folder(CONFIGS / "llama-3-8b")
WHOLE = Partition(132, 132, is_shared=True)
SPLITS = tuple(Partition(132 - n, n) for n in (16, 32, 48, 64, 80))
SPLIT = SPLITS[1]
KEYS = ("batch", "context", "prompt")


def measured(**changes) -> Profile:
    """The prior, with a table for its products: 5 ms on the whole chip up to 64 tokens, 25 ms at 1,024."""
    table = ((64, Curve(((66, 100.0), (132, 200.0)))), (1024, Curve(((66, 20.0), (132, 40.0)))))
    return replace(h200_prior(), passes=table, step_overhead_s=0.0, **changes)


def slowed(profile: Profile, factor: float) -> Profile:
    """A machine that takes ``factor`` times as long for everything."""

    def slow(curve: Curve) -> Curve:
        return Curve(tuple((sms, rate / factor) for sms, rate in curve.points))

    rates = {name: slow(value) for name, value in vars(profile).items() if isinstance(value, Curve)}
    times = {name: factor * getattr(profile, name) for name in ("step_overhead_s", "fork_join_s", "host_launch_s")}
    return replace(profile, **rates, **times)


def prefill(num_tokens=1024, start=0, first=0, last=32):
    piece = PrefillSlice("p", 0, start, (0,) * num_tokens)
    return PrefillWork(1, (piece,), first, last, is_last=last == 32)


def decode(batch=16, context=1000):
    return DecodeWork(tuple(f"d{i}" for i in range(batch)), tuple(range(batch)), (context - 1,) * batch)


def completion(work, partition, started_s, busy_s):
    return Completion(Ticket(0, work, partition, started_s), started_s + busy_s, busy_s=busy_s)


# --- the model of solo time -----------------------------------------------------------------------------------------


def test_products_come_from_the_table_and_lie_on_straight_lines_between_its_cells():
    cost = CostModel(LLAMA, measured())
    assert cost.products_s(1, 132) == cost.products_s(64, 132) == pytest.approx(0.005)
    assert cost.products_s(544, 132) == pytest.approx(0.015)  # halfway to 1,024 tokens
    assert cost.products_s(2048, 132) == pytest.approx(0.050)
    assert cost.products_s(64, 99) == pytest.approx(1 / 150)  # halfway in SMs: rates are interpolated, not times
    assert cost.products_s(0, 132) == 0


def test_a_table_never_gets_faster_with_more_tokens():
    table = ((64, Curve(((132, 200.0),))), (128, Curve(((132, 210.0),))))  # noise of a measurement
    cost = CostModel(LLAMA, replace(measured(), passes=table))
    assert cost.products_s(128, 132) == cost.products_s(64, 132)


def test_prefill_takes_at_least_as_long_as_its_launches():
    cost = CostModel(LLAMA, measured(host_launch_s=0.001))
    assert cost.prefill_s(PrefillLoad.of_chunk(64, 0), 132) == pytest.approx(0.032)
    assert cost.work_s(prefill(64, first=0, last=8), 132, 132) == pytest.approx(0.008)
    fused_s = cost.fused_s(PrefillLoad.of_chunk(64, 0), DecodeLoad(), 132, 132)
    assert fused_s < 0.032, "a fused step is one graph"


def test_attention_of_prefill_counts_what_came_before_and_idle_sms():
    cost = CostModel(
        LLAMA,
        measured(
            attention_flops_per_s=Curve(((132, 1e14),)), prefix_flops_per_s=Curve(((132, 2e14),)), host_launch_s=0.0
        ),
    )

    def attention_s(n, r):
        return cost.prefill_s(PrefillLoad.of_chunk(n, r), 132) - cost.prefill_s(PrefillLoad(n), 132)

    flops = 4 * 4096 * 32
    assert attention_s(2048, 0) == pytest.approx(2048**2 / 2 * flops / 1e14)
    assert attention_s(2048, 8192) - attention_s(2048, 0) == pytest.approx(2048 * 8192 * flops / 2e14)
    full, per_pair_s = LONE_TILE * 132 * ATTENTION_ROWS_PER_SM / 32, flops / 2e14
    few_s = full * (2000 + 100) * per_pair_s  # a tile of 100 tokens walks as far as one of many
    assert attention_s(100, 2000) == pytest.approx(few_s), "528 tokens would keep 132 SMs busy"
    two = PrefillLoad.of_parts(((100, 2000), (296, 0)))
    assert cost.prefill_s(two, 132) - cost.prefill_s(PrefillLoad(396), 132) == pytest.approx(few_s)
    cut_s = full * ((8192 + 100) * 13 / 49 + PART_TOKENS) * per_pair_s  # the first of about 7 parts
    assert attention_s(100, 8192) == pytest.approx(cut_s, rel=0.05), "over long contexts tiles are cut"
    most_s = full * ((28_000 + 1) * 15 / 64 + PART_TOKENS) * per_pair_s
    tail = PrefillLoad.of_parts(((1, 28_000), (400, 0)))  # the end of a prompt beside the head of the next
    assert cost.prefill_s(tail, 132) - cost.prefill_s(PrefillLoad(401), 132) == pytest.approx(most_s, rel=1e-3)
    assert attention_s(480, 8192) == pytest.approx(full * (8192 + 480) * per_pair_s), "most of a round is left whole"


def test_the_cost_model_knows_which_tiles_the_kernel_cuts():
    assert CUT_ROUND == attn_prefill.CUT_ROUND
    assert CUT_TOKENS == attn_prefill.FEWEST_PARTS * attn_prefill.PART_BLOCKS * attn_prefill.BLOCK_SIZE
    assert MAX_PARTS == attn_prefill.MOST_PARTS


def test_decode_attention_counts_context_and_requests():
    cost = CostModel(LLAMA, measured(kv_start_tokens=100.0))
    per_token_s = 131072 / 3.4e12  # KV bytes of a token over the prior's bandwidth
    more_context = cost.decode_s(DecodeLoad(16, 20_000), 132) - cost.decode_s(DecodeLoad(16, 10_000), 132)
    more_requests = cost.decode_s(DecodeLoad(32, 10_000), 132) - cost.decode_s(DecodeLoad(16, 10_000), 132)
    assert more_context == pytest.approx(10_000 * per_token_s)
    assert more_requests == pytest.approx(1600 * per_token_s)  # the table is flat up to 64


def test_side_by_side_takes_the_slower_attention():
    cost = CostModel(LLAMA, measured(beside_share=0.2, fork_join_s=1e-5))
    load, step = PrefillLoad.of_chunk(1024, 0), DecodeLoad(64, 64 * 8192)
    bare_s = cost.fused_s(PrefillLoad(1024), DecodeLoad(64, 0), 132, 132)
    attention_s = 64 * 8192 * 131072 / 1.9e12
    other_s = cost.prefill_s(load, 100) - cost.prefill_s(PrefillLoad(1024), 100)
    assert other_s < attention_s
    assert cost.fused_s(load, step, 100, 32) == pytest.approx(bare_s + attention_s + 0.2 * other_s + 32e-5)


# --- profiles ---------------------------------------------------------------------------------------------------------


def write(folder, profile, name="some.json"):
    raw = {key: value.points if isinstance(value, Curve) else value for key, value in vars(profile).items()}
    raw["passes"] = [[num_tokens, curve.points] for num_tokens, curve in profile.passes]
    (folder / name).write_text(json.dumps(raw))
    return folder / name


SHAPE_OF_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "is_head_tied": False,
}


def test_a_profile_is_found_by_device_shape_and_dtype(tmp_path):
    profile = measured(gpu="NVIDIA H200", dtype="bfloat16", model=SHAPE_OF_LLAMA_8B)
    path = write(tmp_path, profile)
    assert read_profile(path) == profile
    llama_31 = ModelConfig.from_folder(CONFIGS / "llama-3.1-8b")  # another name and window, the same shape
    for config in (LLAMA, llama_31):
        assert find_profile("NVIDIA H200", config, "bfloat16", tmp_path) == profile
        assert find_profile("NVIDIA H200", config, "torch.bfloat16", tmp_path) == profile
    qwen = ModelConfig.from_folder(CONFIGS / "qwen3-8b")
    assert find_profile("NVIDIA H200", qwen, "bfloat16", tmp_path) is None
    assert find_profile("NVIDIA H100", LLAMA, "bfloat16", tmp_path) is None
    assert find_profile("NVIDIA H200", LLAMA, "float16", tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', '{"passes": 1}'])
def test_what_is_no_profile_is_refused_by_name(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json.*calibrate"):
        read_profile(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="absent"):
        read_profile(tmp_path / "absent.json")


def test_a_profile_with_the_cells_of_an_earlier_version_is_refused(tmp_path):
    """Read as it stands, a field would be taken for its neighbour."""
    raw = json.loads(next((ROOT / "nanodrift" / "profiles").glob("*.json")).read_text())
    raw["factors"] = [row[:5] + row[6:] for row in raw["factors"]]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"old\.json.*other cells.*calibrate"):
        read_profile(tmp_path / "old.json")


def test_the_guard_starts_from_the_profile():
    rows = [("decode", sms, batch, 7, 6, prefix, False, *seen, 90) for sms, batch, prefix, *seen in
            ((32, 5, 0, 1.2, 1.3), (32, 7, 0, 1.4, 1.6), (64, 5, 0, 1.1, 1.4), (32, 7, 3, 1.5, 1.9))]  # fmt: skip
    guard = Guard.of(measured(factors=rows))
    assert guard.factor(Lane.DECODE, Cell(32, 5, 7, 6)).worst == 1.3
    between = guard.factor(Lane.DECODE, Cell(32, 6, 7, 6))
    assert (between.mean, between.worst) == (pytest.approx(1.3), 1.6), "expect the neighbours' mean, promise the worst"
    assert guard.factor(Lane.DECODE, Cell(48, 5, 7, 6)).worst == 1.4, "nothing on 48 SMs: the worst of 32 and 64"
    assert guard.factor(Lane.DECODE, Cell(48, 5, 7, 6)).num_samples == 0, "marked as inferred"
    assert guard.factor(Lane.DECODE, Cell(32, 9, 9, 6)).worst == 1.6, "far from everything: the nearest on 32 SMs"
    assert guard.factor(Lane.DECODE, Cell(32, 1, 7, 6)).worst == 1.3, "the nearest, not the worst"
    assert guard.factor(Lane.DECODE, Cell(32, 7, 7, 6, 4)).worst == 1.9, "behind a long context"
    assert guard.factor(Lane.DECODE, Cell(128, 5, 7, 6)).worst == guard.prior_worst
    assert guard.factor(Lane.DECODE, Cell(32, 5, 7, 0)).mean == 1.0, "alone"


def test_a_prior_scales_with_the_device():
    half = CostModel(LLAMA, prior_for("half an H200", 66, 2.4e12, 494.5e12))
    whole = CostModel(LLAMA, h200_prior())
    for load in (DecodeLoad(1, 100), DecodeLoad(64, 64_000)):
        pairs = half.decode_s(load, 66), whole.decode_s(load, 132)
        assert pairs[0] - 0.8e-3 == pytest.approx(2 * (pairs[1] - 0.8e-3))
    assert half.products_s(4096, 33) == pytest.approx(2 * whole.products_s(4096, 66), rel=0.01)


# --- what traffic teaches ---------------------------------------------------------------------------------------------


def test_steps_alone_correct_the_solo_time_and_only_theirs():
    cost = CostModel(LLAMA, h200_prior())
    observer, before_s = Observer(cost, Guard()), cost.decode_s(DecodeLoad(16, 16_000), 132)
    prefill_s = cost.prefill_s(PrefillLoad(512), 132)
    for i in range(200):
        observer.observe(completion(decode(), WHOLE, i, 2 * before_s))
    assert cost.decode_s(DecodeLoad(16, 16_000), 132) == pytest.approx(2 * before_s, rel=0.03)
    assert cost.scale(DecodeWork, 32) == pytest.approx(2, rel=0.03), "where it has not run yet the same is assumed"
    assert cost.prefill_s(PrefillLoad(512), 132) == prefill_s
    assert observer.report()["decode"]["error_p50"] < 0.1


def test_a_measured_profile_is_corrected_more_slowly_than_a_prior():
    scales = []
    for profile in (h200_prior(), measured()):
        cost = CostModel(LLAMA, profile)
        for _ in range(20):
            cost.correct(DecodeWork, 132, cost.scale(DecodeWork, 132), 1.5)
        scales.append(cost.scale(DecodeWork, 132))
    assert 1 < scales[1] < scales[0] < 1.5


def test_what_ran_beside_the_other_lane_feeds_the_guard_of_both():
    cost, guard = CostModel(LLAMA, h200_prior()), Guard()
    observer = Observer(cost, guard)
    piece = prefill(2048, last=8)
    step_s, piece_s = cost.work_s(decode(), 100, 32), cost.work_s(piece, 100, 32)
    at_s = {Lane.DECODE: 0.0, Lane.PREFILL: 0.0}
    for _ in range(100):  # both lanes full: decode slowed by 1.3, prefill by 1.1
        lane = min(at_s, key=at_s.get)
        work, busy_s = (decode(), 1.3 * step_s) if lane is Lane.DECODE else (piece, 1.1 * piece_s)
        observer.observe(completion(work, SPLIT, at_s[lane], busy_s))
        at_s[lane] += busy_s
    cell = Cell.of(PrefillLoad(2048), DecodeLoad(16, 16_000), 32)
    assert guard.factor(Lane.DECODE, cell).mean == pytest.approx(1.3)
    assert guard.factor(Lane.PREFILL, cell).mean == pytest.approx(1.1)
    assert cost.scales == {}, "nothing ran alone"
    assert set(observer.report()) == {"decode beside", "prefill beside"}


def test_steps_with_a_bit_of_both_are_left_out():
    cost, guard = CostModel(LLAMA, h200_prior()), Guard()
    observer = Observer(cost, guard)
    observer.observe(completion(prefill(), SPLIT, 0.0, 0.010))
    observer.observe(completion(decode(), SPLIT, 0.005, 0.010))  # half of it beside
    observer.observe(completion(prefill(), SPLIT, 0.020, 0.010))
    assert all(cell.log_batch == 0 for lane, cell in guard.factors if lane is Lane.PREFILL)
    assert not [lane for lane, _ in guard.factors if lane is Lane.DECODE]


def test_fused_steps_have_cells_of_their_own():
    cost, guard = CostModel(LLAMA, h200_prior()), Guard()
    fused = FusedWork(prefill(256), decode())
    Observer(cost, guard).observe(completion(fused, SPLIT, 0.0, 2 * cost.work_s(fused, 100, 32)))
    cell = Cell.of(PrefillLoad(256), DecodeLoad(16, 16_000), 32, True)
    assert guard.factor(Lane.DECODE, cell).mean == pytest.approx(2)
    assert guard.factor(Lane.DECODE, cell._replace(is_fused=False)).mean == guard.prior_mean


def test_fused_steps_soon_after_a_split_have_cells_of_their_own():
    """The clock is still as lanes beside each other leave it: their slowness is not held against later steps."""
    cost, guard = CostModel(LLAMA, h200_prior()), Guard()
    observer, fused, at_s = Observer(cost, guard), FusedWork(prefill(256), decode()), 0.0
    solo_s = cost.work_s(fused, 132, 132)
    cell = Cell.of(PrefillLoad(256), DecodeLoad(16, 16_000), 132, True)
    behind = cell._replace(is_behind_split=True)
    unseen = guard.factor(Lane.DECODE, cell), guard.factor(Lane.DECODE, behind)
    assert unseen[1].worst == pytest.approx(unseen[0].worst * guard.behind_split)
    for _ in range(3):
        observer.observe(completion(prefill(last=8), SPLIT, at_s, 0.01))
        observer.observe(completion(fused, WHOLE, at_s + 0.01, 1.3 * solo_s))
        observer.observe(completion(fused, WHOLE, at_s + 0.01 + 2 * RECOVERY_S, solo_s))
        at_s += 1.0
    assert guard.factor(Lane.DECODE, behind).mean == pytest.approx(1.3, rel=0.02)
    assert guard.factor(Lane.DECODE, cell).mean == pytest.approx(1.0, rel=0.02)
    assert guard.factor(Lane.DECODE, cell).worst == pytest.approx(guard.floor, rel=0.02)


def test_work_that_nobody_timed_is_ignored():
    observer = Observer(CostModel(LLAMA, h200_prior()), Guard())
    observer.observe(completion(decode(), WHOLE, 0.0, 0.0))
    assert observer.report() == {}


def test_the_guards_word_holds_under_noise():
    """5% of noise, now and then a step that is 20% slower: at most 1% beyond the promise, which is not much beyond."""
    cost, guard, draw = CostModel(LLAMA, measured()), Guard(), random.Random(0)
    observer = Observer(cost, guard)
    solo_s = cost.work_s(decode(), 132, 132)
    for i in range(4000):
        slow = 1.2 if draw.random() < 0.002 else 1.0
        observer.observe(completion(decode(), WHOLE, i, solo_s * slow * draw.lognormvariate(0, 0.05)))
    report = observer.report()["decode"]
    assert report["violations"] <= 0.01
    assert report["guarded_over_actual"] <= 1.25
    assert report["error_p50"] <= 0.05


def test_observing_is_cheap():
    observer = Observer(CostModel(LLAMA, measured()), Guard())
    steps = [completion(decode(64), WHOLE, i, 0.005) for i in range(500)]
    started_s = time.perf_counter()
    for step in steps:
        observer.observe(step)
    assert (time.perf_counter() - started_s) / len(steps) < 200e-6  # 20 us on an idle core


class Watched(SimExecutor):
    """A simulated machine whose completions an observer sees."""

    observer: Observer

    def wait(self, until_s):
        done = super().wait(until_s)
        for one in done:
            self.observer.observe(one)
        return done


def run_traffic(machine_profile, believed_profile, num_requests=60, tbt_ms=25.0):
    """Serves requests under the dispatcher, which believes one profile, on a machine of another."""
    machine = Watched(
        CostModel(LLAMA, machine_profile), partitions=SPLITS, num_blocks=4000, num_rows=64, max_prefill_tokens=2048
    )
    cost, guard = CostModel(LLAMA, believed_profile), Guard.of(believed_profile)
    machine.observer = Observer(cost, guard)
    policy = Dispatcher(cost, guard, machine.partitions, max_prefill_tokens=2048)
    scheduler = Scheduler(
        num_blocks=4000, num_rows=64, num_layers=32, max_model_len=8192, max_prefill_tokens=2048, policy=policy
    )
    engine = Engine(scheduler, machine, vocab_size=LLAMA.vocab_size, slo=SLO(tbt_ms=tbt_ms))
    for i in range(num_requests):
        params = SamplingParams(max_tokens=40 + i * 7 % 60, ignore_eos=True)
        engine.add(engine.new_request([i] * (100 + i * 131 % 3000), params, arrival_s=0.05 * i))
    while engine.has_work:
        engine.step()
    return cost, guard, machine.observer


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_prior_that_is_wrong_by_two_converges_under_traffic(factor):
    truth = slowed(h200_prior(), factor)
    cost, guard, observer = run_traffic(truth, h200_prior(), tbt_ms=25.0 * max(1.0, factor))  # what it can keep
    right = CostModel(LLAMA, truth)
    for load in (DecodeLoad(8, 8000), DecodeLoad(24, 48_000)):
        cell = Cell.of(PrefillLoad(), load, 132)
        predicted_s = cost.decode_s(load, 132) * guard.factor(Lane.DECODE, cell).mean
        assert predicted_s == pytest.approx(right.decode_s(load, 132), rel=0.1)
    late = [abs(mean - 1) for kind in observer.seen.values() for mean, _ in list(kind)[len(kind) // 2 :]]
    assert sorted(late)[len(late) // 2] < 0.05


# --- calibration, on a machine whose figures are known --------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated():
    """(the truth, the profile that calibration makes of it, the driver): the machine is the simulator."""
    truth = CostModel(LLAMA, h200_prior())
    machine = SimExecutor(truth, partitions=SPLITS, num_blocks=13_000, num_rows=256, max_prefill_tokens=2048)
    driver = Driver(machine, vocab_size=1000)
    rows = calibrate.measure(driver, calibrate.shapes(machine.partitions), 0.5, Console(quiet=True))
    about = {"gpu": "simulated", "dtype": "bfloat16", "conditions": {"clocks": None}}
    return truth, calibrate.fit(rows, LLAMA, 132, about), driver


def test_calibrating_the_simulator_gives_back_its_own_figures(calibrated):
    truth, profile, _ = calibrated
    cost, draw, misses = CostModel(LLAMA, profile), random.Random(1), []
    for _ in range(200):
        sms, batch = draw.choice((16, 32, 48, 64, 80, 132)), draw.randrange(1, 250)
        load = DecodeLoad(batch, batch * draw.randrange(200, 8000))
        misses.append(cost.decode_s(load, sms) / truth.decode_s(load, sms) - 1)
        sms, chunk = 148 - sms, PrefillLoad.of_chunk(draw.randrange(300, 2048), draw.randrange(8000))
        misses.append(cost.prefill_s(chunk, min(sms, 132)) / truth.prefill_s(chunk, min(sms, 132)) - 1)
    misses = sorted(abs(miss) for miss in misses)
    assert misses[200] < 0.005
    assert misses[380] < 0.05
    beside = [factor for (_, cell), factor in Guard.of(profile).factors.items() if cell.is_beside]
    assert len(beside) > 40
    assert all(1.0 < factor.mean < 1.15 and factor.num_samples > 2 for factor in beside), "the truth is 1.12"


def test_a_written_profile_reads_back_as_it_was(calibrated, tmp_path):
    _, profile, _ = calibrated
    calibrate.write_profile(profile, tmp_path / "one.json")
    assert read_profile(tmp_path / "one.json") == profile
    assert find_profile("simulated", LLAMA, "bfloat16", tmp_path) == profile


def test_random_work_is_predicted_before_it_is_seen(calibrated):
    _, profile, driver = calibrated
    found = calibrate.check(driver, profile, LLAMA, num=16, window_s=0.5)
    assert found["num_windows"] == 16
    beside = found["kinds"]["decode beside"]
    assert beside["num_steps"] > 100
    assert beside["error_p95"] <= 0.08
    assert beside["violations"] <= 0.01
    assert beside["guarded_over_actual"] <= 1.20


def test_the_map_compares_all_ways_at_every_point(calibrated):
    _, profile, driver = calibrated
    ways = sharing.Ways(LLAMA, profile, driver.executor.partitions)
    rows = sharing.predict(ways)
    assert len(rows) > 500
    for row in rows:
        assert row["fused side by side"] >= row["fused in sequence"]
        looser = [r for r in rows if r["tbt_ms"] > row["tbt_ms"] and all(r[k] == row[k] for k in KEYS)]
        assert all(r["split"] >= 0.98 * row["split"] for r in looser[:1]), "a looser promise leaves prefill more SMs"
    assert sum(sharing.winners(rows).values()) - sharing.winners(rows)["side by side helps"] == len(rows)
    measured = sharing.measure(driver, ways, 0.3)
    assert {row["way"] for row in measured} == set(sharing.WAYS)
    misses = sorted(abs(row["prompt_tokens_per_s"] / row["predicted"] - 1) for row in measured)
    assert misses[len(misses) // 2] < 0.1


def test_sums_of_rates_are_shares_of_the_whole_chip():
    alone = {"shared": True, "fused": False, "sm_mhz": None, "watts": None}
    both = {"shared": False, "fused": False, "sm_mhz": 1500.0, "watts": 690.0, "decode_sms": 32}
    rows = [
        alone | {"batch": 16, "prompts": [], "context_tokens": 17_000, "steps_per_s": 200.0},
        alone | {"batch": 0, "prompts": [[2048, 0]], "prompt_tokens_per_s": 40_000.0},
        both | {"batch": 16, "prompts": [[2048, 0]], "context_tokens": 17_100, "steps_per_s": 120.0,
                "prompt_tokens_per_s": 24_000.0},
    ]  # fmt: skip
    (found,) = sharing.corun(rows)
    assert (found["decode_share"], found["prefill_share"], found["sum"]) == (0.6, 0.6, 1.2)
    assert (found["way"], found["decode_sms"], found["context"], found["watts"]) == ("split", 32, 1024, 690.0)


def test_sums_are_written_from_the_windows_of_a_calibration(tmp_path, capsys):
    windows, output = ROOT / "results" / "h200" / "calibration.json", tmp_path / "corun.json"
    assert sharing.main(["--model", "llama-3.1-8b", "--corun-of", str(windows), "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written == json.loads((windows.parent / "corun.json").read_text()), "run bench.py map --corun-of again"
    best = {key: max(r["sum"] for r in written["sums"] if (r["batch"], r["context"]) == key and r["way"] == "split")
            for key in ((16, 1024), (16, 8192), (64, 1024), (64, 8192))}  # fmt: skip
    assert all(1.0 < share < 1.5 for share in best.values()), "both lanes at once do more than in turns"
    assert "decode on  64 SMs, split" in capsys.readouterr().out


def test_the_map_needs_no_torch():
    script = (
        "import sys; sys.modules['torch'] = None\nfrom nanodrift.bench import map\nsys.exit(map.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "--model", "llama-3.1-8b"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "NVIDIA H200, calibrated" in result.stderr
