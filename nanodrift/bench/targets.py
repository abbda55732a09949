"""What a sweep measures on: the engine in this process, loaded once, or the simulated machine. Same questions to both.

``engine_for`` gives an idle engine under a policy. On a device the model, the executor and its graphs stay, and the
scheduler, its pool and the engine's books are new: no point sees what another left behind. Imports torch only for a
device.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import asdict, fields

from nanodrift.bench import simulate
from nanodrift.bench.policies import PolicySpec, parse
from nanodrift.config import SLO, ConfigError, EngineConfig
from nanodrift.cost import Observer
from nanodrift.decision import Mode
from nanodrift.engine import Engine
from nanodrift.scheduler import Scheduler

SETTINGS = {"modes", "chunk_tokens", "decode_sms"}  # of policies: whoever makes these reads them


class NoPower:
    """Watts of a machine that draws none."""

    def figures(self, num_tokens: int) -> dict:
        return {}


class SimTarget:
    """The simulated H200."""

    is_simulated = True
    encode = None  # no tokenizer: prompts are ids
    default_policy = PolicySpec("mux", "mux")

    def __init__(self, options: dict):
        known = {field.name for field in fields(EngineConfig)} & options.keys()
        unused = sorted(known - {"device", "prefix_caching", "seed", "load_format", "policy", "profile"} - SETTINGS)
        if unused:
            raise ConfigError(f"the simulated machine has no option --{unused[0].replace('_', '-')}")
        model, caching = options.get("model", simulate.DEFAULT_MODEL), options.get("prefix_caching", True)
        self.machine = simulate.machine(model, caching, options.get("profile"))
        self.seed = options.get("seed", 0)
        self.max_model_len = self.machine.model_config.max_position
        self.vocab_size = self.machine.model_config.vocab_size
        self.about = {
            "backend": "nanodrift",
            "simulated": True,
            "gpu": f"SIMULATED {self.machine.name}",
            "model_id": model,
            "dtype": "bfloat16",
            "max_model_len": self.max_model_len,
            "num_kv_tokens": simulate.NUM_BLOCKS * 64,
            "prefix_caching": caching,
            "seed": self.seed,
        }

    def engine_for(self, spec: PolicySpec, slo: SLO) -> Engine:
        if spec.num_devices > 1:
            spec = spec.inner or self.default_policy  # only looked at: sweep.py runs pairs through two_devices.py
        if spec.name == "overlap":
            raise ConfigError("overlap leaves SMs to the hardware, which the simulated machine has no model of")
        return self.machine.engine(spec, slo)

    def power(self):
        return contextlib.nullcontext(NoPower())

    def close(self) -> None:
        pass


class EngineTarget:
    """An engine of this process on its device. Options that are EngineConfig's fields configure it."""

    is_simulated = False

    def __init__(self, options: dict, policies: list[PolicySpec] | None = None, loaded=None):
        """Loads the model, unless somebody has: then ``options`` must be what it was loaded with."""
        from nanodrift.bench import machine, offline
        from nanodrift.server.tokenizer import load_tokenizer
        from nanodrift.startup import load_engine, resolve_device

        names = {field.name for field in fields(EngineConfig)}
        given = {k: v for k, v in options.items() if k in names}
        if policies:  # the device is divided for every one of them
            given["policy"] = "overlap" if all(spec.name == "overlap" for spec in policies) else "auto"
            sms = [spec.decode_sms for spec in policies if spec.decode_sms]
            given |= {"decode_sms": sms[0]} if sms else {}
        self.config = EngineConfig.from_options(**given)
        self.device = resolve_device(self.config.device)
        self.loaded = loaded
        if loaded is None:
            self.loaded = load_engine(options.get("model"), self.config)
            offline.throughput(self.loaded.engine, num_prompts=2, input_len=32, output_len=4, seed=self.config.seed + 1)
        tokenizer = load_tokenizer(self.loaded.folder, self.config.load_format)
        self.encode = tokenizer.encode if tokenizer is not None else None
        self.seed, self.max_model_len = self.config.seed, self.loaded.max_model_len
        self.vocab_size = self.loaded.model_config.vocab_size
        self.about = machine.describe(self.device) | {
            "simulated": False,
            "model_id": options.get("model", "embedded"),
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "num_kv_tokens": self.loaded.num_kv_tokens,
            "prefix_caching": self.config.prefix_caching,
            "profile": self.loaded.cost.profile.name,
            "partitions": [[p.prefill_sms, p.decode_sms] for p in self.loaded.engine.executor.partitions],
            "seed": self.config.seed,
            "engine": asdict(self.config),
            "start_s": self.loaded.phases_s,
        }

    @property
    def default_policy(self) -> PolicySpec:
        return parse("mux" if len(self.loaded.engine.executor.partitions) > 1 else "turns")

    def engine_for(self, spec: PolicySpec, slo: SLO) -> Engine:
        """Raises ConfigError for a policy that divides a device which is not divided."""
        loaded = self.loaded
        if loaded.engine.has_work:
            raise RuntimeError("the engine is not idle: a policy is exchanged between runs, not during one")
        executor = loaded.engine.executor
        if spec.num_devices > 1:
            raise ConfigError(f"policy {spec.text!r} needs two devices, which are only simulated: --device sim")
        divides = spec.name in ("static", "overlap") or (spec.name == "mux" and Mode.SPLIT in spec.modes)
        if divides and len(executor.partitions) == 1:
            raise ConfigError(
                f"policy {spec.text!r} divides the SMs of a GPU, which {executor.device_name} cannot: "
                "take mux:fused+exclusive, chunked:TOKENS, prefill-first or turns, or --device sim"
            )
        if spec.name == "overlap" and self.config.policy != "overlap":
            raise ConfigError("overlap needs plain streams: sweep it alone, then --resume the folder of the others")
        cost, guard = copy.deepcopy((loaded.cost, loaded.guard))  # what one run learns is not handed to the next
        scheduler = Scheduler(
            num_blocks=executor.num_blocks,
            num_rows=executor.num_rows,
            num_layers=executor.num_layers,
            max_model_len=loaded.max_model_len,
            max_prefill_tokens=self.config.max_prefill_tokens,
            policy=spec.make(cost, guard, executor.partitions, self.config.max_prefill_tokens),
            prefix_caching=self.config.prefix_caching,
        )
        old = loaded.engine
        loaded.engine = Engine(
            scheduler,
            executor,
            vocab_size=old.vocab_size,
            eos_token_ids=tuple(old.eos_token_ids),
            slo=slo,
            seed=self.config.seed,
            observer=Observer(cost, guard) if self.device.type == "cuda" else None,
        )
        return loaded.engine

    def power(self):
        from nanodrift.bench import machine

        return machine.PowerLog(self.device)

    def close(self) -> None:
        self.loaded.engine.close()


def target_of(options: dict, policies: list[PolicySpec] | None = None) -> SimTarget | EngineTarget:
    """The machine that ``--device`` names. Raises ConfigError."""
    return SimTarget(options) if options.get("device") == "sim" else EngineTarget(options, policies)
