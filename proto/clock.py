"""Time and chance as things that are given.

Decision code never reads a wall clock or the `random` module: it is handed a Clock and an Rng. Live they are
the two classes below; in simulation they are a virtual event loop's time and a seeded generator.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

_RNG_READ_BYTES = 4096


class Clock(Protocol):
    """Seconds on a monotonic clock. On one host all processes share it; between hosts it has an offset."""

    def now(self) -> float: ...


class Rng(Protocol):
    """What is used of `random.Random`."""

    def random(self) -> float: ...
    def getrandbits(self, k: int, /) -> int: ...


class MonotonicClock:
    """The live clock."""

    def now(self) -> float:
        return time.monotonic()


class SystemRng:
    """The operating system's chance, read in bulk: a call to the system costs more than a request's other
    arithmetic. An instance belongs to one process and must not be used on both sides of a fork."""

    def __init__(self) -> None:
        self._bytes = b""
        self._used = 0

    def random(self) -> float:
        """In [0, 1), 53 bits."""
        return self.getrandbits(53) * 2.0**-53

    def getrandbits(self, k: int, /) -> int:
        count = (k + 7) // 8
        if self._used + count > len(self._bytes):
            self._bytes = os.urandom(max(_RNG_READ_BYTES, count))
            self._used = 0
        start = self._used
        self._used = start + count
        return int.from_bytes(self._bytes[start : self._used], "little") >> (8 * count - k)


def system_rng() -> Rng:
    """The live source of chance."""
    return SystemRng()
