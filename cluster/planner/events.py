"""What happens next in virtual time: actions at integer nanoseconds, in a fixed order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

NS = 1_000_000_000
"""Nanoseconds in a second."""
LAST = 2**62
"""Nanoseconds: what would happen after 146 years does not happen, and who waits for it is not served."""

STEP_ENDS, HAPPENS = 0, 1
"""Of what is due at one moment, the ends of steps come first: who looks at a worker then sees them done."""


def to_ns(seconds: float) -> int:
    return round(seconds * NS)


class EventQueue:
    """Due times never lie before now."""

    def __init__(self) -> None:
        self.now = 0
        """Nanoseconds since the start."""
        self._heap: list[tuple[int, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    @property
    def now_s(self) -> float:
        return self.now / NS

    def at(self, when: int, action: Callable[..., None], *args: Any, rank: int = HAPPENS) -> None:
        """Runs an action at a time; equal times in the order of rank, then of the calls."""
        self._order += 1
        heapq.heappush(self._heap, (when, rank, self._order, action, args))

    def stop(self) -> None:
        """Nothing happens any more."""
        self._heap.clear()

    def run(self) -> None:
        """Until nothing is left to happen, or LAST."""
        heap = self._heap
        while heap and heap[0][0] <= LAST:
            self.now, _, _, action, args = heapq.heappop(heap)
            action(*args)
