"""rmsnorm.py, rope.py, filter.py, penalties.py and sample.py: kernels in Triton's interpreter against their references,
and those against independent formulas (transformers' modules, sorting, statistics). ``-m gpu`` repeats the comparison
in bf16 at Llama-8B sizes. The interpreter's bf16 is wrong, so fp32 and fp16 stand in for it here.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from nanodrift.kernels import filter as filters
from nanodrift.kernels import penalties, rmsnorm, rope, sample

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels of the fast tests run


def randn(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def ints(values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


def close(actual, expected, tolerance):
    """Relative error by norm; the tolerance stands beside the dtype in each parametrize."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"  # a NaN fails too


# ------------------------------------------------------------------------------------------------------ rmsnorm


@pytest.mark.parametrize("num_tokens, width, num_sms", [(1, 64, 132), (7, 72, 1), (19, 130, 2), (3, 1000, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_rmsnorm(num_tokens, width, num_sms, dtype, tolerance):
    x, weight = randn(num_tokens, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    out = torch.full_like(x, float("nan"))
    assert rmsnorm.rmsnorm(x, weight, 1e-5, out=out, num_sms=num_sms) is out
    close(out, rmsnorm.rmsnorm_reference(x, weight, 1e-5), tolerance)
    wide = x.double()
    close(out, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double(), tolerance)


@pytest.mark.parametrize("num_partials, num_tokens, width", [(1, 5, 64), (2, 1, 200), (4, 9, 72), (7, 3, 512)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_add_rmsnorm(num_partials, num_tokens, width, dtype, tolerance):
    partials = randn(num_partials, num_tokens, width, dtype=dtype if num_partials == 1 else torch.float32)
    residual, weight = randn(num_tokens, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    expected_residual = residual.clone()
    expected = rmsnorm.add_rmsnorm_reference(partials, expected_residual, weight, 1e-6)
    summed = residual.double() + partials.double().sum(0)
    out = rmsnorm.add_rmsnorm(partials, residual, weight, 1e-6, num_sms=1)
    assert torch.equal(residual, expected_residual)  # one rounding of the same ordered sum: equal bits
    close(residual, summed, tolerance)
    close(out, expected, tolerance)


def test_add_rmsnorm_normalises_the_rounded_residual():
    residual, weight = randn(4, 128, dtype=torch.float16), randn(128, dtype=torch.float16, seed=1)
    out = rmsnorm.add_rmsnorm(randn(3, 4, 128, seed=2), residual, weight, 1e-5, num_sms=1)
    assert torch.equal(out, rmsnorm.rmsnorm(residual, weight, 1e-5, num_sms=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rmsnorm_reference_is_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, weight = randn(6, 96, dtype=dtype, device="cpu"), randn(96, dtype=dtype, seed=1, device="cpu")
    for module in (LlamaRMSNorm(96, eps=1e-5), Qwen3RMSNorm(96, eps=1e-5)):
        module.weight.data = weight
        assert torch.equal(rmsnorm.rmsnorm_reference(x, weight, 1e-5), module(x))


# ------------------------------------------------------------------------------------------------------ rope


def rope_inputs(heads, kv_heads, head_dim, *, partials=1, dtype=torch.float32, norm=False, device=DEVICE):
    """Seven tokens of three rows, one of them padding, among scattered blocks. -> positional, keyword arguments."""
    positions = ints([0, 63, 10**6, 64, 130, 5, 191], device)
    rows = ints([0, 1, -1, 2, 0, 2, 1], device)
    block_table = ints([[7, 1, 9, 999], [3, 8, 2, 999], [0, 5, 6, 999]], device)
    qkv = randn(partials, 7, (heads + 2 * kv_heads) * head_dim, dtype=torch.float32 if partials > 1 else dtype)
    angles = torch.arange(192)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # [192, D/2]
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    caches = [torch.full((10, kv_heads, 64, head_dim), -7.0, dtype=dtype, device=device) for _ in range(2)]
    weights = [randn(head_dim, dtype=dtype, seed=s, device=device) if norm else None for s in (3, 4)]
    keywords = {"num_heads": heads, "num_kv_heads": kv_heads, "q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6}
    return (qkv.to(device), cos_sin, positions, rows, block_table, *caches), keywords


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (7, 1, 64), (6, 6, 128), (28, 4, 64)])
@pytest.mark.parametrize("partials, norm", [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_rope_kv_write(heads, kv_heads, head_dim, partials, norm, dtype, tolerance):
    inputs, keywords = rope_inputs(heads, kv_heads, head_dim, partials=partials, dtype=dtype, norm=norm)
    results = []
    for function, extra in ((rope.rope_kv_write, {"num_sms": 1}), (rope.rope_kv_write_reference, {})):
        caches = [cache.clone() for cache in inputs[5:]]
        out = torch.full((7, heads, head_dim), -7.0, dtype=dtype, device=DEVICE)
        assert function(*inputs[:5], *caches, **keywords, out=out, **extra) is out
        results.append((out, *caches))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, tolerance)
        assert torch.equal(actual == -7.0, expected == -7.0)  # both left the same places alone
    out, k_cache, v_cache = results[0]
    assert (out[2] == -7.0).all()  # the padding token
    written = (k_cache != -7.0).all(-1).all(1)  # [N, 64]
    assert written.nonzero().tolist() == [[0, 5], [2, 63], [3, 63], [5, 0], [7, 0], [9, 2]]
    if partials == 1:  # values are copied
        v = inputs[0][0].view(7, -1, head_dim)[:, heads + kv_heads :]
        assert torch.equal(v_cache[9, :, 2], v[4]) and torch.equal(v_cache[5, :, 0], v[3])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_reference_is_transformers(family):
    """The reference against transformers' rotary functions (and Qwen3's qk-norm), values and cache places apart."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    inputs, keywords = rope_inputs(4, 2, 64, norm=family == "qwen3", device="cpu")
    qkv, cos_sin, positions, rows, block_table, k_cache, v_cache = inputs
    out = rope.rope_kv_write_reference(*inputs, **keywords)
    valid = rows >= 0
    q, k, v = qkv[0, valid].view(-1, 8, 64).split([4, 2, 2], dim=1)
    if family == "qwen3":
        norm = Qwen3RMSNorm(64, eps=1e-6)
        norm.weight.data = keywords["q_norm"]
        q = norm(q)
        norm.weight.data = keywords["k_norm"]
        k = norm(k)
    cos, sin = (torch.cat((half, half), dim=-1)[None] for half in cos_sin[positions[valid].long()].chunk(2, dim=-1))
    q, k = apply_rotary_pos_emb(q.detach().transpose(0, 1)[None], k.detach().transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(out[valid], q[0].transpose(0, 1))
    block = block_table[rows[valid].long(), positions[valid].long() // 64].long()
    torch.testing.assert_close(k_cache[block, :, positions[valid].long() % 64], k[0].transpose(0, 1))
    assert torch.equal(v_cache[block, :, positions[valid].long() % 64], v)


# ------------------------------------------------------------------------------------------------------ random bits


@triton.jit
def _philox_kernel(seed_ptr, out_ptr, position, CALLS: tl.constexpr):
    """Triton's own Philox, words of each call side by side."""
    calls = tl.arange(0, CALLS)
    zero = calls * 0
    words = tl.philox(tl.load(seed_ptr), calls, position + zero, zero, zero)
    for word in tl.static_range(4):
        tl.store(out_ptr + calls * 4 + word, words[word])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 12345, -(2**62) + 99])
def test_philox_reference_is_tritons(seed):
    seeds = torch.tensor([seed], device=DEVICE)
    words = torch.empty(256, dtype=torch.int32, device=DEVICE)
    _philox_kernel[(1,)](seeds, words, 77, CALLS=64)
    expected = sample.philox_reference(seeds.cpu(), torch.tensor([77]), 256)[0]
    assert torch.equal(words.cpu().long() & 0xFFFFFFFF, expected)
    assert len(set(expected.tolist())) == 256


def test_philox_known_answer():
    """Philox-4x32-10 of counter 0, key 0, as published with the generator (Random123's known-answer vectors)."""
    words = sample.philox_reference(torch.tensor([0]), torch.tensor([0]), 4)[0]
    assert [f"{word:08x}" for word in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_gumbel_noise_has_the_right_distribution():
    words = torch.arange(0, 2**32, 4001)  # evenly spaced: the noise's quantiles, lowest bits and all
    noise = sample.gumbel_reference(words).double()
    uniform = torch.exp(-torch.exp(-noise))  # what a Gumbel variable's own distribution function makes of it
    expected = 1.0 - (words.double() + 0.5) / 2**32
    assert (uniform - expected).abs().max() < 1e-6
    extremes = sample.gumbel_reference(torch.tensor([0, 1, 2**25, 2**32 - 1]))
    assert torch.isfinite(extremes).all()
    assert extremes[0].item() == pytest.approx(math.log(2.0**33), rel=1e-6)  # the upper tail is not cut at 2^-24


# ------------------------------------------------------------------------------------------------------ sample

NUM_ROWS = 8


def sample_state(device=DEVICE):
    """Tables for NUM_ROWS requests: temperature, seed, last_token, next_position."""
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.6, 0.0, 1e-4, 0.9, 1.0], device=device)
    seed = torch.tensor([5, -3, 2**50 + 1, 7, 0, 11, 13, 17], device=device)
    return temperature, seed, ints([-9] * NUM_ROWS, device), ints([-9] * NUM_ROWS, device)


@pytest.mark.parametrize("vocab_size, num_sms", [(17, 132), (1024, 1), (2050, 3), (5003, 132)])
def test_sample(vocab_size, num_sms):
    logits = randn(6, vocab_size) * 3
    rows, positions = ints([3, -1, 0, 6, 2, 4]), ints([10, 99, 0, 7, 4000, 12])
    temperature, seed, last_token, next_position = sample_state()
    out = sample.sample(logits, rows, positions, temperature, seed, last_token, next_position, num_sms=num_sms)
    expected_state = sample_state()
    expected = sample.sample_reference(logits, rows, positions, *expected_state)
    assert out.tolist() == expected.tolist()
    assert torch.equal(last_token, expected_state[2]) and torch.equal(next_position, expected_state[3])
    assert out[1] == 0 and out[2] == logits[2].argmax() and out[5] == logits[5].argmax()
    assert last_token.tolist() == [out[2], -9, out[4], out[0], out[5], -9, out[3], -9]
    assert next_position.tolist() == [1, -9, 4001, 11, 13, -9, 8, -9]


def test_sample_takes_the_lowest_of_equals_and_survives_nan():
    logits = torch.zeros(4, 3000, device=DEVICE)
    logits[0, [700, 1500, 2999]] = 4.0  # equal best, in different tiles
    logits[1] = float("-inf")  # nothing allowed: still a token
    logits[2, :2000] = float("nan")
    logits[3, 5] = float("inf")
    rows = ints([0, 0, 0, 0])
    for function, extra in ((sample.sample, {"num_sms": 132}), (sample.sample_reference, {})):
        assert function(logits, rows, rows, *sample_state(), **extra).tolist() == [700, 0, 2000, 5]


def test_draws_depend_on_seed_and_position_alone():
    logits = randn(1, 1500) * 2

    def draw(rows, positions):
        batch = logits.expand(len(rows), -1).contiguous()
        return sample.sample(batch, ints(rows), ints(positions), *sample_state(), num_sms=4).tolist()

    alone = draw([3], [40])[0]
    assert draw([1, 2, 3, 6, 3], [1, 2, 40, 4, 40])[2::2] == [alone, alone]  # any batch, any place in it
    assert len(set(draw([3] * 8, range(8)))) > 4  # another position, another draw
    assert len(set(draw([1, 2, 3, 6, 7], [5] * 5))) > 2  # another seed, another draw


def chi_square(counts, probabilities):
    """-> how many standard deviations the statistic lies above its mean (Wilson and Hilferty's cube root)."""
    expected = probabilities.double() * counts.sum()
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_draws_follow_the_distribution(temperature):
    """The reference draws 40,000 tokens over 12; the kernel was shown to draw the same tokens as the reference."""
    logits, num_draws = randn(1, 12, device="cpu") * 1.5, 40_000
    rows = torch.arange(num_draws, dtype=torch.int32)
    tables = torch.full((num_draws,), temperature), torch.arange(num_draws) * 7 + 3, rows.clone(), rows.clone()
    tokens = sample.sample_reference(logits.repeat(num_draws, 1), rows, rows % 50, *tables)
    counts = torch.bincount(tokens.long(), minlength=12)
    assert chi_square(counts, (logits[0] / temperature).softmax(-1)) < 3.1  # one in a thousand
    assert chi_square(counts, (logits[0] / (temperature * 1.1)).softmax(-1)) > 3.1  # the test can fail


def test_kernel_draws_follow_the_distribution():
    logits, num_draws = randn(1, 8) * 1.5, 300
    rows = torch.arange(num_draws, dtype=torch.int32, device=DEVICE)
    tables = torch.ones(num_draws, device=DEVICE), torch.arange(num_draws, device=DEVICE), rows.clone(), rows.clone()
    tokens = sample.sample(logits.repeat(num_draws, 1), rows, rows, *tables, num_sms=132)
    counts = torch.bincount(tokens.long().cpu(), minlength=8)
    assert chi_square(counts, logits[0].softmax(-1).cpu()) < 3.1


# ------------------------------------------------------------------------------------------------------ filters


def filter_tables(top_k=0, top_p=1.0, min_p=0.0, device=DEVICE):
    """The same setting for every row of the tables."""
    tables = ints([top_k] * NUM_ROWS, device), torch.tensor([top_p] * NUM_ROWS), torch.tensor([min_p] * NUM_ROWS)
    return tables[0], tables[1].to(device), tables[2].to(device)


def kept_by_definition(logits, temperature, top_k, top_p, min_p):
    """The set of surviving tokens of one row, token by token in pure Python."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])
    kept = order[: top_k or None]
    weight = {v: math.exp((logits[v] - logits[order[0]]) / temperature) for v in kept}
    total, mass, within = sum(weight.values()), 0.0, []
    for v in kept:
        if top_p < 1.0 and within and mass >= top_p * total:
            break
        within.append(v)
        mass += weight[v]
    return {v for v in within if weight[v] >= min_p}


FILTERS = [
    (5, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.1),
    (20, 0.8, 0.05),
    (1, 0.5, 0.0),
    (0, 0.01, 0.0),
    (300, 0.99, 1e-4),
]


@pytest.mark.parametrize("vocab_size", [331, 20011])
@pytest.mark.parametrize("top_k, top_p, min_p", FILTERS)
def test_filter_logits(vocab_size, top_k, top_p, min_p):
    logits = randn(5, vocab_size) * 3
    rows, temperature = ints([3, -1, 0, 1, 6]), sample_state()[0]
    tables = filter_tables(top_k, top_p, min_p)
    actual, expected = logits.clone(), logits.clone()
    assert filters.filter_logits(actual, rows, rows, temperature, *tables, num_sms=4) is actual
    filters.filter_logits_reference(expected, rows, rows, temperature, *tables)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[1:3], logits[1:3])  # padding, temperature 0
    for b in (0, 3, 4):
        kept = kept_by_definition(logits[b].tolist(), temperature[rows[b]].item(), top_k, top_p, min_p)
        assert set(torch.isfinite(actual[b]).nonzero().flatten().tolist()) == kept
        assert torch.equal(actual[b, list(kept)], logits[b, list(kept)])


def test_filter_logits_leaves_rows_without_filters_alone():
    logits = randn(4, 100)
    kept = logits.clone()
    for tables in (filter_tables(), filter_tables(top_k=100), filter_tables(top_k=5000)):
        for function, extra in ((filters.filter_logits, {"num_sms": 4}), (filters.filter_logits_reference, {})):
            assert torch.equal(function(kept, ints([1, 2, 3, 6]), None, sample_state()[0], *tables, **extra), logits)


def test_filter_logits_keeps_all_equals_of_the_threshold():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]], device=DEVICE).repeat(3, 1)
    tables = filter_tables(top_k=2)
    filters.filter_logits(logits, ints([1, 2, 3]), None, sample_state()[0], *tables, num_sms=4)
    assert torch.isfinite(logits).tolist() == [[True, False, True, True, True, False]] * 3


@pytest.mark.parametrize("scale, shift", [(1e-3, 0.0), (1e4, -5e3), (1.0, 1e5), (1e-30, 0.0)])
def test_filter_logits_on_odd_ranges(scale, shift):
    """Thresholds are found whatever the numbers' size, with banned (-inf) and repeated entries among them."""
    logits = (randn(2, 700, seed=5) * scale + shift).repeat(1, 2)
    logits[:, 3:50] = float("-inf")
    logits[1, 60:] = shift
    for tables in (filter_tables(top_k=31), filter_tables(top_p=0.7)):
        actual, expected = logits.clone(), logits.clone()
        filters.filter_logits(actual, ints([1, 2]), None, sample_state()[0], *tables, num_sms=4)
        filters.filter_logits_reference(expected, ints([1, 2]), None, sample_state()[0], *tables)
        assert torch.equal(actual, expected)


def test_ban_tokens():
    logits = randn(5, 50)
    banned = ints([[3, 49, -1, 50] + [-1] * 12, [7] + [-1] * 15])
    rows, positions, min_position = ints([0, 1, -1, 0, 1]), ints([3, 3, 0, 4, 5]), ints([5, 4])
    actual, expected = logits.clone(), logits.clone()
    filters.ban_tokens(actual, rows, positions, banned, min_position)
    filters.ban_tokens_reference(expected, rows, positions, banned, min_position)
    assert torch.equal(actual, expected)
    assert (actual != logits).nonzero().tolist() == [[0, 3], [0, 49]]  # row 0 before position 5; row 1 is past it


# ------------------------------------------------------------------------------------------------------ penalties


def penalty_tables(vocab_size, device=DEVICE):
    """settings [NUM_ROWS, 3], and counts of every kind: in the prompt or not, never said to said 32,767 times."""
    settings = [
        [1, 0, 0],
        [1.5, 0, 0],
        [0.6, 0.5, 0],
        [1, 0, 0.25],
        [1, -2, 1.5],
        [2, 1, -1],
        [1, 1, 0],
        [1.1, 0.1, 0.1],
    ]
    counts = torch.randint(4, (NUM_ROWS, vocab_size), generator=torch.Generator().manual_seed(3)).to(torch.int16)
    counts[:, ::7] |= penalties.IN_PROMPT
    counts[:, ::5] = 0
    counts[:, 3] = 2**15 - 1
    return torch.tensor(settings, dtype=torch.float32).to(device), counts.to(device)


@pytest.mark.parametrize("vocab_size", [17, 4097, 9001])
def test_penalties(vocab_size):
    logits, rows = randn(7, vocab_size) * 3, ints([3, -1, 0, 6, 2, 4, 1])
    logits[3, 5:9] = float("-inf")  # banned tokens stay banned
    tables = penalty_tables(vocab_size)
    actual, expected = logits.clone(), logits.clone()
    assert penalties.penalize(actual, rows, *tables) is actual
    penalties.penalize_reference(expected, rows, *tables)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6)
    assert torch.equal(actual[1:3], logits[1:3])  # padding, a row that asks for nothing
    assert actual[3, 5:9].tolist() == [float("-inf")] * 4


def test_penalties_by_definition():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0, 0.0]], device=DEVICE)
    settings = torch.tensor([[4.0, 0.5, 0.25]], device=DEVICE)
    in_prompt = penalties.IN_PROMPT
    counts = torch.tensor([[0, in_prompt, in_prompt, 1, in_prompt + 3, 2]], dtype=torch.int16, device=DEVICE)
    penalties.penalize(logits, ints([0]), settings, counts)
    # unseen; prompt: times 4; prompt: over 4; times 4, once; over 4, three times; twice
    assert logits[0].tolist() == [2.0, -8.0, 0.5, -8.0 - 0.75, 0.5 - 1.25, -1.0]


# ------------------------------------------------------------------------------------------------------ GPU, bf16


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, num_sms", [(1, 132), (64, 16), (4097, 132)])
def test_norms_in_bf16(num_tokens, num_sms):
    x, weight = randn(num_tokens, 4096, dtype=torch.bfloat16), randn(4096, dtype=torch.bfloat16, seed=1)
    exact = rmsnorm.rmsnorm_reference(x.float(), weight.float(), 1e-5)
    close(rmsnorm.rmsnorm(x, weight, 1e-5, num_sms=num_sms), exact, 4e-3)
    partials, residual = randn(4, num_tokens, 4096, seed=2), x.clone()
    out = rmsnorm.add_rmsnorm(partials, residual, weight, 1e-5, num_sms=num_sms)
    assert torch.equal(residual, (x.float() + (((partials[0] + partials[1]) + partials[2]) + partials[3])).bfloat16())
    close(out, rmsnorm.rmsnorm_reference(residual.float(), weight.float(), 1e-5), 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("partials, norm", [(1, False), (4, False), (4, True)])
def test_rope_in_bf16_and_beyond_two_to_the_31_elements(partials, norm):
    inputs, keywords = rope_inputs(32, 8, 128, partials=partials, dtype=torch.bfloat16, norm=norm)
    blocks = 2**31 // (8 * 64 * 128) + 10  # the last ten blocks start beyond 2^31 elements
    table = inputs[4] % 10 + blocks - 10
    caches = [torch.zeros((blocks, 8, 64, 128), dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    out = rope.rope_kv_write(*inputs[:4], table, *caches, **keywords, num_sms=132)
    expected_caches = [cache.float() for cache in inputs[5:]]
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    expected = rope.rope_kv_write_reference(inputs[0].float(), *inputs[1:4], inputs[4] % 10, *expected_caches, **wide)
    valid = inputs[3] >= 0
    close(out[valid], expected[valid], 6e-3)
    for cache, wanted in zip(caches, expected_caches, strict=True):
        tail = cache[-10:].float()
        close(tail[tail != 0], wanted[wanted != -7.0], 6e-3)


@pytest.mark.gpu
def test_sampling_at_full_vocabulary():
    logits = randn(64, 128256) * 3
    rows = torch.arange(64, dtype=torch.int32, device=DEVICE) % NUM_ROWS
    positions = torch.arange(64, dtype=torch.int32, device=DEVICE)
    expected = sample.sample_reference(logits.cpu(), rows.cpu(), positions.cpu(), *sample_state("cpu"))
    for num_sms in (8, 132):
        out = sample.sample(logits, rows, positions, *sample_state(), num_sms=num_sms)
        assert (out.cpu() != expected).sum() <= 1  # the logarithms differ in the last bit: a near-tie may flip
    for setting in ((50, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.8, 0.05)):
        actual, wanted = logits.clone(), logits.cpu()
        filters.filter_logits(actual, rows, rows, sample_state()[0], *filter_tables(*setting), num_sms=132)
        cpu_tables = filter_tables(*setting, device="cpu")
        filters.filter_logits_reference(wanted, rows.cpu(), None, sample_state("cpu")[0], *cpu_tables)
        differing = (actual.cpu() != wanted).nonzero().tolist()
        for row, token in differing:  # mass summed in another order moves a boundary, by what fp32 sums can be off
            scaled = logits[row].double().cpu() / sample_state("cpu")[0][row % NUM_ROWS].double()
            if setting[0]:
                scaled[scaled < scaled.topk(setting[0]).values[-1]] = -math.inf
            above = scaled.softmax(0)[scaled > scaled[token]].sum().item()
            assert abs(above - setting[1]) < 1e-4, (setting, row, token, above)


@pytest.mark.gpu
def test_penalties_at_full_vocabulary_and_with_tables_beyond_two_to_the_31_elements():
    logits, rows = randn(64, 128256) * 3, torch.arange(64, dtype=torch.int32, device=DEVICE) % NUM_ROWS
    settings, counts = penalty_tables(128256)
    expected = penalties.penalize_reference(logits.clone(), rows, settings, counts)
    torch.testing.assert_close(
        penalties.penalize(logits.clone(), rows, settings, counts), expected, atol=1e-5, rtol=1e-6
    )
    first = 2**31 // 128256 + 1  # its counts start beyond 2^31 elements
    many = torch.zeros((first + NUM_ROWS, 128256), dtype=torch.int16, device=DEVICE)
    many[first:] = counts
    far = torch.cat((torch.ones((first, 3), device=DEVICE), settings))
    actual = penalties.penalize(logits.clone(), rows + first, far, many)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-6)
