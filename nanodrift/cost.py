"""How long a piece of work takes on so many SMs, alone and beside the other lane.

The paper's contention-tolerant estimator (arXiv 2504.14489, section 3.3): solo time from a model of the work, times a
factor learned per coarse cell for what the other lane costs. Solo time is the time of the weight products, which
prefill, decode and fused steps share since weights are read once whoever asks, plus attention, which they do not:

    products(M, n)  = max(weight bytes / bandwidth(n), 2 parameters M / rate(n))        M tokens on n SMs
    prefill attn    = (sum n_i^2 / 2 + sum n_i r_i) * 4 H D L / attention rate(n)       n_i new tokens after r_i
    decode attn     = sum context_i * KV bytes per token / KV bandwidth(n)
    side by side    = the slower of two attentions on their own SMs, times contention, plus fork and join

A profile holds the machine's figures: measured by calibration, or the prior below until then. Pure arithmetic: imports
no torch and reads no clock. Used by the dispatcher to choose and by the simulator to pass time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanodrift.config import ModelConfig
from nanodrift.plan import DecodeWork, FusedWork, Lane, PrefillSlice, PrefillWork, Work


@dataclass(frozen=True)
class Curve:
    """A quantity over SM counts: straight lines between points, proportional below the first, flat above the last."""

    points: tuple[tuple[int, float], ...]

    def at(self, num_sms: int) -> float:
        sms = [point[0] for point in self.points]
        right = bisect_right(sms, num_sms)
        if right == 0:
            return self.points[0][1] * num_sms / sms[0]
        if right == len(sms):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * (num_sms - x0) / (x1 - x0)


@dataclass(frozen=True)
class Profile:
    """One machine's figures, sustained (clocks as they settle under load)."""

    name: str
    num_sms: int
    weight_bytes_per_s: Curve  # of a product at few tokens
    kv_bytes_per_s: Curve  # of decode attention
    flops_per_s: Curve  # of a product at many tokens
    attention_flops_per_s: Curve  # of prefill attention, causal half counted
    step_overhead_s: float  # kernels of a pass that the formulas do not count
    fork_join_s: float  # of one layer whose two attentions run side by side
    host_launch_s: float  # of a prefill piece, a layer
    is_measured: bool = False


def h200_prior() -> Profile:
    """An H200 before calibration: the curves of DESIGN section 1 and of this engine's first bench (results/h200)."""
    tera = 1e12
    return Profile(
        name="H200 prior",
        num_sms=132,
        weight_bytes_per_s=Curve(((16, 1.95 * tera), (32, 3.0 * tera), (64, 3.95 * tera), (132, 4.15 * tera))),
        kv_bytes_per_s=Curve(((16, 1.0 * tera), (32, 1.9 * tera), (64, 3.0 * tera), (132, 3.4 * tera))),
        flops_per_s=Curve(((64, 365 * tera), (96, 520 * tera), (132, 670 * tera))),
        attention_flops_per_s=Curve(((132, 420 * tera),)),
        step_overhead_s=0.8e-3,
        fork_join_s=2.0e-6,
        host_launch_s=0.2e-3,
    )


@dataclass(frozen=True)
class PrefillLoad:
    """What of a token chunk decides its time."""

    num_tokens: int = 0
    num_pairs: float = 0.0  # query-key pairs: sum of n^2 / 2 + n r
    num_sampled: int = 0

    @classmethod
    def of(cls, slices: Iterable[PrefillSlice]) -> PrefillLoad:
        num_tokens = num_sampled = 0
        num_pairs = 0.0
        for piece in slices:
            n = len(piece.token_ids)
            num_tokens += n
            num_pairs += n * n / 2 + n * piece.start
            num_sampled += piece.params is not None
        return cls(num_tokens, num_pairs, num_sampled)

    @classmethod
    def of_chunk(cls, num_tokens: int, start: int) -> PrefillLoad:
        return cls(num_tokens, num_tokens * num_tokens / 2 + num_tokens * start)


@dataclass(frozen=True)
class DecodeLoad:
    """What of a decode step decides its time."""

    batch: int = 0
    context_tokens: int = 0  # summed over the batch

    @classmethod
    def of(cls, work: DecodeWork) -> DecodeLoad:
        return cls(len(work.rows), sum(work.positions) + len(work.positions))


class CostModel:
    """Predicted seconds of one model's work on one machine."""

    def __init__(self, config: ModelConfig, profile: Profile, itemsize: int = 2):
        self.profile, self.num_layers = profile, config.num_layers
        self._head_parameters = config.vocab_size * config.hidden_size
        vocabularies = 1 if config.is_head_tied else 2
        self._layer_parameters = config.num_parameters - vocabularies * self._head_parameters
        self._itemsize = itemsize
        self._kv_bytes_per_token = config.num_kv_values_per_token * itemsize
        self._flops_per_pair = 4 * config.num_heads * config.head_dim * config.num_layers

    def products_s(self, num_tokens: int, num_sms: int) -> float:
        """All weight products of all layers on ``num_tokens`` tokens."""
        return self._product_s(self._layer_parameters, num_tokens, num_sms)

    def prefill_s(self, load: PrefillLoad, num_sms: int) -> float:
        """A token chunk through all layers, and the head for the prompts that end in it."""
        attention_s = load.num_pairs * self._flops_per_pair / self.profile.attention_flops_per_s.at(num_sms)
        return self._pass_s(load.num_tokens, load.num_sampled, num_sms) + attention_s

    def decode_s(self, load: DecodeLoad, num_sms: int) -> float:
        return self._pass_s(load.batch, load.batch, num_sms) + self._decode_attention_s(load, num_sms)

    def fused_s(self, prefill: PrefillLoad, decode: DecodeLoad, prefill_sms: int, decode_sms: int) -> float:
        """One pass for both on the whole chip; the attentions side by side if their SMs fit beside each other."""
        whole = self.profile.num_sms
        rest_s = self._pass_s(prefill.num_tokens + decode.batch, prefill.num_sampled + decode.batch, whole)
        flops = prefill.num_pairs * self._flops_per_pair
        if prefill_sms + decode_sms > whole:
            attention_s = flops / self.profile.attention_flops_per_s.at(whole) + self._decode_attention_s(decode, whole)
        else:
            side_s = flops / self.profile.attention_flops_per_s.at(prefill_sms)
            attention_s = max(side_s, self._decode_attention_s(decode, decode_sms))
            attention_s += self.profile.fork_join_s * self.num_layers
        return rest_s + attention_s

    def work_s(self, work: Work, prefill_sms: int, decode_sms: int) -> float:
        """Solo seconds of a launched piece of work."""
        if isinstance(work, PrefillWork):
            load = PrefillLoad.of(work.slices)
            share = (work.last_layer - work.first_layer) / self.num_layers
            head_s = self._product_s(self._head_parameters, load.num_sampled, prefill_sms) if work.is_last else 0.0
            return self.prefill_s(PrefillLoad(load.num_tokens, load.num_pairs), prefill_sms) * share + head_s
        if isinstance(work, FusedWork):
            prefill, decode = PrefillLoad.of(work.prefill.slices), DecodeLoad.of(work.decode)
            return self.fused_s(prefill, decode, prefill_sms, decode_sms)
        return self.decode_s(DecodeLoad.of(work), decode_sms)

    def _pass_s(self, num_tokens: int, num_sampled: int, num_sms: int) -> float:
        head_s = self._product_s(self._head_parameters, num_sampled, num_sms)
        return self.products_s(num_tokens, num_sms) + head_s + self.profile.step_overhead_s

    def _product_s(self, num_parameters: int, num_tokens: int, num_sms: int) -> float:
        if num_tokens == 0:
            return 0.0
        bytes_s = num_parameters * self._itemsize / self.profile.weight_bytes_per_s.at(num_sms)
        return max(bytes_s, 2 * num_parameters * num_tokens / self.profile.flops_per_s.at(num_sms))

    def _decode_attention_s(self, load: DecodeLoad, num_sms: int) -> float:
        return load.context_tokens * self._kv_bytes_per_token / self.profile.kv_bytes_per_s.at(num_sms)


@dataclass(frozen=True)
class Cell:
    """A coarse region of co-run states that shares its contention factors."""

    decode_sms: int
    log_batch: int  # powers of two
    log_context: int  # powers of four, of the batch's context in tokens
    log_prefill: int  # powers of four, of the chunk's tokens

    @classmethod
    def of(cls, prefill: PrefillLoad, decode: DecodeLoad, decode_sms: int) -> Cell:
        return cls(
            decode_sms,
            max(decode.batch, 1).bit_length(),
            max(decode.context_tokens, 1).bit_length() // 2,
            max(prefill.num_tokens, 1).bit_length() // 2,
        )


@dataclass
class Factor:
    """Actual over solo-predicted time of one lane in one cell: its mean, to choose by, and its worst, to promise by."""

    mean: float
    worst: float
    num_samples: int = 0


@dataclass
class Guard:
    """Contention factors by lane and cell, corrected by every co-run step that is seen.

    A cell never seen takes the worst seen neighbour, or the prior. ``worst`` follows a slower step at once and forgives
    slowly, never below the mean times ``floor``.
    """

    prior_mean: float = 1.12
    prior_worst: float = 1.25
    decay: float = 0.02
    floor: float = 1.03
    factors: dict[tuple[Lane, Cell], Factor] = field(default_factory=dict)

    def factor(self, lane: Lane, cell: Cell) -> Factor:
        known = self.factors.get((lane, cell))
        if known is not None:
            return known
        near = [f for (of_lane, other), f in self.factors.items() if of_lane is lane and _is_neighbour(other, cell)]
        if near:
            return Factor(max(f.mean for f in near), max(f.worst for f in near))
        return Factor(self.prior_mean, self.prior_worst)

    def observe(self, lane: Lane, cell: Cell, solo_s: float, actual_s: float) -> None:
        """Takes in one co-run step: what was predicted for it alone, and what it took."""
        ratio = actual_s / solo_s
        known = self.factors.get((lane, cell))
        if known is None:
            self.factors[(lane, cell)] = Factor(ratio, max(ratio * self.floor, self.factor(lane, cell).worst), 1)
            return
        known.num_samples += 1
        weight = max(self.decay, 1 / known.num_samples)
        known.mean += weight * (ratio - known.mean)
        known.worst = max(ratio, known.worst - self.decay * (known.worst - known.mean), known.mean * self.floor)


def _is_neighbour(a: Cell, b: Cell) -> bool:
    return (
        abs(a.decode_sms - b.decode_sms) <= 16
        and abs(a.log_batch - b.log_batch) <= 1
        and abs(a.log_context - b.log_context) <= 1
        and abs(a.log_prefill - b.log_prefill) <= 1
    )
