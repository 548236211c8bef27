"""Sequences that wait for blocks or a place in the batch: highest priority first, then first come, first
served."""

from __future__ import annotations

import heapq

from ..proto.ids import HandoffKey
from .sequence import Sequence

Rank = tuple[int, float, HandoffKey]


def rank(sequence: Sequence) -> Rank:
    """Sorts the most important sequence first. The key makes the order total, so that runs repeat exactly."""
    return (-sequence.slo.priority, sequence.arrived_at, sequence.key)


class WaitQueue:
    """A heap with removal by key: removed entries stay in the heap until they come to its top."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []
        self._waiting: dict[HandoffKey, Sequence] = {}
        self.num_tokens = 0
        """Tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._waiting

    def sequences(self) -> list[Sequence]:
        return list(self._waiting.values())

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (rank(sequence), sequence))
        self._waiting[sequence.key] = sequence
        self.num_tokens += sequence.num_tokens

    def head(self) -> Sequence | None:
        """The next one, left in place."""
        while self._heap:
            sequence = self._heap[0][1]
            if self._waiting.get(sequence.key) is sequence:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, key: HandoffKey) -> Sequence | None:
        sequence = self._waiting.pop(key, None)
        if sequence is not None:
            self.num_tokens -= sequence.num_tokens
        return sequence
