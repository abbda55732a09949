"""Text to token ids and back, chat templates, and text that grows token by token.

Reads a hub model's ``tokenizer.json`` through the ``tokenizers`` package and its ``tokenizer_config.json`` (special
tokens, chat template) as plain JSON. Runs no code from the folder: templates are rendered in jinja2's immutable
sandbox.
Knows nothing about requests, HTTP or devices.

    tokenizer = Tokenizer.from_folder("nanodrift/embedded")
    tokenizer.decode(tokenizer.encode("Once upon a time"))
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from nanodrift.config import ConfigError, read_json

MAX_CHAT_CHARS = 8 * 1024 * 1024  # of a rendered chat: a template that loops cannot eat the memory
MAX_TEMPLATE_STEPS = 100_000  # numbers a template may count through
MAX_PARTIAL_TOKENS = 3  # of a UTF-8 character that lacks its last byte
MAX_PENDING_TOKENS = 8  # tokens that stay undecodable for longer are not the beginning of a character
CONTEXT_TOKENS = 6  # kept as context, so that a first token keeps its leading space
UNDECODABLE = "\ufffd"


class MissingTokenizer(ConfigError):
    """The folder has no tokenizer.json; a model served without one takes token-id prompts only."""


class ChatError(ValueError):
    """These messages cannot be rendered; the text says why and is meant for the person who sent them."""


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict | None = None, chat_template: str | None = None):
        backend.no_truncation()
        backend.no_padding()
        settings = settings or {}
        self._backend = backend
        names = ("bos_token", "eos_token", "pad_token")
        self.bos_token, self.eos_token, self.pad_token = (_token_text(settings.get(name)) for name in names)
        self.bos_token_id = self.token_id(self.bos_token)
        self.eos_token_id = self.token_id(self.eos_token)
        self._must_add_bos = settings.get("add_bos_token") is True and self.bos_token_id is not None
        self.chat_template = chat_template
        self._template = _compile_template(chat_template) if chat_template else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Raises MissingTokenizer without a tokenizer.json, ConfigError when a file there cannot be read."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise MissingTokenizer(
                f"no tokenizer.json in {folder}: this engine reads that format only. Fetch the file from the model's "
                "page, or convert an older format with transformers' save_pretrained(); without it only token ids can "
                "be served"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from error
        names = ("special_tokens_map.json", "tokenizer_config.json")  # the latter wins
        older, settings = (read_json(folder / name, is_needed=False) for name in names)
        return cls(backend, older | settings, _find_chat_template(folder, settings))

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows, added tokens included; a model's table may be padded to more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def token_texts(self, token_ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's own spelling of each token, which is not always text; None for ids without a token."""
        return [self._backend.id_to_token(token_id) for token_id in token_ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens`` also what the model expects around a text, such as BOS."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can carry, becomes "?"
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._must_add_bos and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **options) -> str:
        """The text a chat becomes under the model's template. Raises ChatError without a template or if it refuses.

        ``messages`` are dicts with ``role`` and ``content`` (a string); ``options`` are extra template variables.
        """
        if self._template is None:
            raise ChatError("this model has no chat template; use /v1/completions with a plain prompt")
        variables = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        variables = {name: text or "" for name, text in variables.items()}
        parts, num_chars = [], 0
        try:
            for part in self._template.generate(
                **(variables | options),
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                range=_bounded_range(),
            ):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_CHAT_CHARS:
                    raise ChatError(f"the rendered chat is longer than {MAX_CHAT_CHARS} characters")
        except ChatError:
            raise
        except jinja2.TemplateError as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # foreign code: whatever it raises is an answer about these messages
            kind = type(error).__name__
            raise ChatError(f"the model's chat template failed on these messages ({kind}: {error})") from error
        return "".join(parts)

    def encode_chat(self, messages: list[dict], **options) -> list[int]:
        """Token ids of a chat. The template writes BOS itself, so none is added here."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


def load_tokenizer(folder: Path, load_format: str) -> Tokenizer | None:
    """A model folder's tokenizer; None where it has none, which only made-up weights may do without."""
    try:
        return Tokenizer.from_folder(folder)
    except MissingTokenizer:
        if load_format != "dummy":
            raise
        return None


class Detokenizer:
    """Turns one request's output tokens into text as they come; O(1) work a token.

    A token's text depends on its neighbours (a leading space, half a UTF-8 character), so new text is the difference
    between decoding a short window with and without the new tokens. Text is given out once it is certain: whole
    characters only, and no suffix that may still grow into a stop string. Of several stop strings the one that is
    complete first ends the text, so the result does not depend on how the tokens were grouped.

    ``prompt_token_ids`` lends context from before the first token; ``min_tokens`` output tokens are not searched.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Iterable[str] = (),
        include_stop: bool = False,
        *,
        prompt_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ):
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._include_stop = include_stop
        self._min_tokens = min_tokens if self._stops else 0
        self._skip_special_tokens = skip_special_tokens
        self._num_tokens = 0
        self._set_context(list(prompt_token_ids[-CONTEXT_TOKENS - MAX_PARTIAL_TOKENS :]))
        self._pending: list[int] = []  # not given out yet
        self._held = ""  # decoded; its whole may be the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that is now safe to show; empty after a stop string."""
        if self.stopped_by is not None:
            return ""
        num_unsearched = self._min_tokens - self._num_tokens
        self._num_tokens += len(token_ids)
        if num_unsearched > 0:
            text = self._grow(token_ids[:num_unsearched])
            return text + self._release(self._grow(token_ids[num_unsearched:]))
        return self._release(self._grow(token_ids))

    def finish(self) -> str:
        """The rest that was held back: nothing more will come."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._grow((), is_last=True))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens) if token_ids else ""

    def _set_context(self, token_ids: list[int]) -> None:
        """Keeps the end of what was given out, cut where no character is torn apart."""
        for length in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_PARTIAL_TOKENS + 1):
            self._context = token_ids[-length:]
            self._context_text = self._decode(self._context)
            if length >= len(token_ids) or not self._context_text.startswith(UNDECODABLE):
                return

    def _grow(self, token_ids: Sequence[int], is_last: bool = False) -> str:
        """The text the window gained, as far as it consists of whole characters."""
        self._pending.extend(token_ids)
        if not self._pending:
            return ""
        for num_left_out in range(MAX_PARTIAL_TOKENS + 1):  # leave out a character that still lacks its last byte
            given = self._pending[: len(self._pending) - num_left_out]
            text = self._decode(self._context + given)
            if is_last or not text.endswith(UNDECODABLE):
                break
        else:
            if len(self._pending) <= MAX_PENDING_TOKENS:
                return ""
            given = list(self._pending)  # no character is that long: these bytes really are not UTF-8
            text = self._decode(self._context + given)
        gained = text[len(self._context_text) :]
        if gained:
            self._set_context(given)
        if gained or len(self._pending) > MAX_PENDING_TOKENS:  # the latter: special tokens, invisible and no context
            self._pending = self._pending[len(given) :]
        return gained

    def _release(self, text: str) -> str:
        """Adds ``text`` to what is held and returns the part that no stop string can reach any more."""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            end, start, self.stopped_by = min(ends)
            text, self._held = self._held[: end if self._include_stop else start], ""
            return text
        cut = len(self._held) - max(_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _token_text(value: str | dict | None) -> str | None:
    """Special tokens are written as a string or as an object with a ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def _find_chat_template(folder: Path, settings: dict) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, where the template is a string or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default", next(iter(named.values()), None))
    return template


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja2's, and a product or power cannot be made that takes the memory or the time of everybody."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator: str, left, right):
        factors = [
            part if isinstance(part, int) else len(part) for part in (left, right) if not isinstance(part, float)
        ]
        if operator == "**" or max(factors, default=0) > MAX_TEMPLATE_STEPS:
            raise jinja2.sandbox.SecurityError(f"{operator} of such values is not allowed in a template")
        return super().call_binop(context, operator, left, right)


def _bounded_range():
    """A ``range`` for one rendering, whose numbers are limited over all calls together, so that nested loops end."""
    num_left = MAX_TEMPLATE_STEPS

    def bounded(*arguments: int) -> range:
        nonlocal num_left
        numbers = range(*arguments)
        num_left -= len(numbers)
        if num_left < 0:
            raise jinja2.sandbox.SecurityError("the template counts too far")
        return numbers

    return bounded


def _compile_template(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the model's chat template cannot be read: {error}") from error
