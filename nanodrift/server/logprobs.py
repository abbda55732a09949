"""Logprobs in OpenAI's two shapes: of chat answers, and the older one of completions, which may tell of the prompt too.

They are those of the model's own distribution, before temperature, penalties, bias and filters, as vLLM's by default.
A token is spelled as the text it stands for; one that stands for a part of a character, as ``bytes:\\xe4\\xbd``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanodrift.server.tokenizer import UNDECODABLE, Tokenizer

LOWEST = -9999.0  # JSON has no infinity
DIGITS = 6
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
MAX_KNOWN_TOKENS = 200_000


@dataclass(frozen=True)
class Scored:
    """A token of the answer or of an echoed prompt. ``logprob`` is None where there is none: of a prompt's first."""

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()  # likeliest first


def scored(token_ids: Sequence[int], logprobs: Sequence[list]) -> list[Scored]:
    """``logprobs`` as plan.Logprobs come over the wire: [logprob, top ids, their logprobs] for each token."""
    return [
        Scored(token_id, _finite(own), [*zip(ids, map(_finite, tops), strict=True)])
        for token_id, (own, ids, tops) in zip(token_ids, logprobs, strict=True)
    ]


def _finite(logprob: float) -> float:
    return round(logprob, DIGITS) if logprob > LOWEST else LOWEST  # a NaN becomes the lowest too


def _alphabet() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """token id -> the bytes it stands for within a text; without a tokenizer, its number."""

    ALPHABET = _alphabet()

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        if tokenizer is not None:
            self._before = tokenizer.encode("a", add_special_tokens=False)  # a token's text begins behind another's
            self._before_text = tokenizer.decode(self._before)

    def __getitem__(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            if len(self._known) >= MAX_KNOWN_TOKENS:
                self._known.clear()
            found = self._known[token_id] = self._find(token_id)
        return found

    def is_special(self, token_id: int) -> bool:
        """True if the token is left out of texts that leave out special tokens."""
        tokenizer = self._tokenizer
        return tokenizer is not None and bool(self[token_id]) and not tokenizer.decode([token_id])

    def _find(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return f" {token_id}".encode()
        text = self._tokenizer.decode([*self._before, token_id], skip_special_tokens=False)[len(self._before_text) :]
        spelling = self._tokenizer.token_texts([token_id])[0] or ""
        if UNDECODABLE in text:
            if match := BYTE_TOKEN.fullmatch(spelling):
                return bytes([int(match[1], 16)])
            if all(char in self.ALPHABET for char in spelling):
                return bytes(self.ALPHABET[char] for char in spelling)
        return text.encode()


def spell(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(tokens: Sequence[Scored], known: TokenBytes) -> dict:
    def entry(token_id: int, logprob: float) -> dict:
        return {"token": spell(known[token_id]), "logprob": logprob, "bytes": list(known[token_id])}

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*candidate) for candidate in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Keeps count of where in a choice's text its tokens begin, from chunk to chunk."""

    def __init__(self, known: TokenBytes, skips_special: bool):
        """``skips_special``: the text leaves special tokens out."""
        self._known, self._skips_special = known, skips_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, tokens: Sequence[Scored]) -> dict:
        columns: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in tokens:
            columns["tokens"].append(spell(self._known[one.token_id]))
            columns["token_logprobs"].append(one.logprob)
            columns["top_logprobs"].append(self._candidates(one))
            columns["text_offset"].append(self._offset)
            if not (self._skips_special and self._known.is_special(one.token_id)):
                self._offset += len(self._decoder.decode(self._known[one.token_id]))
        return columns

    def _candidates(self, one: Scored) -> dict[str, float] | None:
        """The likeliest tokens, and the one that stands there; of two that are spelled alike the likelier."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(spell(self._known[token_id]), logprob)
        return found
