"""What is in flight on both lanes: how much, until when by prediction, and on which SMs. Reads no clock.

Two rules keep a decode step from waiting for more prefill than was promised. On the whole chip, where the lanes share a
stream, a step follows every piece. And lanes that change their partition shrink first and grow after: a step runs on
SMs that no piece before it holds, and pieces of the whole chip and of a half are never queued behind each other.
"""

from __future__ import annotations

from nanodrift.plan import Lane, Partition, PrefillWork, Ticket


class Flight:
    """Tickets that were launched and are not done, in launch order."""

    def __init__(self):
        self.has_stepped = True  # a decode step was launched after the newest prefill piece
        self.step_end_s = 0.0  # when the last decode step ended
        self._end_s: dict[Lane, dict[int, float]] = {lane: {} for lane in Lane}  # predicted, by ticket number
        self._pieces: dict[int, Ticket] = {}  # of prefill, fused steps not counted

    def launch(self, ticket: Ticket, predicted_s: float) -> None:
        for lane in ticket.work.lanes:
            ends = self._end_s[lane]
            ends[ticket.number] = max(ticket.launched_s, *ends.values(), 0.0) + predicted_s
        self.has_stepped = not isinstance(ticket.work, PrefillWork)
        if not self.has_stepped:
            self._pieces[ticket.number] = ticket

    def complete(self, ticket: Ticket, now_s: float) -> None:
        for lane in ticket.work.lanes:
            ends = self._end_s[lane]
            late_s = now_s - ends.pop(ticket.number)
            for number in ends:  # what is behind it moves with it
                ends[number] += late_s
        if self._pieces.pop(ticket.number, None) is None:
            self.step_end_s = now_s

    def __len__(self) -> int:
        return sum(len(ends) for ends in self._end_s.values())

    def num_in(self, lane: Lane) -> int:
        return len(self._end_s[lane])

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    @property
    def is_merging(self) -> bool:
        """A prompt is about to end beside the decode lane."""
        return bool(self._merging())

    def can_queue(self, partition: Partition) -> bool:
        """True if a prefill piece there has no piece of the other kind before it."""
        return all(ticket.partition.is_shared == partition.is_shared for ticket in self._pieces.values())

    def step_partition(self, wanted: Partition) -> Partition:
        """Where the next decode step runs: behind the newest piece on the whole chip, else on what the pieces leave."""
        partitions = [ticket.partition for ticket in self._pieces.values()]
        if not partitions or partitions[-1].is_shared:
            return partitions[-1] if partitions else wanted
        return min((p for p in partitions if not p.is_shared), key=lambda p: p.decode_sms)

    def hold_until_s(self, tbt_s: float, decode_s: float) -> float | None:
        """Until when the next step had better wait for a prompt that ends beside the decode lane, so that it can join.

        Steps take d of a TBT T, and the prompt ends x after the running step. If x <= T - d the next step waits, and
        the others' gap is x + d. Else it does not, and the prompt's first gap is 2 d - x < 3 d - T. Both are within T
        as long as d <= 2/3 T, which is what the dispatcher allows where a prompt ends (MERGE_STEPS).
        """
        ends = [self._end_s[Lane.PREFILL][number] for number in self._merging()]
        latest_s = max([self.step_end_s, *self._end_s[Lane.DECODE].values()]) + tbt_s - decode_s
        return latest_s if ends and min(ends) <= latest_s else None

    def _merging(self) -> list[int]:
        return [n for n, t in self._pieces.items() if t.work.sampled_ids and not t.partition.is_shared]
