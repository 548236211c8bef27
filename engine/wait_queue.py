"""Sequences that wait for blocks or a place in the batch: highest priority first, then first come, first
served."""

from __future__ import annotations

import heapq
from itertools import count

from ..proto.errors import Overloaded
from ..proto.ids import HandoffKey
from .sequence import Sequence

Rank = tuple[int, float, HandoffKey]

SLACK = 64
"""Removed entries that the heap of an empty queue may hold."""


def rank(sequence: Sequence) -> Rank:
    """Sorts the most important sequence first, then by when the client's call came: who is tried again does
    not queue again. The key makes the order total, so that runs repeat exactly."""
    return (-sequence.slo.priority, sequence.arrived_at - sequence.waited_s, sequence.key)


class WaitQueue:
    """A heap with removal by key: removed entries stay in it until they come to its top, or are too many."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Sequence]] = []
        self._entries = count()  # a sequence that comes back may have an old entry of the same rank
        self._waiting: dict[HandoffKey, Sequence] = {}
        self.num_tokens = 0
        """Tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._waiting

    def sequences(self) -> list[Sequence]:
        return list(self._waiting.values())

    def check_room(self, most: int) -> None:
        """Raises:
        Overloaded: so many wait already.
        """
        if len(self) >= most:
            raise Overloaded(f"{len(self)} requests wait for prefill already; send fewer", retry_after_s=1.0)

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.key] = sequence
        heapq.heappush(self._heap, (rank(sequence), next(self._entries), sequence))
        if len(self._heap) > 2 * len(self._waiting) + SLACK:
            self._heap = [(rank(s), next(self._entries), s) for s in self._waiting.values()]
            heapq.heapify(self._heap)
        self.num_tokens += sequence.num_tokens

    def head(self) -> Sequence | None:
        """The next one, left in place."""
        while self._heap:
            sequence = self._heap[0][2]
            if self._waiting.get(sequence.key) is sequence:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, key: HandoffKey) -> Sequence | None:
        sequence = self._waiting.pop(key, None)
        if sequence is not None:
            self.num_tokens -= sequence.num_tokens
        return sequence
