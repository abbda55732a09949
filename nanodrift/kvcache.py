"""Which KV block belongs to whom: a pool of 64-token blocks, reference counts, and the prefix tree over full blocks.

Integers only: no tensors and no clock. A block is in one of three states. *Used*: requests hold it, and it counts how
many. *Cached*: nobody holds it, but the tree knows which tokens it stands for, so that a later request may take it up
again. *Free*: neither. ``free + cached + used == num_blocks`` at every moment; ``check_pool`` of the tests says so at
length.

The tree has one node per block. A node's key is the block's 64 token ids, compared and not only hashed, and its path
from the root is everything before them. Two rules keep it sound:

- A block enters once it is full and the host has seen the work that wrote its last layer. From then on it is read only.
- Whoever holds a node's block holds all blocks above it, and lets go of all at once. So among the cached blocks, in the
  order in which they were let go (deepest first), children stand before their parents: the oldest one is always a leaf,
  and evicting from that end is evicting the least recently used leaf.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from nanodrift.config import BLOCK_SIZE
from nanodrift.request import Request


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class Node:
    """A full block that the tree knows. An evicted node has no parent and never comes back: another takes its place."""

    __slots__ = ("block_id", "children", "key", "parent")

    def __init__(self, block_id: int, key: tuple, parent: Node | None):
        self.block_id, self.key, self.parent = block_id, key, parent
        self.children: dict[tuple, Node] = {}


class BlockPool:
    """Blocks 1 .. num_blocks (0 is the device's spare). Free ones are handed out oldest first, then cached ones."""

    def __init__(self, num_blocks: int, has_tree: bool = True):
        self.num_blocks, self.has_tree = num_blocks, has_tree
        self.num_queried_tokens = 0  # of first admissions: how many tokens the tree was asked for ...
        self.num_hit_tokens = 0  # ... and how many it had
        self._free = deque(range(1, num_blocks + 1))
        self._num_holders = [0] * (num_blocks + 1)
        self._nodes: list[Node | None] = [None] * (num_blocks + 1)  # the tree's node of each block
        self._root = Node(0, (), None)
        self._cached: OrderedDict[int, Node] = OrderedDict()  # by block id, least recently used first

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_available_blocks

    @property
    def num_available_blocks(self) -> int:
        """What ``allocate`` can hand out."""
        return len(self._free) + len(self._cached)

    # ---- a request's way through the pool ------------------------------------------------------------------------

    def match(self, request: Request) -> None:
        """Finds the leading blocks of a waiting request that the tree has; they are remembered, not yet held.

        The last find is where the next search begins, so that asking again while it waits costs next to nothing. None
        are found for a request whose tokens must all be computed.
        """
        nodes = request.nodes
        if not request.reads_cache:
            nodes.clear()
            return
        while nodes and nodes[-1].parent is None:  # evicted since; leaves go first, so what stands before it is alive
            nodes.pop()
        node = nodes[-1] if nodes else self._root
        while (node := node.children.get(_key(request, len(nodes)))) is not None:
            nodes.append(node)

    def num_missing_blocks(self, request: Request) -> int:
        """Blocks that admitting a matched request takes from the available ones: new ones, and cached ones."""
        return blocks_for(request.num_tokens) - sum(self._num_holders[node.block_id] > 0 for node in request.nodes)

    def is_about_to_write(self, owner: Request, request: Request) -> bool:
        """True if ``owner``, whose prompt is being computed, writes the very block at which a request's match ends."""
        index = len(request.nodes)
        is_same_path = owner.nodes[index - 1 : index] == request.nodes[-1:]  # hence all tokens before, and the salt
        is_full = (index + 1) * BLOCK_SIZE <= request.num_tokens
        is_of_use = self.has_tree and request.reads_cache and is_full
        return is_of_use and is_same_path and _key(owner, index) == _key(request, index)

    def admit(self, request: Request) -> None:
        """Gives a matched request its cached prefix and new blocks for its other tokens; at least one is computed."""
        request.block_ids = [node.block_id for node in request.nodes]
        for block_id in request.block_ids:
            self._num_holders[block_id] += 1
            self._cached.pop(block_id, None)
        request.num_written_tokens = len(request.nodes) * BLOCK_SIZE
        request.num_computed_tokens = min(request.num_written_tokens, request.num_tokens - 1)
        self.allocate(request, blocks_for(request.num_tokens) - len(request.nodes))
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_queried_tokens += request.num_tokens
            self.num_hit_tokens += request.num_cached_tokens

    def allocate(self, request: Request, num_blocks: int) -> list[int]:
        """Appends blocks to a request's own. Asking for more than are available is a bug of the caller."""
        assert num_blocks <= self.num_available_blocks, f"{num_blocks} of {self.num_available_blocks} blocks asked for"
        while len(self._free) < num_blocks:
            self._evict()
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_holders[block_id] = 1
        request.block_ids += block_ids
        return block_ids

    def enter(self, request: Request, is_leaving: bool = False) -> None:
        """Enters a request's blocks into the tree, as far as they are full and the host has seen them written.

        The tree may know the same tokens by another block, which somebody wrote at the same time. Then a running
        request stops there, since it does not hold that block; one that is leaving enters what follows all the same.
        """
        nodes = request.nodes
        while self.has_tree and (len(nodes) + 1) * BLOCK_SIZE <= request.num_written_tokens:
            parent, key = nodes[-1] if nodes else self._root, _key(request, len(nodes))
            node = parent.children.get(key)
            if node is None:
                block_id = request.block_ids[len(nodes)]
                node = parent.children[key] = self._nodes[block_id] = Node(block_id, key, parent)
            elif not is_leaving:
                return
            nodes.append(node)

    def release(self, request: Request) -> None:
        """Lets go of all blocks of a request that nothing in flight touches. Those the tree knows stay cached."""
        self.enter(request, is_leaving=True)
        for block_id in request.block_ids:
            assert self._num_holders[block_id] > 0, f"block {block_id} is let go twice"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0 and self._nodes[block_id] is None:
                self._free.append(block_id)
        for node in reversed(request.nodes):  # deepest first
            if self._num_holders[node.block_id] == 0:
                self._cached[node.block_id] = node
                self._cached.move_to_end(node.block_id)
        request.block_ids = []

    def num_lost_tokens(self, request: Request) -> int:
        """Tokens to compute again if the request's blocks were taken: those that no other request holds too."""
        num_shared = sum(self._num_holders[block_id] > 1 for block_id in request.block_ids)
        return request.num_written_tokens - num_shared * BLOCK_SIZE

    # ---- inside --------------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        block_id, node = self._cached.popitem(last=False)
        assert not node.children, f"block {block_id} is evicted before what follows it"
        del node.parent.children[node.key]
        node.parent = self._nodes[block_id] = None
        self._free.append(block_id)


def _key(request: Request, index: int) -> tuple:
    """What block ``index`` of a request is known by. The salt in the first one keeps whole trees apart."""
    ids = tuple(request.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    return (request.cache_salt, *ids) if index == 0 and request.cache_salt is not None else ids
