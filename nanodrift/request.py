"""What a user asked for, how far it has come, and when each of its tokens arrived.

The only home of per-request timestamps. Knows nothing about devices, text or policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from nanodrift.config import BLOCK_SIZE, SLO
from nanodrift.plan import Logprobs, PrefillSlice, RowParams

MAX_STOP_TOKEN_IDS = 16  # ids that min_tokens can hold back on the device
MAX_STOP_STRINGS = 16
MAX_BIASED_TOKENS = 300
MAX_LOGPROBS = 20
RANGES = {  # of the numbers that the sampler reads too, both ends included
    "temperature": (0, 100),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "top_p": (0, 1),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Field names and defaults as in the OpenAI and vLLM APIs."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0  # on tokens of the output
    frequency_penalty: float = 0.0  # on each time they stand there
    repetition_penalty: float = 1.0  # factor on tokens of prompt and output
    logit_bias: dict[int, float] | None = None  # added to the logits of these token ids
    logprobs: int | None = None  # of each output token, and this many of the likeliest; of the logits as they are
    prompt_logprobs: int | None = None  # the same of each prompt token but the first

    def __post_init__(self):
        def check(ok: bool, message: str):
            if not ok:
                raise ValueError(message)

        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            check(is_number and low <= value <= high, f"{name} must lie between {low} and {high}, got {value!r}")
        for name in ("top_k", "max_tokens", "min_tokens"):
            value = getattr(self, name)
            check(type(value) is int, f"{name} must be an integer, got {value!r}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            is_ok = value is None or (type(value) is int and 0 <= value <= MAX_LOGPROBS)
            check(is_ok, f"{name} must be an integer between 0 and {MAX_LOGPROBS}, got {value!r}")
        bias = self.biases
        check(len(bias) <= MAX_BIASED_TOKENS, f"logit_bias may name {MAX_BIASED_TOKENS} tokens, got {len(bias)}")
        is_sound = all(token >= 0 and -100 <= value <= 100 for token, value in bias)
        check(is_sound, "logit_bias must give each token id a number between -100 and 100")
        check(self.top_p > 0, "top_p must lie above 0")
        check(self.top_k >= 0, f"top_k must be 0 (off) or a positive integer, got {self.top_k}")
        check(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")
        least, most = self.min_tokens, self.max_tokens
        check(0 <= least <= most, f"min_tokens must lie between 0 and max_tokens ({most}), got {least}")
        stops, most = self.stop_strings, MAX_STOP_STRINGS
        check(len(stops) <= most, f"at most {most} stop strings are supported, got {len(stops)}")
        check(all(isinstance(s, str) and s for s in stops), "every stop string must be a non-empty string")
        ids = self.stop_token_ids or []
        is_sound = all(type(i) is int and i >= 0 for i in ids)
        check(is_sound, f"stop_token_ids must be non-negative integers, got {ids!r}")
        check(len(ids) <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids are supported")
        is_sound = self.seed is None or (type(self.seed) is int and -(2**63) <= self.seed < 2**63)
        check(is_sound, f"seed must be a 64-bit integer or None, got {self.seed!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias, whose ids are strings when they come from JSON. Raises ValueError for what is no number."""
        return tuple((int(token), float(value)) for token, value in (self.logit_bias or {}).items())


class RequestState(Enum):
    WAITING = "waiting"  # in the queue; holds no blocks
    PREFILL = "prefill"  # holds a row and blocks; its prompt is being computed
    RUNNING = "running"  # decodes
    FINISHED = "finished"


@dataclass(eq=False)  # two requests are never the same one
class Request:
    """One request from arrival to end. The scheduler owns every field below ``priority``."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float = 0.0
    slo: SLO = field(default_factory=SLO)
    stop_token_ids: frozenset[int] = frozenset()  # eos ids (unless ignored) and the user's own
    seed: int = 0
    cache_salt: str | None = None  # requests share cached prefixes only with those of the same salt
    priority: int = 0  # lower goes first

    number: int = 0  # counts up in order of arrival
    row_params: RowParams = field(default_factory=RowParams)  # what the device's sampler needs of params
    is_special: bool = False  # its steps do more than take the likeliest or a drawn token
    most_tokens: int = 0  # prompt and output together
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(init=False)  # prompt and output
    num_computed_tokens: int = 0  # prompt tokens whose prefill was launched (all of their layers or the first of them)
    num_written_tokens: int = 0  # leading tokens whose KV the host has seen completely written
    num_cached_tokens: int = 0  # prompt tokens that its first admission found in the prefix cache
    num_launched_tokens: int = 0  # output tokens launched and not yet read, on top of output_token_ids
    num_in_flight: int = 0  # tickets that touch its row or blocks
    row: int | None = None  # its place in the device's per-request tables
    block_ids: list[int] = field(default_factory=list)
    nodes: list = field(default_factory=list)  # kvcache.Node of its leading blocks; held iff it holds blocks
    num_slices: int = 0  # of its prompt, in token chunks so far
    num_overtaken: int = 0  # times another prompt was let go first while this one was under way
    has_overtaken: bool = False
    num_preemptions: int = 0
    finish_reason: str | None = None  # stop | length | abort
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it
    logprobs: list[Logprobs] = field(default_factory=list)  # of the output tokens, if params want them
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of the prompt's second token onward
    token_s: list[float] = field(default_factory=list)  # when the host saw each output token
    scheduled_s: float | None = None  # first time it left the queue
    finished_s: float | None = None

    def __post_init__(self):
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def reads_cache(self) -> bool:
        """False if all its tokens must be computed: for their logprobs, or to be counted for penalties."""
        params, is_resumed = self.row_params, self.num_preemptions > 0
        has_counts = params.repetition_penalty != 1 or (params.has_penalty and is_resumed)
        return not has_counts and self.params.prompt_logprobs is None

    def check_size(self, max_model_len: int, num_blocks: int) -> None:
        """Raises ValueError, naming both numbers, if it can never be served with this context and so many KV blocks."""
        num_prompt = len(self.prompt_token_ids)
        if num_prompt == 0:
            raise ValueError("the prompt is empty: at least one token is needed")
        if num_prompt >= max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but the context holds {max_model_len} tokens of prompt and "
                "output together: shorten the prompt"
            )
        most_tokens = min(num_prompt + self.params.max_tokens, max_model_len)
        if most_tokens > num_blocks * BLOCK_SIZE:
            raise ValueError(
                f"prompt and output may reach {most_tokens} tokens = {-(-most_tokens // BLOCK_SIZE)} KV blocks, but "
                f"the cache has {num_blocks}: shorten the prompt, lower max_tokens, or give it more memory"
            )
        if self.params.min_tokens > 0 and len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"min_tokens can hold back at most {MAX_STOP_TOKEN_IDS} stop ids, eos ids included")

    def set_row_params(self) -> None:
        params = self.params
        self.row_params = row = RowParams(
            **{name: getattr(params, name) for name in ("top_k", *RANGES)},
            seed=self.seed,
            banned_token_ids=tuple(sorted(self.stop_token_ids)) if params.min_tokens else (),
            min_position=len(self.prompt_token_ids) + params.min_tokens,
            logit_bias=params.biases,
            has_logprobs=params.logprobs is not None,
        )
        self.is_special = row.has_filter or row.has_penalty or row.has_logprobs or params.min_tokens > 0

    @property
    def num_new_tokens(self) -> int:
        """Of a matched, waiting request: the tokens that its prefill computes, at least one."""
        return max(1, self.num_tokens - len(self.nodes) * BLOCK_SIZE)

    def take_slice(self, room: int, slices: list[PrefillSlice]) -> int:
        """Appends its next slice of at most ``room`` tokens, counted as computed from now on; returns its length."""
        start = self.num_computed_tokens
        end = min(start + room, self.num_tokens)
        if end == start:
            return 0
        params = self.row_params if end == self.num_tokens else None
        writes_kv = end > self.num_written_tokens  # else all is cached, and its last token runs for the next one
        token_ids = tuple(self.token_ids[start:end])
        output_start = len(self.prompt_token_ids) if self.row_params.has_penalty else None
        wants_prompt = self.params.prompt_logprobs is not None and not self.output_token_ids
        next_ids = tuple(self.token_ids[start + 1 : end + 1]) if wants_prompt else ()
        slices.append(
            PrefillSlice(self.request_id, self.row, start, token_ids, params, writes_kv, output_start, next_ids)
        )
        self.num_computed_tokens = end
        self.num_slices += 1
        return end - start

    @property
    def due_s(self) -> float:
        """When its first token is promised for."""
        return self.arrival_s + self.slo.ttft_ms / 1e3

    @property
    def first_token_s(self) -> float | None:
        return self.token_s[0] if self.token_s else None

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED


class TokenEvent(NamedTuple):
    """What the outside learns of a request: new tokens, and at its end the reason."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # stop | length | abort
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[Logprobs, ...] = ()  # of token_ids, if the request wants them
    prompt_logprobs: tuple[Logprobs, ...] = ()  # with the first token
