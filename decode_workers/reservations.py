"""The KV pool as hand-offs may use it: what the running batch needs to grow is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..engine.block_manager import BlockManager
from ..proto.errors import OutOfBlocks


class ReservationPool:
    """Implements kv_transfer's BlockPool over the worker's block manager. Without the margin, a new
    reservation could take the block that a running sequence needs next, and its preemption would cost a whole
    prompt."""

    def __init__(self, blocks: BlockManager, growth_blocks: Callable[[], int]) -> None:
        """`growth_blocks` says how many blocks have to stay available at this moment."""
        self.num_blocks = blocks.num_blocks
        self._blocks = blocks
        self._growth_blocks = growth_blocks

    def allocate(self, n: int) -> list[int]:
        left = self._blocks.available - n
        if left < self._growth_blocks():
            raise OutOfBlocks(
                f"{n} blocks would leave {left} for {self._growth_blocks()} sequences that grow"
            )
        return self._blocks.allocate(n)

    def acquire(self, ids: Iterable[int]) -> None:
        self._blocks.acquire(ids)

    def release(self, ids: Sequence[int]) -> None:
        self._blocks.release(ids)

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        return self._blocks.match_prefix(hashes)

    def quarantine(self, ids: Iterable[int]) -> None:
        self._blocks.quarantine(ids)

    def lift(self, ids: Iterable[int]) -> None:
        self._blocks.lift(ids)
