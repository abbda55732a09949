"""The OpenAI-shaped bodies this server understands, and the shapes it answers in.

Every known field is honoured or refused with a plain sentence; unknown fields are ignored and logged once. Knows
nothing about the engine: ``sampling`` turns a body into SamplingParams, which does the checking of values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from nanodrift.config import SLO
from nanodrift.request import MAX_LOGPROBS, SamplingParams
from nanodrift.server.logprobs import CompletionLogprobs, Scored, TokenBytes, chat_logprobs

log = logging.getLogger("nanodrift.server")

MAX_CHOICES = 256  # of one request: prompts times n
MAX_N = 16
MAX_MESSAGES = 4096
MAX_PARTS = 256  # of one message
MAX_STOP_CHARS = 1000
MAX_ECHOED_LOGPROBS = (
    2**21
)  # numbers that one answer may say of its prompts: a likelihood costs less to ask than to send
MAX_LOGGED_FIELDS = 100  # unknown names, over the life of the process
MAX_TOKEN_ID = 2**31 - 1
SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: multiples of it lie far apart
DEFAULT_COMPLETION_TOKENS = 16
ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system"}

# Known fields that are not honoured, or not by this kind of request, each with the values that ask for nothing. Null is
# always one of them.
NOT_HONOURED: dict[str, tuple] = {
    "prompt": (),
    "messages": (),
    "max_completion_tokens": (),
    "add_special_tokens": (False,),  # of a chat: its template writes them
    "best_of": (1,),
    "use_beam_search": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "return_tokens_as_token_ids": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
}
# Fields that ask for nothing of the engine.
HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
# What a request may tell a chat template.
TEMPLATE_VARIABLES = {"enable_thinking": bool, "thinking": bool, "date_string": str}
# Fields of several types: what pydantic says of each type in turn is no help to anyone.
UNION_FIELDS = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": "a string or a list of strings",
}
_logged_fields: set[str] = set()


class ApiError(Exception):
    """An answer other than success, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SloBody(BaseModel):
    """A promise of the request's own; what it leaves out is the server's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttft_ms: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    tbt_ms: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None


class GenerationBody(BaseModel):
    """What both kinds of completion share. A null means the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N)] = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    truncate_prompt_tokens: Annotated[int | None, Field(ge=1)] = None  # this many, from the end
    return_token_ids: bool | None = None
    request_id: Annotated[str | None, Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")] = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None  # lower goes first
    slo: SloBody | None = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=256)] = None  # cached prefixes are its own

    def check_extra(self) -> None:
        """Refuses known fields that ask for something this server does not do. Raises ApiError."""
        for name, value in (self.model_extra or {}).items():
            if name in NOT_HONOURED:
                if value is not None and not any(_is_same(value, neutral) for neutral in NOT_HONOURED[name]):
                    raise ApiError(400, f"`{name}` is not supported by this server yet; leave it out", param=name)
            elif name not in HARMLESS and name not in _logged_fields and len(_logged_fields) < MAX_LOGGED_FIELDS:
                _logged_fields.add(name)
                log.warning("request field %.80r is not known and is ignored", name)

    def truncated(self, prompt: list[int]) -> list[int]:
        return prompt[-self.truncate_prompt_tokens :] if self.truncate_prompt_tokens else prompt

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Raises ApiError, in the words of SamplingParams."""
        if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in self.logit_bias or ()):
            raise ApiError(400, "`logit_bias` must map token ids to numbers", param="logit_bias")
        asked = self.logprobs_asked() | {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM's way to say off
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
        }
        try:
            params = SamplingParams(max_tokens=max_tokens, **{k: v for k, v in asked.items() if v is not None})
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if any(len(stop) > MAX_STOP_CHARS for stop in params.stop_strings):
            raise ApiError(400, f"a stop string may have at most {MAX_STOP_CHARS} characters", param="stop")
        return params

    def promise(self, default: SLO) -> SLO:
        """The request's own SLO, filled up from the server's."""
        if self.slo is None:
            return default
        return SLO(self.slo.ttft_ms or default.ttft_ms, self.slo.tbt_ms or default.tbt_ms)


class CompletionBody(GenerationBody):
    prompt: str | Texts | TokenIds | list[TokenIds]
    add_special_tokens: bool | None = None
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def is_only_echo(self) -> bool:
        """True if nothing is to follow the prompt: the engine draws one token all the same, which is not shown."""
        return bool(self.echo) and self.max_tokens == 0

    def check_echo(self, num_prompt_tokens: int) -> None:
        """Raises ApiError if the prompts' logprobs would be too many to send."""
        num_numbers = num_prompt_tokens * (self.n or 1) * (1 + 2 * (self.logprobs or 0))
        if self.echo and self.logprobs is not None and num_numbers > MAX_ECHOED_LOGPROBS:
            message = (
                f"the logprobs of {num_prompt_tokens} prompt tokens are too many for one answer: send fewer prompts"
            )
            raise ApiError(400, message, param="echo")

    def logprobs_asked(self) -> dict[str, int | None]:
        return {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one for each choice to come."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise ApiError(400, "`prompt` is an empty list: at least one prompt is needed", param="prompt")
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            raise ApiError(
                400,
                f"`prompt` holds {len(prompt)} prompts with {self.n or 1} choices each; the limit is {MAX_CHOICES}",
                param="prompt",
            )
        return prompt


def choice_seed(seed: int | None, number: int) -> int | None:
    """The seed of a request's choice ``number``: the first has the request's own, the others numbers far from it."""
    if seed is None or number == 0:
        return seed  # None: the engine counts up
    mixed = (seed + number * SEED_STEP) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(GenerationBody):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    is_only_echo: ClassVar[bool] = False

    def logprobs_asked(self) -> dict[str, int | None]:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            message = f"top_logprobs must lie between 0 and {MAX_LOGPROBS}, got {self.top_logprobs}"
            raise ApiError(400, message, param="top_logprobs")
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def template_options(self) -> dict[str, Any]:
        """What the chat template is told beside the messages. Raises ApiError."""
        options = self.chat_template_kwargs or {}
        for name, value in options.items():
            kind = TEMPLATE_VARIABLES.get(name)
            if kind is None or not isinstance(value, kind) or len(str(value)) > 100:
                known = ", ".join(f"{name} ({kind.__name__})" for name, kind in TEMPLATE_VARIABLES.items())
                raise ApiError(400, f"`chat_template_kwargs` may hold {known}", param="chat_template_kwargs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "`continue_final_message` and `add_generation_prompt` cannot both be true"
            raise ApiError(400, message, param="continue_final_message")
        if self.continue_final_message and (not self.messages or self.messages[-1].role != "assistant"):
            message = "`continue_final_message` needs a last message of the assistant's"
            raise ApiError(400, message, param="continue_final_message")
        has_prompt = not self.continue_final_message and self.add_generation_prompt is not False
        return options | {"add_generation_prompt": has_prompt}


class TokenizeBody(BaseModel):
    """Either a text or a chat, as vLLM's /tokenize takes them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: TokenIds


def plain_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as a chat template wants them: a known role, and text. Raises ApiError."""
    if not messages:
        raise ApiError(400, "`messages` is an empty list: at least one message is needed", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(400, f"a chat may have at most {MAX_MESSAGES} messages, not {len(messages)}", param="messages")
    return [{"role": _role(m.role), "content": _text(m)} for m in messages]


def _role(role: str) -> str:
    if role not in ROLES:
        raise ApiError(400, f"role {role[:40]!r} is not known; use one of {', '.join(ROLES)}", param="messages")
    return ROLES[role]


def _text(message: Message) -> str:
    if (message.model_extra or {}).get("tool_calls"):
        raise ApiError(400, "messages with `tool_calls` are not supported by this server yet", param="messages")
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise ApiError(400, f"a {message.role} message needs `content`", param="messages")
        return ""
    if isinstance(content, str):
        return content
    if len(content) > MAX_PARTS:
        raise ApiError(400, f"a message may have at most {MAX_PARTS} parts, not {len(content)}", param="messages")
    for part in content:
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"message content of type {part.type[:40]!r} is not supported: text only")
    return "\n".join(part.text for part in content)


def _is_same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def describe_invalid(errors: list[dict]) -> ApiError:
    """One sentence for what pydantic found wrong with a body."""
    error = errors[0]
    place = [part for part in error["loc"] if part != "body"]
    field = str(place[0]) if place else None
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][-1]}")
    if field in UNION_FIELDS and error["type"] != "missing":
        return ApiError(400, f"`{field}` must be {UNION_FIELDS[field]}", param=field)
    if field is None:
        return ApiError(400, "the body must be a JSON object")
    where = ".".join(str(part) for part in place[:3] if isinstance(part, int) or part.isidentifier())
    return ApiError(400, f"`{where}`: {error['msg']}", param=field)


def usage(num_prompt: int, num_output: int, num_cached: int) -> dict:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class CompletionShape:
    """How /v1/completions answers. ``logprobs`` are what ``logprobs_of`` makes of the tokens that are new."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    @staticmethod
    def logprobs_of(known: TokenBytes, skips_special: bool) -> Callable[[list[Scored]], dict]:
        return CompletionLogprobs(known, skips_special).take

    @staticmethod
    def whole_choice(index: int, text: str, logprobs: dict | None, finish_reason: str, stop_reason) -> dict:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    @staticmethod
    def chunk_choices(
        index: int, text: str, logprobs: dict | None, is_first: bool, finish_reason: str | None, stop_reason
    ) -> list[dict]:
        """The choices of the chunks that carry this piece, one chunk each."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return [choice if finish_reason is None else choice | {"stop_reason": stop_reason}]


class ChatShape:
    """How /v1/chat/completions answers: the role in a chunk of its own, and so is the finish_reason."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def logprobs_of(known: TokenBytes, skips_special: bool) -> Callable[[list[Scored]], dict]:
        return lambda tokens: chat_logprobs(tokens, known)

    @staticmethod
    def whole_choice(index: int, text: str, logprobs: dict | None, finish_reason: str, stop_reason) -> dict:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    @staticmethod
    def chunk_choices(
        index: int, text: str, logprobs: dict | None, is_first: bool, finish_reason: str | None, stop_reason
    ) -> list[dict]:
        """The choices of the chunks that carry this piece, one chunk each."""
        empty = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        choices = [empty | {"delta": {"role": "assistant", "content": ""}}] if is_first else []
        if text or logprobs or (finish_reason is None and not is_first):
            choices.append(empty | {"delta": {"content": text}, "logprobs": logprobs})
        if finish_reason is not None:
            choices.append(empty | {"finish_reason": finish_reason, "stop_reason": stop_reason})
        return choices
