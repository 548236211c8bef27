"""Pieces of a range of bytes, lent and taken back: arithmetic only, first fit. Knows no memory and no
peers."""

from __future__ import annotations

ALIGNMENT = 256
"""Of every piece, bytes: a cache line, a GPU's widest access and the items of every dtype fit it."""


class Arena:
    """`size` bytes from offset `begin` on."""

    def __init__(self, begin: int, size: int) -> None:
        self.begin = begin
        self.size = size
        self._free: list[tuple[int, int]] = [(begin, size)] if size > 0 else []  # (offset, length), sorted
        self._taken: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes that are taken, alignment included."""
        return sum(self._taken.values())

    def take(self, length: int) -> int | None:
        """Offset of a free piece of that many bytes; None: there is none now."""
        length = -(-max(length, 1) // ALIGNMENT) * ALIGNMENT
        for i, (offset, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(offset + length, free - length)] if free > length else []
                self._taken[offset] = length
                return offset
        return None

    def fits(self, length: int) -> bool:
        """Whether an empty arena could give so much."""
        return -(-max(length, 1) // ALIGNMENT) * ALIGNMENT <= self.size

    def shrink(self, offset: int, length: int) -> None:
        """What lies beyond the first `length` bytes of a piece is free again.

        Raises:
            KeyError: nothing is taken at this offset.
        """
        taken = self._taken[offset]
        length = min(taken, -(-max(length, 1) // ALIGNMENT) * ALIGNMENT)
        if length < taken:
            self._taken[offset] = length
            self._taken[offset + length] = taken - length
            self.give_back(offset + length)

    def give_back(self, offset: int) -> None:
        """
        Raises:
            KeyError: nothing is taken at this offset.
        """
        length = self._taken.pop(offset)
        self._free.append((offset, length))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for begin, size in self._free:
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged
