"""Carries one lane's plan messages through the model: blocks and parameters into the rows, tokens out.

What the CPU and the GPU executor share. Everything it does is stream-ordered and it never waits; it knows nothing of
tickets, events, or how graphs come to be. Where it has a graph for a piece of work it replays that; everything else is
launched operator by operator.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import torch

from nanodrift import ops
from nanodrift.batch import Batch, PassShape, Rows, Upload, lay_out, num_ints, pack
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources
from nanodrift.plan import FLAGS, MAX_FUSED_SLICES, DecodeWork, FusedWork, Logprobs, Partition, PrefillWork, Work
from nanodrift.request import MAX_LOGPROBS

ANSWER_WIDTH = 2 + 2 * MAX_LOGPROBS  # ints of a token that comes with logprobs


@dataclass
class _Chunk:
    """A token chunk whose layers are under way; what it carries from layer to layer lies in a LayerState."""

    batch_id: int
    batch: Batch
    ints: array  # what the batch was made from


class Runner:
    """One lane's memory (hidden state, logits, scratch) over a model, KV pool and rows that both lanes share.

    Decode steps run between or beside the layer chunks of a prefill, so each lane has a runner of its own. A fused step
    runs on the prefill lane's, which is large enough for both. ``lane`` and ``partition`` may be exchanged between two
    pieces of work.

    Two chunks may be open at once: the one under way, and one set aside because another passed it. Beginning a third
    loses the one used longest ago. ``shapes`` are what work is padded to; ``graphs`` hold, for a partition and a shape,
    one graph a layer (the key ends with the layer), or of the whole pass from token ids to logits.
    """

    def __init__(self, model: Model, kv: KVPool | None, rows: Rows, lane: LaneResources, max_tokens: int):
        self.model, self.kv, self.rows, self.lane = model, kv, rows, lane
        self.partition: Partition | None = None
        self.shapes: tuple[PassShape, ...] = ()  # small ones first
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.num_layers = model.config.num_layers
        self.state = model.new_state(max_tokens)
        self._aside_state = model.new_state(max_tokens)
        self._chunk: _Chunk | None = None
        self._aside: _Chunk | None = None
        self._decoding: tuple[tuple[int, ...], Batch] | None = None  # rows of the last decode step, and its batch
        device = rows.block_table.device
        most_sampled = rows.num_rows + MAX_FUSED_SLICES
        largest = PassShape(max_tokens, 1 + most_sampled, rows.num_rows, most_sampled)
        # the metadata of the pass under way: at fixed addresses, as graphs want it
        self._ints = torch.zeros(num_ints(largest), dtype=torch.int32, device=device)
        self.logits = torch.empty(most_sampled, model.config.vocab_size, dtype=torch.float32, device=device)  # [Q, V]
        self._logprobs = torch.empty_like(self.logits)  # [Q, V]

    # ---- work --------------------------------------------------------------------------------------------------

    def carry_out(self, work: Work, upload: Upload) -> torch.Tensor | None:
        """Any kind of work. What it returns lies on the device; ``read_answer`` says what it means."""
        if isinstance(work, PrefillWork):
            return self.prefill(work, upload)
        return self.fused(work, upload) if isinstance(work, FusedWork) else self.decode(work, upload)

    def prefill(self, work: PrefillWork, upload: Upload) -> torch.Tensor | None:
        """Runs layers [first, last) of a chunk; its last piece returns the sampled tokens [Q] int32."""
        if work.first_layer == 0:
            self._set_aside()
            self.rows.assign_blocks(work.new_blocks, upload)
            batch, ints = self._enter(work, None, upload)
            self._chunk = _Chunk(work.batch_id, batch, ints)
            self.model.embed(batch, self.state, self.lane)
        elif self._chunk is None or self._chunk.batch_id != work.batch_id:
            self._exchange()
            if self._chunk is None or self._chunk.batch_id != work.batch_id:
                raise RuntimeError(f"chunk {work.batch_id} is not open: it never began, it ended, or two began since")
            upload(self._chunk.ints, self._ints)
        batch = self._chunk.batch
        for layer in range(work.first_layer, work.last_layer):
            graph = self.graphs.get((self.partition, batch.shape, layer))
            if graph is not None:
                graph.replay()
            else:
                self.run_layer(batch, layer)
        if not work.is_last:
            return None
        self._chunk = None
        if work.sampled_ids:
            self.model.head(batch, self.state, self.lane, out=self.logits[: len(work.sampled_ids)])
        return self._draw(batch, work, None, upload)

    def decode(self, work: DecodeWork, upload: Upload) -> torch.Tensor:
        """One step. Returns the tokens [B] int32."""
        self.rows.assign_blocks(work.new_blocks, upload)
        if self._decoding is None or self._decoding[0] != work.rows:  # else the last step left all as this one needs it
            self._decoding = work.rows, self._enter(None, work, upload)[0]
        batch = self._decoding[1]
        self._run(batch)
        return self._draw(batch, None, work, upload)

    def fused(self, work: FusedWork, upload: Upload) -> torch.Tensor:
        """A prefill chunk and a decode step in one pass: tokens of the prompts that end, then of the decoding rows."""
        self._set_aside()
        self.rows.assign_blocks(work.prefill.new_blocks + work.decode.new_blocks, upload)
        batch, _ = self._enter(work.prefill, work.decode, upload)
        self._run(batch)
        return self._draw(batch, work.prefill, work.decode, upload)

    def compute(self, batch: Batch, num_layers: int | None = None) -> None:
        """A whole pass (or its first layers, to warm up), from the rows' tokens to the first Q rows of ``logits``."""
        if batch.shape.num_decoding > 0:
            self.rows.advance(batch)
        self.model.embed(batch, self.state, self.lane)
        self.model.run_layers(batch, self.state, self.kv, 0, num_layers or self.num_layers, self.lane)
        self.model.head(batch, self.state, self.lane, out=self.logits[: batch.shape.num_sampled])

    def run_layer(self, batch: Batch, layer: int) -> None:
        self.model.run_layers(batch, self.state, self.kv, layer, layer + 1, self.lane)

    def _run(self, batch: Batch) -> None:
        graph = self.graphs.get((self.partition, batch.shape))
        if graph is not None:
            graph.replay()
        else:
            self.compute(batch)

    def batch_of(self, shape: PassShape) -> Batch:
        """Where the metadata of every pass of this shape lies."""
        return lay_out(self.rows, shape, self._ints)

    def padding(self, shape: PassShape, upload: Upload) -> Batch:
        """A pass that holds nothing."""
        upload(pack(self.rows, None, None, shape), self._ints)
        return self.batch_of(shape)

    # ---- chunks ------------------------------------------------------------------------------------------------

    def _enter(self, prefill: PrefillWork | None, decode: DecodeWork | None, upload: Upload) -> tuple[Batch, array]:
        shape = self._shape_for(PassShape.of(prefill, decode))
        ints = pack(self.rows, prefill, decode, shape)
        upload(ints, self._ints)
        batch = self.batch_of(shape)
        if prefill:
            self.rows.penalties.count_prompts(prefill, batch.token_ids[len(decode.rows) if decode else 0 :])
        return batch, ints

    def _shape_for(self, needed: PassShape) -> PassShape:
        """The smallest of ``shapes`` that has room without too much waste, else just what is needed."""
        return next((shape for shape in self.shapes if shape.may_hold(needed)), needed)

    def _set_aside(self) -> None:
        """Makes room for another pass: a chunk that is under way keeps what it carries."""
        self._decoding = None
        if self._chunk is not None:
            self._exchange()
            self._chunk = None

    def _exchange(self) -> None:
        """The chunk under way for the one set aside. By copies, since graphs know the state by its address."""
        self._chunk, self._aside = self._aside, self._chunk
        num_tokens = max(chunk.batch.num_tokens for chunk in (self._chunk, self._aside) if chunk is not None)
        for name in ("hidden", "residual"):
            here, there = (getattr(state, name)[:num_tokens] for state in (self.state, self._aside_state))
            between = self.lane.take("gated", here.shape, here)  # dead at layer boundaries, and never narrower
            between.copy_(here)
            here.copy_(there)
            there.copy_(between)

    # ---- sampling ----------------------------------------------------------------------------------------------

    def _draw(
        self, batch: Batch, prefill: PrefillWork | None, decode: DecodeWork | None, upload: Upload
    ) -> torch.Tensor | None:
        """Tokens from the first rows of ``logits``: of the prompts that end, then of the decoding rows."""
        ended = [s for s in prefill.slices if s.params is not None] if prefill else []
        self.rows.set_params([(s.row, s.params) for s in ended], upload)
        first = len(decode.rows) if decode else 0  # of the prompts' tokens
        num = len(ended) + first
        wants_prompt = prefill is not None and any(s.next_token_ids for s in prefill.slices)
        if num == 0:
            return self._score_prompts(batch, prefill, first, upload) if wants_prompt else None
        flags = {flag: any(getattr(s.params, flag) for s in ended) or getattr(decode, flag, False) for flag in FLAGS}
        flags["has_ban"] = any(s.params.min_position > s.end for s in ended) or getattr(decode, "has_ban", False)
        flags["has_logprobs"] |= wants_prompt
        if prefill is None:  # of rows that decode again and again, the device alone knows the positions
            rows, positions = batch.decode_rows, batch.positions
        else:
            rows, positions = batch.sample_rows, batch.sample_positions
        answer = self.sample(self.logits[:num], rows[:num], positions[:num], **flags)
        return torch.cat((answer, self._score_prompts(batch, prefill, first, upload))) if wants_prompt else answer

    def sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        has_filter: bool,
        has_ban: bool,
        has_penalty: bool,
        has_logprobs: bool,
    ) -> torch.Tensor:
        """Draws the next token of each row from logits [Q, V] and writes it into the row.

        Returns tokens [Q] int32, or what ``_with_logprobs`` makes of them.
        """
        tables, lane = self.rows, self.lane
        if has_logprobs:
            logprobs = torch.log_softmax(logits, -1, out=self._logprobs[: logits.shape[0]])  # [Q, V]
        if has_penalty:
            tables.penalties.apply(logits, rows, lane)
        if has_ban:
            ops.ban_tokens(logits, rows, positions, tables.banned, tables.min_position, lane)
        if has_filter:
            limits = (tables.temperature, tables.top_k, tables.top_p, tables.min_p)
            ops.filter_logits(logits, rows, positions, *limits, lane)
        state = (tables.temperature, tables.seed, tables.last_token, tables.next_position)
        token_ids = ops.sample(logits, rows, positions, *state, lane)
        if has_penalty:
            tables.penalties.count_output(rows, token_ids)
        return _with_logprobs(token_ids, logprobs) if has_logprobs else token_ids

    def _score_prompts(self, batch: Batch, work: PrefillWork, start: int, upload: Upload) -> torch.Tensor:
        """The slices' ``next_token_ids`` with their logprobs, as many at a time as there is memory for logits."""
        places, token_ids = array("i"), array("i")
        for piece in work.slices:
            places.extend(range(start, start + len(piece.next_token_ids)))
            token_ids.extend(piece.next_token_ids)
            start += len(piece.token_ids)
        answers, most = [], self.logits.shape[0]
        for indices, wanted in zip(upload(places).split(most), upload(token_ids).split(most), strict=True):
            part, num = replace(batch, sample_indices=indices), len(indices)
            logits = self.model.head(part, self.state, self.lane, out=self.logits[:num])
            answers.append(_with_logprobs(wanted, torch.log_softmax(logits, -1, out=self._logprobs[:num])))
        return torch.cat(answers)


def _with_logprobs(token_ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """token_ids [Q], logprobs [Q, V] -> [Q, 2 + 2n] int32: token, bits of its logprob, of the n highest, their ids."""
    top = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]))  # [Q, n]
    own = logprobs.gather(1, token_ids.long()[:, None])  # [Q, 1]
    bits = torch.cat((own, top.values), 1).view(torch.int32)
    return torch.cat((token_ids[:, None], bits, top.indices.int()), 1)


def read_answer(work: Work, answer: torch.Tensor | None) -> dict:
    """What a runner has returned, once it lies on the host, as a Completion names it."""
    if answer is None:
        return {}
    if answer.ndim == 1:
        return {"tokens": tuple(zip(work.sampled_ids, answer.tolist(), strict=True))}
    num_top, num = answer.shape[1] // 2 - 1, len(work.sampled_ids)
    floats, top_ids = answer[:, 1 : 2 + num_top].view(torch.float32), answer[:, 2 + num_top :]
    found = tuple(map(Logprobs, floats[:, 0].tolist(), top_ids.tolist(), floats[:, 1:].tolist()))
    tokens = tuple(zip(work.sampled_ids, answer[:num, 0].tolist(), strict=True))
    return {"tokens": tokens, "logprobs": found[:num], "prompt_logprobs": found[num:]}
