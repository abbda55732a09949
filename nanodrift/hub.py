"""Which folder a model's name stands for, and whether the model fits into memory.

A name is a local folder, an alias, or a hub id; nothing means the small model that comes with the package. Downloads go
through huggingface_hub and fetch JSON, safetensors and templates only: nothing that can run. With ``--load-format
dummy`` an alias needs no download, since its config.json lies in ``nanodrift/configs/``. Knows nothing about tensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nanodrift.config import BLOCK_SIZE, ConfigError, ModelConfig

HERE = Path(__file__).parent
EMBEDDED = HERE / "embedded"
CGROUP = Path("/sys/fs/cgroup")
GIB = 1 << 30

ALIASES = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}
UNGATED = tuple(alias for alias, hub_id in ALIASES.items() if hub_id.startswith("Qwen/"))

_TEXT_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_WEIGHT_FILES = ["*.safetensors"]
_OTHER_FORMATS = ["original/*", "consolidated*"]  # the same weights once more, as their authors keep them


def resolve_model(name: str | Path | None, load_format: str = "auto") -> Path:
    """-> the model's folder, downloaded if need be. Its ConfigErrors say which names there are, or the way out."""
    if name is None:
        return EMBEDDED
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    name = str(name)
    if folder.exists():
        raise ConfigError(
            f"{name} is a file; name the folder that holds the model's config.json, weights and tokenizer."
        )
    alias = name.lower()
    if alias in ALIASES:
        return HERE / "configs" / alias if load_format == "dummy" else _download(ALIASES[alias], load_format)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return _download(name, load_format)
    raise ConfigError(
        f"there is no folder and no alias {name!r}. Aliases are {', '.join(ALIASES)}; hub ids look like Qwen/Qwen3-8B."
    )


def _download(hub_id: str, load_format: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = _TEXT_FILES if load_format == "dummy" else _TEXT_FILES + _WEIGHT_FILES
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS))
    except GatedRepoError:
        problem = f"its owners let only people in who have accepted its licence, at https://huggingface.co/{hub_id}"
    except RepositoryNotFoundError:
        problem = "the hub does not know it, or keeps it private"
    except Exception as error:  # whatever its transport raises: the ways out are the same
        problem = f"the hub cannot be reached ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    raise ConfigError(
        f"{hub_id} cannot be downloaded: {problem}. Ways out: log in (huggingface-cli login, or HF_TOKEN in the "
        "environment); name a local folder that holds the model; serve random weights of an alias's shape with "
        f"--load-format dummy; or take an alias that is open to all: {', '.join(UNGATED)}."
    )


def memory_need(config: ModelConfig, itemsize: int, min_kv_tokens: int) -> tuple[int, int]:
    """Bytes that a model takes before the first request: its weights, and the least KV cache it is useful with."""
    num_kv_tokens = -(-min_kv_tokens // BLOCK_SIZE) * BLOCK_SIZE
    return config.num_parameters * itemsize, num_kv_tokens * config.num_kv_values_per_token * itemsize


def check_memory(config: ModelConfig, dtype, free_bytes: int, min_kv_tokens: int) -> None:
    """Compares what the model needs in this torch dtype with what is free; a ConfigError gives both numbers."""
    weight_bytes, kv_bytes = memory_need(config, dtype.itemsize, min_kv_tokens)
    if weight_bytes + kv_bytes <= free_bytes:
        return
    sizes = {}
    for alias in ALIASES:
        other = ModelConfig.from_folder(HERE / "configs" / alias)
        sizes[sum(memory_need(other, dtype.itemsize, min(min_kv_tokens, other.max_position)))] = alias
    largest = max((size for size in sizes if size <= free_bytes), default=None)
    best = sizes.get(largest, "none; the built-in model may fit")
    advice = f"The largest alias that fits: {best}."
    num_fitting_tokens = (free_bytes - weight_bytes) // (config.num_kv_values_per_token * dtype.itemsize)
    if num_fitting_tokens >= BLOCK_SIZE:
        advice += f" Or keep this one and lower --max-model-len to {num_fitting_tokens // BLOCK_SIZE * BLOCK_SIZE}."
    raise ConfigError(
        f"this model needs {(weight_bytes + kv_bytes) / GIB:.1f} GiB ({weight_bytes / GIB:.1f} for weights in "
        f"{str(dtype).removeprefix('torch.')}, {kv_bytes / GIB:.1f} for {min_kv_tokens} tokens of KV cache) and "
        f"{free_bytes / GIB:.1f} GiB are free. {advice}"
    )


def free_memory_bytes(device) -> int:
    """What a torch device has left: of the GPU, or of the host within the limit of its container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free_bytes = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        free_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["active_file"]) + int(stat["inactive_file"])  # cached files, the weights say, give way
        return min(free_bytes, max(limit - used, 0))
    except (OSError, KeyError, ValueError):  # no limit ("max"), or no control groups
        return free_bytes
