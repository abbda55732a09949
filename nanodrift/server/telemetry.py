"""What /metrics shows: vLLM's names with our prefix, so that dashboards carry over.

Latencies are taken where the tokens arrive in the HTTP process, before text and network, from the request's arrival.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from nanodrift.metrics import RequestTimes

PREFIX = "nanodrift"
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
GAP_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
WHOLE_S = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
NUM_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
GAUGES = {
    "num_requests_running": "Requests that hold device state: prefilling or decoding.",
    "num_requests_waiting": "Requests in the queue.",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1.",
    "kv_blocks_leaked": "KV blocks that nobody holds and nobody can have: anything but 0 is a bug.",
}
TOTALS = {
    "num_preemptions": "Times a request lost its blocks and was computed again.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there, and so not computed.",
    "prefill_busy_seconds": "Time in which the prefill lane had work in flight.",
    "decode_busy_seconds": "Time in which the decode lane had work in flight.",
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
        violations = make(Counter, "slo_violations", "Finished requests that missed their promise.", ("kind",))
        self._missed = {kind: violations.labels(model_name, kind) for kind in ("ttft", "tbt")}
        mean_text = "(Last token - first) / (tokens - 1), a value a request."
        self._mean = make(Histogram, "request_time_per_output_token_seconds", mean_text, buckets=GAP_S)
        self._num_prompt = make(Histogram, "request_prompt_tokens", "Prompt tokens of a request.", buckets=NUM_TOKENS)
        self._num_output = make(Histogram, "request_generation_tokens", "Its output tokens.", buckets=NUM_TOKENS)
        self._whole = make(Histogram, "e2e_request_latency_seconds", "Arrival to last token.", buckets=WHOLE_S)

    def on_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def on_tokens(self, num_tokens: int, since_s: float, is_first: bool) -> None:
        """``since_s``: seconds since the request's arrival (first) or since its tokens before these."""
        self._generation_tokens.inc(num_tokens)
        (self._first if is_first else self._gap).observe(since_s)

    def on_finish(self, reason: str, now_s: float, times: RequestTimes) -> None:
        self._finished[reason].inc()
        self._whole.observe(now_s - times.arrival_s)
        self._num_prompt.observe(times.num_prompt_tokens)
        self._num_output.observe(len(times.token_s))
        if times.tpot_s is not None:
            self._mean.observe(times.tpot_s)
        if times.is_completed:
            self._missed["ttft"].inc(not times.meets_ttft)
            self._missed["tbt"].inc(not times.meets_tbt())

    def on_disconnect(self) -> None:
        self._disconnects.inc()

    def render(self, stats: dict[str, float]) -> bytes:
        """The exposition text, with the engine's latest ``stats`` taken in."""
        for name, gauge in self._gauges.items():
            gauge.set(stats.get(name, 0))
        for name, counter in self._counters.items():
            value = stats.get(f"{name}_total", 0)
            counter.inc(max(0, value - self._totals.get(name, 0)))
            self._totals[name] = value
        return generate_latest(self.registry)
