"""``bench.py sweep``: paired points that survive a cut, a batch that is held, policies exchanged on one engine."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from nanodrift.bench import campaign, figures, peers, plots, sweep, tables, two_devices, versus, workloads
from nanodrift.bench.arrivals import drawn
from nanodrift.bench.load import CUT_OFF, LEAD_S, run_workload
from nanodrift.bench.policies import parse, parse_all
from nanodrift.bench.simulate import machine
from nanodrift.bench.targets import EngineTarget
from nanodrift.config import SLO, ConfigError
from nanodrift.dispatch import Mode

SMALL = ("--device", "sim", "--num-prompts", "12", "--rates", "4,8", "--policy", "mux,turns")


def run(folder, *argv, keep="--output"):
    return sweep.main([*SMALL, *argv, keep, str(folder)])


def lines_of(folder, name="points.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- what a sweep keeps ----------------------------------------------------------------------------------------------


def test_every_policy_meets_the_same_requests_at_the_same_times(tmp_path):
    assert run(tmp_path, "--seeds", "2") == 0
    lists = lines_of(tmp_path, "requests.jsonl")
    assert [(entry["policy"], entry["rate"], entry["seed"]) for entry in lists] == [
        ("mux", "4", 0), ("turns", "4", 0), ("turns", "4", 1), ("mux", "4", 1),
        ("mux", "8", 0), ("turns", "8", 0), ("turns", "8", 1), ("mux", "8", 1),
    ]  # fmt: skip
    by_cell = {}
    for entry in lists:
        by_cell.setdefault((entry["rate"], entry["seed"]), []).append((entry["start_s"], entry["input_lens"]))
    assert all(one == other for one, other in by_cell.values())
    assert len({str(pairs[0]) for pairs in by_cell.values()}) == 4
    assert all(point["simulated"] and point["issued"] == 12 for point in lines_of(tmp_path))
    assert json.loads((tmp_path / "sweep.json").read_text())["missing"] == []


def test_a_cut_sweep_goes_on_and_ends_as_if_it_had_not_been_cut(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole) == 0 and run(cut) == 0
    for name in ("points.jsonl", "requests.jsonl"):
        lines = (cut / name).read_text().splitlines(keepends=True)
        (cut / name).write_text("".join(lines[:2]))
    capsys.readouterr()
    assert run(cut) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(cut, "--slo-ttft-ms", "77", keep="--resume") == 2
    assert "slo_ttft_ms" in capsys.readouterr().err
    assert run(cut, keep="--resume") == 0
    for name in ("points.jsonl", "requests.jsonl", "sweep.json"):
        assert (cut / name).read_text() == (whole / name).read_text()


def test_a_campaign_is_several_sweeps_on_one_engine(tmp_path, capsys):
    text = "# two of a folder, one alone\n" + "".join(
        f"--policy {policy} --rates {rates} --output {tmp_path / name}\n"
        for policy, rates, name in (("mux", "4", "a"), ("mux,turns", "4,8", "a"), ("turns", "8", "b"))
    )
    (tmp_path / "c.txt").write_text(text)
    command = [str(tmp_path / "c.txt"), "--device", "sim", "--num-prompts", "12"]
    assert campaign.main(command) == 0
    assert run(tmp_path / "whole") == 0
    both = [sorted((tmp_path / name / "points.jsonl").read_text().splitlines()) for name in ("a", "whole")]
    assert both[0] == both[1] and len(lines_of(tmp_path / "b")) == 1
    assert campaign.main(command) == 0 and len(lines_of(tmp_path / "a")) == 4, "what is there is kept"
    capsys.readouterr()
    refused = {
        f"--model qwen3-8b --output {tmp_path / 'd'}": "another model",
        "--rates 2": "--output DIR",
        f"--slo-ttft-ms 77 --output {tmp_path / 'a'}": "slo_ttft_ms",
    }
    for line, message in refused.items():
        (tmp_path / "c.txt").write_text(text + line)
        assert campaign.main(command) == 2 and message in capsys.readouterr().err
    (tmp_path / "c.txt").write_text("# nothing\n")
    assert campaign.main(command) == 2 and "names no sweep" in capsys.readouterr().err


def test_the_committed_campaign_is_what_its_file_says(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    text = Path("results/h200/campaign.txt").read_text()
    common = text.splitlines()[0].split(".txt ")[1].split()
    for options in campaign.read(campaign.commands(text, common)):
        assert not sweep.Sweep(options, Console(quiet=True)).missing


def test_what_goes_on_names_the_runs_before_it(tmp_path):
    assert run(tmp_path) == 0
    about = json.loads((tmp_path / "sweep.json").read_text())
    assert about["earlier"] == []
    first = {"date": "20260101", "gpu": "one", "driver": "1", "torch": "2", "triton": "3", "git": "abc", "argv": ["a"]}
    (tmp_path / "sweep.json").write_text(json.dumps(about | first))
    for _ in range(2):
        assert run(tmp_path, keep="--resume") == 0
        assert json.loads((tmp_path / "sweep.json").read_text())["earlier"] == [first]


def test_what_time_did_not_allow_is_named(tmp_path, capsys):
    assert run(tmp_path, "--time-limit-s", "1e-9", "--workers", "1") == 0
    out = capsys.readouterr().out
    assert out.count("missing: ") == 4 and "missing: turns at 8/s, seed 0" in out
    assert len(json.loads((tmp_path / "sweep.json").read_text())["missing"]) == 4


def test_a_cell_that_fails_ends_the_sweep_and_keeps_what_was_before(tmp_path, capsys, monkeypatch):
    measure, calls = sweep.measure_cell, []

    def fail_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return measure(*arguments)

    monkeypatch.setattr(sweep, "measure_cell", fail_third)
    assert run(tmp_path, "--workers", "1") == 1
    out = capsys.readouterr().out
    assert "failed: mux at 8/s" in out and "out of memory" in out and "missing: turns at 8/s" in out
    assert len(lines_of(tmp_path)) == 2


def test_half_a_point_is_none(tmp_path, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "measure_cell", stop)
    assert run(tmp_path, "--workers", "1") == 130
    assert not (tmp_path / "points.jsonl").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["interrupted"]


def test_one_seed_prints_the_same_bytes_whatever_the_number_of_processes(capsys):
    outputs = []
    for workers in ("1", "2"):
        assert sweep.main([*SMALL, "--workers", workers]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_policy_that_sees_no_promise_runs_once_and_is_judged_by_each(tmp_path):
    assert run(tmp_path, "--slo-tbt-ms", "10,150", "--rates", "8") == 0
    points = {(point["policy"], point["slo"]["tbt_ms"]): point for point in lines_of(tmp_path)}
    tight, loose = points["turns", 10.0], points["turns", 150.0]
    assert tight["p99_tbt_ms"] == loose["p99_tbt_ms"] and tight["judged_only"]
    assert tight["slo_attainment_tbt"] < loose["slo_attainment_tbt"]
    assert points["mux", 10.0]["p99_tbt_ms"] < points["mux", 150.0]["p99_tbt_ms"]
    assert not points["mux", 10.0]["judged_only"]


@pytest.mark.parametrize("kind", ["cdf", "attainment", "scale", "pareto", "goodput"])
def test_a_figure_of_a_sweep_says_what_it_shows(tmp_path, kind):
    assert run(tmp_path / "s", "--slo-tbt-ms", "20,150", "--seeds", "2") == 0
    written = plots.draw(kind, [tmp_path / "s"], tmp_path / kind, Console(quiet=True), tbt_ms=20.0)
    assert [path.suffix for path in written] == [".csv", ".png", ".svg"]
    picture = written[2].read_text()
    assert "SIMULATED" in picture and "TBT 20 ms" in picture and "mux" in picture and "turns" in picture
    rows = list(csv.DictReader(written[0].open()))
    assert {row["label"] for row in rows} == {"mux", "turns"}
    if kind == "scale":  # looser promises are never kept less often
        shares = [float(row["slo_attainment"]) for row in rows[: len(figures.SCALES)]]
        assert shares == sorted(shares) and len(set(shares)) > 1
        point = lines_of(tmp_path / "s")[0]
        assert shares[figures.SCALES.index(1.0)] == point["slo_attainment"], "judged anew, it is what it was"


def test_seeds_are_one_point_of_a_figure_with_their_range(tmp_path):
    def drawn_rows(kind, **options):
        written = plots.draw(kind, [tmp_path / "s"], tmp_path / kind, Console(quiet=True), **options)
        return list(csv.DictReader(written[0].open()))

    assert run(tmp_path / "s", "--num-prompts", "40", "--seeds", "3") == 0
    own = {}
    for point in lines_of(tmp_path / "s"):
        own.setdefault((point["policy"], point["request_rate"]), []).append(point)
    rows = drawn_rows("attainment")
    assert [(row["label"], float(row["request_rate"])) for row in rows] == sorted(own)
    for row in rows:
        shares = [point["slo_attainment"] for point in own[row["label"], float(row["request_rate"])]]
        found = [float(row[f"slo_attainment{end}"]) for end in ("_min", "", "_max")]
        assert len(shares) == 3 and found == pytest.approx([min(shares), sum(shares) / 3, max(shares)])
    rows = drawn_rows("pareto")
    assert len(rows) == 4
    for row in rows:
        rates = [point["output_throughput"] for point in own[row["label"], float(row["request_rate"])]]
        assert float(row["output_throughput"]) == pytest.approx(sum(rates) / 3)
    rows = drawn_rows("cdf", rate="8")
    assert {(row["label"], row["seed"]) for row in rows} == {
        (name, seed) for name in ("mux", "turns") for seed in "012"
    }


def test_a_policy_against_the_others_with_paired_intervals(tmp_path, capsys):
    assert run(tmp_path, "--num-prompts", "60", "--seeds", "2") == 0
    capsys.readouterr()
    assert versus.main([str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["rate"], row["against"]) for row in rows] == [("4", "turns"), ("8", "turns")]
    points = {(p["policy"], p["rate"], p["seed"]): p["slo_attainment"] for p in lines_of(tmp_path)}
    for row in rows:
        mean = {name: sum(points[name, row["rate"], seed] for seed in (0, 1)) / 2 for name in ("mux", "turns")}
        value, low, high = row["good"]
        assert value == pytest.approx(100 * (mean["mux"] - mean["turns"])) and low <= value <= high and low > 0
    same = versus.compare(*[versus.load(tmp_path)["8", 20.0, "mux"]] * 2)
    assert same["good"] == (0, 0, 0) and same["ttft_p99"] == (1, 1, 1), "paired: what both met cancels out"
    lists = (tmp_path / "requests.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "requests.jsonl").write_text(
        "".join(one for one in lists if (json.loads(one)["policy"], json.loads(one)["seed"]) != ("turns", 1))
    )
    assert versus.main([str(tmp_path)]) == 0
    for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]:
        first = [points[name, row["rate"], 0] for name in ("mux", "turns")]
        assert row["seeds"] == [0] and row["good"][0] == pytest.approx(100 * (first[0] - first[1])), "what both met"
    assert versus.main([str(tmp_path), "--of", "chunked"]) == 2 and versus.main([str(tmp_path / "none")]) == 2


# --- loads -----------------------------------------------------------------------------------------------------------


def steady(count=6, **more):
    return workloads.named("steady8k", count, background=workloads.Background(16, 64, 200), **more)


def test_a_held_batch_keeps_its_size_until_the_last_prompt_is_done():
    engine, workload = machine("llama-3-8b").engine(parse("mux"), SLO(5000, 20)), steady()
    records = run_workload(engine, workload, 2.0, 0, burstiness=float("inf"))
    own = [record for record in records if not record.is_background]
    held = [record for record in records if record.is_background]
    assert [record.arrival_s for record in own] == pytest.approx([LEAD_S + 0.5 * (i + 1) for i in range(6)])
    assert all(len(record.token_s) == 128 and record.num_prompt_tokens == 8000 for record in own)
    end_s = max(record.end_s for record in own)
    for moment in (LEAD_S, LEAD_S + 1.7, end_s - 1e-6):
        assert sum(record.arrival_s <= moment < record.end_s + 0.05 for record in held) in (16, 17)
    assert len(held) > 32 and all(record.is_completed for record in held if record.token_s)
    assert not engine.has_work


def test_the_held_batch_has_no_part_in_ttft_and_rate():
    slo = SLO(5000, 20)
    cell = sweep.Cell("mux", "2", 0, 20.0)
    records = run_workload(machine("llama-3-8b").engine(parse("mux"), slo), steady(), 2.0, 0, slo=slo)
    point = sweep.point_of(cell, parse("mux"), 2.0, records, slo, steady())
    own = [record for record in records if not record.is_background]
    assert point["median_ttft_ms"] == pytest.approx(1e3 * sorted(record.ttft_s for record in own)[2])
    assert point["background_requests"] == len(records) - 6 and point["issued"] == len(records)
    assert not point["interrupted"] and not point["saturated"]
    assert point["own_throughput"] < 2.5


def test_what_is_not_done_in_time_is_cut_off_and_counts_as_a_miss():
    slo = SLO(60_000, 1000)
    workload = workloads.named("random", 40, input_len=4000, output_len=50)
    engine = machine("llama-3-8b", prefix_caching=False).engine(parse("turns"), slo)
    records = run_workload(engine, workload, 12.0, 0, slo=slo, drain_s=0.3)
    cut = [record for record in records if record.error == CUT_OFF]
    assert len(records) == 40 and 0 < len(cut) < 40
    assert max(record.end_s for record in records) <= drawn(40, 12.0, 0)[-1] + 1.0
    point = sweep.point_of(sweep.Cell("turns", "12", 0, None), parse("turns"), 12.0, records, slo, workload)
    assert point["slo_attainment"] == pytest.approx(1 - len(cut) / 40)
    assert point["timeouts"] == point["failed"] == len(cut) and not engine.has_work


def test_a_share_of_the_knee_is_a_rate(capsys):
    load = ("--workload", "steady8k", "--num-prompts", "8", "--decode-batch", "8", "--model", "llama-3-8b")
    assert sweep.main(["--device", "sim", "--policy", "turns", "--rates", "80%", "--knee-of", "turns", *load]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 2 < result["knee"] < 6, "an 8,000-token prompt takes about 0.2 s of the chip"
    [point] = result["points"]
    assert point["request_rate"] == pytest.approx(0.8 * result["knee"], abs=1e-3)
    assert not point["saturated"]


def test_a_promise_may_grow_with_the_prompt():
    slo = SLO(100, 50)
    workload = workloads.Workload("two", steady(2).samples)
    records = run_workload(
        machine("llama-3-8b").engine(parse("mux"), slo), workload, 1.0, 0, slo=slo, ttft_per_token_ms=0.25
    )
    assert [record.slo.ttft_ms for record in records] == [100 + 0.25 * 8000] * 2
    assert sweep.judge(records[0], 7.0).slo == SLO(2100, 7)


# --- beside other engines --------------------------------------------------------------------------------------------


def test_our_runs_of_a_peers_list_stand_beside_its_rows(tmp_path, capsys):
    trace = tmp_path / "peer_azure500.jsonl"
    trace.write_text("".join(f"[{0.1 * i}, {200 + i}, {10 + i}]\n" for i in range(20)))
    load = ("--trace", str(trace), "--rates", "x0.4", "--policy", "mux,chunked:64", "--slo-tbt-ms", "20")
    assert sweep.main(["--device", "sim", *load, "--output", str(tmp_path / "s")]) == 0
    [point, _] = lines_of(tmp_path / "s")
    assert point["request_rate"] == pytest.approx(20 / (1.9 * 0.4)) and point["issued"] == 20
    capsys.readouterr()
    assert peers.main([str(tmp_path / "s"), "--to", str(tmp_path / "online.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    at_same_scale = [line for line in lines if "azure500, 0.4" in line]
    assert [line.split("  ")[0] for line in at_same_scale] == [
        "SGLang 0.5.15 --enable-pdmux", "vLLM 0.26.0, budget 512", "vLLM 0.26.0, budget 2048",
        "nanodrift mux, TBT SLO 20 ms, SIMULATED", "nanodrift chunked:64, judged at 20 ms, SIMULATED",
    ]  # fmt: skip
    known = json.loads((peers.ROOT / "results" / "peers.json").read_text())
    online = json.loads((tmp_path / "online.json").read_text())
    text = tables.online_table(online, known)
    assert "| vLLM 0.26.0, budget 512 | azure500, 0.2 | 19.4 | 16.60 | 240 / 931 | 18.5 / 20.2 / 22.7 / 41.0 |" in text
    assert f"{point['p99_tbt_ms']:.1f}" in text and peers.main([str(tmp_path)]) == 2


def test_almost_all_tokens_in_time_are_not_all():
    row = {"trace": "peer_x.jsonl", "scale": 0.2, "offered": 1, "done": 1, "ttft_ms": [1, 2], "tbt_ms": [1, 2, 3, 4],
           "within_ms": 20.0}  # fmt: skip
    assert [peers.cells("us", row | {"within": share})[-1] for share in (0.867, 0.99973, 1)] == [
        "86.7% in 20 ms", "99.9% in 20 ms", "100.0% in 20 ms",
    ]  # fmt: skip


def test_a_campaign_row_names_the_best_of_each_kind_and_leaves_blank_what_was_not_run():
    def point(policy, good, ttft_ms, tbt_ms=20.0):
        return {"policy": policy, "rate": "6", "request_rate": 6.0, "slo": {"tbt_ms": tbt_ms}, "slo_attainment": good,
                "median_ttft_ms": ttft_ms, "p99_tbt_ms": 18.25}  # fmt: skip

    points = [point("mux", 0.95, 1200.0), point("chunked:512", 0.5, 300.0), point("chunked:256", 0.75, 400.0),
              point("mux", 0.962, 1268.0), point("mux", 1.0, 90.0, 50.0)]  # two seeds of the first  # fmt: skip
    head, _, first, second = tables.campaign_table({"workload": "peer_x.jsonl"}, points).splitlines()
    assert first.startswith(
        "| peer_x, 6/s, 20 ms, 2 seeds | 95.6% |  | 75.0% (256, 1 of 2 seeds) |  |  | 1,234 / - / 400 / - / - | 18.2 /"
    )
    assert second.startswith("| peer_x, 6/s, 50 ms | 100.0% |  |  |  |  | 90 / - / - / - / - |")
    assert head.count("|") == first.count("|") == second.count("|")


# --- policies --------------------------------------------------------------------------------------------------------


def test_policies_are_read():
    specs = parse_all("mux, mux:fused+exclusive,mux:sequential,chunked:64,chunked-auto,static:48,mux")
    assert [spec.text for spec in specs] == [
        "mux", "mux:fused+exclusive", "mux:sequential", "chunked:64", "chunked-auto", "static:48",
    ]  # fmt: skip
    assert specs[1].modes == (Mode.FUSED, Mode.EXCLUSIVE)
    assert [spec.side_by_side for spec in specs[:3]] == [True, True, False] and specs[2].modes == tuple(Mode)
    assert (specs[3].budget_tokens, specs[5].decode_sms) == (64, 48)
    assert [spec.sees_tbt for spec in specs] == [True, True, True, False, True, True]


@pytest.mark.parametrize("text", ["chunked:0", "chunked:x", "mux:all", "turns:3", "static:"])
def test_a_setting_that_there_is_not_is_refused(text):
    with pytest.raises(ValueError, match=r"understood|mux is set"):
        parse(text)


# --- two devices -----------------------------------------------------------------------------------------------------


def on_two(text, rate=8.0, count=60, output_len=40):
    workload = workloads.named("random", count, input_len=3000, output_len=output_len)
    return two_devices.run(machine(), parse(text), workload, drawn(count, rate, 0), SLO(2000, 20), 0, 60.0)


@pytest.mark.parametrize("text", ["disaggregated:50", "disaggregated-dynamic:50", "2xmux"])
def test_two_devices_answer_every_request_once_and_in_order_of_time(text):
    records = on_two(text)
    assert [record.arrival_s for record in records] == pytest.approx(drawn(60, 8.0, 0))
    assert all(len(record.token_s) == 40 and record.is_completed for record in records)
    assert all(gap > 0 for record in records for gap in record.tbt_s) and all(r.ttft_s > 0 for r in records)


def test_the_link_stands_between_the_first_token_and_the_second():
    config = machine().model_config
    kv_bytes = 3000 * config.num_kv_values_per_token * 2
    for gb_per_s in (5, 50):
        first_gaps = [record.tbt_s[0] for record in on_two(f"disaggregated:{gb_per_s}", rate=0.5, count=5)]
        step_s = on_two(f"disaggregated:{gb_per_s}", rate=0.5, count=1)[0].tbt_s[5]
        assert min(first_gaps) == pytest.approx(kv_bytes / (gb_per_s * 1e9) + step_s, rel=0.02)


def test_a_decode_device_that_helps_shortens_the_queue():
    alone, helped = (
        sorted(record.ttft_s for record in on_two(text, rate=40.0, output_len=4))
        for text in ("disaggregated:50", "disaggregated-dynamic:50")
    )
    assert helped[30] < 0.8 * alone[30]


def test_two_devices_are_simulated_and_rows_say_so(tmp_path, target):
    policies = ("--policy", "disaggregated:50,2xturns")
    assert sweep.main(["--device", "sim", *policies, "--num-prompts", "10", "--output", str(tmp_path)]) == 0
    points = lines_of(tmp_path)
    assert all(point["devices"] == 2 and point["simulated"] for point in points) and len(points) == 6
    with pytest.raises(ConfigError, match="only simulated"):
        target.engine_for(parse("2xturns"), SLO())
    with pytest.raises(ValueError, match="holds a batch"):
        two_devices.run(machine(), parse("2xmux"), steady(), drawn(6, 1.0, 0), SLO(), 0, 60.0)


# --- on a device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    target = EngineTarget({"device": "cpu", "max_model_len": 512})
    yield target
    target.close()


def test_policies_are_exchanged_on_one_executor(target):
    executor = target.loaded.engine.executor
    workload = workloads.named("random", 4, input_len=40, output_len=6)
    for text in ("turns", "chunked:32", "mux:fused+exclusive"):
        engine = target.engine_for(parse(text), SLO())
        assert engine.executor is executor and engine.stats()["prompt_tokens_total"] == 0
        records = run_workload(engine, workload, 50.0, 0)
        assert [len(record.token_s) for record in records] == [6] * 4
        assert engine.stats()["num_kv_blocks"] - engine.stats()["num_free_kv_blocks"] == 0


def test_a_policy_is_not_exchanged_under_way_nor_where_it_cannot_run(target):
    engine = target.engine_for(parse("turns"), SLO())
    with pytest.raises(ConfigError, match="--device sim"):
        target.engine_for(parse("mux"), SLO())
    from nanodrift.request import SamplingParams

    engine.add(engine.new_request([5] * 20, SamplingParams(max_tokens=2)))
    with pytest.raises(RuntimeError, match="idle"):
        target.engine_for(parse("turns"), SLO())
    while engine.has_work:
        engine.step()


def test_the_whole_command_on_the_cpu(tmp_path, capsys):
    load = "--workload random --input-len 24 --output-len 5 --num-prompts 5 --rates 30 --slo-tbt-ms 500,1000"
    command = ["--device", "cpu", "--policy", "turns,mux:fused+exclusive", *load.split(), "--output", str(tmp_path)]
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["num_points"] == 4 and not result["simulated"] and "SIMULATED" not in out
    assert [point["slo_attainment"] for point in result["points"]] == [1.0] * 4
    point = lines_of(tmp_path)[0]
    assert point["watts"] is None and point["total_output_tokens"] == 25 and point["residency"]
