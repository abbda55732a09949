"""What the device knows of requests that want penalties or a logit bias: what they have said, and what they asked for.

The sampler counts the tokens it draws itself, so a step can be launched before the host has read the one before it.
Rows of requests that ask for nothing are never touched. Knows nothing of queues, streams or graphs.
"""

from __future__ import annotations

from array import array

import torch

from nanodrift import ops
from nanodrift.plan import PrefillWork, RowParams
from nanodrift.request import MAX_BIASED_TOKENS


class Penalties:
    """Tables with a row for each request and a spare one, which the row -1 of padding names."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        sizes, floats = {"device": device}, {"dtype": torch.float32, "device": device}
        self.settings = torch.tensor([1.0, 0.0, 0.0], **floats).repeat(num_rows + 1, 1)  # [rows, 3] as in the kernel
        self.counts = torch.zeros(num_rows + 1, vocab_size, dtype=torch.int16, **sizes)  # [rows, V]
        self.biased_ids = torch.full((num_rows + 1, MAX_BIASED_TOKENS), -1, dtype=torch.int32, **sizes)  # -1: none
        self.biases = torch.zeros(num_rows + 1, MAX_BIASED_TOKENS, **floats)
        self._rows_in_use: set[int] = set()

    def set_params(self, rows_and_params: list[tuple[int, RowParams]], upload) -> None:
        """Writes what requests ask for whose prompt is about to be complete, over what their rows' last owners did."""
        for row, p in rows_and_params:
            if p.has_penalty or row in self._rows_in_use:
                (self._rows_in_use.add if p.has_penalty else self._rows_in_use.discard)(row)
                ids, biases = zip(*p.logit_bias, strict=True) if p.logit_bias else ((), ())
                floats = array("f", (p.repetition_penalty, p.presence_penalty, p.frequency_penalty, *biases))
                settings, biases = upload(array("i", floats.tobytes())).view(torch.float32).tensor_split([3])
                self.settings[row], self.biases[row, : len(ids)] = settings, biases
                self.biased_ids[row] = -1
                self.biased_ids[row, : len(ids)] = upload(array("i", ids))

    def count_prompts(self, work: PrefillWork, token_ids: torch.Tensor) -> None:
        """Counts a chunk's tokens, token_ids [T], where its requests have penalties; a new owner's row begins at 0."""
        end, new_rows = 0, {new.row for new in work.new_blocks if new.first_index == 0}
        for piece in work.slices:
            start, end = end, end + len(piece.token_ids)
            if piece.output_start is not None:
                counts, num_prompt = self.counts[piece.row], max(piece.output_start - piece.start, 0)  # [V]
                of_prompt, of_output = token_ids[start:end].long().tensor_split([num_prompt])
                if piece.row in new_rows:
                    counts.zero_()
                counts.index_fill_(0, of_prompt, ops.IN_PROMPT)
                counts.index_add_(0, of_output, torch.ones_like(of_output, dtype=counts.dtype))

    def apply(self, logits: torch.Tensor, rows: torch.Tensor, lane: ops.LaneResources) -> None:
        """Adds biases to logits [Q, V] and takes penalties off, in place."""
        ids, biases = self.biased_ids[rows.long()].long(), self.biases[rows.long()]  # [Q, 300]
        logits.scatter_add_(1, ids.clamp(min=0), biases * (ids >= 0))
        ops.penalize(logits, rows, self.settings, self.counts, lane)

    def count_output(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Counts drawn tokens [Q]."""
        self.counts[rows.long(), token_ids.long()] += 1
