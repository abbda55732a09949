"""SM clock and board power of a GPU, sampled through NVML beside whatever runs; nothing where NVML is not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

INTERVAL_S = 0.1
MAX_SAMPLES = 36_000  # an hour


def nvml_reader(uuid: str) -> Callable[[], tuple[float, float]] | None:
    """A function that returns (SM MHz, watts) of the GPU with this UUID (``GPU-...``), or None."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        handle = nvml.device_get_handle_by_uuid(uuid)

        def read() -> tuple[float, float]:
            clock = nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_SM)
            return float(clock), nvml.device_get_power_usage(handle) / 1e3

        read()
        return read
    except Exception:  # no binding, an older one, no permission, no GPU: the figures stay blank
        return None


class PowerLog:
    """Samples on a thread until ``close``. Times are those of time.perf_counter, as the executors' clocks."""

    def __init__(self, read: Callable[[], tuple[float, float]] | None, interval_s: float = INTERVAL_S):
        self.samples: deque[tuple[float, float, float]] = deque(maxlen=MAX_SAMPLES)  # seconds, MHz, watts
        self.joules = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(read, interval_s), daemon=True)
        if read is not None:
            self._thread.start()

    @classmethod
    def of(cls, device) -> PowerLog:
        """Of a torch.device; one that is no GPU has no samples."""
        if device.type != "cuda":
            return cls(None)
        import torch

        return cls(nvml_reader(f"GPU-{torch.cuda.get_device_properties(device).uuid}"))

    def stats(self) -> dict[str, float]:
        """The newest sample, and the energy since the start; empty where there is none."""
        if not self.samples:
            return {}
        _, mhz, watts = self.samples[-1]
        return {"sm_mhz": mhz, "watts": watts, "joules_total": self.joules}

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, read, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            with contextlib.suppress(Exception):  # a sample lost is no reason to stop a measurement
                mhz, watts = read()
                now_s = time.perf_counter()
                if self.samples:
                    self.joules += watts * (now_s - self.samples[-1][0])
                self.samples.append((now_s, mhz, watts))
