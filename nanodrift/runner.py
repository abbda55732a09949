"""Carries one lane's plan messages through the model: blocks and parameters into the rows, tokens out.

What the CPU and the GPU executor share. Everything it does is stream-ordered and it never waits; it knows nothing of
tickets, events or graphs.
"""

from __future__ import annotations

import torch

from nanodrift import ops
from nanodrift.batch import Batch, Rows, Upload, build_batch
from nanodrift.model import KVPool, LayerState, Model
from nanodrift.ops import LaneResources
from nanodrift.plan import DecodeWork, FusedWork, PrefillWork


class Runner:
    """A model, its KV pool and rows, and the memory of its passes: state, logits, the lane's scratch.

    Decode steps run between the layer chunks of a prefill, so each side has a state of its own.
    """

    def __init__(self, model: Model, kv: KVPool, rows: Rows, lane: LaneResources, max_tokens: int):
        self.model, self.kv, self.rows, self.lane = model, kv, rows, lane
        self.num_layers = model.config.num_layers
        self.prefill_state = model.new_state(max_tokens)
        self.decode_state = model.new_state(rows.num_rows)
        device = rows.block_table.device
        vocab_size = model.config.vocab_size
        self.logits = torch.empty(rows.num_rows, vocab_size, dtype=torch.float32, device=device)  # [num_rows, V]
        self.chunk: Batch | None = None  # the token chunk whose layers are under way

    def prefill(self, work: PrefillWork, upload: Upload) -> torch.Tensor | None:
        """Runs layers [first, last) of a chunk; its last piece returns the sampled tokens [Q] int32."""
        if work.first_layer == 0:
            self.rows.assign_blocks(work.new_blocks, upload)
            self.chunk = build_batch(self.rows, work, None, upload)
            self.model.embed(self.chunk, self.prefill_state, self.lane)
        self.model.run_layers(self.chunk, self.prefill_state, self.kv, work.first_layer, work.last_layer, self.lane)
        return self._finish(self.chunk, self.prefill_state, work, None, upload) if work.is_last else None

    def decode(self, work: DecodeWork, upload: Upload) -> torch.Tensor:
        """One step, launched operator by operator. Returns the tokens [B] int32."""
        self.rows.assign_blocks(work.new_blocks, upload)
        return self._run(build_batch(self.rows, None, work, upload), self.decode_state, None, work, upload)

    def fused(self, work: FusedWork, upload: Upload) -> torch.Tensor | None:
        """A prefill chunk and a decode step in one pass: tokens of the prompts that end, then of the decoding rows."""
        self.rows.assign_blocks(work.prefill.new_blocks + work.decode.new_blocks, upload)
        batch = build_batch(self.rows, work.prefill, work.decode, upload)
        return self._run(batch, self.prefill_state, work.prefill, work.decode, upload)

    def _run(
        self, batch: Batch, state: LayerState, prefill: PrefillWork | None, decode: DecodeWork, upload: Upload
    ) -> torch.Tensor:
        self.model.embed(batch, state, self.lane)
        self.model.run_layers(batch, state, self.kv, 0, self.num_layers, self.lane)
        return self._finish(batch, state, prefill, decode, upload)

    def _finish(
        self, batch: Batch, state: LayerState, prefill: PrefillWork | None, decode: DecodeWork | None, upload: Upload
    ) -> torch.Tensor | None:
        ended = [s for s in prefill.slices if s.params is not None] if prefill else []
        self.rows.set_params([(s.row, s.params) for s in ended], upload)
        num_sampled = batch.sample_indices.shape[0]
        if num_sampled == 0:
            return None
        logits = self.model.head(batch, state, self.lane, out=self.logits[:num_sampled])
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
