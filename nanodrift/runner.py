"""Carries one lane's plan messages through the model: blocks and parameters into the rows, tokens out.

What the CPU and the GPU executor share. Everything it does is stream-ordered and it never waits; it knows nothing of
tickets, events or graphs.
"""

from __future__ import annotations

import torch

from nanodrift import ops
from nanodrift.batch import Batch, Rows, Upload, build_batch
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources
from nanodrift.plan import DecodeWork, FusedWork, PrefillWork


class Runner:
    """One lane's memory (hidden state, logits, scratch) over a model, KV pool and rows that both lanes share.

    Decode steps run between or beside the layer chunks of a prefill, so each lane has a runner of its own. A fused step
    runs on the prefill lane's, which is large enough for both. ``lane`` may be exchanged between two pieces of work,
    for one of another SM count over the same scratch.
    """

    def __init__(self, model: Model, kv: KVPool | None, rows: Rows, lane: LaneResources, max_tokens: int):
        self.model, self.kv, self.rows, self.lane = model, kv, rows, lane
        self.num_layers = model.config.num_layers
        self.state = model.new_state(max_tokens)
        device = rows.block_table.device
        vocab_size = model.config.vocab_size
        self.logits = torch.empty(rows.num_rows, vocab_size, dtype=torch.float32, device=device)  # [num_rows, V]
        self.chunk: Batch | None = None  # the token chunk whose layers are under way

    def prefill(self, work: PrefillWork, upload: Upload) -> torch.Tensor | None:
        """Runs layers [first, last) of a chunk; its last piece returns the sampled tokens [Q] int32."""
        if work.first_layer == 0:
            self.rows.assign_blocks(work.new_blocks, upload)
            self.chunk = build_batch(self.rows, work, None, upload)
            self.model.embed(self.chunk, self.state, self.lane)
        self.model.run_layers(self.chunk, self.state, self.kv, work.first_layer, work.last_layer, self.lane)
        return self._finish(self.chunk, work, None, upload) if work.is_last else None

    def decode(self, work: DecodeWork, upload: Upload) -> torch.Tensor:
        """One step, launched operator by operator. Returns the tokens [B] int32."""
        self.rows.assign_blocks(work.new_blocks, upload)
        return self._run(build_batch(self.rows, None, work, upload), None, work, upload)

    def fused(self, work: FusedWork, upload: Upload) -> torch.Tensor | None:
        """A prefill chunk and a decode step in one pass: tokens of the prompts that end, then of the decoding rows."""
        self.rows.assign_blocks(work.prefill.new_blocks + work.decode.new_blocks, upload)
        batch = build_batch(self.rows, work.prefill, work.decode, upload)
        return self._run(batch, work.prefill, work.decode, upload)

    def _run(self, batch: Batch, prefill: PrefillWork | None, decode: DecodeWork, upload: Upload) -> torch.Tensor:
        self.model.embed(batch, self.state, self.lane)
        self.model.run_layers(batch, self.state, self.kv, 0, self.num_layers, self.lane)
        return self._finish(batch, prefill, decode, upload)

    def _finish(
        self, batch: Batch, prefill: PrefillWork | None, decode: DecodeWork | None, upload: Upload
    ) -> torch.Tensor | None:
        ended = [s for s in prefill.slices if s.params is not None] if prefill else []
        self.rows.set_params([(s.row, s.params) for s in ended], upload)
        num_sampled = batch.sample_indices.shape[0]
        if num_sampled == 0:
            return None
        logits = self.model.head(batch, self.state, self.lane, out=self.logits[:num_sampled])
        has_filter = any(s.params.has_filter for s in ended) or (decode is not None and decode.has_filter)
        has_ban = any(s.params.min_position > s.end for s in ended) or (decode is not None and decode.has_ban)
        return self.sample(logits, batch.sample_rows, batch.sample_positions, has_filter, has_ban)

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        has_filter: bool,
        has_ban: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws the next token of each row from logits [Q, V] and writes it into the row. Returns tokens [Q] int32."""
        tables, lane = self.rows, self.lane
        if has_ban:
            ops.ban_tokens(logits, rows, positions, tables.banned, tables.min_position, lane)
        if has_filter:
            limits = (tables.temperature, tables.top_k, tables.top_p, tables.min_p)
            ops.filter_logits(logits, rows, positions, *limits, lane)
        state = (tables.temperature, tables.seed, tables.last_token, tables.next_position)
        return ops.sample(logits, rows, positions, *state, lane, out=out)
