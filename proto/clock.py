"""Time and chance as things that are given.

Decision code never reads a wall clock or the `random` module: it is handed a Clock and an Rng. Live they are
the two classes below; in simulation they are a virtual event loop's time and a seeded generator.
"""

from __future__ import annotations

import random
import time
from typing import Protocol


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


def system_rng() -> Rng:
    """The live source of chance: the operating system's."""
    return random.SystemRandom()
