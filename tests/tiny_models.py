"""Small random models of every served family, as transformers builds them, and a driver that runs ours step by step."""

import copy
import functools

import torch
import transformers

from nanodrift.batch import PassShape, Rows, lay_out, pack
from nanodrift.config import ModelConfig
from nanodrift.model import KVPool
from nanodrift.ops import LaneResources
from nanodrift.plan import DecodeWork, NewBlocks, PrefillSlice, PrefillWork, RowParams
from nanodrift.weights import Weights, named_places

_SHARED = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 303,  # odd: the head's rows are padded
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {  # config.json in the classic form, which every version of transformers reads
    "llama": ("Llama", {"rms_norm_eps": 1e-6}),
    "llama3.1": ("Llama", {"rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"hidden_size": 256}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}


def config_json(family: str, **changes) -> dict:
    name, own = FAMILIES[family]
    architecture = {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "tie_word_embeddings": False}
    return copy.deepcopy(_SHARED | architecture | own | changes)


def transformers_config(raw: dict):
    return getattr(transformers, raw["architectures"][0].replace("ForCausalLM", "Config")).from_dict(copy.deepcopy(raw))


def transformers_class(raw: dict):
    return getattr(transformers, raw["architectures"][0])


@functools.cache
def transformers_model(family: str):
    """A model with weights large enough that every part of it shows in the logits: norms and biases drawn too."""
    raw = config_json(family)
    torch.manual_seed(0)
    model = transformers_class(raw)(transformers_config(raw)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5)
    return model.requires_grad_(False)


def transformers_twin(raw: dict, config: ModelConfig, weights: Weights, dtype: torch.dtype):
    """A transformers model over our weights: over the same memory where the dtype is theirs already."""
    state = {name: place.to(dtype) for name, place in named_places(weights, config).items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    theirs = transformers_config(raw)
    with torch.device("meta"):
        model = transformers_class(raw)(theirs)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs).to(weights.head.device)  # its buffers are not weights
    return model.eval().requires_grad_(False)


class Driver:
    """Runs a Model over hand-made prefill slices and decode rows; every row's blocks lie scattered in the pool."""

    def __init__(self, model, lane=None, num_rows: int = 6, max_len: int = 320, seed: int = 0, max_tokens: int = 512):
        self.model, self.lane = model, lane or LaneResources()
        self.rows = Rows(num_rows, max_len, model.device)
        num_blocks = num_rows * self.rows.max_blocks
        self.kv = KVPool(model.config, num_blocks, model.dtype, model.device)
        scattered = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        for row in range(num_rows):
            ids = scattered[row * self.rows.max_blocks : (row + 1) * self.rows.max_blocks]
            self.rows.assign_blocks((NewBlocks(row, 0, tuple(ids)),), self.upload)
        self.state = model.new_state(max_tokens)

    def upload(self, ints):
        if not ints:
            return torch.empty(0, dtype=torch.int32, device=self.model.device)
        return torch.frombuffer(ints, dtype=torch.int32).clone().to(self.model.device)

    def batch(self, prefill=(), decode=()):
        """prefill: (row, start, tokens, whether they end the prompt); decode: (row, token, position); row -1 pads."""
        slices = tuple(
            PrefillSlice("", r, start, tuple(t), RowParams() if ends else None) for r, start, t, ends in prefill
        )
        work = PrefillWork(0, slices, 0, self.model.config.num_layers, True) if slices else None
        for row, token, _ in decode:
            self.rows.last_token[row] = token
        rows = tuple(row if row >= 0 else self.rows.spare_row for row, _, _ in decode)
        positions = tuple(position for _, _, position in decode)
        step = DecodeWork(("",) * len(rows), rows, positions) if rows else None
        shape = PassShape.of(work, step)
        batch = lay_out(self.rows, shape, self.upload(pack(self.rows, work, step, shape)))
        batch.token_ids[: len(rows)] = self.rows.last_token[batch.gather_rows.long()]
        for place, (row, _, _) in enumerate(decode):
            if row < 0:
                batch.rows[place], batch.positions[place] = -1, 0
                batch.decode_rows[place] = -1
                batch.decode_context_lens[place] = 0
        return batch

    @torch.inference_mode()
    def forward(self, prefill=(), decode=(), layer_chunks=None):
        """One whole pass -> logits [Q, V] on the CPU."""
        batch = self.batch(prefill, decode)
        self.model.embed(batch, self.state, self.lane)
        for first, last in layer_chunks or [(0, self.model.config.num_layers)]:
            self.model.run_layers(batch, self.state, self.kv, first, last, self.lane)
        return self.model.head(batch, self.state, self.lane).cpu()
