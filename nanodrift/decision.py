"""The scheduler's question to a policy, and its answer: what is there to run, and how the lanes share the device.

As plan.py is to an executor, so is this to dispatch.py and baselines.py. Knows no costs and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from nanodrift.cost import DecodeLoad, PrefillLoad
from nanodrift.plan import Partition


class Mode(Enum):
    SPLIT = "split"
    FUSED = "fused"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True)
class Load:
    """What the dispatcher decides for: the running batch, its promise, and the prompts that are next."""

    decode: DecodeLoad
    tbt_s: float  # the tightest TBT among the running requests, less headroom and what they have waited already
    prompt_tokens: int = 0  # that wait to be computed, of all prompts together
    prompt_start: int = 0  # where the next token chunk begins in its prompt: cached and computed tokens before it
    open_tokens: int = 0  # of a chunk on its way through the layers: it must go on by layers
    prompts: tuple[tuple[int, int], ...] = ()  # (tokens, start) of each prompt in order, where they are several
    is_merging: bool = False  # a prompt is about to end beside the decode lane
    is_behind_split: bool = False  # the lanes run beside each other, or did a moment ago

    def chunk(self, most_tokens: int, most_slices: int | None = None) -> tuple[PrefillLoad, DecodeLoad]:
        """The next token chunk of at most so many tokens, and the batch once the prompts that end in it have joined."""
        parts, ended, num_tokens, most_tokens = [], [], 0, self.open_tokens or most_tokens
        prompts = self.prompts or ((self.prompt_tokens, self.prompt_start),)
        for left, start in prompts[:most_slices]:
            n = min(left, most_tokens - num_tokens)
            num_tokens += n
            parts.append((n, start))
            if n < left or n == 0:
                break
            ended.append(start + n)
        return PrefillLoad.of_parts(parts, len(ended)), self.decode.joined_by(ended)

    def like_first(self, chunk: PrefillLoad, most_tokens: int) -> PrefillLoad:
        """This chunk, were all of it like the first prompt's next ``most_tokens``, cut into chunks of its size."""
        left, start = self.prompts[0] if self.prompts else (self.prompt_tokens, self.prompt_start)
        n = min(left, most_tokens)
        prefix = start + max(0, n - chunk.num_tokens) / 2  # what is before a chunk, in the mean
        num_pairs, num_prefix_pairs = (chunk.num_tokens * each for each in (start + n / 2, prefix))
        return chunk._replace(num_pairs=num_pairs, num_prefix_pairs=num_prefix_pairs, longest=start + n)


@dataclass(frozen=True)
class Decision:
    """How the two lanes share the device until the next decision."""

    mode: Mode
    partition: Partition
    token_chunk: int  # prompt tokens of the next chunk, decoding rows not counted
    layers: int  # of one prefill piece, about as long as a decode step
    step_s: float = 0.0  # guarded prediction of the gap between two tokens; 0 where nothing was predicted
    prompt_tokens_per_s: float = 0.0
    is_unmeetable: bool = False
    decode_s: float = 0.0  # guarded prediction of the decode step alone
    holds_decode: bool = False  # no decode step is launched while a prompt waits (prefill-first)


class Policy(Protocol):
    """What the scheduler asks before it launches anything: dispatch.py's dispatcher, or one of baselines.py."""

    def choose(self, load: Load, current: Decision | None = None) -> Decision: ...

    def may_join(self, joined: DecodeLoad, newest: DecodeLoad, tbt_s: float) -> bool:
        """Whether a prompt may begin: the batch once it and all under way have joined, it alone, their median TBT."""
        return True
