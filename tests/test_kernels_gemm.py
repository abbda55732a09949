"""The three matrix-product kernels against their references.

Without a GPU they run in Triton's interpreter, in fp32 and fp16 (its bf16 arithmetic is wrong), at small odd sizes.
With one (``pytest -m gpu``) they run in bf16 at the shapes of Llama-3-8B against fp32 mathematics.
"""

import pytest
import torch

from nanodrift.kernels import gemm, gemm_skinny, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (1, 7, 33, 130)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def make(*shape, dtype=torch.float16, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_matches(actual, expected):
    """Equal up to one rounding of the result's dtype and the order of fp32 sums."""
    relative, absolute = {torch.float32: (2e-5, 2e-4), torch.float16: (1e-3, 1e-3)}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("tile", gemm.TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}x{tile.block_k}")
def test_gemm_equals_reference_at_every_edge(M, tile):
    x, w = make(M, 80, seed=1), make(272, 80, seed=2)  # [M, K], [N, K]: no dimension fills its tiles
    out = poisoned(M, 272, dtype=x.dtype)
    assert gemm.gemm(x, w, out=out, num_sms=2, tile=tile) is out
    assert_matches(out, gemm.gemm_reference(x, w))


@pytest.mark.parametrize("tile", [gemm.TILES[i] for i in (0, 1, 4)], ids=["two parts stored", "a tail", "one part"])
def test_gemm_adds_bias_and_a_residual_that_is_its_output(tile):
    x, w, bias, residual = make(33, 64, seed=1), make(304, 64, seed=2), make(304, seed=3), make(33, 304, seed=4)
    expected = gemm.gemm_reference(x, w, bias=bias, residual=residual)
    assert_matches(gemm.gemm(x, w, bias=bias, residual=residual, num_sms=4, tile=tile), expected)
    out = residual.clone()
    gemm.gemm(x, w, bias=bias, residual=out, out=out, num_sms=4, tile=tile)
    assert_matches(out, expected)
    out = residual.clone()
    assert_matches(gemm.gemm_reference(x, w, bias=bias, residual=out, out=out), expected)


def test_gemm_writes_the_dtype_of_out_and_reads_strided_rows():
    wide = make(7, 128, dtype=torch.float16, seed=1)
    x, w = wide[:, 32:96], make(48, 64, seed=2)  # rows of x are 128 elements apart
    out = poisoned(7, 48, dtype=torch.float32)
    assert_matches(gemm.gemm(x, w, out=out, num_sms=3), x.float() @ w.float().T)


@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 operands are for the interpreter: a GPU would use tf32")
def test_gemm_in_fp32_is_exact_to_rounding():
    x, w = make(5, 48, dtype=torch.float32, seed=1), make(32, 48, dtype=torch.float32, seed=2)
    assert_matches(gemm.gemm(x, w, num_sms=1), x @ w.T)


@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_deterministic_rows_do_not_depend_on_company_or_sms(num_sms):
    x, w = make(130, 96, seed=1), make(160, 96, seed=2)
    alone = gemm.gemm(x[17:18], w, num_sms=7, deterministic=True)
    assert torch.equal(gemm.gemm(x, w, num_sms=num_sms, deterministic=True)[17:18], alone)
    alone = swiglu.gemm_swiglu(x[17:18], w, num_sms=7, deterministic=True)
    assert torch.equal(swiglu.gemm_swiglu(x, w, num_sms=num_sms, deterministic=True)[17:18], alone)


def test_inputs_that_tma_cannot_take_are_refused():
    x, w = make(4, 64), make(64, 64)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        gemm.gemm(x, w.T, num_sms=1)
    with pytest.raises(ValueError, match="16-byte aligned"):
        gemm.gemm(make(4, 72)[:, 1:65], w, num_sms=1)
    for function in (gemm.gemm, gemm_skinny.gemm_skinny, swiglu.gemm_swiglu):
        with pytest.raises(ValueError, match="multiples of 16"):
            function(make(4, 40), make(64, 40), num_sms=1)
    with pytest.raises(ValueError, match="out must be contiguous"):
        gemm_skinny.gemm_skinny(x, w, out=poisoned(1, 4, 64, dtype=torch.float32), num_sms=1, num_splits=2)


def test_tiles_and_splits_follow_rows_and_sms():
    large, wide, square, odd, small = gemm.TILES
    assert gemm.choose_tile(8192, 4096, 132) == large
    assert gemm.choose_tile(512, 4096, 132) == square  # 64 large tiles would leave half of the SMs idle
    assert gemm.choose_tile(512, 6144, 132) == wide  # 128 tiles: one wave
    assert gemm.choose_tile(512, 4096, 64) == large
    assert gemm.choose_tile(384, 4096, 132) == odd  # 132 tiles, one for each SM
    assert gemm.choose_tile(256, 4096, 132) == small
    assert [gemm_skinny.num_splits(1, 4096, 4096, num_sms) for num_sms in (16, 64, 132)] == [1, 2, 4]
    assert gemm_skinny.num_splits(1, 4096, 14336, 48) == 3  # 64 column tiles: 96 programs take 192 units
    assert gemm_skinny.num_splits(1, 128256, 4096, 132) == 1
    assert gemm_skinny.num_splits(1, 64, 64, 132) == 1  # nothing to split
    assert [gemm_skinny.choose(64, 128256, 4096, num_sms, (1,))[0].block_n for num_sms in (16, 64)] == [128, 128]
    assert gemm_skinny.choose(64, 6144, 4096, 132)[0].block_n == 64  # 96 units of half the width, twice
    assert [swiglu.choose_swiglu_tile(M, 14336, 132).block_m for M in (1, 17, 33, 65)] == [16, 32, 64, 128]
    assert swiglu.choose_swiglu_tile(4096, 14336, 132) == swiglu.TILES[0]
    assert swiglu.choose_swiglu_tile(512, 14336, 132) == swiglu.TILES[2]


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("splits", [1, 3])
def test_skinny_partials_are_the_sums_of_their_ranges(M, splits):
    x, w = make(M, 640, seed=1), make(80, 640, seed=2)
    out = poisoned(splits, M, 80, dtype=torch.float32)
    assert gemm_skinny.gemm_skinny(x, w, out=out, num_sms=2, num_splits=splits) is out
    assert_matches(out, gemm_skinny.gemm_skinny_reference(x, w, num_splits=splits))
    assert_matches(out.sum(0), x.float() @ w.float().T)


def test_skinny_adds_bias_once_and_allocates_what_num_splits_says():
    x, w, bias = make(3, 1040, seed=1), make(64, 1040, seed=2), make(64, seed=3)
    partials = gemm_skinny.gemm_skinny(x, w, bias=bias, num_sms=8)
    assert partials.shape == (gemm_skinny.num_splits(3, 64, 1040, 8), 3, 64)
    assert partials.dtype == torch.float32
    assert_matches(partials.sum(0), x.float() @ w.float().T + bias)
    assert_matches(gemm_skinny.gemm_skinny_reference(x, w, bias=bias).sum(0), x.float() @ w.float().T + bias)


def test_more_splits_than_blocks_leave_zeros():
    x, w = make(2, 144, seed=1), make(32, 144, seed=2)
    partials = gemm_skinny.gemm_skinny(x, w, num_sms=4, num_splits=4)
    assert_matches(partials.sum(0), x.float() @ w.float().T)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("tile", [None, swiglu.TILES[0]], ids=["chosen by M", "persistent"])
def test_swiglu_equals_reference(M, tile):
    x, w = make(M, 112, seed=1), make(2 * 144, 112, seed=2, scale=0.2)
    out = poisoned(M, 144, dtype=x.dtype)
    assert swiglu.gemm_swiglu(x, w, out=out, num_sms=2, tile=tile) is out
    gate, up = x.float() @ w[:144].float().T, x.float() @ w[144:].float().T
    assert_matches(out, torch.nn.functional.silu(gate) * up)
    assert_matches(swiglu.gemm_swiglu_reference(x, w), torch.nn.functional.silu(gate) * up)


LLAMA = [(6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096)]  # N, K of Llama-3-8B's layer


def relative_error(actual, exact):
    return ((actual.float() - exact).norm() / exact.norm()).item()


@gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 17, 64, 128, 200, 512, 2047])
@pytest.mark.parametrize(("N", "K"), [*LLAMA, (128256, 4096)])
def test_products_are_as_exact_as_torch_on_the_gpu(M, N, K):
    x, w = make(M, K, dtype=torch.bfloat16, seed=M), make(N, K, dtype=torch.bfloat16, seed=N, scale=K**-0.5)
    exact = x.float() @ w.float().T
    limit = 1.5 * relative_error(x @ w.T, exact)
    assert relative_error(gemm.gemm(x, w, num_sms=132), exact) <= limit
    assert relative_error(gemm.gemm(x, w, num_sms=60, deterministic=True), exact) <= limit
    residual = make(M, N, dtype=torch.bfloat16, seed=3)
    out = gemm.gemm(x, w, bias=residual[0].contiguous(), residual=residual, num_sms=100)
    exact_sum = exact + residual.float() + residual[:1].float()
    assert relative_error(out, exact_sum) <= 1.5 * relative_error(exact_sum.bfloat16(), exact_sum)
    if M <= 256:
        assert relative_error(gemm_skinny.gemm_skinny(x, w, num_sms=132).sum(0), exact) <= limit
        assert relative_error(gemm_skinny.gemm_skinny(x, w, num_sms=16, num_splits=1)[0], exact) <= limit


@gpu
@needs_gpu
@pytest.mark.parametrize("M", [1, 17, 64, 128, 200, 512, 2047])
def test_swiglu_is_as_exact_as_torch_on_the_gpu(M):
    x, w = make(M, 4096, dtype=torch.bfloat16, seed=M), make(28672, 4096, dtype=torch.bfloat16, seed=1, scale=1 / 64)
    gate, up = (x.float() @ w.float().T).chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    torch_gate, torch_up = (x @ w.T).chunk(2, dim=1)
    limit = 1.5 * relative_error(torch.nn.functional.silu(torch_gate) * torch_up, exact)
    for deterministic in (False, True):
        assert relative_error(swiglu.gemm_swiglu(x, w, num_sms=132, deterministic=deterministic), exact) <= limit


@gpu
@needs_gpu
def test_deterministic_bits_at_full_size_on_the_gpu():
    x, w = make(600, 4096, dtype=torch.bfloat16, seed=1), make(28672, 4096, dtype=torch.bfloat16, seed=2, scale=1 / 64)
    for function in (gemm.gemm, swiglu.gemm_swiglu):
        whole = function(x, w, num_sms=132, deterministic=True)
        for first, last, num_sms in ((0, 1, 132), (37, 101, 16), (300, 600, 64)):
            assert torch.equal(function(x[first:last], w, num_sms=num_sms, deterministic=True), whole[first:last])
