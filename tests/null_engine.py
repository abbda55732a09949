"""An engine process without a model, for tests of the server: the real loop and frames around a scripted engine.

A request's output is its own prompt, over and over, one token a step; at the temperature HOT its seed is added. Some
prompts begin with an order instead (see ORDERS). Text goes through the embedded model's tokenizer, so that what comes
out can be read.

    python tests/null_engine.py --fd N [--step-ms 2] [--load-s 0] [--fail TEXT] [--max-num-seqs 64] [--leak 0] [--sms 1]
        [--trace FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanodrift.config import SLO  # noqa: E402
from nanodrift.request import SamplingParams  # noqa: E402
from nanodrift.server.engine_process import run  # noqa: E402

WINDOW, VOCAB_SIZE, EOS_ID, KV_TOKENS = 2048, 2048, 2, 1600
HOT = 99.0
OOM, CRASH, DIE, SILENT, HANG = 2039, 2040, 2041, 2042, 2043
ORDERS = {
    OOM: "ask for more memory than there is",
    CRASH: "raise in the next step",
    DIE: "kill -9 itself",
    SILENT: "never answer",
    HANG: "never step again",
}


@dataclass
class NullRequest:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    slo: SLO | None
    priority: int = 0
    num_output: int = 0
    scheduled_s: float | None = None


@dataclass
class NullEvent:
    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple = ()
    prompt_logprobs: tuple = ()


def logprobs_of(token_id: int, num_top: int) -> list:
    """As plan.Logprobs: a token's logprob is its number over -1000; the tokens before it are the likelier ones."""
    top_ids = [max(token_id - num_top + 1, 0) + i for i in range(num_top)]
    return [-token_id / 1000, top_ids, [-i / 1000 for i in top_ids]]


def kv_tokens(window):
    return KV_TOKENS if window == WINDOW else window


@dataclass
class NullEngine:
    step_s: float
    max_num_seqs: int
    window: int = WINDOW
    num_leaked: int = 0
    num_sms: int = 1  # of the device it pretends to share, if more than one
    trace: list[dict] | None = None  # what a real server's /load said (tests/test_server_gpu.py), said again
    requests: dict[str, NullRequest] = field(default_factory=dict)
    num_aborted: int = 0
    started_s: float = field(default_factory=time.monotonic)

    @property
    def executor(self):
        return self  # it is its own machine, and ...

    def counters(self):
        return {"num_compilations": 0, "num_cuda_mallocs": 0, "graph_bytes": 0}

    def new_request(self, prompt_token_ids, params, *, request_id, arrival_s, slo, cache_salt, priority):
        bad = next((token for token in prompt_token_ids if token >= VOCAB_SIZE), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary of {VOCAB_SIZE} tokens")
        return NullRequest(request_id, prompt_token_ids, params, slo, priority)

    def add(self, request):
        if len(request.prompt_token_ids) + request.params.max_tokens > kv_tokens(self.window):
            raise ValueError(f"the cache has room for {kv_tokens(self.window)} tokens")
        self.requests[request.request_id] = request

    def abort(self, request_id, reason="abort", stop_reason=None):
        self.num_aborted += self.requests.pop(request_id, None) is not None

    @property
    def has_work(self):
        return bool(self.requests)

    def step(self):
        time.sleep(self.step_s)
        running = sorted(self.requests.values(), key=lambda request: request.priority)[: self.max_num_seqs]
        return [event for request in running if (event := self._advance(request)) is not None]

    def _advance(self, request):
        prompt, params = request.prompt_token_ids, request.params
        if prompt[0] == CRASH:
            raise RuntimeError("the script says crash")
        if prompt[0] == OOM:
            bytearray(1 << 60)
        if prompt[0] == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt[0] == HANG:
            time.sleep(1000)
        if prompt[0] == SILENT:
            return None
        token = prompt[request.num_output % len(prompt)]
        if params.temperature == HOT:
            token = 100 + (token + params.seed + request.num_output) % 1000
        request.num_output += 1
        reason = stop_reason = None
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS_ID})
        if token in stops and request.num_output > params.min_tokens:
            reason, stop_reason = "stop", token
        elif request.num_output >= params.max_tokens:
            reason = "length"
        if reason is not None:
            del self.requests[request.request_id]
        asked, of_prompt = params.logprobs, params.prompt_logprobs if request.num_output == 1 else None
        return NullEvent(
            request.request_id,
            (token,),
            reason,
            stop_reason,
            logprobs=() if asked is None else (logprobs_of(token, asked),),
            prompt_logprobs=() if of_prompt is None else [logprobs_of(token, of_prompt) for token in prompt[1:]],
        )

    def stats(self):
        num_running = min(len(self.requests), self.max_num_seqs)
        return {
            "num_requests_running": num_running,
            "num_requests_waiting": len(self.requests) - num_running,
            "kv_cache_usage_perc": sum(len(r.prompt_token_ids) for r in self.requests.values()) / 1e6,
            "num_preemptions_total": self.num_aborted,
            "num_kv_blocks": 100,
            "num_free_kv_blocks": 100 - self.num_leaked - (num_running > 0),
            **(self.sharing() if self.num_sms > 1 else self.traced() if self.trace else {}),
        }

    def traced(self):
        """The newest of the trace, which begins when this engine does and stays at its end."""
        passed_s = time.monotonic() - self.started_s
        return [said for said in self.trace if said["at_s"] <= passed_s + self.trace[0]["at_s"]][-1]

    def sharing(self):
        """How the device was shared, as nanodrift/telemetry.py tells it: four ways that follow each other."""
        ways = [("exclusive", 1.0, 1.0), ("split", 0.75, 0.25), ("split", 0.5, 0.5), ("fused", 1.0, 1.0)]
        turn, seconds = int(time.monotonic() / 2) % 4, dict.fromkeys(ways, 0.0)
        for tick in range(int((time.monotonic() - self.started_s) * 20)):
            seconds[ways[int((self.started_s + tick / 20) / 2) % 4]] += 0.05 * 0.9
        sms = [[mode, round(p * self.num_sms), round(d * self.num_sms)] for mode, p, d in ways]
        busy = sum(seconds.values()) - seconds[ways[0]]
        return {
            "num_sms": self.num_sms,
            "has_partitions": True,
            "residency": [[*row, s] for row, s in zip(sms, seconds.values(), strict=True)],
            **dict(zip(("mode", "prefill_sms", "decode_sms"), sms[turn], strict=True)),
            "prefill_busy_seconds_total": busy,
            "decode_busy_seconds_total": busy + seconds[ways[0]],
            "watts": 512.0,
        }

    def predictions(self):
        return {}

    def close(self):
        pass


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--fail", default="")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--leak", type=int, default=0)
    parser.add_argument("--sms", type=int, default=1)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()

    def load(model, config, report):
        report("weights", 0.5)
        time.sleep(args.load_s)
        if args.fail:
            raise ValueError(args.fail)
        info = {
            "folder": str(ROOT / "nanodrift" / "embedded"),
            "description": "no model at all",
            "is_embedded": model is None,
            "has_tokenizer": model != "no-tokenizer",
            "eos_token_ids": [EOS_ID],
            "device_name": "none" if args.sms == 1 else "a device of the script's",
            "dtype": "none",
            "weights_bytes": 0,
            "kv_tokens": kv_tokens(args.window),
            "kv_bytes": 0,
            "max_model_len": args.window,
            "max_num_seqs": args.max_num_seqs,
            "policy": "echo",
            "phases_s": {"weights": args.load_s},
        }
        trace = json.loads(args.trace.read_text()) if args.trace else None
        return NullEngine(args.step_ms / 1000, args.max_num_seqs, args.window, args.leak, args.sms, trace), info

    return run(args.fd, load)


if __name__ == "__main__":
    sys.exit(main())
