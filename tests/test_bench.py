"""bench.py: the roofline by hand, the measuring loops on the embedded model, the command line, the README's tables."""

import json
import random
from dataclasses import fields
from xml.etree import ElementTree

import pytest
import torch

from nanodrift.bench import cli, first_look, machine, offline, tables
from nanodrift.bench.roofline import Ceilings, Load, decode_load, layer_weights, prefill_load
from nanodrift.config import EngineConfig, ModelConfig, RopeConfig
from nanodrift.startup import load_engine

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM", hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, vocab_size=128256, max_position=8192, norm_eps=1e-5, rope=RopeConfig(5e5),
    is_head_tied=False, has_qkv_bias=False, has_qk_norm=False, dtype="bfloat16", bos_token_id=128000,
    eos_token_ids=(128001,),
)  # fmt: skip
H200 = Ceilings(bytes_per_s=4.39e12, flops_per_s=750e12)


@pytest.fixture(scope="module")
def engine():
    loaded = load_engine(None, EngineConfig(device="cpu", max_num_seqs=8, max_prefill_tokens=128, max_model_len=512))
    yield loaded.engine
    loaded.engine.close()


# --- roofline ------------------------------------------------------------------------------------------------------


def test_weights_of_llama_8b_by_hand():
    assert layer_weights(LLAMA_8B) == 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336


@pytest.mark.parametrize("batch, floor_ms", [(1, 3.45), (16, 3.94), (64, 5.50), (128, 7.58)])
def test_decode_floors_are_those_worked_out_beside_the_peers(batch, floor_ms):
    load = decode_load(LLAMA_8B, 2, batch, mean_context=1087)
    assert load.floor_s(H200) * 1e3 == pytest.approx(floor_ms, rel=0.01)
    assert load.bound_by(H200) == "memory"


def test_prefill_floor_by_hand():
    load = prefill_load(LLAMA_8B, 2, [2048])
    products = 2 * 32 * layer_weights(LLAMA_8B) * 2048
    attention = 4 * 32 * 32 * 128 * 2048 * 2049 / 2
    assert load.num_flops == products + attention + 2 * 128256 * 4096
    assert load.bound_by(H200) == "compute"
    assert load.floor_s(H200) == load.num_flops / 750e12


def test_four_prompts_cost_less_than_one_of_their_length():
    four, one = prefill_load(LLAMA_8B, 2, [2048] * 4), prefill_load(LLAMA_8B, 2, [8192])
    assert four.num_flops < one.num_flops and four.num_bytes == one.num_bytes


def test_the_floor_is_the_longer_of_the_two():
    assert Load(10, 1).floor_s(Ceilings(5, 1)) == 2 and Load(1, 10).floor_s(Ceilings(5, 1)) == 10


# --- measuring -----------------------------------------------------------------------------------------------------


def test_throughput_counts_every_token(engine):
    done = []
    result = offline.throughput(engine, num_prompts=11, input_len=40, output_len=6, advance=done.append)
    assert (result["completed"], result["failed"], sum(done)) == (11, 0, 11)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (440, 66)
    assert result["output_throughput"] == pytest.approx(66 / result["duration"])
    assert not engine.has_work


def test_prefill_is_timed_to_the_last_first_token(engine):
    assert 0 < offline.prefill_s(engine, 3, 100, seed=1)
    assert not engine.has_work


def test_steady_decode_sees_the_whole_batch_decode(engine):
    steady = offline.steady_decode(engine, batch=4, context=100, num_steps=20, seed=1)
    assert len(steady.gaps_s) == 20 and min(steady.gaps_s) > 0
    assert 100 + 10 < steady.mean_context < 100 + 60
    assert steady.num_preemptions == 0
    assert not engine.has_work and engine.stats()["num_free_kv_blocks"] == engine.stats()["num_kv_blocks"]


def test_a_window_that_does_not_fit_is_refused_and_leaves_the_engine_idle(engine):
    with pytest.raises(ValueError, match="do not fit"):
        offline.steady_decode(engine, batch=2, context=500, num_steps=40, seed=1)
    offline.run_out(engine)
    assert not engine.has_work


def test_the_same_seed_draws_the_same_work(engine):
    drawn = []
    for _ in range(2):
        requests = offline.add_random(engine, 2, 30, 1, random.Random(7))
        drawn.append([r.prompt_token_ids for r in requests])
        offline.run_out(engine)
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_no_gpu_means_blanks_and_ceilings_are_measured():
    device = torch.device("cpu")
    about = machine.describe(device)
    assert about["torch"] == torch.__version__ and about["gpu"] is None and about["driver"] is None
    with machine.PowerLog(device) as power:
        pass
    assert power.medians() == {"sm_mhz": None, "watts": None}
    ceilings, figures = machine.measure_ceilings(device, torch.float32)
    fastest = max(figures["copy_gb_per_s"], figures["read_gb_per_s"])
    assert ceilings.bytes_per_s == pytest.approx(fastest * 1e9)
    assert ceilings.flops_per_s > 1e8


def test_power_samples_become_medians():
    power = machine.PowerLog(torch.device("cpu"))
    power.samples = [(1000.0, 100.0), (1980.0, 690.0), (1500.0, 650.0)]
    assert power.medians() == {"sm_mhz": 1500.0, "watts": 650.0}


# --- command line --------------------------------------------------------------------------------------------------


def test_every_engine_option_has_a_flag_of_its_type():
    flags = []
    for field in fields(EngineConfig):
        if field.name != "slo":
            flags += [f"--{field.name.replace('_', '-')}"]
            flags += [] if field.type.startswith("bool") else ["0.5" if field.type == "float" else "7"]
    given = vars(cli.build_parser().parse_args(["latency", *flags]))
    assert (given["max_num_seqs"], given["memory_fraction"], given["deterministic"]) == (7, 0.5, True)
    assert {f.name for f in fields(EngineConfig)} - {"slo"} <= given.keys()
    assert vars(cli.build_parser().parse_args([])) == {"mode": None}, "what is not given is left to EngineConfig"


def test_shapes():
    assert cli.parse_shape("512") == (1, 512) and cli.parse_shape("4x2048") == (4, 2048)
    for bad in ("x", "4x", "ax8", "-3", ""):
        with pytest.raises(ValueError, match="prefill shape"):
            cli.parse_shape(bad)


def test_defaults_are_cut_to_the_model_and_given_sizes_are_not():
    plan = cli.fit(cli.PLAN["cuda"], max_model_len=2048, max_num_seqs=64, given={})
    assert plan["prefill"] == ["512"] and plan["batches"] == [1, 16, 64] and plan["context"] == 1024
    plan = cli.fit({**cli.PLAN["cuda"], "context": 1500}, 2048, 64, given={"context": 1500})
    assert plan["context"] == 1500


def test_the_whole_command(capsys, tmp_path):
    path = tmp_path / "new" / "run.json"
    sizes = (
        "--num-prompts 3 --input-len 16 --output-len 4 --prefill 32 2x16 --batches 1 2 --context 32 --decode-steps 8"
    )
    rest = f"--repeats 2 --device cpu --max-model-len 256 --label smoke --metadata git=abc --output {path}"
    assert cli.main([*sizes.split(), *rest.split(), "--no-sweep"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(path.read_text())
    assert (result["completed"], result["git"], result["label"], result["model_id"]) == (3, "abc", "smoke", "embedded")
    assert [row["shape"] for row in result["prefill"]] == ["32", "2x16"]
    assert [row["batch"] for row in result["decode"]] == [1, 2]
    assert all(row["ms"] > 0 and row["roofline_ms"] > 0 for row in result["prefill"] + result["decode"])
    assert result["engine"]["max_model_len"] == 256 and result["stats"]["num_requests_running"] == 0
    assert "decode step" in err and "decode step" not in out


def test_without_a_mode_it_ends_in_a_table_a_plot_and_a_json_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(first_look, "FOLDER", tmp_path)
    small = ("--num-prompts", "8", "--rates", "4,8", "--workers", "1")
    monkeypatch.setattr(first_look, "SIMULATED", (*first_look.SIMULATED, *small))
    sizes = "--num-prompts 2 --input-len 8 --output-len 3 --prefill 16 --batches 1 --context 16 --decode-steps 4"
    for _ in range(2):  # the second replaces what the first left
        assert cli.main([*sizes.split(), "--device", "cpu", "--repeats", "1", "--max-model-len", "64"]) == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        result = json.loads(lines[-1])
        rows = [line for line in lines if line.endswith("SIMULATED")]
        assert len(rows) == len(result["sweep"]["points"]) == 10 and result["completed"] == 2
        assert len({row.split()[0] for row in rows}) == 5 and result["sweep"]["simulated"]
        assert (tmp_path / "attainment.png").exists() and str(tmp_path / "attainment.png") in err
        assert "decode step" in err and "next:" in err


def test_throughput_and_latency_of_the_simulated_machine(capsys):
    outputs = []
    for _ in range(2):
        small = "--prefill 512 --batches 1 64 --num-prompts 8 --decode-steps 16"
        assert cli.main(["--device", "sim", *small.split()]) == 0
        out, err = capsys.readouterr()
        outputs.append(out)
    result = json.loads(out)
    assert outputs[0] == outputs[1] and result["simulated"] and "SIMULATED" in err and "date" not in result
    one, many = result["decode"]
    assert 3 < one["ms"] < many["ms"] < 12 and result["completed"] == 8


def test_mistakes_end_with_a_sentence(capsys):
    assert cli.main(["throughput", "--device", "cpu", "--model", "/no/such/folder"]) == 2
    assert cli.main(["--dtype", "fp4"]) == 2
    assert cli.main(["latency", "--device", "cpu", "--prefill", "many"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["--metadata", "git"])
    out, err = capsys.readouterr()
    assert out == "" and err.count("bench.py:") == 4 and "Traceback" not in err and "expected KEY=VALUE" in err


def test_what_was_measured_before_an_error_is_kept(capsys):
    sizes = "--prefill 16 --repeats 1 --batches 1 2 --context 100 --decode-steps 200 --max-model-len 128"
    assert cli.main(["latency", "--device", "cpu", *sizes.split()]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert len(result["prefill"]) == 1 and result["decode"] == [] and "do not fit" in result["error"]
    assert "stopped early" in err and "Traceback" not in err


# --- tables --------------------------------------------------------------------------------------------------------

RUN = {
    "gpu": "NVIDIA H200", "driver": "580", "torch": "2.11", "triton": "3.6", "git": "abc", "argv": ["latency"],
    "num_prompts": 8, "input_len": 1024, "output_len": 128, "output_throughput": 1e4, "total_token_throughput": 9e4,
    "median_ttft_ms": 1234.5, "p99_tbt_ms": 12.34,
    "decode": [{"batch": b, "ms": 4.0 + b, "p99_ms": 5.0 + b, "tokens_per_s": 250.0, "roofline_ms": 3.5,
                "roofline_share": 3.5 / (4.0 + b)} for b in (1, 3)],
    "prefill": [{"shape": "4x2048", "ms": 180.0, "max_ms": 190.0, "tokens_per_s": 45511.0, "roofline_ms": 150.0,
                 "roofline_share": 0.83}],
}  # fmt: skip
PEERS = {"engines": {"Other 1.0": {"decode": [{"batch": 1, "ms": 10.0}], "prefill": [{"shape": "4x2048", "ms": 189}]}}}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "results" / "peers.json").write_text(json.dumps(PEERS))
    kinds = ["decode results/run.json results/peers.json", "prefill results/run.json", "throughput results/run.json",
             "conditions results/run.json", "figure results/run.json results/peers.json"]  # fmt: skip
    text = "# x\n" + "between\n".join(f"<!-- table: {kind} -->\nold\n<!-- /table -->\n" for kind in kinds)
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_tables_are_written_once_and_then_up_to_date(project, capsys):
    assert tables.main(check=True, root=project) == 1
    assert "run python bench.py tables" in capsys.readouterr().err
    assert tables.main(root=project) == 0
    text = (project / "README.md").read_text()
    assert "| 1 | 5.00 | 6.00 | 250 | 3.50 | 70% | 10.00 | 2.00x |" in text
    assert "| 3 | 7.00 | 8.00 | 250 | 3.50 | 50% |  |  |" in text, "no peer at this batch: blanks"
    assert "| 4x2048 | 180.00 | 190.00 | 45,511 | 150.00 | 83% |\n" in text
    assert "| 8 | 1024 / 128 | 10,000 | 90,000 | 1,234 | 12.3 |" in text
    assert "NVIDIA H200, driver 580; torch 2.11, triton 3.6; commit abc; `python bench.py latency`" in text
    assert "old" not in text and text.count("between") == 4
    assert tables.main(check=True, root=project) == 0


def test_a_changed_result_makes_the_readme_stale(project):
    tables.main(root=project)
    changed = {**RUN, "prefill": [{**RUN["prefill"][0], "ms": 99.0}]}
    (project / "results" / "run.json").write_text(json.dumps(changed))
    assert tables.main(check=True, root=project) == 1


def test_the_figure_draws_every_number(project):
    tables.main(root=project)
    svg = ElementTree.parse(project / "results" / "run.svg").getroot()
    texts = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert {"roofline", "nanodrift", "Other 1.0", "5.0", "7.0", "10.0", "180", "189"} <= set(texts)
    bars = [node for node in svg.iter() if node.tag.endswith("rect")]
    assert len(bars) == 1 + 3 + (3 + 2) + 3  # background, legend, decode (one without a peer), prefill


def test_kernel_rows_stand_whole_chip_first_then_in_a_partition(project):
    """A row without a library stays blank there; kernels/README.md is rewritten like the other."""
    rows = [{"op": op, "case": case, "sms": sms, "us": 50.0 if sms == 132 else 1234.0, "limit_share": 0.8,
             "ratio": None if op == "rope_kv_write" else 1.25}
            for op, case, part in tables.KERNEL_ROWS for sms in (132, part)]  # fmt: skip
    (project / "results" / "kernels.json").write_text(json.dumps({"num_sms": 132, "rows": rows}))
    (project / "kernels").mkdir()
    readme = project / "kernels" / "README.md"
    readme.write_text("<!-- table: kernels results/kernels.json -->\nold\n<!-- /table -->\n")
    assert tables.main(root=project) == 0
    text = readme.read_text()
    assert "| `gemm` down M=2048 | 50.0 us | 80% | 1.25 | 1,234 us, 100 SMs | 80% | 1.25 |" in text
    assert "| `rope_kv_write` T=8192 S=1 | 50.0 us | 80% |  | 1,234 us, 100 SMs | 80% |  |" in text
    assert text.count("\n") == 2 + 2 + len(tables.KERNEL_ROWS)
