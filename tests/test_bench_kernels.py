"""The kernel bench's cases in Triton's interpreter, tiny: ours, the libraries and fp32 agree, and poison is seen.

What needs a GPU (graphs, partitions, clocks) is not run here.
"""

import json

import pytest
import torch
from rich.console import Console

from nanodrift.bench import kernel_cases, kernel_plots, kernel_tuning, kernels
from nanodrift.bench.kernel_cases import Dims, Maker
from nanodrift.kernels import gemm, gemm_skinny

TINY = Dims(hidden=256, intermediate=96, heads=4, kv_heads=2, head_dim=64, vocab=160, has_qk_norm=True)


@pytest.fixture
def maker(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernel_cases, "num_sets", lambda num_bytes: 2)
    return Maker(TINY, torch.device("cpu"), torch.float32)


CASES = {
    "few rows": lambda m: m.product("qkv", 3),
    "many rows": lambda m: m.product("down", 130),
    "head": lambda m: m.product("head", 2),
    "swiglu": lambda m: m.swiglu(5),
    "decode products": lambda m: m.decode_products(2, layers_kept=1, total_layers=2),
    "prefill": lambda m: m.prefill(2, 70),
    "prefill over cache": lambda m: m.prefill(1, 5, 66),
    "decode": lambda m: m.decode([130, 130], "2 x 130"),
    "ragged decode": lambda m: m.decode([1, 70], "ragged"),
    "rmsnorm": lambda m: m.norm(3),
    "add_rmsnorm": lambda m: m.norm(3, 2),
    "rope": lambda m: m.rope(5, 2),
    "sample": lambda m: m.sample(2),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_case_computes_what_it_says(maker, make):
    case = make(maker)
    exact = case.exact()
    for i in range(min(case.num_sets, 2)):
        result = case.ours(i, 2)
        if i == 0:
            assert kernels.compare(result, exact) < 1e-4
    if case.op != "attn_prefill":  # backends of scaled_dot_product_attention that a CPU lacks
        for name, call in case.libraries.items():
            if name.startswith(("cublas", "torch")):
                exact = case.exact()
                assert kernels.compare(call(0), exact) < 1e-4
    assert case.num_bytes > 0 and case.num_flops > 0 and case.sms


def test_poison_and_wrong_shapes_are_errors():
    exact = torch.ones(2, 3)
    assert kernels.compare(torch.full((2, 3), float("nan")), exact) != 0
    assert not kernels.compare(torch.full((2, 3), float("nan")), exact) < 1
    assert not kernels.compare(torch.ones(3, 2), exact) < 1
    assert kernels.compare(torch.ones(2, 2, 3) / 2, exact) == 0  # partials
    assert kernels.compare(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [float("nan")] * 3])) == 0


def test_every_operator_has_cases_and_sets_exceed_the_cache():
    listed = {op for op, _ in kernel_cases.cases(Maker(TINY, torch.device("cpu")))}
    assert {"gemm", "gemm_skinny", "swiglu", "attn_prefill", "attn_decode", "decode_products"} <= listed
    for size in (1e5, 3e7, 1e9):
        count = kernel_cases.num_sets(size)
        assert count == 64 or count * size >= 2 * kernel_cases.L2_BYTES


def test_rows_become_lines_a_table_and_figures(tmp_path):
    def row(sms, us):
        return {"op": "gemm", "case": "qkv M=512", "sms": sms, "us": us, "library_us": {"cublas": 40.0},
                "ratio": 40 / us, "num_bytes": 1e8, "num_flops": 2.6e10, "limit_us": 26.0, "limit_share": 26 / us,
                "tb_per_s": 2.0, "tflops": 600.0, "is_right": us != 50.0}  # fmt: skip

    rows = [row(132, 40.0), row(64, 50.0)]
    assert (
        "1.00x" in kernels.line(rows[0]) and "WRONG" not in kernels.line(rows[0]) and "WRONG" in kernels.line(rows[1])
    )
    assert kernels.table(rows).row_count == 2
    result = {
        "rows": rows,
        "gpu": "g",
        "model_id": "m",
        "torch": "t",
        "triton": "3",
        "date": "20260101-000000",
        "git": "0",
    }
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    written = kernel_plots.draw(json.loads(json.dumps(result)), tmp_path / "kernels", Console())
    assert [path.name for path in written] == ["kernels-gemm.png", "kernels-gemm.svg"]
    assert all(path.stat().st_size > 1000 for path in written)


def test_tuning_tries_every_tile_that_holds_the_rows():
    for M in (1, 64, 128):
        tiles = {option["tile"] for option in kernel_tuning.skinny_options("qkv", M)}
        assert set(gemm_skinny.TILES) & tiles == {t for t in gemm_skinny.TILES if t.block_m == max(16, M)}
        assert all(isinstance(o["tile"], gemm.Tile) or o["tile"].block_m >= M for o in kernel_tuning.swiglu_options(M))
    assert {option["splits"] for option in kernel_tuning.skinny_options("head", 1)} == {1}  # logits are whole
    assert set(gemm.TILES) <= {option["tile"] for option in kernel_tuning.gemm_options("o", 512)}
