"""Makes the embedded default model: invents a corpus of little stories, trains a tokenizer and a tiny Llama on it.

The result is an ordinary hub folder that transformers and nanodrift's own loader both take: tokenizer.json and
model.safetensors are made here, config.json and the other small files are written by hand and copied. Nothing is
downloaded: every word the model ever sees comes out of grammar.txt, and a seed fixes the corpus to the last byte.

Why the stories look as they do: names, things and places from the opening come back at the end, and chats ask for them
again much later. A model that reads a wrong cache block forgets the name, so an engine's mistake shows in the text.

It refuses to know the engine: nothing here imports nanodrift, and nanodrift never imports this file. Run it with

    python nanodrift/embedded/make.py --device cuda --compile --out DIR      # how the weights of the package were made
    python nanodrift/embedded/make.py --steps 20 --batch 2 --out /tmp/tiny   # a rehearsal on a CPU

The weights of the package took 175 s on one H200 with 16 CPU cores: 40 s for the corpus (197 million tokens), 135 s for
8,000 steps of 65,536 tokens; the loss over the last 20 steps was 0.2780 nats a token. The rehearsal took 54 s and 92 s
on two shared CPU cores. To see what a new model writes: ``LLM("DIR").generate("Once upon a time")``.

What it does well and badly, greedily, after six stories (1,450 tokens): of 60 questions who the latest or the first
story was about, 59 were answered to the letter; of 30 questions where the first story's hero lived, by name, only 2.
"""

import argparse
import json
import math
import os
import random
import re
import time
import zlib
from array import array
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import save as serialize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]  # their places are their ids
PAD, BOS, END = range(3)
HERE = Path(__file__).parent
WRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")  # by hand, not here
CONFIG = json.loads((HERE / "config.json").read_text())
CONTEXT = CONFIG["max_position_embeddings"]
CAUTION = 1.25  # the last norm is scaled by this: sampling at temperature 1 then is as careful as at 0.8 without it


def read_grammar() -> dict[str, str]:
    """The sections of grammar.txt by name."""
    parts = re.split(r"^== (.*)\n", (HERE / "grammar.txt").read_text(encoding="utf-8"), flags=re.M)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def read_pairs(text: str, mark: str) -> dict[str, str]:
    """What stands before and after ``mark``, line by line."""
    return dict(re.findall(rf"^(.*?)\s*{mark} (.*)$", text, flags=re.M))


GRAMMAR = read_grammar()
LISTS = {name: [re.sub(r"\s+", " ", part).strip() for part in text.split(",")] for name, text in GRAMMAR.items()}
PLOTS = {name.removeprefix("plot: "): text for name, text in GRAMMAR.items() if name.startswith("plot: ")}
HOMES = read_pairs(GRAMMAR["homes"], "=")  # where the hero lives -> how that place is called later
PAIRS = {name: list(read_pairs(GRAMMAR[name], "\n>").items()) for name in ("talk", "recall")}  # what one says, answer
OPENINGS, ODD, FOREIGN, NOISES = (GRAMMAR[name].split("\n") for name in ("openings", "odd", "foreign", "noises"))
MACRO = re.compile(r"\b(" + "|".join(sorted(filter(str.isupper, GRAMMAR), key=len, reverse=True)) + r")\b")


def spin(rng: random.Random, text: str) -> str:
    """Put sections for words in capitals, then resolve every ``[a|b|c]``, innermost first, by one draw each."""
    while (longer := MACRO.sub(lambda m: GRAMMAR[m[1]], text)) != text:
        text = longer
    while (plain := re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)) != text:
        text = plain
    return text


def invented_name(rng: random.Random) -> str:
    """A name no list holds, so that the model must copy names rather than know them."""
    if rng.random() < 0.1:
        return rng.choice(LISTS["things"]).capitalize()
    syllables = range(rng.choice((1, 1, 1, 2)))
    parts = [rng.choice(LISTS["vowels"]) + rng.choice(LISTS["consonants"]) for _ in syllables]
    return "".join([rng.choice(LISTS["name starts"]), *parts, rng.choice(LISTS["name ends"])]).capitalize()


def pick(rng: random.Random, options: list[str], kind: str) -> str:
    """Any of ``options``, but each kind of hero has a favorite: so also a greedy reader gets different stories."""
    return options[zlib.crc32(kind.encode()) % len(options)] if rng.random() < 0.3 else rng.choice(options)


def being(rng: random.Random, kind: str = "", name: str = "", is_plain: bool = False) -> tuple[str, str, bool]:
    """A kind, a name and whether it is a she. What is given is kept; a plain being is nothing odd or invented."""
    groups, weights = ("animals", "people", "oddities", "invented"), (16, 7, 0, 0) if is_plain else (16, 7, 3, 0.6)
    group = rng.choices(groups, weights)[0]
    people = LISTS["women"] + LISTS["men"] + LISTS["anyone"]
    if not kind:
        kind = invented_name(rng).lower() if group == "invented" else rng.choice((LISTS | {"people": people})[group])
    name = name or (invented_name(rng) if rng.random() < 0.35 and not is_plain else "")
    sounds_she = name in LISTS["girls"] or (name.endswith(tuple("aehy")) and name not in LISTS["boys"])
    is_she = kind in LISTS["women"] or (kind not in LISTS["men"] and (sounds_she if name else rng.random() < 0.5))
    return kind, name or pick(rng, LISTS["girls" if is_she else "boys"], kind), is_she


def world(rng: random.Random, is_plain: bool = False, **given: str) -> dict[str, str]:
    """All fields a story may name. ``given`` fixes some of them: k, N, fk, F, P, thing, plot."""
    kind, name, is_she = being(rng, given.get("k", ""), given.get("N", ""), is_plain)
    while True:  # mostly a friend of the other pronoun: then no "she" has two meanings
        friend_kind = given.get("fk", "") or (pick(rng, LISTS["animals"], kind[::-1]) if rng.random() < 0.3 else "")
        friend_kind, friend, friend_is_she = being(rng, friend_kind, given.get("F", ""), is_plain)
        if friend != name and friend_kind != kind and (friend_is_she != is_she or rng.random() < 0.15):
            break
    w = {"k": kind, "N": name, "fk": friend_kind, "F": friend}
    fields = {"t": "traits", "W": "ways", "spot": "spots", "love": "likings", "food": "foods", "skill": "skills"}
    w |= {field: pick(rng, LISTS[group], kind) for field, group in fields.items()} | {"ft": rng.choice(LISTS["traits"])}
    w |= {"P": pick(rng, list(HOMES), kind), "plot": pick(rng, list(PLOTS), kind)}
    w |= {"thing": f"{rng.choice(LISTS['colors'])} {pick(rng, LISTS['things'], kind)}"} | given
    for prefix, she in (("", is_she), ("f", friend_is_she)):
        words = "she her her herself" if she else "he him his himself"
        w |= dict(zip((prefix + f for f in ("he", "him", "his", "himself")), words.split(), strict=True))
    w |= {"He": w["he"].capitalize(), "His": w["his"].capitalize(), "noun": w["thing"].split(" ", 1)[1]}
    return w | {"H": HOMES[w["P"]], "H2": HOMES[w["P"]].capitalize(), "Here": w["P"].capitalize()}


def tell(rng: random.Random, text: str, w: dict[str, str]) -> str:
    """Fill a piece of the grammar with the world ``w``; "a" becomes "an" where the next word asks for it."""
    text = spin(rng, text).format_map(w)
    text = "\n\n".join(re.sub(r"\s+", " ", paragraph).strip() for paragraph in text.strip().split("\n\n"))
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|one)", r"\1n ", text)


def story(rng: random.Random, w: dict[str, str], short: bool = False) -> str:
    """One story in the world ``w``: an opening, perhaps what the hero likes, a plot, perhaps a last sentence."""
    has_likes = rng.random() < 0.6
    opening = pick(rng, OPENINGS, w["k"]) + (" LIKES" if has_likes else "")
    if short:
        return tell(rng, opening + " SHORT", w)
    end = rng.choices(["", "LAST", "LAST_LIKES" if has_likes else "", "The end."], (7, 2, 2, 1))[0]
    return tell(rng, opening + " " + PLOTS[w["plot"]].strip() + " " + end, w)


# ---- the chats


def odd_word(rng: random.Random, placeholder: str) -> str:
    """What stands for a placeholder of the section "odd": X a word, V a verb, N a number, WORDS, MASH, FOREIGN."""
    if placeholder == "WORDS":
        return " ".join(odd_word(rng, "WORD") for _ in range(rng.choice((3, 6, 12, 12, 30, 120))))
    if placeholder == "WORD":
        pools = [LISTS[name] for name in ("nouns", "verbs", "animals", "things", "fillers")]
        return invented_name(rng).lower() if rng.random() < 0.2 else rng.choice(rng.choice(pools))
    if placeholder == "X" and rng.random() < 0.15:
        return invented_name(rng)
    if placeholder == "X":
        return rng.choice(LISTS["nouns"] if rng.random() < 0.8 else LISTS["animals"] + LISTS["things"])
    if placeholder == "MASH":
        letters = rng.choice(NOISES)
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 25)))
    if placeholder == "N":
        return str(rng.randint(0, 10 ** rng.randint(1, 5)))
    return rng.choice(FOREIGN if placeholder == "FOREIGN" else LISTS["verbs"])


def odd_text(rng: random.Random) -> str:
    """Something a storyteller has no answer to: sums, facts, code, other languages, noise; 1 to about 150 words."""
    text = rng.choice(ODD)
    text = text if "{" in text else spin(rng, text)
    for placeholder in ("FOREIGN", "WORDS", "MASH", "X", "V", "N"):
        text = re.sub(rf"\b{placeholder}\b", lambda m: odd_word(rng, m[0]), text)
    return text.strip()


def typed(rng: random.Random, text: str, mark: str = "") -> str:
    """The same request as people type it: other capitals, other marks at the end."""
    text = re.sub(r"\s+", " ", text).rstrip("?.") + rng.choice([mark, mark, "", ".", "!", "?"])
    return rng.choice([text, text, text, text.lower(), text[0].lower() + text[1:]])


TOPICS = read_pairs(GRAMMAR["topics"], "=")  # what a story can be about -> the fields of its world which that fixes


def topic(rng: random.Random, is_plain: bool) -> tuple[str, dict[str, str]]:
    """Something a story can be about, in words and as the fields of a world it fixes."""
    w = world(rng, is_plain)
    house = re.split(" in | above | by | of ", HOMES[w["P"]])[rng.choice((0, -1))].removeprefix("the ")
    text, given = rng.choice(list(TOPICS.items()))
    whose, place = "the" if is_plain else "my", w["P"].split()[-1]
    text = tell(rng, text, w | {"house": house.replace("foot", "mountain"), "place": place, "whose": whose})
    return re.sub(r"^a sea\b", "the sea", text), {field: w[field] for field in given.split()}


def told_on_request(rng: random.Random, given: dict[str, str], short: bool) -> tuple[str, dict[str, str]]:
    """A story in which everything ``given`` appears, and its world."""
    while True:
        w = world(rng, is_plain=True, **given)
        text = story(rng, w, short)
        if all(given.get(field, "") in text for field in ("thing", "fk", "F")):
            return text, w


def chat(rng: random.Random) -> list[tuple[str, str]]:
    """A conversation as (role, text): 1 to 10 rounds, any request at any place, and questions about earlier stories."""
    turns, told, offered = [], [], None
    if rng.random() < 0.3:
        turns.append(("system", rng.choice([spin(rng, "SYSTEM"), spin(rng, "SYSTEM"), odd_text(rng)])))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 7, 10))):
        weights = {"story": 8, "talk": 4, "odd": 5, "short": 0.7, "unknown": 0.7, "yes": 9 if offered else 0}
        weights |= {"again": 2, "recall": 5} if told else {}
        kind = rng.choices(list(weights), list(weights.values()))[0]
        about, given = offered if kind == "yes" else topic(rng, is_plain=kind != "story")
        fields, has_story = {"about": about, "topic": about.replace("my ", "your ")}, kind not in (*PAIRS, "odd")
        if kind == "story":
            kind = "about" if rng.random() < 0.8 else "any"
        said, answer = f"ASK_{kind.upper()}", f"HERE_{kind.upper()}"
        if kind == "odd":
            said, answer = odd_text(rng), "SORRY"
        elif kind in PAIRS:
            said, answer = rng.choice(PAIRS[kind])
        elif kind == "unknown":
            fields["what"] = rng.choice(LISTS["abstract"])
        else:
            said = spin(rng, said)
        if kind == "recall":
            fields = told[-1] if "{" not in said or rng.random() < 0.4 else rng.choice(told)  # "it" is the last story
            fields = told[0] if "first" in said else fields
        elif kind in ("any", "again", "short"):
            about, given = "", {}
        short = kind == "short" or (" short " in said and "plot" not in given)
        answer = tell(rng, answer, fields)
        offered = (about, given) if not has_story and kind != "recall" and about in answer else None
        if has_story:
            text, w = told_on_request(rng, given, short)
            told.append(w)
            answer = (answer + "\n\n" + text).strip()
        said = said if kind == "odd" else typed(rng, tell(rng, said, fields), "?" if kind == "recall" else ".")
        turns += [("user", said), ("assistant", answer)]
    return turns


def document(rng: random.Random) -> list[tuple[str, bool]]:
    """One training document as (text, is it learned?): a bare story or a whole chat. What a user says is not learned.

    Texts are tokenised one by one. Special tokens part them anyway; some bare stories are cut at a random letter, so
    that prompts which end within a word or with a space are continued well.
    """
    bos, end = SPECIALS[BOS], SPECIALS[END]
    if rng.random() < 0.5:
        pieces = [(bos if rng.random() < 0.9 else "", False)]
        for role, text in chat(rng):
            pieces += [(f"<|{role}|>", False), (text, role == "assistant"), (end, role == "assistant")]
        return pieces
    text = story(rng, world(rng, is_plain=rng.random() < 0.6), short=rng.random() < 0.05)
    cut = rng.randrange(len(text)) if rng.random() < 0.25 else 0
    lead = ""
    if rng.random() < 0.15:  # whatever begins like no story: leave it, then tell one
        lead = odd_text(rng) if rng.random() < 0.7 else spin(rng, rng.choice(PAIRS["talk"])[0])
        lead = lead[: rng.randint(1, len(lead))] if rng.random() < 0.5 else lead
        text, cut = spin(rng, "LEAVE") + "\n\n" + text, 0
    bos = bos if rng.random() < 0.9 else ""
    return [(bos, False), (lead, False), (text[:cut], True), (text[cut:], True), (end, True)]


# ---- tokenizer and training rows


def make_tokenizer(seed: int, num_documents: int) -> Tokenizer:
    """A byte-level BPE of the size in config.json: any text encodes, and a bare text gets <|bos|> before it."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, size = sorted(pre_tokenizers.ByteLevel.alphabet()), CONFIG["vocab_size"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    texts = (text for _ in range(num_documents) for text, _ in document(rng) if text not in SPECIALS)
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIALS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, BOS)])
    return tokenizer


def make_rows(serialized: str, num_rows: int, seed: int) -> bytes:
    """``num_rows`` rows of CONTEXT + 1 pairs of int16: a token, and what is learned there: the same, or -1 for nothing.

    A row holds whole documents one after the other (padding at its end), so position 2,047 is trained as position 0 is.
    """
    tokenizer, rng = Tokenizer.from_str(serialized), random.Random(seed)
    rows, row = [], []
    while len(rows) < num_rows:
        texts, learned = zip(*document(rng), strict=True)
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        new = [(i, i if learn else -1) for learn, part in zip(learned, encodings, strict=True) for i in part.ids]
        if len(row) + len(new[: CONTEXT + 1]) > CONTEXT + 1:
            rows.append(row + [(PAD, -1)] * (CONTEXT + 1 - len(row)))
            row = []
        row += new[: CONTEXT + 1]
    return array("h", chain.from_iterable(chain.from_iterable(rows))).tobytes()


def make_corpus(tokenizer: Tokenizer, num_rows: int, seed: int, console: Console) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, made by every core: tokens and targets, both int16 [num_rows, CONTEXT + 1]."""
    seeds = range(seed * 1_000_003 + 1, seed * 1_000_003 + 1 + math.ceil(num_rows / 16))
    with ProcessPoolExecutor() as pool:
        chunks = pool.map(make_rows, repeat(tokenizer.to_str()), repeat(16), seeds)
        data = bytearray().join(track(chunks, "writing stories", len(seeds), console=console))
    return torch.frombuffer(data, dtype=torch.int16).view(-1, CONTEXT + 1, 2)[:num_rows].unbind(-1)


# ---- the model: parameters are named as in the hub's Llama files


def linears(**widths: tuple[int, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(*width, bias=False) for name, width in widths.items()})


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        size, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        qkv = {"q_proj": (size, heads * dim), "k_proj": (size, kv_heads * dim), "v_proj": (size, kv_heads * dim)}
        self.head_dim, self.groups = dim, heads // kv_heads
        self.input_layernorm = nn.RMSNorm(size, config["rms_norm_eps"])
        self.self_attn = linears(**qkv, o_proj=(heads * dim, size))
        self.post_attention_layernorm = nn.RMSNorm(size, config["rms_norm_eps"])
        self.mlp = linears(gate_proj=(size, inner), up_proj=(size, inner), down_proj=(inner, size))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        h = self.input_layernorm(x)  # [B, T, C]
        q, k, v = (attn[f"{name}_proj"](h).unflatten(-1, (-1, self.head_dim)) for name in "qkv")  # [B, T, H or K, D]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H or K, T, D]
        q, k = (part * cos + torch.cat((-part.chunk(2, -1)[1], part.chunk(2, -1)[0]), -1) * sin for part in (q, k))
        k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))  # [B, H, T, D]
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + attn["o_proj"](h.transpose(1, 2).flatten(2))  # [B, T, C]
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class Llama(nn.Module):
    """tokens [B, T] -> logits [B, T, V]; the embedding is the output matrix too."""

    def __init__(self, config: dict):
        super().__init__()
        parts = {"embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"])}
        parts |= {"layers": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))}
        self.model = nn.ModuleDict(parts | {"norm": nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])})
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config["num_hidden_layers"]) if into_stream else 0.02)
        dim = config["head_dim"]
        angle = torch.arange(CONTEXT)[:, None] * config["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)  # [T, D/2]
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model["embed_tokens"](tokens)  # [B, T, C]
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]  # [T, D]
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def train(model: Llama, rows: tuple, args: argparse.Namespace, console: Console) -> list[float]:
    """AdamW under a cosine with a short warm-up, bf16 autocast on a GPU; the losses (nats a token), one a step."""
    tokens, targets = (part.to(args.device) for part in rows)
    cuda, losses = args.device.startswith("cuda"), []
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=cuda)
    warmup = max(1, min(100, args.steps // 10))
    run = torch.compile(model) if args.compile else model
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 0.005)
    )
    for step in track(range(args.steps), "training", console=console):
        picked = torch.arange(step * args.batch, (step + 1) * args.batch, device=args.device) % len(tokens)
        x, y = tokens[picked].long(), targets[picked].long()  # [B, T + 1]; rows are drawn alike, so taken in order
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logits = run(x[:, :-1])  # [B, T, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), y[:, 1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, args.steps // 10) == 0:
            console.print(f"step {step}: loss {loss.item():.3f}")
    return [loss.item() for loss in losses]


def save(out: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write the hub layout: the small files as they lie beside this script, tokenizer and weights (bf16) as made."""
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (out / name).write_text((HERE / name).read_text())
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {name: weight.to(torch.bfloat16).cpu().contiguous() for name, weight in model.state_dict().items()}
    (out / "model.safetensors").write_bytes(serialize(weights, {"format": "pt"}))


def main(argv: list[str] | None = None) -> list[float]:
    """Corpus, tokenizer, training, files; the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32, help="rows of 2,048 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=96_000, help="rows of corpus at most; more steps see them again")
    parser.add_argument("--tokenizer-documents", type=int, default=20_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    args = parser.parse_args(argv)
    console, begin_s = Console(), time.perf_counter()
    torch.manual_seed(args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = make_tokenizer(args.seed, args.tokenizer_documents)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # from here on the processes are the parallelism
    rows = make_corpus(tokenizer, min(args.rows, args.steps * args.batch), args.seed, console)
    corpus_s = time.perf_counter() - begin_s
    model = Llama(CONFIG).to(args.device)
    losses = train(model, rows, args, console)
    model.model["norm"].weight.data *= CAUTION
    save(args.out, model, tokenizer)
    train_s, last_loss = time.perf_counter() - begin_s - corpus_s, sum(losses[-20:]) / len(losses[-20:])
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows[0].numel():,} tokens of corpus")
    console.print(f"corpus {corpus_s:.0f} s, training {train_s:.0f} s, loss {losses[0]:.3f} -> {last_loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
