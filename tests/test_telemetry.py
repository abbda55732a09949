"""telemetry.py's books: worked by hand on a few launches, then against the simulator's own clock."""

import json
import time
from types import SimpleNamespace

import pytest

from nanodrift.bench import simulate
from nanodrift.config import SLO
from nanodrift.dispatch import Decision, Mode
from nanodrift.plan import Completion, DecodeWork, FusedWork, Partition, PrefillSlice, PrefillWork, Ticket
from nanodrift.request import Request, SamplingParams
from nanodrift.server.power import PowerLog, nvml_reader
from nanodrift.server.trace import Trace
from nanodrift.telemetry import Telemetry

WHOLE, SPLIT = Partition(132, 132, is_shared=True), Partition(100, 32)


class Machine:
    """Hands telemetry what an engine would: work that ran from one moment to another."""

    def __init__(self):
        self.requests = {}
        self.telemetry = Telemetry(self.requests, (WHOLE, SPLIT))
        self.num_tickets = 0

    def arrive(self, request_id, at_s):
        self.requests[request_id] = Request(request_id, [1], SamplingParams(), arrival_s=at_s)

    def ran(self, work, partition, start_s, end_s, is_unmeetable=False, step_s=0.0):
        self.num_tickets += 1
        ticket = Ticket(self.num_tickets, work, partition, start_s)
        decision = Decision(Mode.SPLIT, partition, 1, 1, step_s=step_s, is_unmeetable=is_unmeetable)
        self.telemetry.on_launch(ticket, decision)
        tokens = tuple((request_id, 0) for request_id in work.sampled_ids)
        self.telemetry.on_complete(Completion(ticket, end_s, tokens, busy_s=end_s - start_s))

    @property
    def stats(self):
        return self.telemetry.stats()


def prefill(*request_ids, is_last=True, num_tokens=8):
    params = SamplingParams if is_last else None
    slices = tuple(PrefillSlice(i, 0, 0, (1,) * num_tokens, params=params) for i in request_ids)
    return PrefillWork(1, slices, 0, 4, is_last)


def decode(*request_ids):
    return DecodeWork(request_ids, tuple(range(len(request_ids))), (8,) * len(request_ids))


def test_nothing_has_run():
    stats = Machine().stats
    assert (stats["mode"], stats["residency"], stats["num_sms"], stats["has_partitions"]) == ("", [], 132, True)


def test_residency_counts_a_moment_once():
    machine = Machine()
    machine.ran(prefill("a", is_last=False), WHOLE, 0.0, 1.0)
    machine.ran(decode("b"), SPLIT, 2.0, 4.0)
    machine.ran(decode("b"), SPLIT, 4.0, 6.0)
    machine.ran(
        prefill("a", is_last=False), SPLIT, 1.5, 7.0
    )  # ended last, began first: half a second alone at the start
    machine.ran(FusedWork(prefill("a"), decode("b")), WHOLE, 7.0, 8.0)
    stats = machine.stats
    assert stats["residency"] == [["split", 100, 32, 5.5], ["exclusive", 132, 132, 1.0], ["fused", 132, 132, 1.0]]
    assert stats["repartitions_total"] == 2
    assert stats["prefill_busy_seconds_total"] == 1.0 + 5.5 + 1.0
    assert stats["decode_busy_seconds_total"] == 2.0 + 2.0 + 1.0
    assert (stats["mode"], stats["decode_batch"], stats["chunk_tokens"]) == ("fused", 1, 8)


def test_a_lane_that_could_run_and_did_not_has_a_bubble():
    machine = Machine()
    machine.ran(decode("a", "b"), SPLIT, 0.0, 1.0)
    machine.ran(decode("b"), SPLIT, 1.25, 2.0)  # b waited a quarter of a second
    machine.ran(decode("c"), SPLIT, 3.0, 4.0)  # nobody of this step could have run before
    assert machine.stats["decode_bubble_seconds_total"] == 0.25
    machine.arrive("p", 0.5)
    machine.arrive("q", 0.75)
    machine.arrive("r", 9.0)
    machine.ran(prefill("p", is_last=False), SPLIT, 1.0, 2.0)
    machine.ran(prefill("p"), SPLIT, 2.5, 3.0)  # half a second within the prompt
    machine.ran(prefill("q"), SPLIT, 3.125, 4.0)  # q was there
    machine.ran(prefill("r"), SPLIT, 10.0, 11.0)  # r was not
    assert machine.stats["prefill_bubble_seconds_total"] == 0.625


def test_the_other_lanes_turn_on_the_whole_chip_is_no_bubble():
    machine = Machine()
    machine.ran(decode("a"), WHOLE, 0.0, 1.0)
    machine.ran(prefill("p", is_last=False), WHOLE, 1.0, 3.0)
    machine.ran(decode("a"), WHOLE, 3.0, 4.0)
    machine.ran(prefill("p", is_last=False), WHOLE, 4.0, 6.0)
    machine.ran(decode("a"), WHOLE, 6.5, 7.0)
    stats = machine.stats
    assert (stats["decode_bubble_seconds_total"], stats["prefill_bubble_seconds_total"]) == (0.5, 0.0)
    assert stats["repartitions_total"] == 0


def test_a_host_that_looks_late_loses_no_busy_time():
    machine = Machine()
    machine.ran(decode("a"), WHOLE, 0.0, 1.0)
    ticket = Ticket(9, decode("a"), WHOLE, 0.5)
    machine.telemetry.on_complete(Completion(ticket, 1.0, busy_s=1.0))  # seen together with the first
    machine.ran(decode("a"), WHOLE, 2.0, 2.5)
    stats = machine.stats
    assert stats["decode_busy_seconds_total"] == 2.5 == stats["residency"][0][3]
    assert stats["decode_bubble_seconds_total"] == 1.0  # as far as the host could see


def test_the_first_gap_of_a_request_is_its_merge():
    machine = Machine()
    for name in "abc":
        machine.arrive(name, 0.0)
    machine.ran(prefill("a", "b"), SPLIT, 0.0, 1.0)
    machine.ran(decode("a", "b"), SPLIT, 1.0, 1.5)
    machine.ran(decode("a", "b"), SPLIT, 1.5, 4.0)  # no first gap any more
    machine.ran(FusedWork(prefill("c"), decode("a")), WHOLE, 4.0, 5.0)
    machine.ran(decode("c"), WHOLE, 5.0, 7.0)
    stats = machine.stats
    assert (stats["merges_total"], stats["merge_gap_seconds_total"], stats["merge_gap_seconds_max"]) == (3, 3.0, 2.0)


def test_who_ends_before_merging_is_forgotten():
    machine = Machine()
    for number in range(50):
        machine.arrive(f"gone-{number}", 0.0)
        machine.ran(prefill(f"gone-{number}"), WHOLE, number, number + 1)
        del machine.requests[f"gone-{number}"]
    assert len(machine.telemetry._first_token_s) <= 1


def test_what_was_promised_and_what_cannot_be():
    machine = Machine()
    machine.ran(decode("a"), WHOLE, 0.0, 1.0, step_s=0.012)
    machine.ran(decode("a"), WHOLE, 1.0, 2.0, step_s=0.03, is_unmeetable=True)
    assert (machine.stats["tbt_predicted_seconds"], machine.stats["unmeetable_steps_total"]) == (0.03, 1)


@pytest.mark.parametrize("modes", [tuple(Mode), (Mode.SPLIT, Mode.EXCLUSIVE)])
def test_the_books_of_a_simulated_run_add_up(modes):
    engine = simulate.simulated_engine("mux", SLO(tbt_ms=12), modes)
    for number, (arrival_s, num_prompt, num_output) in enumerate([(0.0, 700, 60), (0.05, 9000, 20), (0.1, 3000, 30)]):
        params = SamplingParams(max_tokens=num_output, ignore_eos=True)
        engine.add(engine.new_request([number] * num_prompt, params, arrival_s=arrival_s))
    while engine.has_work:
        engine.step()
    stats, executor = engine.stats(), engine.executor
    worked_s = sum(seconds for *_, seconds in stats["residency"])
    both = [stats[f"{lane}_busy_seconds_total"] for lane in ("prefill", "decode")]
    assert max(both) <= worked_s + 1e-9 <= executor.clock.now() + 2e-9
    assert both == [pytest.approx(busy_s) for busy_s in executor.busy_s.values()]
    assert stats["merges_total"] == 3
    assert sum(stats[f"{lane}_bubble_seconds_total"] for lane in ("prefill", "decode")) <= 0.05 * worked_s
    assert {mode for mode, *_ in stats["residency"]} <= {mode.value for mode in modes}


def test_a_trace_is_json_that_viewers_know(tmp_path):
    machine = Machine()
    executor = SimpleNamespace(device_name="a machine", partitions=(WHOLE,))
    trace = Trace(SimpleNamespace(telemetry=machine.telemetry, executor=executor))
    machine.ran(prefill("a"), SPLIT, 0.5, 1.0)
    machine.ran(FusedWork(prefill("c", num_tokens=5), decode("a", "b")), WHOLE, 1.0, 1.002)
    path = tmp_path / "new" / "trace.json"
    trace.write(path, [(0.75, 1500.0, 690.5)], simulated=True)
    written = json.loads(path.read_text())
    assert written["otherData"] == {"device": "a machine", "num_sms": 132, "simulated": True}
    events = written["traceEvents"]
    slices = [(e["name"], e["tid"], e["ts"], e["dur"], e["cat"]) for e in events if e["ph"] == "X"]
    assert slices == [
        ("prefill 8", 2, 500_000.0, 500_000.0, "split"),
        ("prefill 5", 2, 1_000_000.0, 2_000.0, "fused"),
        ("decode 2", 1, 1_000_000.0, 2_000.0, "fused"),
    ]
    counters = [(e["name"], e["ts"], e["args"]) for e in events if e["ph"] == "C"]
    assert ("SMs", 500_000.0, {"decode": 32, "prefill": 100}) in counters
    assert ("watts", 750_000.0, {"W": 690.5}) in counters
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"nanodrift on a machine", "decode lane", "prefill lane"}


def test_power_is_sampled_where_it_can_be_read():
    assert nvml_reader("GPU-of-nobody") is None and PowerLog(None).stats() == {}
    answers = iter([(1500.0, 700.0), (1400.0, 690.0)])
    log = PowerLog(lambda: next(answers), interval_s=0.001)  # then it fails, and the log goes on
    deadline_s = time.monotonic() + 10
    while len(log.samples) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    log.close()
    assert [sample[1:] for sample in log.samples] == [(1500.0, 700.0), (1400.0, 690.0)]
    assert log.stats()["watts"] == 690.0
    assert log.stats()["joules_total"] == pytest.approx(690.0 * (log.samples[1][0] - log.samples[0][0]))
