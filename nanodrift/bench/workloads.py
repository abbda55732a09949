"""What is asked: prompts and lengths of named workloads and of traces, the same for the same seed on any machine.

A prompt is a list of segments (stream name, tokens): the first so many tokens of an endless seeded stream of ids. So
requests that name the same stream share a prefix for real: a document under many questions, a conversation whose turns
extend each other, a trace's prefix blocks. Knows nothing about rates (arrivals.py) or servers. No downloads: lengths
come from the quantiles in lengths.json, whose ``source`` says what was measured from a file and what was published.

    sharegpt       chat logs up to 8k tokens: medium prompts, long answers
    chat           Azure's conversation service: shorter, steadier
    code           Azure's code service: prompts of thousands of tokens, answers of a line
    reasoning      short questions, very long answers
    conversation   many turns over one history, a system prompt shared by all
    longdoc        about eight short questions on each document of 20k to 30k tokens
    random         fixed lengths: ``--input-len``, ``--output-len``
    steady8k       long prompts (8,000 tokens) at a steady beat, beside a decode batch that is held at one size
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

LENGTHS = Path(__file__).with_name("lengths.json")
SYSTEM_TOKENS = 512  # shared by all conversations
LIVE_DOCUMENTS, QUESTIONS = 16, 8
LOWEST_ID, NUM_IDS = 3, 1000  # drawn from when the vocabulary is not known: below are special ids, above who knows


@dataclass(frozen=True)
class Sample:
    """One request to come."""

    segments: tuple[tuple[str, int], ...]  # (stream, tokens from its start); empty if ``text`` is the prompt
    num_output_tokens: int
    conversation: str = ""
    arrival_s: float | None = None  # where the source has one
    text: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """0 for a text: only the server's tokenizer knows."""
        return sum(tokens for _, tokens in self.segments)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True)
class Background:
    """Short requests with long answers, ``batch`` of them at any time: where one ends the next begins.

    They keep a decode batch under way while the workload's own requests come and go, and are no part of its rate.
    """

    batch: int
    input_len: int
    output_len: int

    def sample(self, number: int) -> Sample:
        """The first ``batch`` answers are of all lengths up to ``output_len``, so that they do not end together."""
        share = (number + 1) / self.batch if number < self.batch else 1.0
        name = f"background-{number}"
        return Sample(((name, self.input_len),), max(2, round(self.output_len * share)), name)


@dataclass(frozen=True)
class Workload:
    """Samples in order of arrival. Each method returns a changed one, with a note of what it dropped or changed."""

    name: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    background: Background | None = None

    @property
    def has_arrivals(self) -> bool:
        return bool(self.samples) and all(sample.arrival_s is not None for sample in self.samples)

    @property
    def num_shared_tokens(self) -> int:
        """Prompt tokens that stood in an earlier prompt of this workload: the most a prefix cache can save."""
        seen: dict[str, int] = {}
        shared = 0
        for stream, tokens in (segment for sample in self.samples for segment in sample.segments):
            shared += min(tokens, seen.get(stream, 0))
            seen[stream] = max(tokens, seen.get(stream, 0))
        return shared

    def _changed(self, samples, note: str) -> Workload:
        return replace(self, samples=tuple(samples), notes=(*self.notes, note) if note else self.notes)

    def fitting(self, max_model_len: int) -> Workload:
        """Without the requests whose prompt and answer exceed the window."""
        kept = [sample for sample in self.samples if sample.num_tokens <= max_model_len]
        dropped = len(self.samples) - len(kept)
        share = f"dropped {dropped} of {len(self.samples)} requests: longer than {max_model_len} tokens"
        return self._changed(kept, share if dropped else "")

    def first(self, count: int) -> Workload:
        note = f"the first {count} of {len(self.samples)} requests" if count < len(self.samples) else ""
        return self._changed(self.samples[:count], note)

    def scaled(self, factor: float) -> Workload:
        """All lengths times ``factor``, at least a token each; what was shared stays shared."""
        samples = [
            replace(
                sample,
                segments=tuple((stream, max(1, round(tokens * factor))) for stream, tokens in sample.segments),
                num_output_tokens=max(1, round(sample.num_output_tokens * factor)),
            )
            for sample in self.samples
        ]
        return self._changed(samples, f"all lengths times {factor:g}" if factor != 1 else "")

    def sampled(self, share: float, seed: int) -> Workload:
        """About ``share`` of the conversations, each with all of its turns: dropping rows would drop reuse."""
        kept = [s for s in self.samples if random.Random(f"{seed}/keep/{s.conversation}").random() < share]
        num_kept, num_all = (len({s.conversation for s in samples}) for samples in (kept, self.samples))
        note = f"kept {num_kept} of {num_all} conversations ({len(kept)} of {len(self.samples)} requests)"
        return self._changed(kept, note if share < 1 else "")

    def stretched(self, factor: float) -> Workload:
        """Arrivals times ``factor``: 0.5 is twice as fast."""
        samples = [replace(sample, arrival_s=sample.arrival_s * factor) for sample in self.samples]
        return self._changed(samples, f"arrival times times {factor:g}" if factor != 1 else "")

    def jittered(self, tick_s: float | None, seed: int) -> Workload:
        """Spreads arrivals that a coarse clock put on one tick over that tick, in the order they stand.

        ``tick_s`` None: looks for a tick of at least a second; 0 leaves them as they are.
        """
        arrivals = [sample.arrival_s for sample in self.samples]
        tick_s = find_tick(arrivals) if tick_s is None else tick_s
        if not tick_s:
            return self
        draw, spread = random.Random(f"{seed}/jitter"), []
        ticks = [round(arrival_s / tick_s) for arrival_s in arrivals]
        for tick in sorted(set(ticks)):
            spread += sorted((tick + draw.random()) * tick_s for _ in range(ticks.count(tick)))
        ordered = sorted(self.samples, key=lambda sample: round(sample.arrival_s / tick_s))
        samples = [replace(sample, arrival_s=s - spread[0]) for sample, s in zip(ordered, spread, strict=True)]
        return self._changed(samples, f"arrivals lay on a {tick_s:g} s clock: spread inside the tick, seed {seed}")


def find_tick(arrivals: list[float]) -> float:
    """The coarsest of some usual clock ticks on which all arrivals lie, to a few milliseconds; 0 if there is none."""
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    for tick_s in (60.0, 30.0, 10.0, 5.0, 3.0, 2.0, 1.0):
        off_s = (abs(arrival_s - round(arrival_s / tick_s) * tick_s) for arrival_s in arrivals)
        if span_s >= 10 * tick_s and max(off_s) <= 0.005:
            return tick_s
    return 0.0


# --- named workloads -------------------------------------------------------------------------------------------------

Quantiles = list[list[float]]


def draw_length(points: Quantiles, draw: random.Random) -> float:
    """A value of the quantile function, log-linear between its points."""
    percent = 100 * draw.random()
    (p, a), (q, b) = next(pair for pair in itertools.pairwise(points) if percent <= pair[1][0])
    return a * math.exp(math.log(b / a) * (percent - p) / (q - p))


def singles(lengths: dict, draw: random.Random) -> Iterator[Sample]:
    """Requests that share nothing; the two lengths are drawn independently."""
    number = 0
    while True:
        number += 1
        name = f"prompt-{number}"
        num_prompt, num_output = (round(draw_length(lengths[side], draw)) for side in ("input", "output"))
        yield Sample(((name, num_prompt),), num_output, name)


def conversations(lengths: dict, draw: random.Random) -> Iterator[Sample]:
    """Turns in the order in which they would come at the trace's own pace; each prompt extends the one before."""
    turns: list[tuple] = []  # a heap of (due, conversation, turns left, prompt tokens of its own)
    start_s, number = 0.0, 0
    while True:
        while not turns or start_s <= turns[0][0]:
            number += 1
            own = max(1, round(draw_length(lengths["input"], draw)) - SYSTEM_TOKENS)
            heapq.heappush(turns, (start_s, number, round(draw_length(lengths["turns"], draw)), own))
            start_s += draw.expovariate(lengths["starts_per_s"])
        due_s, talk, left, own = heapq.heappop(turns)
        name = f"conversation-{talk}"
        num_output = round(draw_length(lengths["output"], draw))
        yield Sample((("system", SYSTEM_TOKENS), (name, own)), num_output, name)
        if left > 1:
            own += round(draw_length(lengths["growth"], draw))
            heapq.heappush(turns, (due_s + draw_length(lengths["gap_s"], draw), talk, left - 1, own))


def questions(draw: random.Random) -> Iterator[Sample]:
    """Questions on a shelf of documents; one that was asked about often enough makes room for the next."""
    shelf: list[list] = []  # [name, tokens, questions left]
    number = 0
    while True:
        while len(shelf) < LIVE_DOCUMENTS:
            number += 1
            shelf.append([f"document-{number}", draw.randint(20_000, 30_000), QUESTIONS])
        document = draw.choice(shelf)
        name, tokens, left = document
        yield Sample(((name, tokens), (f"{name}-question-{left}", draw.randint(50, 200))), draw.randint(10, 100), name)
        document[2] -= 1
        if not document[2]:
            shelf.remove(document)


def fixed(input_len: int, output_len: int) -> Iterator[Sample]:
    number = 0
    while True:
        number += 1
        yield Sample(((f"prompt-{number}", input_len),), output_len, f"prompt-{number}")


NAMES = ("sharegpt", "chat", "code", "reasoning", "conversation", "longdoc", "random", "steady8k")
FIXED_LENGTHS = {"random": (1024, 128), "steady8k": (8000, 128)}  # tokens in and out, unless told otherwise
BACKGROUND = Background(batch=32, input_len=256, output_len=768)  # of steady8k


def named(
    name: str,
    count: int,
    seed: int = 0,
    *,
    max_model_len: int | None = None,
    length_scale: float = 1.0,
    input_len: int | None = None,
    output_len: int | None = None,
    background: Background = BACKGROUND,
) -> Workload:
    """``count`` requests of a named workload, all within the window: what does not fit is passed over and counted.

    ``input_len`` and ``output_len`` are of those that have fixed lengths; ``background`` is steady8k's.

    Raises ValueError for an unknown name, and when next to nothing fits.
    """
    if name not in NAMES:
        raise ValueError(f"there is no workload {name!r}; there are {', '.join(NAMES)}")
    draw, lengths = random.Random(f"{seed}/{name}"), json.loads(LENGTHS.read_text()).get(name)
    makers = {
        "conversation": lambda: conversations(lengths, draw),
        "longdoc": lambda: questions(draw),
        **{
            fixed_name: lambda most=most: fixed(input_len or most[0], output_len or most[1])
            for fixed_name, most in FIXED_LENGTHS.items()
        },
    }
    endless = makers.get(name, lambda: singles(lengths, draw))()
    samples, num_passed = [], 0
    while len(samples) < count:
        sample = Workload(name, (next(endless),)).scaled(length_scale).samples[0]
        if max_model_len is None or sample.num_tokens <= max_model_len:
            samples.append(sample)
            continue
        num_passed += 1
        if num_passed >= 200 and num_passed > 50 * len(samples):
            raise ValueError(
                f"hardly a request of {name} fits a window of {max_model_len} tokens; --length-scale 0.1 makes all "
                "lengths ten times shorter, --workload random --input-len N --output-len N asks for fixed ones"
            )
    workload = Workload(name, tuple(samples), background=background if name == "steady8k" else None)
    if length_scale != 1:
        workload = workload._changed(samples, f"all lengths times {length_scale:g}")
    if num_passed:
        note = f"{num_passed} of {num_passed + count} drawn requests passed over: longer than {max_model_len} tokens"
        workload = workload._changed(samples, note)
    return workload


# --- prompts ---------------------------------------------------------------------------------------------------------


@dataclass
class PromptMaker:
    """Turns samples into token ids, or into text of about as many tokens for servers that take no ids."""

    seed: int | str = 0
    num_ids: int = NUM_IDS
    _streams: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        if self.num_ids <= LOWEST_ID:
            raise ValueError(f"a vocabulary of {self.num_ids} tokens is too small to draw prompts from")
        self._population = list(range(LOWEST_ID, self.num_ids))

    def token_ids(self, sample: Sample, encode: Callable[[str], list[int]] | None = None) -> list[int]:
        if sample.text is not None:
            if encode is None:
                raise ValueError("this workload's prompts are texts, and there is no tokenizer to turn them into ids")
            return encode(sample.text)
        return [token for stream, count in sample.segments for token in self._stream(stream, count)]

    def text(self, sample: Sample, tokens_per_word: float = 1.0) -> str:
        """A short word for each id, as many as make the tokens; equal prefixes stay equal."""
        if sample.text is not None:
            return sample.text
        words = [(stream, max(1, round(tokens / tokens_per_word))) for stream, tokens in sample.segments]
        return " ".join(f"{token:03x}" for stream, count in words for token in self._stream(stream, count))

    def _stream(self, name: str, count: int) -> list[int]:
        """The first ``count`` ids; drawn anew from the start when more are asked for than before."""
        if len(self._streams.get(name, ())) < count:
            self._streams[name] = random.Random(f"{self.seed}/{name}").choices(self._population, k=count)
        return self._streams[name][:count]
