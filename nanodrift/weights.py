"""Parameters of a decoder: read from safetensors straight to the device, or drawn there (``--load-format dummy``).

The three attention projections that read the same input become one matrix, gate and up become another; every tensor of
a checkpoint is copied into its place in them, one at a time, from the memory-mapped file. Only safetensors are opened:
the older .bin and .pth files are pickles, which can run code when they are read. Knows nothing about how layers are
computed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanodrift.config import ConfigError, ModelConfig

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass
class LayerWeights:
    attention_norm: torch.Tensor  # [C]
    qkv: torch.Tensor  # [(H + 2K) D, C]
    qkv_bias: torch.Tensor | None  # [(H + 2K) D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    o: torch.Tensor  # [C, H D]
    mlp_norm: torch.Tensor  # [C]
    gate_up: torch.Tensor  # [2I, C] gate rows, then up rows
    down: torch.Tensor  # [C, I]


@dataclass
class Weights:
    embedding: torch.Tensor  # [V, C]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [C]
    head: torch.Tensor  # [V, C], V rounded up to a multiple of 16 by rows of zeros; a tied embedding lies in it

    def tensors(self) -> list[torch.Tensor]:
        """All of them, layer by layer; a tied embedding and its head are both there."""
        in_layers = [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return [*in_layers, self.final_norm, self.embedding, self.head]

    def bytes(self) -> int:
        storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}  # what is tied counts once
        return sum(storages.values())


def resolve_dtype(option: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU; on a GPU the checkpoint's, or bfloat16 where that is float32."""
    if option != "auto":
        return getattr(torch, option)
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if config.dtype == "float16" else torch.bfloat16


def empty_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """The parameters' memory, unwritten."""
    c = config
    qkv_width, attention_width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    layers = [
        LayerWeights(
            attention_norm=new(c.hidden_size),
            qkv=new(qkv_width, c.hidden_size),
            qkv_bias=new(qkv_width) if c.has_qkv_bias else None,
            q_norm=new(c.head_dim) if c.has_qk_norm else None,
            k_norm=new(c.head_dim) if c.has_qk_norm else None,
            o=new(c.hidden_size, attention_width),
            mlp_norm=new(c.hidden_size),
            gate_up=new(2 * c.intermediate_size, c.hidden_size),
            down=new(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_layers)
    ]
    head = new(-(-c.vocab_size // 16) * 16, c.hidden_size)
    head[c.vocab_size :] = 0
    embedding = head[: c.vocab_size] if c.is_head_tied else new(c.vocab_size, c.hidden_size)
    return Weights(embedding, layers, new(c.hidden_size), head)


def named_places(weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The names that checkpoints use -> where each tensor belongs: views into the fused matrices."""
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if not config.is_head_tied:
        places["lm_head.weight"] = weights.head[: config.vocab_size]
    for index, layer in enumerate(weights.layers):
        here = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.o_proj.weight": layer.o,
            "mlp.gate_proj.weight": layer.gate_up[: config.intermediate_size],
            "mlp.up_proj.weight": layer.gate_up[config.intermediate_size :],
            "mlp.down_proj.weight": layer.down,
        }
        fused = {"weight": layer.qkv} if layer.qkv_bias is None else {"weight": layer.qkv, "bias": layer.qkv_bias}
        for kind, matrix in fused.items():
            for name, rows in zip("qkv", matrix.split([q_width, kv_width, kv_width]), strict=True):
                here[f"self_attn.{name}_proj.{kind}"] = rows
        if layer.q_norm is not None:
            here["self_attn.q_norm.weight"], here["self_attn.k_norm.weight"] = layer.q_norm, layer.k_norm
        places |= {f"model.layers.{index}.{name}": place for name, place in here.items()}
    return places


def load_weights(
    folder: str | Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Weights:
    """Reads a folder's safetensors onto the device. ``progress`` is told bytes read and in all.

    Raises ConfigError that names the file (missing, truncated, a pickle) or the tensors (names, shapes) that are wrong;
    names and shapes are compared before anything is allocated or copied.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in _weight_files(Path(folder))]
        found = {name: file for file in files for name in file.keys()}
        expected = named_places(empty_weights(config, torch.device("meta"), dtype), config)
        _compare(expected, {name: file.get_slice(name) for name, file in found.items()}, config, folder)
        weights = empty_weights(config, device, dtype)
        places = named_places(weights, config)
        total_bytes, read_bytes = sum(place.nbytes for place in places.values()), 0
        for name, file in found.items():  # in file order, so that the disk is read front to back
            if name in places:
                places[name].copy_(file.get_tensor(name))
                read_bytes += places[name].nbytes
                if progress:
                    progress(read_bytes, total_bytes)
    return weights


def dummy_weights(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, draw: str = "unit_rms", seed: int = 0
) -> Weights:
    """Weights of the right shape, drawn on the device; the same for the same seed and kind of device.

    ``unit_rms``: normal draws scaled so that activations keep a root mean square near one through every layer, hence
    about the bits and the power of a real model. ``uniform``: everything within +-1e-3, as other engines draw theirs.
    """
    weights = empty_weights(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    head = weights.head[: config.vocab_size]
    if draw == "uniform":
        for tensor in (*weights.tensors()[:-1], head):  # what pads the head stays zero
            tensor.uniform_(-1e-3, 1e-3, generator=generator)
        return weights
    if draw != "unit_rms":
        raise ConfigError(f"the dummy draw {draw!r} does not exist; there are unit_rms and uniform")

    def normal(place: torch.Tensor, gain: float = 1.0):
        """Rows that keep the root mean square of what they multiply, times the gain."""
        place.normal_(0.0, gain * place.shape[-1] ** -0.5, generator=generator)

    # each layer adds two results to the residual stream: at 1 / sqrt(2 L) they double its variance over all layers
    branch_gain = (2 * config.num_layers) ** -0.5
    for layer in weights.layers:
        for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.fill_(1.0)
        if layer.qkv_bias is not None:
            layer.qkv_bias.normal_(0.0, 0.1, generator=generator)
        normal(layer.qkv)
        normal(layer.o, branch_gain)
        normal(layer.gate_up)
        normal(layer.down, branch_gain / 0.6)  # silu(gate) * up of unit normals has a root mean square of 0.6
    weights.final_norm.fill_(1.0)
    if config.is_head_tied:
        normal(weights.embedding)  # logits near one matter more than embeddings do, which a norm meets first
    else:
        weights.embedding.normal_(0.0, 1.0, generator=generator)
        normal(head)
    return weights


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is not an index of weight files ({error!r}). Download it again.") from None
        outside = [n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")]
        if outside:
            raise ConfigError(f"{index} names {outside[0]!r}; weight files are *.safetensors beside the index.")
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise ConfigError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {_first_ten(missing)}.")
        return [folder / n for n in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickles = sorted(p.name for ending in ("bin", "pth", "pt") for p in folder.glob(f"*.{ending}"))
    if pickles:
        raise ConfigError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read and is never opened here. Use "
            "a model that comes as safetensors, or, if you trust this one, convert it: load it with transformers and "
            "call save_pretrained on another folder."
        )
    raise ConfigError(
        f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json. Download the model "
        "whole, or serve random weights with --load-format dummy."
    )


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors ({error}): cut short or damaged. Download it again."
        ) from None


def _compare(expected: dict[str, torch.Tensor], found: dict, config: ModelConfig, folder: str | Path) -> None:
    """Every tensor that is missing, not known, of another shape or not of floats, in one error."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, stored in found.items():
        shape = tuple(stored.get_shape())
        if name not in expected:
            is_known_stray = name.endswith("rotary_emb.inv_freq") or (config.is_head_tied and name == "lm_head.weight")
            problems += [] if is_known_stray else [f"{name} is not part of {config.architecture}"]
        elif tuple(expected[name].shape) != shape:
            problems.append(f"{name} has shape {list(shape)}, config.json asks for {list(expected[name].shape)}")
        elif stored.get_dtype() not in ("BF16", "F16", "F32"):
            problems.append(f"{name} is stored as {stored.get_dtype()}, where BF16, F16 and F32 are read")
    if problems:
        raise ConfigError(
            f"the weights in {folder} do not fit its config.json, in {len(problems)} places: {_first_ten(problems)}. "
            "Are both from the same model, and is it one of the served families?"
        )


def _first_ten(items: list[str]) -> str:
    return ", ".join(items[:10]) + (f", and {len(items) - 10} more" if len(items) > 10 else "")
