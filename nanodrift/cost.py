"""How long a piece of work takes on so many SMs, alone and beside the other lane.

The paper's contention-tolerant estimator (arXiv 2504.14489, section 3.3): solo time from a model of the work, times a
factor learned per coarse cell for what the other lane costs. Solo time is the time of the weight products, which
prefill, decode and fused steps share since weights are read once whoever asks, plus attention, which they do not:

    products(M, n)  = a table of measured passes over (M tokens, n SMs), straight lines between; before calibration
                      max(weight bytes / bandwidth(n), 2 parameters M / rate(n))
    prefill attn    = sum n_i^2 / 2 * 4 H D L / causal rate(n) + sum n_i r_i * 4 H D L / prefix rate(n)
                      n_i new tokens after r_i; too few to fill the SMs take as long as if they did
    decode attn     = (sum context_i + start * batch) * KV bytes per token / KV bandwidth(n)
    side by side    = the slower of two attentions on their own SMs, a share of the faster, fork and join

A ``Profile`` holds one machine's figures: measured by ``bench.py calibrate`` and found in profiles/ by GPU and model
shape, or a prior scaled from what is known of the device. Traffic keeps correcting both: ``Observer`` looks at every
completion, learns ``CostModel.scales`` from steps that ran alone or fused, and the ``Guard`` from these and from those
that ran beside the other lane for most of their time, each kind in cells of its own.

Pure arithmetic: imports no torch and reads no clock. The dispatcher chooses by it, the simulator passes time by it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nanodrift.config import ConfigError, ModelConfig
from nanodrift.metrics import percentile
from nanodrift.plan import (
    Completion,
    DecodeWork,
    FusedWork,
    Lane,
    PrefillSlice,
    PrefillWork,
    Work,
    padded_rows,
    padded_tokens,
)

PROFILES = Path(__file__).parent / "profiles"
SHAPE = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
         "is_head_tied")  # what of a model decides its times  # fmt: skip
ANY_SMS = 0  # as an SM count: learned from all of them, for one where nothing ran yet
ALONE_SHARE, BESIDE_SHARE = 0.1, 0.75  # of a step's time beside the other lane: at most, at least
# Prefill attention, as kernels/attn_prefill.py goes about it.
ATTENTION_ROWS_PER_SM = 128  # query rows, all heads counted, at work at a time
LONE_TILE = 0.95  # of a tile's time, where SMs are filled in part
TILE_TOKENS = 16  # tokens of a tile, for most models; a slice's last tile may hold fewer
CUT_ROUND, CUT_TOKENS = 0.7, 3072  # tiles of at most so many rounds, over at least so long contexts, are all cut
MAX_PARTS, PART_TOKENS = 8, 512  # of a tile; of context, what a part takes beyond its work
RECOVERY_S = 0.03  # until the clock is back up after a split


@dataclass(frozen=True)
class Curve:
    """A quantity over SM counts or tokens: straight lines between points, in proportion below, flat beyond them."""

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
    """One machine's figures, sustained (clocks as they settle under load). JSON keeps curves as lists of points."""

    name: str
    num_sms: int
    weight_bytes_per_s: Curve  # of a product at few tokens
    kv_bytes_per_s: Curve  # of decode attention
    flops_per_s: Curve  # of a product at many tokens
    attention_flops_per_s: Curve  # of prefill attention among new tokens, the causal half counted
    prefix_flops_per_s: Curve  # of prefill attention over what came before
    step_overhead_s: float  # kernels of a pass that the formulas do not count
    fork_join_s: float  # of one layer whose two attentions run side by side
    host_launch_s: float  # of a prefill piece, for each of its layers
    kv_start_tokens: float = 0.0  # what starting on a request costs decode attention, in tokens of context
    beside_share: float = 0.5  # of the faster of two attentions: what the slower one loses to it
    fused_overhead_s: float = 0.0  # of a fused step: what it takes to start one attention more
    settled_clock: Curve = Curve(((1, 1.0),))  # over the highest, where passes of so many prompt tokens never end
    passes: tuple[tuple[int, Curve], ...] = ()  # (tokens, passes through all layers' products per second)
    factors: tuple[tuple, ...] = ()  # of the guard: lane, the fields of Cell, mean, worst, samples
    gpu: str = ""  # the rest: what this was measured on, and how
    dtype: str = ""
    model: dict = field(default_factory=dict)  # shape
    conditions: dict = field(default_factory=dict)  # versions, clocks, watts

    @property
    def is_measured(self) -> bool:
        return bool(self.passes)

    def fits(self, device_name: str, config: ModelConfig, dtype: object) -> bool:
        """Whether it was measured on such a device with weights of this shape, whatever the model is called."""
        shape = {key: getattr(config, key) for key in SHAPE}
        return (self.gpu, self.model, self.dtype) == (device_name, shape, str(dtype).removeprefix("torch."))


def read_profile(path: str | Path) -> Profile:
    """Raises ConfigError if the file cannot be read or is no profile."""

    def curve(points: list) -> Curve:
        return Curve(tuple((int(x), float(y)) for x, y in points))

    try:
        raw = json.loads(Path(path).read_text())
        values = {
            key: curve(value) if key.endswith(("_per_s", "_clock")) else value for key, value in dict(raw).items()
        }
        values["passes"] = tuple((num_tokens, curve(points)) for num_tokens, points in raw["passes"])
        if any(len(row) != len(Cell._fields) + 4 for row in raw["factors"]):  # lane, cell, mean, worst, samples
            raise ValueError("its factors belong to other cells")
        return Profile(**values | {"factors": tuple(map(tuple, raw["factors"]))})
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is no cost profile of this version ({error}): bench.py calibrate makes one"
        ) from None


def find_profile(device_name: str, config: ModelConfig, dtype: object, folder: Path = PROFILES) -> Profile | None:
    """The shipped profile of this device, shape and dtype (a torch dtype or its name), or None."""
    profiles = map(read_profile, sorted(folder.glob("*.json")))
    return next((profile for profile in profiles if profile.fits(device_name, config, dtype)), None)


def h200_prior() -> Profile:
    """An H200 before calibration: the curves of this engine's first benches (results/h200)."""
    return prior_for("H200 prior", 132, 4.8e12, 989e12)


def prior_for(device_name: str, num_sms: int, bandwidth_bytes_per_s: float, flops_per_s: float) -> Profile:
    """A device nobody has calibrated: an H200's shares of its peaks, at the same shares of the SMs.

    The arguments are peaks as a datasheet has them: 4.8e12 and 989e12 (dense, 16 bit) for an H200 of 132 SMs.
    """
    whole, byte, flop = num_sms / 132, bandwidth_bytes_per_s / 4.8, flops_per_s / 989

    def curve(unit: float, *points: tuple[int, float]) -> Curve:
        return Curve(tuple((max(1, round(sms * whole)), value * unit) for sms, value in points))

    return Profile(
        name=device_name,
        num_sms=num_sms,
        weight_bytes_per_s=curve(byte, (16, 1.95), (32, 3.0), (64, 3.95), (132, 4.15)),
        kv_bytes_per_s=curve(byte, (16, 1.0), (32, 1.9), (64, 3.0), (132, 3.4)),
        flops_per_s=curve(flop, (64, 365), (96, 520), (132, 670)),
        attention_flops_per_s=curve(flop, (132, 420)),
        prefix_flops_per_s=curve(flop, (132, 480)),
        step_overhead_s=0.8e-3,
        fork_join_s=2.0e-6,
        host_launch_s=0.2e-3,
    )


class PrefillLoad(NamedTuple):
    """What of a token chunk decides its time."""

    num_tokens: int = 0
    num_pairs: float = 0.0  # query-key pairs: sum of n^2 / 2 + n r
    num_sampled: int = 0
    num_prefix_pairs: float = 0.0  # of the pairs, those with what came before: sum of n r, n in whole tiles
    longest: int = 0  # context that a query sees

    @classmethod
    def of(cls, slices: Iterable[PrefillSlice]) -> PrefillLoad:
        slices = tuple(slices)
        num_sampled = sum(piece.params is not None for piece in slices)
        return cls.of_parts(((len(piece.token_ids), piece.start) for piece in slices), num_sampled)

    @classmethod
    def of_parts(cls, parts: Iterable[tuple[int, int]], num_sampled: int = 0) -> PrefillLoad:
        """``parts``: (new tokens, tokens before them) of each prompt."""
        num_tokens = longest = 0
        num_causal = num_prefix = 0.0
        for n, start in parts:
            num_tokens += n
            num_causal += n * n / 2
            num_prefix += -(-n // TILE_TOKENS) * TILE_TOKENS * start
            longest = max(longest, n + start)
        return cls(num_tokens, num_causal + num_prefix, num_sampled, num_prefix, longest)

    @classmethod
    def of_chunk(cls, num_tokens: int, start: int) -> PrefillLoad:
        return cls.of_parts(((num_tokens, start),))


class DecodeLoad(NamedTuple):
    """What of a decode step decides its time."""

    batch: int = 0
    context_tokens: int = 0  # summed over the batch

    @classmethod
    def of(cls, work: DecodeWork) -> DecodeLoad:
        return cls(len(work.rows), sum(work.positions) + len(work.positions))

    def joined_by(self, lengths: list[int]) -> DecodeLoad:
        """The batch with requests of so many tokens more."""
        return DecodeLoad(self.batch + len(lengths), self.context_tokens + sum(lengths))


@dataclass(frozen=True)
class _Site:
    """A profile's figures at one SM count, for one model: what is left is to multiply and add."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]  # of all layers' products on so many tokens: flat below the first, proportional above
    causal_s: float  # of prefill attention, a query-key pair
    prefix_s: float
    full_tokens: float  # new tokens that prefill attention needs to have work for all these SMs
    kv_s: float  # of decode attention, a token of context


class CostModel:
    """Predicted seconds of one model's work on one machine."""

    def __init__(self, config: ModelConfig, profile: Profile, itemsize: int = 2):
        self.config, self.profile, self.num_layers = config, profile, config.num_layers
        self.scales: dict[tuple[type, int], float] = {}  # actual over predicted: by kind of work and SM count
        self._num_corrections: dict[tuple[type, int], int] = {}
        head_parameters = config.vocab_size * config.hidden_size
        vocabularies = 1 if config.is_head_tied else 2
        self._layer_parameters = config.num_parameters - vocabularies * head_parameters
        self._head_share = head_parameters / self._layer_parameters
        self._itemsize = itemsize
        self._sites: dict[int, _Site] = {}
        self._passes: dict[tuple[int, int, int], float] = {}  # what _pass_s has said: few sizes come again and again

    def products_s(self, num_tokens: int, num_sms: int) -> float:
        """All weight products of all layers on ``num_tokens`` tokens."""
        if num_tokens == 0:
            return 0.0
        site = self._at(num_sms)
        right = bisect_right(site.tokens, num_tokens)
        if right == 0:
            return site.seconds[0]
        if right == len(site.tokens):
            return site.seconds[-1] * num_tokens / site.tokens[-1]
        x0, x1, y0, y1 = *site.tokens[right - 1 : right + 1], *site.seconds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)

    def prefill_s(self, load: PrefillLoad, num_sms: int) -> float:
        """A token chunk through all layers, and the head for the prompts that end in it."""
        device_s = self._pass_s(padded_tokens(load.num_tokens), load.num_sampled, num_sms)
        device_s += self._prefill_attention_s(load, padded_tokens(load.num_tokens), num_sms)
        return self.scale(PrefillWork, num_sms) * max(device_s, self.profile.host_launch_s * self.num_layers)

    def decode_s(self, load: DecodeLoad, num_sms: int) -> float:
        rows = padded_rows(load.batch)
        step_s = self._pass_s(rows, rows, num_sms) + self._decode_attention_s(load, num_sms)
        return self.scale(DecodeWork, num_sms) * step_s

    def fused_s(self, prefill: PrefillLoad, decode: DecodeLoad, prefill_sms: int, decode_sms: int) -> float:
        """One pass for both on the whole chip; the attentions side by side if their SMs fit beside each other."""
        whole = self.profile.num_sms
        num_tokens = padded_tokens(prefill.num_tokens + decode.batch, is_fused=True)
        rest_s = self._pass_s(num_tokens, prefill.num_sampled + decode.batch, whole) + self.profile.fused_overhead_s
        prefill_s = self._prefill_attention_s(prefill, num_tokens, prefill_sms)
        attentions = prefill_s, self._decode_attention_s(decode, decode_sms)
        if prefill_sms + decode_sms > whole:
            attention_s = sum(attentions)
        else:
            attention_s = max(attentions) + self.profile.beside_share * min(attentions)
            attention_s += self.profile.fork_join_s * self.num_layers
        return self.scale(FusedWork, decode_sms) * (rest_s + attention_s)

    def work_s(self, work: Work, prefill_sms: int, decode_sms: int) -> float:
        """Solo seconds of a launched piece of work."""
        if isinstance(work, PrefillWork):
            load = PrefillLoad.of(work.slices)
            share = (work.last_layer - work.first_layer) / self.num_layers
            head_s = self._head_share * self.products_s(load.num_sampled, prefill_sms) if work.is_last else 0.0
            layers_s = self.prefill_s(load._replace(num_sampled=0), prefill_sms) * share
            return layers_s + self.scale(PrefillWork, prefill_sms) * head_s
        if isinstance(work, FusedWork):
            prefill, decode = PrefillLoad.of(work.prefill.slices), DecodeLoad.of(work.decode)
            return self.fused_s(prefill, decode, prefill_sms, decode_sms)
        return self.decode_s(DecodeLoad.of(work), decode_sms)

    def scale(self, kind: type, num_sms: int) -> float:
        """What traffic has taught about this kind of work there, or elsewhere if it has not run there yet."""
        return self.scales.get((kind, num_sms)) or self.scales.get((kind, ANY_SMS), 1.0)

    def correct(self, kind: type, num_sms: int, predicted_s: float, actual_s: float) -> None:
        """Takes in one step that ran alone. Slow, slower where the profile was measured: one step proves little."""
        ratio = min(max(actual_s / predicted_s * self.scale(kind, num_sms), 0.2), 5.0)
        for key in ((kind, num_sms), (kind, ANY_SMS)):
            num = self._num_corrections.get(key, 50 if self.profile.is_measured else 3) + 1
            self._num_corrections[key] = num
            self.scales[key] = self.scale(*key) + max(0.01, 1 / num) * (ratio - self.scale(*key))

    def _at(self, num_sms: int) -> _Site:
        if num_sms in self._sites:
            return self._sites[num_sms]
        profile, config = self.profile, self.config
        if profile.passes:
            tokens = tuple(num_tokens for num_tokens, _ in profile.passes)
            seconds = tuple(accumulate((1 / rate.at(num_sms) for _, rate in profile.passes), max))
        else:  # the roofline: reading the weights up to the knee, multiplying beyond it
            bytes_s = self._layer_parameters * self._itemsize / profile.weight_bytes_per_s.at(num_sms)
            knee = bytes_s * profile.flops_per_s.at(num_sms) / (2 * self._layer_parameters)
            tokens, seconds = (knee, 2 * knee), (bytes_s, 2 * bytes_s)
        flops_per_pair = 4 * config.num_heads * config.head_dim * config.num_layers
        self._sites[num_sms] = _Site(
            tokens,
            seconds,
            causal_s=flops_per_pair / profile.attention_flops_per_s.at(num_sms),
            prefix_s=flops_per_pair / profile.prefix_flops_per_s.at(num_sms),
            full_tokens=num_sms * ATTENTION_ROWS_PER_SM / config.num_heads,
            kv_s=config.num_kv_values_per_token * self._itemsize / profile.kv_bytes_per_s.at(num_sms),
        )
        return self._sites[num_sms]

    def _pass_s(self, num_tokens: int, num_sampled: int, num_sms: int) -> float:
        if (seconds := self._passes.get(key := (num_tokens, num_sampled, num_sms))) is None:
            head_s = self._head_share * self.products_s(num_sampled, num_sms)
            self._passes[key] = seconds = self.products_s(num_tokens, num_sms) + head_s + self.profile.step_overhead_s
        return seconds

    def _prefill_attention_s(self, load: PrefillLoad, num_rows: int, num_sms: int) -> float:
        """Of a launch for ``num_rows`` tokens: all its work spread evenly, or its longest tile, or part of that."""
        site = self._at(num_sms)
        even_s = (load.num_pairs - load.num_prefix_pairs) * site.causal_s + load.num_prefix_pairs * site.prefix_s
        share = max(load.num_pairs / site.full_tokens, 1.0)  # keys of each program
        parts = min(max(1.5 * load.longest / share, 3), MAX_PARTS, max(load.longest / CUT_TOKENS, 1) * 3)
        longest = load.longest * (2 * parts - 1) / parts**2 + PART_TOKENS
        if num_rows <= CUT_ROUND * site.full_tokens and load.longest >= CUT_TOKENS:
            even_s += parts * PART_TOKENS * load.num_prefix_pairs / load.longest * site.prefix_s
        elif load.longest < max(2 * share, CUT_TOKENS):
            longest = load.longest
        return max(even_s, LONE_TILE * longest * site.full_tokens * site.prefix_s)

    def _decode_attention_s(self, load: DecodeLoad, num_sms: int) -> float:
        return (load.context_tokens + self.profile.kv_start_tokens * load.batch) * self._at(num_sms).kv_s


class Cell(NamedTuple):
    """A coarse region of states that shares its factors. A lane that ran alone has the other's fields at 0."""

    decode_sms: int
    log_batch: int  # powers of two
    log_context: int  # powers of four, of the batch's context in tokens
    log_prefill: int  # powers of four, of the chunk's tokens
    log_prefix: int = 0  # powers of four from 256 on, of what its tokens see before the chunk, in the mean
    is_fused: bool = False
    is_behind_split: bool = False  # a fused step, while the clock recovers from what lanes beside each other draw

    @classmethod
    def of(cls, prefill: PrefillLoad, decode: DecodeLoad, decode_sms: int, *flags: bool) -> Cell:
        """``flags``: is_fused, is_behind_split."""
        prefix = int(prefill.num_prefix_pairs / max(prefill.num_tokens, 1))
        fours = [(n.bit_length() + 1) // 2 for n in (decode.context_tokens, prefill.num_tokens, prefix)]
        return cls(decode_sms, decode.batch.bit_length(), *fours[:2], max(fours[2] - 4, 0), *flags)

    @property
    def is_beside(self) -> bool:
        """Whether two pieces of work share the device here."""
        return not self.is_fused and self.log_batch > 0 and self.log_prefill > 0

    def is_like(self, other: Cell) -> bool:
        return (self.is_beside, *self[-2:]) == (other.is_beside, *other[-2:])

    def distance(self, other: Cell) -> float:
        """In steps of the field that differs most; 16 SMs are one."""
        return max(abs(a - b) for a, b in zip((self[0] / 16, *self[1:5]), (other[0] / 16, *other[1:5]), strict=True))


@dataclass
class Factor:
    """Actual over solo-predicted time of one lane in one cell: its worst, to promise by, and its mean, to expect."""

    mean: float
    worst: float
    num_samples: int = 0  # 0: inferred from neighbours, or the prior


@dataclass
class Guard:
    """Factors by lane and cell, corrected by every step that is judged. A fused step stands under the decode lane.

    A cell never seen takes the mean and the worst of its neighbours on as many SMs, which matter most, else of the
    nearest cells on as many, else of its neighbours on other SMs, else the prior. ``worst`` follows a slower step at
    once and forgives slowly, never below the mean times ``floor``.
    """

    prior_mean: float = 1.12  # beside the other lane
    prior_worst: float = 1.25
    alone_worst: float = 1.06  # alone or fused: what solo predictions miss by
    behind_split: float = 1.08  # fused soon after a split, over fused
    decay: float = 0.02
    forgiveness: float = 0.001  # a step: half of an excess is forgotten after some 700, in a new cell after 100
    floor: float = 1.08
    factors: dict[tuple[Lane, Cell], Factor] = field(default_factory=dict)
    _inferred: dict[tuple[Lane, Cell], Factor] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: Profile) -> Guard:
        """Starts from what calibration measured."""
        guard = cls()
        for lane, *cell, mean, worst, num_samples in profile.factors:
            guard.factors[Lane(lane), Cell(*cell)] = Factor(mean, max(worst, mean * guard.floor), num_samples)
        return guard

    def factor(self, lane: Lane, cell: Cell) -> Factor:
        known = self.factors.get((lane, cell)) or self._inferred.get((lane, cell))
        if known is None:
            known = self._inferred[lane, cell] = self._infer(lane, cell)
        return known

    def _infer(self, lane: Lane, cell: Cell) -> Factor:
        like = [(other, f) for (of, other), f in self.factors.items() if of is lane and cell.is_like(other)]
        same = [(cell.distance(other), f) for other, f in like if other.decode_sms == cell.decode_sms]
        most = max(1, min((distance for distance, _ in same), default=1))
        near = [f for distance, f in same if distance <= most]
        if near := near or [f for other, f in like if cell.distance(other) <= 1]:
            return Factor(fmean(f.mean for f in near), max(f.worst for f in near))
        if cell.is_behind_split:
            settled = self.factor(lane, cell._replace(is_behind_split=False))
            return Factor(settled.mean, settled.worst * self.behind_split)
        return Factor(self.prior_mean, self.prior_worst) if cell.is_beside else Factor(1.0, self.alone_worst)

    def observe(self, lane: Lane, cell: Cell, solo_s: float, actual_s: float) -> None:
        """Takes in one step: what was predicted for it alone, and what it took."""
        ratio, known = actual_s / solo_s, self.factors.get((lane, cell))
        if known is None:
            worst = max(ratio * self.floor, self.factor(lane, cell).worst)
            known = self.factors[lane, cell] = Factor(ratio, worst)
            self._inferred.clear()
        known.num_samples += 1
        known.mean += max(self.decay, 1 / known.num_samples) * (ratio - known.mean)
        forgiveness = max(self.forgiveness, 1 / (known.num_samples + 100))  # what was inferred gives way sooner
        forgiven = known.worst - forgiveness * (known.worst - known.mean)
        known.worst = max(ratio, forgiven, known.mean * self.floor)
        if known.worst == ratio:
            self._inferred.clear()


class Observer:
    """Compares every completion with its prediction, then lets it correct the cost model and the guard.

    A step on its half is judged when the other lane has reported past its end: only then is known what ran beside it.
    Fused steps and those on the whole chip are judged at once. Steps that were alone or fused correct the solo times
    too, if no split ran just before. Those beside the other lane for ALONE_SHARE to BESIDE_SHARE of their time say
    little and are left out.
    """

    def __init__(self, cost: CostModel, guard: Guard):
        self.cost, self.guard = cost, guard
        self.seen: dict[str, deque[tuple[float, float]]] = {}  # (mean, guarded prediction) / actual, by kind of step
        self._recent = {lane: deque(maxlen=256) for lane in Lane}
        self._unjudged: deque[Completion] = deque(maxlen=256)
        self._split_s = -math.inf  # when the last prefill piece on its half ended

    def observe(self, completion: Completion) -> None:
        if completion.busy_s <= 0:
            return
        work = completion.ticket.work
        if completion.ticket.partition.is_shared or isinstance(work, FusedWork):
            self._judge(completion, None)
            return
        self._recent[work.lanes[0]].append(completion)
        if work.lanes[0] is Lane.PREFILL:
            self._split_s = completion.finished_s
        self._unjudged.append(completion)
        while self._unjudged:
            step = self._unjudged[0]
            others = self._recent[Lane.DECODE if step.ticket.work.lanes[0] is Lane.PREFILL else Lane.PREFILL]
            if not others or others[-1].finished_s < step.finished_s:
                return
            beside, share = _beside(self._unjudged.popleft(), others)
            if not ALONE_SHARE < share < BESIDE_SHARE:
                self._judge(step, beside if share >= BESIDE_SHARE else None)

    def report(self) -> dict[str, dict[str, float]]:
        """By kind of step: error of the mean prediction, share of guard violations, median of guarded over actual."""
        found = {}
        for kind, seen in sorted(self.seen.items()):
            errors, guarded = [abs(mean - 1) for mean, _ in seen], [worst for _, worst in seen]
            found[kind] = {"num_steps": len(seen), "violations": sum(ratio < 1 for ratio in guarded) / len(seen)}
            found[kind] |= {"error_p50": percentile(errors, 50), "error_p95": percentile(errors, 95)}
            found[kind] |= {"guarded_over_actual": percentile(guarded, 50)}
        return found

    def _judge(self, step: Completion, beside: Completion | None) -> None:
        work, partition = step.ticket.work, step.ticket.partition
        parts = {part.lanes[0]: part for part in (*work.parts, *(beside.ticket.work.parts if beside else ()))}
        prefill = PrefillLoad.of(parts[Lane.PREFILL].slices) if Lane.PREFILL in parts else PrefillLoad()
        decode = DecodeLoad.of(parts[Lane.DECODE]) if Lane.DECODE in parts else DecodeLoad()
        is_behind_split = step.finished_s - step.busy_s < self._split_s + RECOVERY_S
        flags = (True, is_behind_split) if isinstance(work, FusedWork) else ()
        cell = Cell.of(prefill, decode, partition.decode_sms, *flags)
        lane = work.lanes[-1]  # of a fused step: decode
        solo_s = self.cost.work_s(work, partition.prefill_sms, partition.decode_sms)
        factor = self.guard.factor(lane, cell)
        kind = "fused" if cell.is_fused else f"{lane.value} beside" if beside else lane.value
        ratios = solo_s * factor.mean / step.busy_s, solo_s * factor.worst / step.busy_s
        self.seen.setdefault(kind, deque(maxlen=4096)).append(ratios)
        if beside is None and not cell.is_behind_split:
            self.cost.correct(type(work), partition.sms_of(lane), solo_s, step.busy_s)
        self.guard.observe(lane, cell, solo_s, step.busy_s)


def _beside(step: Completion, others: deque[Completion]) -> tuple[Completion | None, float]:
    """What of the other lane ran beside a step for longest, and the share of its time that anything did."""
    started_s, overlaps = step.finished_s - step.busy_s, []
    for other in reversed(others):
        if other.finished_s <= started_s:
            break
        overlap_s = min(step.finished_s, other.finished_s) - max(started_s, other.finished_s - other.busy_s)
        overlaps.append((max(overlap_s, 0.0), other))
    longest = max(overlaps, key=lambda pair: pair[0], default=(0.0, None))
    return longest[1], sum(overlap_s for overlap_s, _ in overlaps) / step.busy_s
