"""Who may write where in staging buffers: the window that a decode worker lends a peer, and the pieces of
it that are in use at the writer.

A piece of a lent window goes through

    free → writing → written → free     (Done came, and the peer has said that it does not read it any more)
                   → torn ─┘            (Failed: until a fence holds, a late byte may still land there)

Pure: offsets and numbers; the bytes are moved elsewhere.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .arena import Arena

HIGH_WATERMARK = 0.75
"""Share of a window in use above which parts that could go directly do."""
LOW_WATERMARK = 0.5
"""Share below which they are staged again."""


@dataclass(frozen=True, slots=True)
class Window:
    """A range of a staging buffer, bytes."""

    region: int
    offset: int
    size: int


class Lender:
    """The decode side's staging buffer: equal windows, one for each session that gets one."""

    def __init__(self, region: int, size: int, window_size: int) -> None:
        self._free = [
            Window(region, offset, window_size) for offset in range(0, size - window_size + 1, window_size)
        ]
        self._size = sum(window.size for window in self._free)

    def lend(self) -> Window | None:
        """None: every window is lent; the peer writes directly then."""
        return self._free.pop() if self._free else None

    @property
    def lent_bytes(self) -> int:
        """Of windows that are lent now."""
        return self._size - sum(window.size for window in self._free)

    def take_back(self, window: Window) -> None:
        """Nobody writes there any more, and nobody reads what was written."""
        self._free.append(window)


@dataclass(slots=True)
class _Piece:
    offset: int
    is_torn: bool = False
    is_written: bool = False
    """Nothing more arrives there."""
    is_consumed: bool = False


class Credits:
    """The prefill side's view of a window that it may write to. Pieces have numbers, which are never used
    again: what is said late of an old piece cannot be taken for the new one at its place."""

    def __init__(self, window: Window) -> None:
        self.region = window.region
        self._arena = Arena(window.offset, window.size)
        self._pieces: dict[int, _Piece] = {}
        self._numbers = itertools.count(1)
        self._flowing = True

    @property
    def flowing(self) -> bool:
        """Whether parts that need not be staged should be, by the watermarks."""
        share = self._arena.used / self._arena.size
        self._flowing = share < (HIGH_WATERMARK if self._flowing else LOW_WATERMARK)
        return self._flowing

    @property
    def used(self) -> int:
        """Bytes of the window that are not free."""
        return self._arena.used

    def fits(self, length: int) -> bool:
        """Whether the window could ever take so much."""
        return self._arena.fits(length)

    def take(self, length: int) -> tuple[int, int] | None:
        """(number, offset) of a piece to write to; None: wait until there is room."""
        offset = self._arena.take(length)
        if offset is None:
            return None
        number = next(self._numbers)
        self._pieces[number] = _Piece(offset)
        return number, offset

    def shrink(self, number: int, length: int) -> None:
        """Only the first `length` bytes of this piece will be written."""
        self._arena.shrink(self._pieces[number].offset, length)

    def untouched(self, number: int) -> None:
        """Nothing was or will be written to this piece, and the peer was not told of it."""
        self._arena.give_back(self._pieces.pop(number).offset)

    def done(self, number: int) -> None:
        """The write to this piece ended well."""
        self._pieces[number].is_written = True
        self._settle(number)

    def consumed(self, number: int) -> bool:
        """The peer does not read this piece (any more); False: there is no such piece now."""
        piece = self._pieces.get(number)
        if piece is None:
            return False
        piece.is_consumed = True
        self._settle(number)
        return True

    def torn(self, number: int) -> None:
        """The write to this piece failed or was cancelled. All of it may have arrived nevertheless, and be
        read."""
        self._pieces[number].is_torn = True

    def torn_now(self) -> frozenset[int]:
        """What a fence that is asked for now will be about."""
        return frozenset(number for number, piece in self._pieces.items() if piece.is_torn)

    def fenced(self, torn: frozenset[int]) -> None:
        """Nothing can arrive in these any more."""
        for number in torn & self._pieces.keys():
            self._pieces[number].is_written = True
            self._settle(number)

    def _settle(self, number: int) -> None:
        piece = self._pieces[number]
        if piece.is_written and piece.is_consumed:
            self._arena.give_back(self._pieces.pop(number).offset)
