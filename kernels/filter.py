"""What a token may not be: top-k / top-p / min-p filters and bans, which set logits to -inf in place.

    threshold = max(k-th largest logit,  t_p,  best + temperature * log(min_p));   logits below it become -inf

where t_p is the smallest logit of the top-p nucleus: the largest t for which the probabilities of all logits >= t sum
to top_p or more, under softmax(logits / temperature) of what top-k left. Numbers equal to the threshold all stay.

Cost: 4 B V bytes a pass: one pass for the extremes, one for the total if top-p is on, a few for each search until its
candidates fit a short list, and one that writes -inf.
Map: ``filter_logits`` gives a row to one program, which finds the threshold by counting passes, each cutting the
bracket to a quarter; once few candidates are left they are copied together and the rest of the passes run over those.
No sort, no atomics, hence the same set every time. ``ban_tokens`` is one small program a row.

Per-request parameters live in tables indexed by ``rows``; row -1 is padding.
Tests: ``pytest tests/test_kernels_small.py -k "filter or ban"``.
"""

import torch
import triton
import triton.language as tl

from .sample import _NEG_INF


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
