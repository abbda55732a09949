"""From a model's name to a running engine: folder, config, memory check, weights, executor; timed phase by phase.

The one place that knows all the parts. Nothing here runs once the engine is ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanodrift import hub
from nanodrift.baselines import make_policy
from nanodrift.config import BLOCK_SIZE, ConfigError, EngineConfig, ModelConfig
from nanodrift.cost import CostModel, Guard, Observer, Profile, find_profile, h200_prior, prior_for, read_profile
from nanodrift.cpu import CpuExecutor
from nanodrift.decision import Mode, Policy
from nanodrift.engine import Engine
from nanodrift.executor import Executor
from nanodrift.gpu import GpuExecutor
from nanodrift.kvcache import blocks_for
from nanodrift.model import Model
from nanodrift.plan import DECODE_SMS
from nanodrift.scheduler import Scheduler
from nanodrift.weights import dummy_weights, load_weights, resolve_dtype

CPU_KV_BYTES = 1 << 30  # what the cache takes on a CPU unless num_kv_blocks says otherwise

UNDIVIDED_POLICIES = ("turns", "chunked", "prefill-first")  # what a device without partitions can serve by

TENSOR_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}  # of an SM, dense 16 bit, by compute capability

Report = Callable[[str, float], None]  # phase, share done


@dataclass
class LoadedEngine:
    """An engine that is ready, and what people want to know about it."""

    engine: Engine
    model_config: ModelConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    max_model_len: int
    num_kv_tokens: int
    cost: CostModel  # what the policy predicts with; on a CPU it describes no device that is there
    guard: Guard
    phases_s: dict[str, float] = field(default_factory=dict)


def load_engine(model: str | Path | None, config: EngineConfig, report: Report | None = None) -> LoadedEngine:
    """Loads an alias, a hub id, a folder, or None: the embedded model. Raises ConfigError that says what to do."""
    report = report or (lambda phase, done: None)
    phases_s: dict[str, float] = {}
    started_s = time.perf_counter()

    def finish_phase(name: str) -> None:
        nonlocal started_s
        now_s = time.perf_counter()
        phases_s[name] = now_s - started_s
        started_s = now_s
        report(name, 1.0)

    device = resolve_device(config.device)
    folder = hub.resolve_model(model, config.load_format)
    model_config = ModelConfig.from_folder(folder, config.max_model_len)
    dtype = resolve_dtype(config.dtype, model_config, device)
    max_model_len = _resolve_max_model_len(config.max_model_len, model_config)
    hub.check_memory(model_config, dtype, hub.free_memory_bytes(device), min_kv_tokens=max_model_len)
    finish_phase("config")

    if config.load_format == "dummy":
        weights = dummy_weights(model_config, device, dtype, config.dummy_draw, config.seed)
    else:
        weights = load_weights(folder, model_config, device, dtype, lambda done, total: report("weights", done / total))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    finish_phase("weights")

    decoder = Model(model_config, weights, max_model_len)
    common = {
        "num_rows": config.max_num_seqs,
        "max_model_len": max_model_len,
        "max_prefill_tokens": config.max_prefill_tokens,
        "deterministic": config.deterministic,
    }
    if device.type == "cuda":
        executor = GpuExecutor(
            decoder,
            memory_fraction=config.memory_fraction,
            num_blocks=config.num_kv_blocks,
            decode_sms=() if config.policy in UNDIVIDED_POLICIES else tuple({*DECODE_SMS, config.decode_sms} - {0}),
            green_contexts=config.policy != "overlap",
            report=report,
            **common,
        )
    else:
        executor = CpuExecutor(decoder, num_blocks=_cpu_blocks(config, model_config, dtype, max_model_len), **common)
    finish_phase("executor")

    profile = choose_profile(config.profile, model_config, device, dtype)
    cost, guard = CostModel(model_config, profile, dtype.itemsize), Guard.of(profile)
    scheduler = Scheduler(
        num_blocks=executor.num_blocks,
        num_rows=executor.num_rows,
        num_layers=executor.num_layers,
        max_model_len=max_model_len,
        max_prefill_tokens=config.max_prefill_tokens,
        policy=choose_policy(config, executor, cost, guard),
        prefix_caching=config.prefix_caching,
    )
    engine = Engine(
        scheduler,
        executor,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        slo=config.slo,
        seed=config.seed,
        observer=Observer(cost, guard) if device.type == "cuda" else None,
    )
    return LoadedEngine(
        engine=engine,
        model_config=model_config,
        folder=folder,
        device=device,
        dtype=dtype,
        weights_bytes=weights.bytes(),
        max_model_len=max_model_len,
        num_kv_tokens=executor.num_blocks * BLOCK_SIZE,
        cost=cost,
        guard=guard,
        phases_s=phases_s,
    )


def choose_profile(option: str | None, model_config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Profile:
    """What the cost model starts from: the file asked for, the one shipped for this GPU and shape, or a prior."""
    if option is not None:
        return read_profile(option)
    if device.type != "cuda":
        return h200_prior()  # describes nothing that is there; policies that predict are refused
    gpu = torch.cuda.get_device_properties(device)
    if (found := find_profile(gpu.name, model_config, dtype)) is not None:
        return found
    bandwidth_bytes_per_s = 2 * gpu.memory_clock_rate * 1e3 * gpu.memory_bus_width / 8  # kHz, two transfers a clock
    flops_per_clock = TENSOR_FLOPS_PER_CLOCK.get((gpu.major, gpu.minor), 1024) * gpu.multi_processor_count
    return prior_for(gpu.name, gpu.multi_processor_count, bandwidth_bytes_per_s, flops_per_clock * gpu.clock_rate * 1e3)


def choose_policy(config: EngineConfig, executor: Executor, cost: CostModel, guard: Guard) -> Policy:
    """The policy that the config names, for the partitions that there are. Raises ConfigError if it cannot run here."""
    is_divided = len(executor.partitions) > 1
    name = config.policy if config.policy != "auto" else "mux" if is_divided else "turns"
    if not is_divided and name not in UNDIVIDED_POLICIES:
        raise ConfigError(
            f"policy {name!r} divides the SMs of a GPU, which {executor.device_name} cannot; use one of "
            f"{', '.join(UNDIVIDED_POLICIES)}"
        )
    try:
        return make_policy(
            name, cost, guard, executor.partitions,
            max_prefill_tokens=config.max_prefill_tokens,
            modes=tuple(Mode(mode) for mode in config.modes.split(",")),
            layers=config.prefill_layers, budget_tokens=config.chunk_tokens, decode_sms=config.decode_sms,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None


def resolve_device(option: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none."""
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {option!r} was asked for, but no CUDA device can be used: either this machine has none, or its "
            "driver is missing or too old for this build of torch, or torch was built without CUDA. Use --device cpu."
        )
    index = int(option.partition(":")[2] or 0) if option != "auto" else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {option!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


def _resolve_max_model_len(option: int | None, model_config: ModelConfig) -> int:
    if option is None:
        return model_config.max_position
    if option > model_config.max_position:
        raise ConfigError(
            f"max_model_len {option} is beyond the model's window of {model_config.max_position} tokens: positions "
            "that it was never trained on. Ask for at most that."
        )
    if option < 2:
        raise ConfigError(f"max_model_len must be at least 2, a token of prompt and one of output; got {option}")
    return option


def _cpu_blocks(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, max_model_len: int) -> int:
    """Blocks in ``CPU_KV_BYTES``, at least one request's worth, at most what all rows could ever fill."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    per_request = blocks_for(max_model_len)
    num_fitting = CPU_KV_BYTES // (model_config.num_kv_values_per_token * BLOCK_SIZE * dtype.itemsize)
    return max(per_request, min(num_fitting, config.max_num_seqs * per_request))
