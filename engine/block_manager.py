"""Who owns which block of the KV pool: reference counts, the prefix cache, quarantine. No torch, no bytes.

A block is in exactly one of four states, so that free + cached + used + quarantined = total at every moment:

- free: no reference, content worthless;
- used: someone holds at least one reference;
- cached: no reference, but its content hash is known: a later prompt may find it, and it goes when room is
needed; - quarantined: bytes may still arrive late from a transfer that failed; nobody gets it before `lift`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..proto.errors import OutOfBlocks


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """How many blocks are in each state."""

    free: int
    cached: int
    used: int
    quarantined: int
    total: int


class BlockManager:
    """Hands out block ids 0 … num_blocks - 1. Every method costs O(blocks named), never O(pool)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # A heap: low ids first keeps a sequence's blocks together, and neighbours move as one piece.
        self._free = list(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._quarantined: set[int] = set()
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, n: int) -> list[int]:
        """`n` blocks with one reference each, the caller's. Cached blocks are evicted, oldest first, if need
        be.

        Raises:
            OutOfBlocks: fewer than `n` blocks are free or cached; nothing was taken.
        """
        if n > self.available:
            raise OutOfBlocks(f"{n} blocks wanted, {self.available} of {self.num_blocks} available")
        free = self._free
        if len(free) < n:
            evicted = [self._cached.popitem(last=False)[0] for _ in range(n - len(free))]
            for block_id in evicted:
                self._forget_hash(block_id)
            taken = sorted(free + evicted)
            free.clear()
        else:
            taken = [heapq.heappop(free) for _ in range(n)]
        references = self._references
        for block_id in taken:
            references[block_id] = 1
        return taken

    def acquire(self, ids: Iterable[int]) -> None:
        """One more reference to each block, which must have one already or be cached."""
        for block_id in ids:
            if self._references[block_id] == 0:
                if block_id not in self._cached:
                    raise ValueError(f"block {block_id} is free: a reference would name nothing")
                del self._cached[block_id]
            self._references[block_id] += 1

    def release(self, ids: Sequence[int]) -> None:
        """Gives one reference to each block back. Those left without one become cached or free.

        Later blocks of a sequence age first: they are of use only to who shares the earlier ones too.
        """
        references = self._references
        for block_id in reversed(ids):
            left = references[block_id] - 1
            if left < 0:
                raise ValueError(f"block {block_id} was released more often than acquired")
            references[block_id] = left
            if not left:
                self._retire(block_id)

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`, one reference to each taken for the caller."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        self.acquire(found)
        return found

    def seal(self, block_id: int, block_hash: bytes) -> None:
        """The block is full and computed: from now on others may find it under its hash. A hash that is known
        already keeps its first block."""
        if self._references[block_id] == 0:
            raise ValueError(f"block {block_id} is sealed by someone who holds no reference")
        if (
            block_hash in self._block_of
            or self._hash_of[block_id] is not None
            or block_id in self._quarantined
        ):
            return
        self._hash_of[block_id] = block_hash
        self._block_of[block_hash] = block_id
        if block_hash in self._evicted:
            del self._evicted[block_hash]
        else:
            self._stored[block_hash] = None

    def quarantine(self, ids: Iterable[int]) -> None:
        """Takes the caller's reference to each block into quarantine: bytes may still arrive in it."""
        for block_id in ids:
            if self._references[block_id] <= 0 or block_id in self._quarantined:
                raise ValueError(f"block {block_id} is quarantined by someone who does not own it")
            self._forget_hash(block_id)
            self._quarantined.add(block_id)

    def lift(self, ids: Iterable[int]) -> None:
        """Ends the quarantine: nothing can be written into these blocks any more."""
        for block_id in ids:
            self._quarantined.remove(block_id)
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._retire(block_id)

    def counts(self) -> BlockCounts:
        free, cached, quarantined = len(self._free), len(self._cached), len(self._quarantined)
        return BlockCounts(
            free=free,
            cached=cached,
            used=self.num_blocks - free - cached - quarantined,
            quarantined=quarantined,
            total=self.num_blocks,
        )

    def events(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes (stored, evicted) since the last call: the net change, so that their order does not
        matter."""
        stored, evicted = list(self._stored), list(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return stored, evicted

    def known_hashes(self) -> list[bytes]:
        """Every hash that a prompt could find now."""
        return list(self._block_of)

    def _retire(self, block_id: int) -> None:
        if self._hash_of[block_id] is None:
            heapq.heappush(self._free, block_id)
        else:
            self._cached[block_id] = None

    def _forget_hash(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is None:
            return
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._evicted[block_hash] = None
