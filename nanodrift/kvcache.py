"""Which KV block belongs to whom: a pool of 64-token blocks with reference counts.

Integers only, no tensors. One pool serves both lanes. A block that several requests share (a common prefix) counts its
holders and returns to the free list when the last one lets go; the radix tree over complete blocks will stand here.
"""

from __future__ import annotations

from collections import deque

from nanodrift.config import BLOCK_SIZE


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks - 1. Freed blocks are handed out again oldest first."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._num_holders = [0] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks off the free list, one holder each. Asking for more than are free is a bug of the caller."""
        if num_blocks > len(self._free):
            raise AssertionError(f"{num_blocks} blocks asked for, {len(self._free)} free")
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        return block_ids

    def share(self, block_ids: list[int]) -> None:
        """Adds a holder to blocks that are in use."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} is free and cannot be shared"
            self._num_holders[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Lets go of blocks; those without a holder left are free again."""
        for block_id in block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} freed twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._free.append(block_id)
