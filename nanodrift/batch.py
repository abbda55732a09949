"""The tensors of one forward pass, and the device tables that requests keep rows in.

``Rows`` holds, per running request, what the device needs to go on without the host: last token, next position, block
table, sampling parameters. ``Batch`` is the metadata of one pass; it is an argument everywhere and never a global, since
two passes are in flight at once. Built from plan messages; knows nothing of queues, streams or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanodrift.config import BLOCK_SIZE
from nanodrift.plan import DecodeWork, NewBlocks, PrefillWork, RowParams
from nanodrift.request import MAX_STOP_TOKEN_IDS


@dataclass
class Batch:
    """Metadata of one pass over T tokens: first those of R prefill slices, then B decoding rows. All int32, on device.

    A row of -1 is padding: it is computed, and nothing is written for it.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    rows: torch.Tensor  # [T] the block-table row of each token
    sample_indices: torch.Tensor  # [Q] which tokens' hidden states go to the head
    num_prefill_tokens: int = 0  # of T; the rest decode
    prefill_rows: torch.Tensor | None = None  # [R]
    query_starts: torch.Tensor | None = None  # [R + 1] cumulative
    prefill_context_lens: torch.Tensor | None = None  # [R] cached and new tokens
    max_query_len: int = 0  # upper bound of the slices' lengths
    decode_context_lens: torch.Tensor | None = None  # [B] = positions + 1, 0 for padding

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


class Rows:
    """Per-request tables on the device, one row a request, and one spare row that padding may read.

    Host code writes them only through ``assign_blocks`` and ``set_params``, stream-ordered; the sampler advances
    ``last_token`` and ``next_position`` itself.
    """

    def __init__(self, num_rows: int, max_model_len: int, device: torch.device):
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

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, torch.Tensor))
