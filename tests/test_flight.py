"""What is in flight: predicted ends, where the next step may run, and when it may be launched."""

import math

import pytest

from nanodrift.flight import LAUNCH_AHEAD, Flight
from nanodrift.plan import DecodeWork, FusedWork, Lane, Partition, PrefillSlice, PrefillWork, RowParams, Ticket

WHOLE, NARROW, WIDE = Partition(132, 132, is_shared=True), Partition(116, 16), Partition(84, 48)
STEP = DecodeWork(("d",), (0,), (5,))


def piece(is_ending=False, last=4):
    params = RowParams() if is_ending else None
    return PrefillWork(1, (PrefillSlice("p", 1, 0, (0,) * 10, params),), 0, last, is_last=is_ending)


class Log:
    """Launches at a time and completes by number."""

    def __init__(self):
        self.flight, self.tickets = Flight(num_layers=4), {}

    def launch(self, number, work, partition=NARROW, at_s=0.0, takes_s=1.0):
        self.tickets[number] = Ticket(number, work, partition, at_s)
        self.flight.launch(self.tickets[number], takes_s)
        return self

    def complete(self, number, at_s):
        self.flight.complete(self.tickets[number], at_s)
        return self


def test_ends_follow_each_other_and_move_with_what_was_late():
    log = Log().launch(1, STEP, takes_s=2.0).launch(2, STEP, takes_s=3.0)
    assert log.flight.step_end_s == 5.0
    log.complete(1, at_s=2.5)
    assert log.flight.step_end_s == 5.5
    log.complete(2, at_s=5.0)
    assert log.flight.step_end_s == 5.0 and len(log.flight) == 0
    log.launch(3, STEP, at_s=9.0)
    assert log.flight.step_end_s == 10.0, "an idle lane starts at the launch"


def test_a_fused_step_is_in_both_lanes():
    log = Log().launch(1, FusedWork(piece(is_ending=True), STEP), WHOLE)
    assert [log.flight.num_in(lane) for lane in Lane] == [1, 1]
    assert log.flight.num_pieces == 0 and log.flight.has_stepped
    log.complete(1, 1.0)
    assert len(log.flight) == 0


def test_on_the_whole_chip_a_step_follows_every_piece():
    log = Log().launch(1, piece(), WHOLE)
    assert not log.flight.can_queue(WHOLE, is_stepping=True)
    assert log.flight.can_queue(WHOLE, is_stepping=False), "nobody decodes"
    assert log.launch(2, STEP, WHOLE).flight.can_queue(WHOLE, is_stepping=True)


def test_pieces_of_the_whole_chip_and_of_a_half_are_not_mixed():
    assert not Log().launch(1, piece(), WHOLE).launch(2, STEP, WHOLE).flight.can_queue(NARROW, is_stepping=True)
    assert not Log().launch(1, piece(), NARROW).flight.can_queue(WHOLE, is_stepping=False)
    assert Log().launch(1, piece(), NARROW).flight.can_queue(WIDE, is_stepping=True)


@pytest.mark.parametrize(
    "before, wanted, where",
    [
        ([], WIDE, WIDE),
        ([NARROW], WIDE, NARROW),  # grow after the piece that holds the SMs
        ([WIDE], NARROW, WIDE),  # room enough: the piece that leaves less will come
        ([WIDE, NARROW], WIDE, NARROW),
        ([NARROW, WIDE], WIDE, NARROW),
        ([WHOLE], NARROW, WHOLE),  # it has to wait for that in any case
        ([NARROW], WHOLE, NARROW),
    ],
)
def test_a_step_runs_where_no_piece_is_in_its_way(before, wanted, where):
    log = Log()
    for number, partition in enumerate(before):
        log.launch(number, piece(), partition)
    assert log.flight.step_partition(wanted) == where


def test_beside_prefill_the_next_step_is_launched_late():
    log = Log().launch(1, STEP, takes_s=0.010).launch(2, piece(), takes_s=0.008)
    assert log.flight.step_from_s(0.020, 0.010) == pytest.approx(0.010 * (1 - LAUNCH_AHEAD))
    assert log.complete(1, 0.009).flight.step_from_s(0.020, 0.010) == -math.inf, "nothing runs: at once"
    assert log.flight.step_from_s(0.020, 0.0) == -math.inf, "nothing is predicted"


def test_a_step_waits_for_a_prompt_that_ends_soon_enough():
    log = Log().launch(1, STEP, takes_s=0.010).launch(2, piece(is_ending=True), takes_s=0.013)
    assert log.flight.is_merging
    assert log.flight.step_from_s(0.020, 0.012) == pytest.approx(0.018), "until the others' gap is used up"
    late = Log().launch(1, STEP, takes_s=0.010).launch(2, piece(is_ending=True), takes_s=0.019)
    assert late.flight.step_from_s(0.020, 0.012) == pytest.approx(0.010 - LAUNCH_AHEAD * 0.012)


@pytest.mark.parametrize("x", [0.0, 0.1, 0.3, 0.34, 0.5, 0.66])
def test_by_either_way_both_gaps_are_within_the_tbt(x):
    """A prompt ends x after the last step; steps take two thirds of a TBT of 1, or less."""
    step_s = 2 / 3
    log = Log().launch(1, STEP, takes_s=step_s).launch(2, piece(is_ending=True), takes_s=step_s + x)
    waits = log.flight.step_from_s(1.0, step_s) > step_s
    others_gap_s, first_gap_s = (x + step_s, step_s) if waits else (step_s, 2 * step_s - x)
    assert max(others_gap_s, first_gap_s) <= 1 + 1e-9


def test_a_last_piece_waits_where_its_prompt_would_end_too_early():
    log = Log().launch(1, STEP, takes_s=0.018)  # a slow step has just begun
    assert log.flight.merge_from_s(0.002, 0.020, 0.012) == pytest.approx(0.018 + 0.012 - 0.020 - 0.002)
    assert log.flight.is_merging, "and the next step knows of it"
    assert log.flight.step_from_s(0.020, 0.012) == pytest.approx(0.018 + 0.020 - 0.012)
    assert log.flight.merge_from_s(0.012, 0.020, 0.012) == -math.inf, "a longer one need not wait"
    assert log.flight.merge_from_s(0.002, 0.020, 0.025) == -math.inf, "what is lost cannot be saved by waiting"
    assert not log.flight.is_merging


def test_pieces_on_a_half_are_remembered():
    log = Log().launch(1, piece(), WHOLE)
    assert not log.complete(1, at_s=1.0).flight.has_split_since(0.0), "the lanes took turns"
    log.launch(2, piece(), NARROW)
    assert log.flight.has_split_since(math.inf), "one runs yet"
    log.complete(2, at_s=2.0)
    assert log.flight.has_split_since(1.9) and not log.flight.has_split_since(2.0)
