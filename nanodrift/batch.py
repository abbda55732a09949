"""The tensors of one forward pass, and the device tables that requests keep rows in.

``Rows`` holds, per running request, what the device needs to go on without the host: last token, next position, block
table, sampling parameters. ``Batch`` is the metadata of one pass; it is an argument everywhere and never a global,
since two passes are in flight at once. Built from plan messages; knows nothing of queues, streams or graphs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanodrift.config import BLOCK_SIZE
from nanodrift.penalties import Penalties
from nanodrift.plan import DecodeWork, NewBlocks, PrefillWork, RowParams, is_wasteful
from nanodrift.request import MAX_STOP_TOKEN_IDS

# 32-bit ints of the host -> an int32 tensor on the device, stream-ordered: the given one if there is one, else any
Upload = Callable[..., torch.Tensor]


class PassShape(NamedTuple):
    """What a pass has room for. Work is padded up to it, so that all work of one shape can use one captured graph.

    Decoding rows come first, then prompts: so the rows that are not needed leave their tokens to the prompts.
    """

    num_tokens: int  # T
    num_slices: int  # R
    num_decoding: int  # B, of the T
    num_sampled: int  # Q

    @classmethod
    def of(cls, prefill: PrefillWork | None, decode: DecodeWork | None) -> PassShape:
        """The shape without padding."""
        slices, num_decoding = prefill.slices if prefill else (), len(decode.rows) if decode else 0
        num_slices = len(slices) + (prefill is not None and decode is not None)  # one that stands for what decodes
        num_ended = sum(piece.params is not None for piece in slices)
        num_tokens = num_decoding + sum(len(piece.token_ids) for piece in slices)
        return cls(num_tokens, num_slices, num_decoding, num_ended + num_decoding)

    def may_hold(self, needed: PassShape) -> bool:
        """Whether work of that shape may be padded to this one: same lanes, room for all of it, not too much waste."""
        has_room = all(room >= need for room, need in zip(self, needed, strict=True))
        is_alike = (self.num_decoding > 0) == (needed.num_decoding > 0)
        return has_room and is_alike and not (needed.num_slices and is_wasteful(needed.num_tokens, self.num_tokens))


@dataclass
class Batch:
    """Metadata of one pass over T tokens: first those that decode, then those of prompts. All int32, on the device.

    A row of -1 is padding: it is computed, and nothing is written for it. Of the B rows that may decode the last ones
    may be padding, while their tokens are a prompt's.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    rows: torch.Tensor  # [T] the block-table row of each token
    sample_indices: torch.Tensor  # [Q] which tokens' hidden states go to the head
    sample_rows: torch.Tensor  # [Q] their rows
    sample_positions: torch.Tensor  # [Q] and their positions
    prefill_rows: torch.Tensor  # [R]
    prefill_context_lens: torch.Tensor  # [R] cached and new tokens
    query_starts: torch.Tensor  # [R + 1] cumulative
    decode_rows: torch.Tensor  # [B]
    decode_context_lens: torch.Tensor  # [B] = positions + 1
    gather_rows: torch.Tensor  # [B] = decode_rows, but for padding the spare row
    block_table: torch.Tensor  # [num_rows, max_blocks] the table that rows index
    shape: PassShape

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


class Rows:
    """Per-request tables on the device, one row a request, and one spare row that padding may read.

    Host code writes them only through ``assign_blocks`` and ``set_params``, stream-ordered; the sampler advances
    ``last_token`` and ``next_position`` itself.
    """

    def __init__(self, num_rows: int, max_model_len: int, device: torch.device, vocab_size: int = 0):
        self.num_rows = num_rows
        self.max_blocks = -(-max_model_len // BLOCK_SIZE)

        def table(*shape, fill=0, dtype=torch.int32):
            return torch.full((num_rows + 1, *shape), fill, dtype=dtype, device=device)

        self.block_table = table(self.max_blocks)  # [rows, max_blocks]
        self.last_token = table()  # [rows]
        self.next_position = table()  # [rows] where last_token will be written
        self.temperature = table(fill=1.0, dtype=torch.float32)
        self.top_k = table()
        self.top_p = table(fill=1.0, dtype=torch.float32)
        self.min_p = table(dtype=torch.float32)
        self.seed = table(dtype=torch.int64)
        self.banned = table(MAX_STOP_TOKEN_IDS, fill=-1)  # [rows, 16] ids held back ...
        self.min_position = table()  # [rows] ... below this position
        self.penalties = Penalties(num_rows, vocab_size, device)

    @property
    def spare_row(self) -> int:
        """A row nobody owns, all of block 0: padding reads it, and what need not be kept is written there."""
        return self.num_rows

    def assign_blocks(self, new_blocks: tuple[NewBlocks, ...], upload: Upload) -> None:
        """Enters newly given blocks into the block table."""
        if not new_blocks:
            return
        places, block_ids = array("i"), array("i")
        for new in new_blocks:
            start = new.row * self.max_blocks + new.first_index
            places.extend(range(start, start + len(new.block_ids)))
            block_ids.extend(new.block_ids)
        places, block_ids = upload(places + block_ids).chunk(2)
        self.block_table.view(-1).index_copy_(0, places.long(), block_ids)

    def advance(self, batch: Batch) -> None:
        """Fetches the decoding rows' tokens, positions and lengths into the batch; the host may not know them yet."""
        is_decoding = batch.decode_rows >= 0  # [B]
        for table, tokens in ((self.last_token, batch.token_ids), (self.next_position, batch.positions)):
            here = tokens[: len(is_decoding)]
            torch.where(is_decoding, table.index_select(0, batch.gather_rows), here, out=here)
        torch.add(batch.positions[: len(is_decoding)], 1, out=batch.decode_context_lens)

    def set_params(self, rows_and_params: list[tuple[int, RowParams]], upload: Upload) -> None:
        """Writes the sampling parameters of requests whose prompt is about to be complete."""
        if not rows_and_params:
            return
        self.penalties.set_params(rows_and_params, upload)
        num = len(rows_and_params)
        ints = array("i", [row for row, _ in rows_and_params])
        ints_of, floats_of = ("top_k", "min_position"), ("temperature", "top_p", "min_p")
        for name in ints_of:
            ints.extend(getattr(params, name) for _, params in rows_and_params)
        for name in floats_of:
            ints.frombytes(array("f", [getattr(params, name) for _, params in rows_and_params]).tobytes())
        ints.frombytes(array("q", [params.seed for _, params in rows_and_params]).tobytes())
        for _, params in rows_and_params:
            ids = params.banned_token_ids
            ints.extend(ids + (-1,) * (MAX_STOP_TOKEN_IDS - len(ids)))
        device_ints = upload(ints)
        columns = device_ints[: 6 * num].view(6, num)
        rows = columns[0].long()
        for name, column in zip(ints_of + floats_of, columns[1:], strict=True):
            table = getattr(self, name)
            table.index_copy_(0, rows, column.view(table.dtype))
        self.seed.index_copy_(0, rows, device_ints[6 * num : 8 * num].view(torch.int64))
        banned = device_ints[8 * num : (8 + MAX_STOP_TOKEN_IDS) * num].view(num, MAX_STOP_TOKEN_IDS)
        self.banned.index_copy_(0, rows, banned)


def pack(rows: Rows, prefill: PrefillWork | None, decode: DecodeWork | None, shape: PassShape) -> array:
    """The ints that describe a prefill chunk, a decode step, or both, padded to a shape; see ``lay_out``."""
    decoding = decode.rows if decode else ()
    slices, num_decoding = prefill.slices if prefill else (), len(decoding)
    token_ids = array("i", [0] * num_decoding)  # theirs lie on the device
    positions, token_rows = array("i", decode.positions if decode else ()), array("i", decoding)
    sampled, sampled_rows = array("i"), array("i")
    # the prefill kernel's slices lie back to back: the decoding tokens before them are one that nothing is written for
    slice_rows, ends, starts = ([-1], [0], [0, num_decoding]) if slices and decoding else ([], [], [0])
    for piece in slices:
        token_ids.extend(piece.token_ids)
        positions.extend(range(piece.start, piece.end))
        token_rows.extend([piece.row if piece.writes_kv else rows.spare_row] * len(piece.token_ids))
        starts.append(len(token_ids))
        slice_rows.append(piece.row)
        ends.append(piece.end)
        if piece.params is not None:
            sampled.append(len(token_ids) - 1)
            sampled_rows.append(piece.row)
    sampled.extend(range(num_decoding))
    sampled_rows.extend(decoding)
    columns = (  # ints, padding
        (token_ids, 0),
        (positions, 0),
        (token_rows, -1),
        (sampled, 0),
        (sampled_rows, -1),
        ([positions[i] for i in sampled], 0),
        (slice_rows, -1),
        (ends, 0),
        (starts, starts[-1]),
        (decoding, -1),
        ([position + 1 for position in positions[:num_decoding]], 0),
        (decoding, rows.spare_row),
    )
    ints = array("i")
    for (part, padding), size in zip(columns, _sizes(shape), strict=True):
        ints.extend(part)
        ints.extend([padding] * (_aligned(size) - len(part)))
    return ints


def lay_out(rows: Rows, shape: PassShape, ints: torch.Tensor) -> Batch:
    """The batch that packed ints are, once they lie on the device: views, always at the same places for one shape."""
    sizes = _sizes(shape)
    padded = ints[: num_ints(shape)].split([_aligned(size) for size in sizes])
    parts = [part[:size] for part, size in zip(padded, sizes, strict=True)]
    return Batch(*parts, block_table=rows.block_table, shape=shape)


def num_ints(shape: PassShape) -> int:
    """What ``pack`` returns, counted."""
    return sum(map(_aligned, _sizes(shape)))


def _sizes(shape: PassShape) -> tuple[int, ...]:
    t, r, b, q = shape
    return t, t, t, q, q, q, r, r, r + 1, b, b, b  # in the order of Batch's fields


def _aligned(size: int) -> int:
    """Each part starts at a multiple of 16 bytes: kernels have one binary for that and one for the rest."""
    return -(-size // 4) * 4
