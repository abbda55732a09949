"""A run as a file for ui.perfetto.dev: the two lanes as tracks, one slice for each piece of work; SMs, clock and watts.

    python serve.py --trace FILE              written when the server ends
    python bench.py run --timeline FILE       or sim: the same, simulated
    python bench.py timeline FILE             draws it

Listens to telemetry.py, holds the newest ``MAX_EVENTS`` events as lines of JSON. Times are microseconds of the engine's
clock.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from nanodrift.engine import Engine
from nanodrift.plan import Completion, DecodeWork, Lane, Partition
from nanodrift.telemetry import mode_of

MAX_EVENTS = 300_000  # about 80 MB; at 200 steps a second with two pieces each, twelve minutes
TRACKS = {Lane.DECODE: 1, Lane.PREFILL: 2}


class Trace:
    """What ``engine`` does from now on."""

    def __init__(self, engine: Engine):
        self.lines: deque[str] = deque(maxlen=MAX_EVENTS)
        self.about = {"device": engine.executor.device_name, "num_sms": engine.executor.partitions[0].decode_sms}
        self._last: tuple[int, Partition | None] = (0, None)  # newest ticket, and its partition
        engine.telemetry.listeners.append(self.on_complete)

    def on_complete(self, completion: Completion, start_s: float) -> None:
        for event in slices(completion, start_s):
            self.lines.append(json.dumps(event))
        number, partition = completion.ticket.number, completion.ticket.partition
        if number > self._last[0]:
            if partition != self._last[1]:
                sms = {"decode": partition.decode_sms, "prefill": partition.prefill_sms}
                self.lines.append(json.dumps(counter("SMs", start_s, sms)))
            self._last = (number, partition)

    def write(self, path: Path, samples: Iterable[tuple[float, float, float]] = (), **about) -> None:
        """``samples``: (seconds on the engine's clock, SM MHz, watts). ``about`` joins what the file says of itself."""
        names = [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"nanodrift on {self.about['device']}"}}
        ]
        for lane, track in TRACKS.items():
            about_lane = {"name": f"{lane.value} lane"}
            names.append({"ph": "M", "pid": 1, "tid": track, "name": "thread_name", "args": about_lane})
        lines = [json.dumps(name) for name in names] + list(self.lines)
        for at_s, mhz, watts in samples:
            lines += (
                json.dumps(counter("SM MHz", at_s, {"MHz": mhz})),
                json.dumps(counter("watts", at_s, {"W": watts})),
            )
        body = ",\n".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"otherData": {json.dumps(self.about | about)},\n"traceEvents": [\n{body}\n]}}\n')


def counter(name: str, at_s: float, values: dict) -> dict:
    return {"ph": "C", "pid": 1, "name": name, "ts": round(1e6 * at_s, 1), "args": values}


def slices(completion: Completion, start_s: float) -> list[dict]:
    """The piece of work on the tracks of its lanes."""
    ticket, events = completion.ticket, []
    mode = mode_of(ticket.work, ticket.partition).value
    times = {"ts": round(1e6 * start_s, 1), "dur": round(1e6 * (completion.finished_s - start_s), 1)}
    for part in ticket.work.parts:
        if isinstance(part, DecodeWork):
            name, sms = f"decode {len(part.rows)}", ticket.partition.decode_sms
            about = {"batch": len(part.rows), "context_tokens": sum(part.positions) + len(part.rows)}
        else:
            name, sms = f"prefill {part.num_tokens}", ticket.partition.prefill_sms
            about = {"tokens": part.num_tokens, "layers": [part.first_layer, part.last_layer]}
            about |= {"requests": [piece.request_id for piece in part.slices], "first_tokens": len(part.sampled_ids)}
        about |= {"sms": sms, "ticket": ticket.number, "queued_ms": round(1e3 * (start_s - ticket.launched_s), 3)}
        track = {"ph": "X", "pid": 1, "tid": TRACKS[part.lanes[0]], "cat": mode}
        events.append({"name": name, **track, **times, "args": about})
    return events
