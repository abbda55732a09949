"""What /metrics shows: vLLM's names with our prefix, so that dashboards carry over, and how the device is shared.

Latencies are taken where the tokens arrive in the HTTP process, before text and network, from the request's arrival.
What the device does comes with the engine's stats; nanodrift/telemetry.py explains their names.
"""

from __future__ import annotations

import math
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from nanodrift.metrics import RequestTimes

PREFIX = "nanodrift"
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
GAP_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
WHOLE_S = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
NUM_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
RECENT = {"ttft": 512, "tbt": 4096}  # latencies kept for the dashboard's percentiles
GAUGES = {
    "num_requests_running": "Requests that hold device state: prefilling or decoding.",
    "num_requests_waiting": "Requests in the queue.",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1.",
    "kv_blocks_leaked": "KV blocks that nobody holds and nobody can have: anything but 0 is a bug.",
    "num_sms": "SMs of the device; 1 on a CPU.",
    "prefill_sms": "SMs of the prefill lane in the newest launch; all of them when the lanes take turns.",
    "decode_sms": "SMs of the decode lane, likewise.",
    "decode_batch": "Rows of the newest decode step.",
    "chunk_tokens": "Prompt tokens of the newest token chunk.",
    "tbt_predicted_seconds": "The guard's promise for the gap between tokens in force; 0: nothing is predicted.",
    "merge_gap_seconds_max": "Longest gap from a first token to the second.",
    "num_compilations": "Kernels compiled or loaded since the engine was ready: anything but 0 is a bug.",
    "num_cuda_mallocs": "Allocations of device memory since then, likewise.",
    "graph_bytes": "Device memory of CUDA graphs.",
    "sm_mhz": "SM clock; not a number where it cannot be read.",
    "watts": "Power of the board, likewise.",
}
TOTALS = {
    "num_preemptions": "Times a request lost its blocks and was computed again.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there, and so not computed.",
    "prefill_busy_seconds": "Time in which the prefill lane had work on its SMs.",
    "decode_busy_seconds": "Time in which the decode lane had work on its SMs.",
    "prefill_bubble_seconds": "Time in which the prefill lane had SMs and work and ran nothing.",
    "decode_bubble_seconds": "Time in which the decode lane had SMs and work and ran nothing.",
    "repartitions": "Changes of mode or partition.",
    "unmeetable_steps": "Decode steps whose TBT no mode could keep.",
    "merges": "Requests that went from the prefill lane to the decode batch.",
    "merge_gap_seconds": "Their gaps from the first token to the second, summed.",
    "joules": "Energy of the board; 0 where its power cannot be read.",
}
MODES = ("split", "fused", "exclusive")
PREDICTIONS = {
    "error_p95": "Predicted against actual step time: 95th percentile of the relative error, by kind of step.",
    "violations": "Share of steps that took longer than the guard said.",
    "guarded_over_actual": "Median of guarded over actual step time.",
}


class Telemetry:
    """Counters of one server; each has its own registry, so several can live in one process.

    ``prefix`` vllm gives the names that stock dashboards look for.
    """

    def __init__(self, model_name: str, prefix: str = PREFIX):
        disable_created_metrics()  # a time stamp beside every counter, which no dashboard reads
        self.registry = CollectorRegistry()
        self._totals: dict[str, float] = {}  # as last reported by the engine

        def make(kind, name: str, text: str, labels: tuple[str, ...] = (), **options):
            metric = kind(f"{prefix}:{name}", text, ("model_name", *labels), registry=self.registry, **options)
            return metric if labels else metric.labels(model_name)

        self._gauges = {name: make(Gauge, name, text) for name, text in GAUGES.items()}
        self._counters = {name: make(Counter, name, text) for name, text in TOTALS.items()}
        self._prompt_tokens = make(Counter, "prompt_tokens", "Prompt tokens of accepted requests.")
        self._generation_tokens = make(Counter, "generation_tokens", "Tokens generated.")
        self._disconnects = make(Counter, "http_requests_client_disconnected", "Requests whose client left early.")
        success = make(Counter, "request_success", "Requests that ended, by reason.", ("finished_reason",))
        self._finished = {reason: success.labels(model_name, reason) for reason in ("stop", "length", "abort")}
        self._first = make(Histogram, "time_to_first_token_seconds", "Arrival to first token.", buckets=FIRST_TOKEN_S)
        self._gap = make(Histogram, "inter_token_latency_seconds", "Between tokens, every gap.", buckets=GAP_S)
        refused = make(Counter, "requests_refused", "Requests that got a 429, each also a missed TTFT.", ("reason",))
        self._refused = {reason: refused.labels(model_name, reason) for reason in ("queue", "slo")}
        violations = make(Counter, "slo_violations", "Finished requests that missed their promise.", ("kind",))
        self._missed = {kind: violations.labels(model_name, kind) for kind in ("ttft", "tbt")}
        mean_text = "(Last token - first) / (tokens - 1), a value a request."
        self._mean = make(Histogram, "request_time_per_output_token_seconds", mean_text, buckets=GAP_S)
        self._num_prompt = make(Histogram, "request_prompt_tokens", "Prompt tokens of a request.", buckets=NUM_TOKENS)
        self._num_output = make(Histogram, "request_generation_tokens", "Its output tokens.", buckets=NUM_TOKENS)
        self._whole = make(Histogram, "e2e_request_latency_seconds", "Arrival to last token.", buckets=WHOLE_S)
        phases = {
            "queue": "Arrival to first launch.",
            "prefill": "That to first token.",
            "decode": "That to last token.",
        }
        self._phases = {
            phase: make(Histogram, f"request_{phase}_time_seconds", text, buckets=FIRST_TOKEN_S)
            for phase, text in phases.items()
        }
        self._mode = make(Gauge, "mode", "1 for the mode of the newest launch.", ("mode",))
        self._residency = make(
            Counter, "residency_seconds", "Time the device worked so.", ("mode", "prefill_sms", "decode_sms")
        )
        self._predictions = {
            name: make(Gauge, f"prediction_{name}", text, ("step",)) for name, text in PREDICTIONS.items()
        }
        self._model_name = model_name
        self.recent = {name: deque(maxlen=most) for name, most in RECENT.items()}  # seconds

    def on_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def on_tokens(self, num_tokens: int, since_s: float, is_first: bool) -> None:
        """``since_s``: seconds since the request's arrival (first) or since its tokens before these."""
        self._generation_tokens.inc(num_tokens)
        (self._first if is_first else self._gap).observe(since_s)
        self.recent["ttft" if is_first else "tbt"].append(since_s)

    def on_finish(self, reason: str, now_s: float, times: RequestTimes, queued_s: float | None = None) -> None:
        """``queued_s``: of the time to its first token, what it spent in the queue; None if that is not known."""
        self._finished[reason].inc()
        self._whole.observe(now_s - times.arrival_s)
        self._num_prompt.observe(times.num_prompt_tokens)
        self._num_output.observe(len(times.token_s))
        if times.tpot_s is not None:
            self._mean.observe(times.tpot_s)
        if times.token_s:
            self._phases["decode"].observe(times.token_s[-1] - times.token_s[0])
            if queued_s is not None:
                self._phases["queue"].observe(queued_s)
                self._phases["prefill"].observe(max(0.0, times.ttft_s - queued_s))
        if times.is_completed:
            self._missed["ttft"].inc(not times.meets_ttft)
            self._missed["tbt"].inc(not times.meets_tbt())

    def on_refused(self, reason: str) -> None:
        """A request that was not let in has missed its promise."""
        self._refused[reason].inc()
        self._missed["ttft"].inc()

    def on_disconnect(self) -> None:
        self._disconnects.inc()

    def render(self, stats: dict[str, float]) -> bytes:
        """The exposition text, with the engine's latest ``stats`` taken in."""
        for name, gauge in self._gauges.items():
            gauge.set(stats.get(name, math.nan if name in ("sm_mhz", "watts") else 0))
        for name, counter in self._counters.items():
            self._grow(name, counter, stats.get(f"{name}_total", 0))
        for mode in MODES:
            self._mode.labels(self._model_name, mode).set(stats.get("mode") == mode)
        for *where, seconds in stats.get("residency", ()):
            self._grow(f"residency {where}", self._residency.labels(self._model_name, *where), seconds)
        for step, seen in stats.get("predictions", {}).items():
            for name, gauge in self._predictions.items():
                gauge.labels(self._model_name, step).set(seen[name])
        return generate_latest(self.registry)

    def _grow(self, name: str, counter: Counter, total: float) -> None:
        """The engine's totals are taken over, not added up."""
        counter.inc(max(0, total - self._totals.get(name, 0)))
        self._totals[name] = total
