"""From logits to the next token: bans, top-k / top-p / min-p filters, greedy choice or Gumbel-max sampling.

    token = argmax_v  logits[v] / temperature + g[v],      g[v] = -log(-log(u[v])),  u uniform in (0, 1)

which draws exactly from softmax(logits / temperature); temperature 0 means plain argmax. Ties go to the lowest index,
NaN counts as -inf. u comes from Philox-4x32-10 with key = the request's seed and counter = (v // 4, position of the
drawn token), word v % 4: the draw depends on the request and the place in its text, never on the batch or on how often
a step is recomputed, and the torch reference below draws the same tokens as the GPU.

Cost: reads 4 B V bytes once; random bits cost about 10 integer instructions per logit (one Philox call serves four).
Map: ``sample`` cuts each row into spans of vocabulary tiles, one program per (row, span), sized so that the grid is
about 8 ``num_sms``; a second tiny kernel takes the best span of each row. ``filter_logits`` gives a row to one program,
which finds the threshold by counting passes, each cutting the bracket to a quarter; once few candidates are left they
are copied together and the rest of the passes run over those. No sort, no atomics, hence the same set every time.

Per-request parameters live in tables indexed by ``rows``; row -1 is padding.
Tests: ``pytest tests/test_kernels_small.py``.
"""

import torch
import triton
import triton.language as tl

_MASK32 = 0xFFFFFFFF
_NEG_INF = float("-inf")


# ---------------------------------------------------------------------------------------------------- references


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


def filter_logits_reference(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor,
    top_p: torch.Tensor, min_p: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What ``filter_logits`` does, by sorting (same arguments)."""
    vocab_size = logits.shape[1]
    row = rows.long().clamp(min=0)
    t, k, p, m = temperature[row], top_k[row].long(), top_p[row], min_p[row]  # [B] each
    active = torch.nonzero((rows >= 0) & (t > 0) & ((k > 0) | (p < 1.0) | (m > 0))).flatten()
    if not len(active):
        return logits
    t, k, p, m = t[active], k[active], p[active], m[active]
    x = logits[active].float()  # [n, V]
    ordered = x.sort(dim=-1, descending=True).values  # [n, V]
    keep = torch.where((k > 0) & (k < vocab_size), k, vocab_size)  # top-k
    top_k_threshold = ordered.gather(1, (keep - 1)[:, None])  # [n, 1]
    scaled = torch.where(ordered >= top_k_threshold, ordered / t[:, None], _NEG_INF)
    mass_before = scaled.softmax(-1).double().cumsum(-1).roll(1, -1)  # mass of everything larger
    mass_before[:, 0] = 0.0
    is_kept = (mass_before < p.double()[:, None]) | (p >= 1.0)[:, None]  # top-p: up to and including the crossing token
    is_kept[:, 0] = True
    top_p_threshold = torch.where(is_kept, ordered, float("inf")).amin(-1, keepdim=True)
    min_p_threshold = ordered[:, :1] + (t * m.log())[:, None]  # p(v) >= min_p * p(best)
    threshold = torch.maximum(torch.maximum(top_k_threshold, top_p_threshold), min_p_threshold)
    logits[active] = torch.where(x >= threshold, logits[active], _NEG_INF)
    return logits


def ban_tokens_reference(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, banned: torch.Tensor, min_position: torch.Tensor
) -> torch.Tensor:
    """What ``ban_tokens`` does, in plain torch (same arguments)."""
    row = rows.long().clamp(min=0)
    is_banned = (rows >= 0) & (positions + 1 < min_position[row])  # [B]
    tokens = torch.where(is_banned[:, None], banned[row].long(), -1)  # [B, 16]
    batch, place = torch.nonzero((tokens >= 0) & (tokens < logits.shape[1]), as_tuple=True)
    logits[batch, tokens[batch, place]] = _NEG_INF
    return logits


# ------------------------------------------------------------------------------------------------------- sample


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


# ------------------------------------------------------------------------------------------------------- filters


@triton.jit
def _flip(bits):
    """fp32 bits <-> an int32 that orders like the number. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pick(passes1, passes2, passes3, a0, a1, a2, a3):
    """a_n for n passing thresholds, of three in rising order."""
    return tl.where(passes3, a3, tl.where(passes2, a2, tl.where(passes1, a1, a0)))


@triton.jit
def _mass_above(
    x_ptr, length, t1, t2, t3, best, scale,
    WEIGHTED: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One pass over a row or what is left of it: for three thresholds, the mass and the number of all x >= threshold.

    The mass is the sum of exp2((x - best) * scale) if WEIGHTED, else the number again. Sums run in a fixed order. A
    tile is [TILE / LANES, LANES]; its rows are added up inside each thread.
    """
    limit = tl.where(length == V, V, 1 << 30)  # a row may end within a tile; a gathered list is filled up
    offsets = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    mass1 = tl.zeros([LANES], tl.float32)
    mass2 = tl.zeros([LANES], tl.float32)
    mass3 = tl.zeros([LANES], tl.float32)
    count1 = tl.zeros([LANES], tl.int32)
    count2 = tl.zeros([LANES], tl.int32)
    count3 = tl.zeros([LANES], tl.int32)
    for start in range(0, length, TILE):
        x = tl.load(x_ptr + start + offsets, mask=start + offsets < limit, other=float("-inf"))
        count1 += tl.sum((x >= t1).to(tl.int32), axis=0)
        count2 += tl.sum((x >= t2).to(tl.int32), axis=0)
        count3 += tl.sum((x >= t3).to(tl.int32), axis=0)
        if WEIGHTED:
            weight = tl.exp2((x - best) * scale)
            mass1 += tl.sum(tl.where(x >= t1, weight, 0.0), axis=0)
            mass2 += tl.sum(tl.where(x >= t2, weight, 0.0), axis=0)
            mass3 += tl.sum(tl.where(x >= t3, weight, 0.0), axis=0)
    num1 = tl.sum(count1, axis=0)
    num2 = tl.sum(count2, axis=0)
    num3 = tl.sum(count3, axis=0)
    if WEIGHTED:
        return tl.sum(mass1, axis=0), tl.sum(mass2, axis=0), tl.sum(mass3, axis=0), num1, num2, num3
    else:
        return num1.to(tl.float32), num2.to(tl.float32), num3.to(tl.float32), num1, num2, num3


@triton.jit
def _gather_above(x_ptr, low, kept_ptr, V: tl.constexpr, TILE: tl.constexpr):
    """Copy a row's x >= low to kept_ptr in their order, fill up with -inf to whole tiles -> length of the list."""
    offsets = tl.arange(0, TILE)
    num_kept = tl.full((), 0, tl.int32)
    for start in range(0, V, TILE):
        x = tl.load(x_ptr + start + offsets, mask=start + offsets < V, other=float("-inf"))
        is_kept = (x >= low).to(tl.int32)
        place = num_kept + tl.cumsum(is_kept, axis=0) - 1
        tl.store(kept_ptr + place, x, mask=is_kept > 0)
        num_kept += tl.sum(is_kept, axis=0)
    length = (num_kept + TILE - 1) // TILE * TILE
    rest = num_kept + offsets
    tl.store(kept_ptr + rest, tl.full([TILE], float("-inf"), tl.float32), mask=rest < length)
    tl.debug_barrier()  # other threads of the program read what this one wrote
    return length


@triton.jit
def _largest_threshold(
    x_ptr, length, kept_ptr, low, best, scale, target,
    WEIGHTED: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
    VALUE_PASSES: tl.constexpr,
):  # fmt: skip
    """The largest threshold t >= low whose mass (see ``_mass_above``) is still >= target, up to an equal set.

    Invariant: low passes, high does not. Three trial thresholds cut the bracket to a quarter; early passes cut it by
    value (quick on logits as they are), later ones by the numbers' bits, which ends for sure. It stops once at most one
    number is left in between. As soon as at most CAPACITY numbers are >= low, they are gathered, and later passes run
    over that list alone. -> threshold, and the list (pointer, length) that holds everything above it.
    """
    high = _flip(_flip(best.to(tl.int32, bitcast=True)) + 1).to(tl.float32, bitcast=True)  # the next number above best
    count_low = length
    count_high = tl.full((), 0, tl.int32)
    gap = tl.full((), 2, tl.int64)
    step = tl.full((), 0, tl.int32)
    while (count_low - count_high > 1) & (gap > 1) & (step < 48):
        key = _flip(low.to(tl.int32, bitcast=True)).to(tl.int64)
        gap = _flip(high.to(tl.int32, bitcast=True)).to(tl.int64) - key
        t1 = _flip((key + gap // 4).to(tl.int32)).to(tl.float32, bitcast=True)
        t2 = _flip((key + gap // 2).to(tl.int32)).to(tl.float32, bitcast=True)
        t3 = _flip((key + gap * 3 // 4).to(tl.int32)).to(tl.float32, bitcast=True)
        if step < VALUE_PASSES:
            t1 = tl.minimum(tl.maximum(low + (high - low) * 0.25, low), high)
            t2 = tl.minimum(tl.maximum(low + (high - low) * 0.5, low), high)
            t3 = tl.minimum(tl.maximum(low + (high - low) * 0.75, low), high)
        mass1, mass2, mass3, count1, count2, count3 = _mass_above(
            x_ptr, length, t1, t2, t3, best, scale, WEIGHTED, V, TILE, LANES
        )
        passes1, passes2, passes3 = mass1 >= target, mass2 >= target, mass3 >= target
        count_low, count_high = (
            _pick(passes1, passes2, passes3, count_low, count1, count2, count3),
            _pick(passes1, passes2, passes3, count1, count2, count3, count_high),
        )
        low, high = (
            _pick(passes1, passes2, passes3, low, t1, t2, t3),  # the last that passes
            _pick(passes1, passes2, passes3, t1, t2, t3, high),  # the first that does not
        )
        if (length > CAPACITY) & (count_low <= CAPACITY):
            length = _gather_above(x_ptr, low, kept_ptr, V, TILE)
            x_ptr = kept_ptr
        step += 1
    return low, x_ptr, length


@triton.jit
def _filter_kernel(
    logits_ptr, rows_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, kept_ptr,
    V: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, VALUE_PASSES: tl.constexpr,
):  # fmt: skip
    # map program -> row
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_top_k = (top_k > 0) & (top_k < V)
    if (temperature <= 0.0) | ((top_p >= 1.0) & (min_p <= 0.0) & (top_k <= 0)):
        return
    row_ptr = logits_ptr + b * V
    offsets = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # first pass: the largest and the smallest finite logit
    largest = tl.full([LANES], float("-inf"), tl.float32)
    smallest = tl.full([LANES], float("inf"), tl.float32)
    for start in range(0, V, TILE):
        x = tl.load(row_ptr + start + offsets, mask=start + offsets < V, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(x, axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(x > float("-inf"), x, float("inf")), axis=0))
    best = tl.max(largest, axis=0)
    threshold = tl.min(smallest, axis=0)
    # narrow the threshold: top-k, then top-p on what is left, then min-p
    x_ptr = row_ptr
    length = tl.full((), V, tl.int32)
    kept_ptr += b * CAPACITY
    if has_top_k:
        threshold, x_ptr, length = _largest_threshold(
            x_ptr, length, kept_ptr, threshold, best, 0.0, top_k.to(tl.float32),
            False, V, TILE, LANES, CAPACITY, VALUE_PASSES,
        )  # fmt: skip
    if top_p < 1.0:
        scale = 1.4426950408889634 / temperature
        total, _1, _2, _3, _4, _5 = _mass_above(
            x_ptr, length, threshold, threshold, threshold, best, scale, True, V, TILE, LANES
        )
        threshold, x_ptr, length = _largest_threshold(
            x_ptr, length, kept_ptr, threshold, best, scale, top_p * total,
            True, V, TILE, LANES, CAPACITY, VALUE_PASSES,
        )  # fmt: skip
    if min_p > 0.0:
        threshold = tl.maximum(threshold, best + temperature * tl.log(min_p))
    # last pass: only what falls is written
    for start in range(0, V, TILE):
        inside = start + offsets < V
        x = tl.load(row_ptr + start + offsets, mask=inside, other=0.0)
        tl.store(
            row_ptr + start + offsets,
            tl.full([TILE // LANES, LANES], float("-inf"), tl.float32),
            mask=inside & ~(x >= threshold),
        )


def filter_logits(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor,
    top_p: torch.Tensor, min_p: torch.Tensor,
    *, num_sms: int,
) -> torch.Tensor:  # fmt: skip
    """Set logits outside top-k, then outside top-p of the renormalised rest, then under min-p, to -inf, in place.

    logits [B, V] fp32 contiguous, rows [B] int32, temperature, top_p, min_p [num_rows] fp32, top_k [num_rows] int32.
    Off: top_k 0 or >= V, top_p >= 1, min_p 0; rows with all three off, with temperature 0 or of index -1 are untouched.
    Probabilities are those of softmax(logits / temperature); the surviving logits stay unscaled, because ``sample``
    applies the temperature. Numbers equal to the threshold all stay. ``positions`` and ``num_sms`` are accepted so that
    all logit operators are called alike; the grid is one program a row.
    """
    batch, vocab_size = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32
    if batch > 0:
        capacity = 16384  # of the list that a row's search shrinks to
        kept = torch.empty((batch, capacity), dtype=torch.float32, device=logits.device)
        _filter_kernel[(batch,)](
            logits, rows, temperature, top_k, top_p, min_p, kept,
            V=vocab_size, TILE=4096, LANES=2048, CAPACITY=capacity, VALUE_PASSES=10, num_warps=16,
        )  # fmt: skip
    return logits


@triton.jit
def _ban_kernel(
    logits_ptr, rows_ptr, positions_ptr, banned_ptr, min_position_ptr, V: tl.constexpr, MAX_BANNED: tl.constexpr
):
    # map program -> row
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b)
    if row < 0:
        return
    if tl.load(positions_ptr + b) + 1 < tl.load(min_position_ptr + row):
        token = tl.load(banned_ptr + row * MAX_BANNED + tl.arange(0, MAX_BANNED))
        tl.store(logits_ptr + b * V + token, float("-inf"), mask=(token >= 0) & (token < V))


def ban_tokens(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, banned: torch.Tensor, min_position: torch.Tensor,
    *, num_sms: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Forbid tokens near the start of an answer (min_tokens): -inf at banned ids while position + 1 < min_position.

    logits [B, V] contiguous (changed in place), rows [B] and positions [B] int32, banned [num_rows, 16] int32 (-1 = no
    token), min_position [num_rows] int32. ``num_sms`` is accepted like everywhere; the grid is one small program a row.
    """
    batch, vocab_size = logits.shape
    assert logits.is_contiguous() and banned.is_contiguous()
    if batch > 0:
        _ban_kernel[(batch,)](
            logits, rows, positions, banned, min_position, V=vocab_size, MAX_BANNED=banned.shape[1], num_warps=1
        )
    return logits
