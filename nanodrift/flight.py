"""What is in flight on both lanes: how much, until when by prediction, and on which SMs. Reads no clock.

Two rules keep a decode step from waiting for more prefill than was promised. On the whole chip, where the lanes share a
stream, a step follows every piece. And lanes that change their partition shrink first and grow after: a step runs on
SMs that no piece before it holds, and pieces of the whole chip and of a half are never queued behind each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanodrift.plan import Lane, NewBlocks, Partition, PrefillSlice, PrefillWork, Ticket

LAUNCH_AHEAD = 0.25  # of a step: how long before the end of one the next is launched, where prompts may end beside them

PACE_MEMORY = 0.95  # what a prefill piece or fused step leaves of those before it


@dataclass
class Chunk:
    """One token chunk on its way through the layers."""

    batch_id: int
    slices: tuple[PrefillSlice, ...]
    new_blocks: tuple[NewBlocks, ...]
    next_layer: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.slices)


class Flight:
    """Tickets that were launched and are not done, in launch order."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.has_stepped = True  # a decode step was launched after the newest prefill piece
        self._step_s = 0.0  # when the last decode step ended
        self._end_s: dict[Lane, dict[int, float]] = {lane: {} for lane in Lane}  # predicted, by ticket number
        self.planned_s = math.inf  # when a last piece that was told to wait will end
        self._pieces: dict[int, Ticket] = {}  # of prefill, fused steps not counted
        self._prefill_s = 0.0  # when the last prefill ended
        self._split_s = -math.inf  # when the last prefill piece on its half ended
        self._pace = 0.0, 0.0  # seconds and prompt tokens of late

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
            self._step_s = now_s
        elif not ticket.partition.is_shared:
            self._split_s = now_s
        if Lane.PREFILL in ticket.work.lanes:
            work = ticket.work.parts[0]
            num_tokens = work.num_tokens * (work.last_layer - work.first_layer) / self.num_layers
            seconds, tokens = self._pace
            seconds += now_s - max(ticket.launched_s, self._prefill_s)
            self._pace = seconds * PACE_MEMORY, (tokens + num_tokens) * PACE_MEMORY
            self._prefill_s = now_s

    def __len__(self) -> int:
        return sum(len(ends) for ends in self._end_s.values())

    def num_in(self, lane: Lane) -> int:
        return len(self._end_s[lane])

    @property
    def num_pieces(self) -> int:
        return len(self._pieces)

    @property
    def token_s(self) -> float:
        """Seconds that prefill has taken per prompt token of late, its turns waited for; 0.0 before the first."""
        seconds, num_tokens = self._pace
        return seconds / num_tokens if num_tokens else 0.0

    @property
    def step_end_s(self) -> float:
        """When the newest decode step ends, or has ended."""
        return max([self._step_s, *self._end_s[Lane.DECODE].values()])

    @property
    def is_split(self) -> bool:
        """Prefill runs beside the decode lane."""
        return any(not ticket.partition.is_shared for ticket in self._pieces.values())

    def has_split_since(self, since_s: float) -> bool:
        """Prefill runs beside the decode lane, or did at that time or later."""
        return self.is_split or self._split_s > since_s

    @property
    def is_turning(self) -> bool:
        """Prefill pieces are in flight on the whole chip, and a decode step behind them."""
        return bool(self._pieces) and self.has_stepped and not self.is_split

    @property
    def is_merging(self) -> bool:
        """A prompt is about to end beside the decode lane."""
        return bool(self._merges_s())

    def can_queue(self, partition: Partition, is_stepping: bool) -> bool:
        """True if a prefill piece may queue there; ``is_stepping``: requests decode, so a step is due behind it."""
        if partition.is_shared and is_stepping and not self.has_stepped:
            return False
        return all(ticket.partition.is_shared == partition.is_shared for ticket in self._pieces.values())

    def step_partition(self, wanted: Partition) -> Partition:
        """Where the next decode step runs: behind the newest piece on the whole chip, else on what the pieces leave."""
        partitions = [ticket.partition for ticket in self._pieces.values()]
        if not partitions or partitions[-1].is_shared:
            return partitions[-1] if partitions else wanted
        return min((p for p in partitions if not p.is_shared), key=lambda p: p.decode_sms)

    def step_from_s(self, tbt_s: float, step_s: float) -> float:
        """When the next decode step may be launched beside prefill: late, so that prompts that end can join it.

        Steps take d of a TBT T, and a prompt ends x after the last step. If x <= T - d the next step waits for it, and
        the others' gap is x + d. Else it does not, and the prompt's first gap is 2 d - x < 3 d - T. Both are within T
        as long as d <= 2/3 T, which is what the dispatcher allows where a prompt ends (MERGE_STEPS).
        """
        if not step_s:
            return -math.inf
        latest_s = self.step_end_s + tbt_s - step_s
        if min(self._merges_s(), default=math.inf) <= latest_s:
            return latest_s
        return self.step_end_s - LAUNCH_AHEAD * step_s if self._end_s[Lane.DECODE] else -math.inf

    def merge_from_s(self, piece_s: float, tbt_s: float, step_s: float) -> float:
        """When the last piece of a prompt may be launched beside decode steps: so that it does not end too early.

        For behind what runs, the step that it joins must end within its TBT.
        """
        end_s = self.step_end_s + step_s - tbt_s
        is_early = step_s < tbt_s and max(self._end_s[Lane.PREFILL].values(), default=0.0) + piece_s < end_s
        self.planned_s = end_s if is_early else math.inf
        return end_s - piece_s if is_early else -math.inf

    def _merges_s(self) -> list[float]:
        """When prompts end beside the decode lane: pieces in flight, and one that was told to wait."""
        ends = self._end_s[Lane.PREFILL]
        found = [ends[n] for n, t in self._pieces.items() if t.work.sampled_ids and not t.partition.is_shared]
        return found if self.planned_s == math.inf else [*found, self.planned_s]
