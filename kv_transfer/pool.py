"""What the hand-off asks of whoever owns the KV blocks. The engine's block manager is one; tests have
others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class BlockPool(Protocol):
    """Blocks counted by references; a block without any is free (or cached, when its content hash is
    known)."""

    num_blocks: int

    def allocate(self, n: int) -> list[int]:
        """`n` blocks with one reference each, the caller's.

        Raises:
            OutOfBlocks: there are fewer; nothing was taken.
        """
        ...

    def acquire(self, ids: Iterable[int]) -> None:
        """One more reference to each block."""
        ...

    def release(self, ids: Sequence[int]) -> None:
        """Gives one reference to each block back."""
        ...

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`, one reference to each taken for the caller."""
        ...

    def quarantine(self, ids: Iterable[int]) -> None:
        """Takes the caller's reference to each block into quarantine: bytes may still arrive in it."""
        ...

    def lift(self, ids: Iterable[int]) -> None:
        """Ends the quarantine and gives its reference back: nothing can be written there any more."""
        ...
