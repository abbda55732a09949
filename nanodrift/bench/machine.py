"""What the figures were measured on: names and versions, the device's ceilings, SM clock and watts while measuring.

Everything that cannot be found out is None, never guessed. Knows nothing about the engine.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from statistics import fmean, median

import torch

from nanodrift.bench.roofline import Ceilings

ROOT = Path(__file__).parent.parent.parent


def describe(device: torch.device) -> dict:
    """The keys that every result file carries."""
    is_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S"),
        "backend": "nanodrift",
        "gpu": torch.cuda.get_device_name(device) if is_gpu else None,
        "num_sms": torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else None,
        "driver": _driver_version() if is_gpu else None,
        "cpu": _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "nanodrift": _version("nanodrift"),
        "git": _git_commit(),
        "argv": sys.argv[1:],
    }


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[Ceilings, dict]:
    """Bandwidth (the better of a read and of a copy, read plus written) and matrix rate, sustained, random data.

    Takes about five seconds and 12 GiB on a GPU, one second on a CPU.
    """
    with PowerLog(device) as power:
        copy, read = _bandwidths(device)
        size, rate = _matmul_rate(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine takes what is free
    figures = {"copy_gb_per_s": copy / 1e9, "read_gb_per_s": read / 1e9, f"matmul_{size}_tflops": rate / 1e12}
    return Ceilings(max(copy, read), rate), figures | power.medians()


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy (read plus written) and of a read."""
    source = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)  # float32: 4 GiB or 256 MiB
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    return 2 * num_bytes / sustained_s(lambda: target.copy_(source), device), num_bytes / sustained_s(
        source.sum, device
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """(n, FLOP/s) of an n x n x n product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    return n, 2 * n**3 / sustained_s(lambda: torch.mm(a, b, out=out), device)


def sustained_s(call, device: torch.device) -> float:
    """Seconds of one call, back to back.

    On a GPU the median over 1.5 s after the first third, when the clock has settled under the load; on a CPU, where
    neighbours disturb rather than heat, the best within 0.3 s.
    """
    is_gpu, each, per_group = device.type == "cuda", [], 4 if device.type == "cuda" else 1
    window_s = 1.5 if is_gpu else 0.3
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < window_s or len(each) < 3:
        group_s = time.perf_counter()
        for _ in range(per_group):
            call()
        if is_gpu:
            torch.cuda.synchronize(device)
        each.append((time.perf_counter() - group_s) / per_group)
    return median(each[len(each) // 3 :]) if is_gpu else min(each)


class PowerLog:
    """SM clock (MHz), board power (W) and energy (J), sampled while the ``with`` block runs; None where unknown."""

    def __init__(self, device: torch.device):
        self.samples: list[tuple[float, float]] = []
        self.sampled_s: list[float] = []  # when, by time.perf_counter
        self.joules: float | None = None
        self._read, self._interval_s = _power_reader(device) if device.type == "cuda" else (None, 0.0)
        self._energy = _energy_reader(device) if device.type == "cuda" else None
        self._start_j = self._start_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self):
        self._start_s = time.perf_counter()
        self._start_j = self._energy() if self._energy else 0.0
        if self._read:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._read:
            self._thread.join()
        if self._energy:
            self.joules = self._energy() - self._start_j
        elif self.samples:
            self.joules = fmean(watts for _, watts in self.samples) * (time.perf_counter() - self._start_s)

    def _sample(self):
        while not self._stop.wait(self._interval_s):
            with contextlib.suppress(Exception):  # a sample lost is no reason to stop a measurement
                self.samples.append(self._read())
                self.sampled_s.append(time.perf_counter())

    def medians(self) -> dict:
        if not self.samples:
            return {"sm_mhz": None, "watts": None}
        return {"sm_mhz": median(s[0] for s in self.samples), "watts": median(s[1] for s in self.samples)}

    def timed(self) -> list[tuple[float, float, float]]:
        """(seconds, MHz, W) of every sample."""
        return [(at_s, *sample) for at_s, sample in zip(self.sampled_s, self.samples, strict=False)]

    def figures(self, num_tokens: int) -> dict:
        """The medians, and how many of the run's tokens a joule paid for; after the ``with`` block."""
        per_joule = num_tokens / self.joules if self.joules else None
        return self.medians() | {"joules": self.joules, "tokens_per_joule": per_joule}


def _nvml_device(device: torch.device):
    """(the bindings, the device's handle). Raises whatever is missing."""
    from cuda.bindings import nvml

    nvml.init_v2()
    return nvml, nvml.device_get_handle_by_uuid(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _energy_reader(device: torch.device):
    """A function that returns the joules drawn since the driver was loaded, or None."""
    try:
        nvml, handle = _nvml_device(device)
        nvml.device_get_total_energy_consumption(handle)
        return lambda: nvml.device_get_total_energy_consumption(handle) / 1e3
    except Exception:  # no binding, or a card without the counter
        return None


def _power_reader(device: torch.device):
    """(a function that returns (SM MHz, W), seconds between calls): NVML, else nvidia-smi, else (None, 0)."""
    try:
        nvml, handle = _nvml_device(device)

        def read():
            clock = nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_SM)
            return float(clock), nvml.device_get_power_usage(handle) / 1e3

        read()
        return read, 0.05
    except Exception:  # no binding, an older one, or no permission: the command line tool may still answer
        if not shutil.which("nvidia-smi"):
            return None, 0.0
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def ask():
        query = "--query-gpu=clocks.sm,power.draw"
        clock, watts = _run("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", uuid).split(",")
        return float(clock), float(watts)

    return ask, 0.5


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _driver_version() -> str | None:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def _git_commit() -> str | None:
    if not (ROOT / ".git").exists():  # a copy of the tree: who made it may say what it is a copy of
        return os.environ.get("NANODRIFT_COMMIT")
    commit = _run("git", "rev-parse", "--short=10", "HEAD")
    changes = _run("git", "status", "--porcelain", "--untracked-files=no", "--", "nanodrift", "kernels")
    return f"{commit}{'+changes' if changes else ''}" if commit else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
