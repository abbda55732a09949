"""The messages between scheduler and executor: frozen, made of ids, ranges and block numbers, never of tensors.

The scheduler decides what runs and says it in these words; an executor (GPU, CPU, simulated) carries it out and answers
with Completions. A recorded list of them is a complete account of a run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

MAX_OPEN_CHUNKS = 2  # token chunks between their first and last layer: one under way, and one that was made to wait
MAX_FUSED_TOKENS = 2048  # prompt tokens of a fused step, and ...
MAX_FUSED_SLICES = 8  # ... the prompts they may come from: what executors have graphs for
# The sizes of the graphs: rows of a decode step, tokens of a chunk, and of a fused step, its decoding rows among them.
DECODE_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PREFILL_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
FUSED_TOKENS = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1152, 2048, 2176)
MAX_WASTE = 1.25  # work is not padded by more than this ...
MAX_FREE_TOKENS = 512  # ... beyond so many tokens: below, a pass takes longer to launch than to run


def padded_rows(batch: int) -> int:
    """What a decode step of so many requests is padded to."""
    return DECODE_ROWS[bisect_left(DECODE_ROWS, batch)] if 0 < batch <= DECODE_ROWS[-1] else batch


def is_wasteful(num_tokens: int, size: int) -> bool:
    """Whether so many tokens are rather launched operator by operator than padded to this size."""
    return size > max(MAX_FREE_TOKENS, MAX_WASTE * num_tokens)


def padded_tokens(num_tokens: int, is_fused: bool = False) -> int:
    """What a pass over so many tokens is padded to, if at all."""
    sizes = FUSED_TOKENS if is_fused else PREFILL_TOKENS
    size = sizes[bisect_left(sizes, num_tokens)] if 0 < num_tokens <= sizes[-1] else num_tokens
    return num_tokens if is_wasteful(num_tokens, size) else size


class Lane(Enum):
    """The two sides of the device. At most a few pieces of work are in flight on each."""

    PREFILL = "prefill"
    DECODE = "decode"

    __hash__ = object.__hash__  # dictionaries of lanes are looked up dozens of times a step


@dataclass(frozen=True)
class Partition:
    """A division of the device's SMs between the lanes; a lane that has the whole chip leaves the other none.

    ``is_shared`` is said of the whole chip: each lane may use every SM, and they take turns.
    """

    prefill_sms: int
    decode_sms: int
    is_shared: bool = False

    def sms_of(self, lane: Lane) -> int:
        return self.prefill_sms if lane is Lane.PREFILL else self.decode_sms


# Of a device with 132 SMs. The prefill halves lie where rounds of tiles end: the down product of 2,048 tokens has 256,
# 3 rounds on 88 to 127 SMs and 4 on 64 to 85, so 84 SMs would prefill no faster than 68.
DECODE_SMS = (32, 40, 64)

FLAGS = ("has_filter", "has_penalty", "has_logprobs")  # of RowParams, and of a step that has such a row


@dataclass(frozen=True)
class RowParams:
    """What the sampler must know of a request, written into its device row when its last prompt token is computed."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    banned_token_ids: tuple[int, ...] = ()  # held back (eos and stop ids) ...
    min_position: int = 0  # ... while the new token's position is below this
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    has_logprobs: bool = False  # they come back with its tokens

    @property
    def has_filter(self) -> bool:
        """True if the logits must be filtered before a token is drawn (off the hot path)."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def has_penalty(self) -> bool:
        """True if logits depend on what the request has said before, or on its wishes (off the hot path too)."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0) or bool(self.logit_bias)


@dataclass(frozen=True)
class NewBlocks:
    """Blocks a request was given: entries ``first_index`` onward of its block-table row."""

    row: int
    first_index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class PrefillSlice:
    """The part of one request's tokens that a prefill computes: positions start .. start + len(token_ids)."""

    request_id: str
    row: int
    start: int
    token_ids: tuple[int, ...]
    params: RowParams | None = None  # given iff this slice ends the prompt, so that a token is sampled after it
    writes_kv: bool = True  # False: its KV lies in blocks that are shared, hence read only; it is run for its logits
    output_start: int | None = None  # for penalties: its tokens are counted, from this position on as output
    next_token_ids: tuple[int, ...] = ()  # for prompt logprobs: what follows each of its tokens in the prompt

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class PrefillWork:
    """Layers [first_layer, last_layer) of one token chunk. The pieces of a chunk share ``batch_id`` and come in order.

    The executor keeps the chunk's hidden states between its pieces; the piece whose ``is_last`` is set samples.
    """

    batch_id: int  # of the chunk
    slices: tuple[PrefillSlice, ...]
    first_layer: int
    last_layer: int
    is_last: bool
    new_blocks: tuple[NewBlocks, ...] = ()  # only with the first piece

    lanes = (Lane.PREFILL,)

    @property
    def parts(self) -> tuple[PrefillWork]:
        """What it consists of; see FusedWork."""
        return (self,)

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.slices)

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(s.request_id for s in self.slices)

    @property
    def sampled_ids(self) -> tuple[str, ...]:
        """The requests this piece samples a token for, in order."""
        return tuple(s.request_id for s in self.slices if s.params is not None) if self.is_last else ()


@dataclass(frozen=True)
class DecodeWork:
    """One token for each request. Tokens and positions already lie in the device rows."""

    request_ids: tuple[str, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]  # of the token each row feeds in: the executor's tables hold the same
    has_filter: bool = False  # some row needs top-k, top-p or min-p
    has_ban: bool = False  # some row is below its min_tokens
    has_penalty: bool = False  # some row has penalties or a bias
    has_logprobs: bool = False  # some row wants logprobs
    new_blocks: tuple[NewBlocks, ...] = ()

    lanes = (Lane.DECODE,)

    @property
    def parts(self) -> tuple[DecodeWork]:
        return (self,)

    @property
    def sampled_ids(self) -> tuple[str, ...]:
        return self.request_ids


@dataclass(frozen=True)
class FusedWork:
    """A prefill chunk (all layers) and a decode step in one pass over the weights. Occupies both lanes.

    Its products use the whole device. The partition it is launched with says where its two attentions run: one after
    the other on the whole chip, or side by side on the two halves.
    """

    prefill: PrefillWork
    decode: DecodeWork

    lanes = (Lane.PREFILL, Lane.DECODE)

    @property
    def parts(self) -> tuple[PrefillWork, DecodeWork]:
        return self.prefill, self.decode

    @property
    def sampled_ids(self) -> tuple[str, ...]:
        return self.prefill.sampled_ids + self.decode.sampled_ids


Work = PrefillWork | DecodeWork | FusedWork


@dataclass(frozen=True)
class Ticket:
    """Names one launched piece of work; tickets count up in launch order."""

    number: int
    work: Work
    partition: Partition
    launched_s: float


class Logprobs(NamedTuple):
    """How likely the model held a token, and which it held likeliest: before temperature, penalties and filters."""

    logprob: float
    top_ids: Sequence[int] = ()  # likeliest first
    top_logprobs: Sequence[float] = ()

    def cut(self, num_top: int) -> Logprobs:
        return Logprobs(self.logprob, self.top_ids[:num_top], self.top_logprobs[:num_top])


@dataclass(frozen=True)
class Completion:
    """A ticket is done: the tokens it sampled, by request id, in the work's own order."""

    ticket: Ticket
    finished_s: float  # on the executor's clock, when the host saw it
    tokens: tuple[tuple[str, int], ...] = ()
    busy_s: float = 0.0  # the device worked on it, from the moment its SMs were free to its last kernel's end
    logprobs: tuple[Logprobs, ...] = ()  # of ``tokens``, if one of their requests wants them
    prompt_logprobs: tuple[Logprobs, ...] = ()  # of the slices' ``next_token_ids``, one after another
