"""From logits to the next token: greedy choice or Gumbel-max sampling.

    token = argmax_v  logits[v] / temperature + g[v],      g[v] = -log(-log(u[v])),  u uniform in (0, 1)

which draws exactly from softmax(logits / temperature); temperature 0 means plain argmax. Ties go to the lowest index,
NaN counts as -inf. u comes from Philox-4x32-10 with key = the request's seed and counter = (v // 4, position of the
drawn token), word v % 4: the draw depends on the request and the place in its text, never on the batch or on how often
a step is recomputed, and the torch reference below draws the same tokens as the GPU.

Cost: reads 4 B V bytes once; random bits cost about 10 integer instructions per logit (one Philox call serves four).
Map: each row is cut into spans of vocabulary tiles, one program per (row, span), sized so that the grid is about 8
``num_sms``; a second tiny kernel takes the best span of each row.

What a token may not be is decided before, in filter.py. Per-request parameters live in tables indexed by ``rows``; row
-1 is padding. Tests: ``pytest tests/test_kernels_small.py -k "sample or draw"``.
"""

import torch
import triton
import triton.language as tl

_MASK32 = 0xFFFFFFFF
_NEG_INF = float("-inf")


def philox_reference(seed: torch.Tensor, position: torch.Tensor, num_words: int) -> torch.Tensor:
    """Philox-4x32-10, the first words of each row: seed [B], position [B] int64 -> [B, num_words] int64 below 2^32."""
    num_calls = -(-num_words // 4)
    c0 = torch.arange(num_calls, device=seed.device).expand(len(seed), num_calls)  # [B, calls]
    c1 = (position.long() & _MASK32)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = (seed & _MASK32)[:, None], ((seed >> 32) & _MASK32)[:, None]  # [B, 1]
    for _ in range(10):
        # int64 products wrap, but their 64 bits are the right ones: low word by mask, high word by shift and mask
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _MASK32) ^ c1 ^ k0, b & _MASK32
        c2, c3 = ((a >> 32) & _MASK32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :num_words]


def gumbel_reference(words: torch.Tensor) -> torch.Tensor:
    """32 random bits -> standard Gumbel noise, fp32. Large noise comes from tiny -log(u), which is kept accurate."""
    v = (words.float() + 0.5) * 2.0**-32  # 1 - u, so that resolution is finest near u = 1; never 0
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))  # -log(1 - v) for small v
    exponential = torch.where(v < 0.0078125, series, -torch.log((1.0 - v).clamp(min=2.0**-26)))
    return -torch.log(exponential)


def sample_reference(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor,
    last_token: torch.Tensor, next_position: torch.Tensor,
    *, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What ``sample`` does, in plain torch (same arguments)."""
    valid = rows >= 0  # [B]
    row = rows.long().clamp(min=0)
    scores = logits.float()
    scores = torch.where(scores.isnan(), _NEG_INF, scores)  # [B, V]
    drawn = torch.nonzero(valid & (temperature[row] > 0)).flatten()
    if len(drawn):
        words = philox_reference(seed[row[drawn]], positions[drawn].long() + 1, scores.shape[1])  # [n, V]
        scores[drawn] = scores[drawn] * (1.0 / temperature[row[drawn]])[:, None] + gumbel_reference(words)
    token = torch.where(valid, scores.argmax(-1), 0).int()  # argmax takes the first of equals
    last_token[row[valid]] = token[valid]
    next_position[row[valid]] = positions[valid].to(next_position.dtype) + 1
    return token if out is None else out.copy_(token)


@triton.jit
def _uniform(seed, position, quads, BLOCK_V: tl.constexpr):
    """Uniform numbers of vocabulary entries 4 * quads .. 4 * quads + 3: [BLOCK_V / 4] -> [BLOCK_V], in that order."""
    zero = quads * 0
    w0, w1, w2, w3 = tl.philox(seed, quads, position + zero, zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_V])
    return (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _gumbel(v):
    """As in ``gumbel_reference``."""
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    return -tl.log(tl.where(v < 0.0078125, series, -tl.log(tl.maximum(1.0 - v, 1.4901161193847656e-08))))


@triton.jit(do_not_specialize=["num_spans", "tiles_per_span"])
def _sample_spans_kernel(
    logits_ptr, rows_ptr, positions_ptr, temperature_ptr, seed_ptr, span_score_ptr, span_token_ptr,
    num_spans, tiles_per_span,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # map program -> row, span of tiles
    b = tl.program_id(0)
    span = tl.program_id(1)
    row = tl.load(rows_ptr + b)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    position = tl.load(positions_ptr + b) + 1
    seed = tl.load(seed_ptr + row)
    inverse = tl.math.div_rn(1.0, tl.where(temperature > 0.0, temperature, 1.0))
    lanes = tl.arange(0, BLOCK_V)
    quads = tl.arange(0, BLOCK_V // 4)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK_V], tl.int32)
    to_beat = tl.full((), float("-inf"), tl.float32)  # the best of all lanes
    for tile in range(span * tiles_per_span, (span + 1) * tiles_per_span):
        # load
        tokens = tile * BLOCK_V + lanes
        score = tl.load(logits_ptr + b * V + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
        score = tl.where(score == score, score, float("-inf"))
        # compute: each lane keeps its own best; a strict > keeps the lowest index of equals
        if temperature > 0.0:
            score = score * inverse
            v = _uniform(seed, position, tile * (BLOCK_V // 4) + quads, BLOCK_V)
            # noise < -log(v) <= ln 2 * (127 - exponent bits of v), and 0.7 > ln 2 leaves room for rounding: many tiles
            # are out before any logarithm is taken
            most_noise = 0.7 * (127 - (v.to(tl.int32, bitcast=True) >> 23)).to(tl.float32)
            if tl.max(score + most_noise, axis=0) > to_beat:
                score += _gumbel(v)
                best_token = tl.where(score > best, tokens, best_token)
                best = tl.maximum(score, best)
                to_beat = tl.max(best, axis=0)
        else:
            best_token = tl.where(score > best, tokens, best_token)
            best = tl.maximum(score, best)
    # store the span's winner
    score = tl.max(best, axis=0)
    token = tl.min(tl.where(best == score, best_token, V), axis=0)
    tl.store(span_score_ptr + b * num_spans + span, score)
    tl.store(span_token_ptr + b * num_spans + span, token)


@triton.jit(do_not_specialize=["num_spans"])
def _sample_rows_kernel(
    span_score_ptr, span_token_ptr, rows_ptr, positions_ptr, last_token_ptr, next_position_ptr, out_ptr,
    num_spans,
    MAX_SPANS: tl.constexpr,
):  # fmt: skip
    # map program -> row
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b)
    if row < 0:
        tl.store(out_ptr + b, 0)
        return
    # load, compute
    spans = tl.arange(0, MAX_SPANS)
    score = tl.load(span_score_ptr + b * num_spans + spans, mask=spans < num_spans, other=float("-inf"))
    token = tl.load(span_token_ptr + b * num_spans + spans, mask=spans < num_spans, other=2147483647)
    best = tl.min(tl.where(score == tl.max(score, axis=0), token, 2147483647), axis=0)
    # store: the next step reads its input from the row
    tl.store(out_ptr + b, best)
    tl.store(last_token_ptr + row, best)
    tl.store(next_position_ptr + row, tl.load(positions_ptr + b) + 1)


def sample(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor,
    last_token: torch.Tensor, next_position: torch.Tensor,
    *, out: torch.Tensor | None = None, num_sms: int,
) -> torch.Tensor:  # fmt: skip
    """Choose one token per row of the batch.

    logits [B, V] fp32 contiguous, rows [B] and positions [B] int32 (position of the token that produced the logits),
    temperature [num_rows] fp32, seed [num_rows] int64, last_token and next_position [num_rows] int32 (written at rows)
    -> out [B] int32. Rows of temperature 0 take the argmax. Where rows[b] is -1, out[b] is 0 and nothing else happens.
    """
    batch, vocab_size = logits.shape
    out = torch.empty(batch, dtype=torch.int32, device=logits.device) if out is None else out
    assert logits.is_contiguous()
    if batch > 0:
        block, max_spans = 1024, 256
        num_tiles = triton.cdiv(vocab_size, block)
        tiles_per_span = triton.cdiv(num_tiles, min(max(num_sms * 8 // batch, 1), max_spans))
        num_spans = triton.cdiv(num_tiles, tiles_per_span)
        span_score = torch.empty((batch, num_spans), dtype=torch.float32, device=logits.device)
        span_token = torch.empty((batch, num_spans), dtype=torch.int32, device=logits.device)
        _sample_spans_kernel[(batch, num_spans)](
            logits, rows, positions, temperature, seed, span_score, span_token,
            num_spans, tiles_per_span,
            V=vocab_size, BLOCK_V=block, num_warps=4,
        )  # fmt: skip
        _sample_rows_kernel[(batch,)](
            span_score, span_token, rows, positions, last_token, next_position, out,
            num_spans,
            MAX_SPANS=max_spans, num_warps=1,
        )  # fmt: skip
    return out
