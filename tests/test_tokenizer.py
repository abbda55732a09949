"""Tokenizer files, chat templates, and the detokenizer's promise: whole characters, no text that may belong to a stop.

Two small tokenizers are made here, of the two kinds that exist: byte-level BPE (GPT-2, Llama-3, Qwen) and SentencePiece
style with a leading-space marker and byte fallback (Llama-2, Mistral).
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from nanodrift.config import ConfigError
from nanodrift.server.tokenizer import ChatError, Detokenizer, MissingTokenizer, Tokenizer

CORPUS = ["the little fox ran over the hill and the sun was warm", "tea for two, tea for the fox: 你好 👋🏽 é"] * 4
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ["user", "assistant", "system"] %}{{ raise_exception("unknown role " + m.role) }}{% endif %}
<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def leading_space_backend() -> Backend:
    """Words as ``▁word``; whatever is not in the vocabulary as one token a byte."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in [
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.,!",
        "▁the",
        "▁fox",
        "▁ran",
        "th",
        "he",
        "the",
        "ox",
        "fox",
        "ra",
        "ran",
    ]:
        vocab.setdefault(piece, len(vocab))
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("o", "x"), ("f", "ox"), ("r", "a"), ("ra", "n")]
    merges += [("▁", "the"), ("▁", "fox"), ("▁", "ran")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


SETTINGS = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
BYTE_LEVEL = Tokenizer(byte_level_backend(), SETTINGS, TEMPLATE)
LEADING_SPACE = Tokenizer(leading_space_backend(), SETTINGS)
TEXTS = st.text(alphabet="the fox,ran.é你好👋🏽\u200d\n ab", max_size=40)
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LEADING_SPACE], ids=["byte_level", "leading_space"])


def groups_of(draw, items: list) -> list[list]:
    groups = []
    while items:
        size = draw(st.integers(1, 6))
        groups.append(items[:size])
        items = items[size:]
    return groups


def cut_reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads the text character by character: the first stop string that is complete ends it, the longest if several."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


@BOTH
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_text_equals_decoding_at_once(tokenizer, data):
    text = data.draw(TEXTS)
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(group) for group in groups_of(data.draw, ids)]
    assert not any("\ufffd" in piece for piece in pieces)  # half a character is never shown
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@BOTH
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_stop_strings_cut_at_the_first_match_however_tokens_are_grouped(tokenizer, data):
    ids = tokenizer.encode(data.draw(TEXTS), add_special_tokens=False)
    stops = data.draw(st.lists(st.text(alphabet="the fox,ran.é你", min_size=1, max_size=5), min_size=1, max_size=3))
    expected, stopped_by = cut_reference(tokenizer.decode(ids), stops)
    detokenizer, shown = Detokenizer(tokenizer, stops), ""
    for group in groups_of(data.draw, ids):
        shown += detokenizer.push(group)
        assert expected.startswith(shown)  # nothing shown is ever taken back
    assert (shown + detokenizer.finish(), detokenizer.stopped_by) == (expected, stopped_by)


@BOTH
@settings(max_examples=100, deadline=None, derandomize=True)
@given(before=st.text(alphabet="the fox é你", min_size=1, max_size=20), after=TEXTS)
def test_a_prompt_lends_its_context(tokenizer, before, after):
    """Prompt plus completion is the text of all ids, leading space included."""
    ids = tokenizer.encode(before + after, add_special_tokens=False)
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if "\ufffd" in prompt:
            continue
        detokenizer = Detokenizer(tokenizer, prompt_token_ids=ids[:cut])
        pieces = [detokenizer.push([token]) for token in ids[cut:]]
        assert prompt + "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


def test_leading_space_of_a_first_token():
    the, fox = LEADING_SPACE.token_id("▁the"), LEADING_SPACE.token_id("▁fox")
    assert Detokenizer(LEADING_SPACE, prompt_token_ids=[the]).push([fox]) == " fox"
    assert Detokenizer(LEADING_SPACE).push([fox]) == "fox"


def test_text_that_may_begin_a_stop_string_is_held_and_let_go():
    def ids(text):
        return BYTE_LEVEL.encode(text, add_special_tokens=False)

    detokenizer = Detokenizer(BYTE_LEVEL, ["\n\nUser:"])
    assert detokenizer.push(ids("tea\n")) == "tea"
    assert detokenizer.push(ids("\nUs")) == ""
    assert detokenizer.push(ids("ual")) == "\n\nUsual"
    assert detokenizer.push(ids(" ok\n\nUser: me")) == " ok"
    assert detokenizer.stopped_by == "\n\nUser:"
    assert detokenizer.push(ids("more")) == "" and detokenizer.finish() == ""

    shown = Detokenizer(BYTE_LEVEL, ["fox"], include_stop=True)
    assert shown.push(ids("a fox ran")) == "a fox"
    held = Detokenizer(BYTE_LEVEL, ["fox"])
    assert held.push(ids("a fo")) == "a " and held.finish() == "fo" and held.stopped_by is None


def test_stop_strings_are_not_searched_before_min_tokens():
    ids = [BYTE_LEVEL.token_id(char) for char in "fxfx"]
    detokenizer = Detokenizer(BYTE_LEVEL, ["x"], min_tokens=3)
    assert detokenizer.push(ids[:2]) + detokenizer.push(ids[2:]) == "fxf"
    assert detokenizer.stopped_by == "x"


def test_undecodable_bytes_and_invisible_tokens_do_not_pile_up():
    lead = BYTE_LEVEL.token_id("ä")  # the byte 0xE4, which begins a three-byte character
    fox = BYTE_LEVEL.encode("fox", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL)
    text = "".join(detokenizer.push([token]) for token in [lead] * 100)
    assert len(detokenizer._pending) <= 9 and 90 <= len(text) <= 100
    assert detokenizer.push(fox).endswith("fox")
    for _ in range(100):
        assert detokenizer.push([BYTE_LEVEL.eos_token_id, 100_000]) == ""
    assert len(detokenizer._pending) <= 10
    assert detokenizer.push(fox) == "fox"
    assert Detokenizer(BYTE_LEVEL, skip_special_tokens=False).push([BYTE_LEVEL.eos_token_id]) == "</s>"


def save(folder, settings: dict, backend=None, jinja: str | None = None):
    (backend or byte_level_backend()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return Tokenizer.from_folder(folder)


def test_a_folder_round_trips_and_special_tokens_are_added_once(tmp_path):
    tokenizer = save(tmp_path, SETTINGS | {"add_bos_token": True})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (0, 1, 300)
    ids = tokenizer.encode("the fox 你好")
    assert ids[0] == 0 and 0 not in ids[1:] and tokenizer.decode(ids) == "the fox 你好"
    assert tokenizer.encode("the fox 你好", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<s>")

    with_template = save(tmp_path, SETTINGS | {"add_bos_token": True}, backend=leading_space_backend())
    assert with_template.encode("the fox")[:2].count(1) == 1  # the post-processor had added it already


def test_half_a_surrogate_pair_is_no_text():
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\ud800b")) == "a?b"


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    assert len(save(tmp_path, {}, backend=backend).encode("the fox ran over the hill and on")) not in (3, 64)


def test_chat_templates_from_each_place(tmp_path):
    chat = [{"role": "user", "content": "tea?"}]
    as_string = save(tmp_path, SETTINGS | {"chat_template": TEMPLATE})
    assert as_string.render_chat(chat) == "<s><|user|>tea?</s><|assistant|>"
    assert as_string.render_chat(chat, add_generation_prompt=False) == "<s><|user|>tea?</s>"
    assert as_string.encode_chat(chat)[:2] == as_string.encode("<s><|", add_special_tokens=False)[:2]  # BOS once
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes {{ messages|length }}"}]
    assert save(tmp_path, SETTINGS | {"chat_template": named}).render_chat(chat) == "yes 1"
    assert save(tmp_path, SETTINGS | {"chat_template": "no"}, jinja="file {{ x }}").render_chat(chat, x=3) == "file 3"


def test_template_helpers():
    tokenizer = Tokenizer(
        byte_level_backend(), {}, "{{ messages | tojson }}|{{ strftime_now('%Y') | length }}|{{ bos_token }}"
    )
    assert tokenizer.render_chat([{"content": "<é&'>"}]) == '[{"content": "<é&\'>"}]|4|'


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),  # the sandbox
        ("{{ messages.append(1) }}", "refuses"),  # immutable
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "counts too far"),
        ("{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}", "counts too far"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
        ("{{ messages[0].content + 1 }}", "failed on these messages"),
    ],
)
def test_hostile_templates_are_chat_errors(template, message):
    with pytest.raises(ChatError, match=message):
        Tokenizer(byte_level_backend(), {}, template).render_chat([{"role": "user", "content": "hi"}])


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingTokenizer, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ConfigError, match="chat template cannot be read"):
        save(tmp_path, {"chat_template": "{% if %}"})
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)
