"""The sequences that decode together, and steps of theirs that change nothing but lengths.

Steps of the whole batch may be taken without touching a sequence (`advance`): lengths, ends and blocks are
then kept for the batch, and a sequence is brought up to date when it leaves or is looked at. What a sequence
that joins, ends or takes a block costs does not depend on the others. Live workers, whose every step samples
tokens, take none of their steps so; the planner's simulator most. Knows no queues and no steps of prompts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import repeat
from typing import NamedTuple

from ..engine.base import ModelLimits
from ..engine.block_tables import BlockTables
from ..engine.sequence import Sequence
from ..proto.ids import HandoffKey


class _Joined(NamedTuple):
    """A sequence when it was last up to date."""

    entry: int
    """Of the heap of ends; older ones are void."""
    step: int
    phase: int
    """It begins a block in the steps that are equal to this modulo the block size."""


class DecodeBatch:
    """In the order in which they came."""

    def __init__(self, tables: BlockTables, limits: ModelLimits) -> None:
        self._tables = tables
        self._limits = limits
        self._sequences: dict[HandoffKey, Sequence] = {}
        # While `_together`: steps since then, and what they mean for sequences that nobody has touched.
        self._together = False
        self._steps = 0
        self._with_blocks = 0  # steps whose blocks are taken
        self._token_id = 0
        self._joined: dict[HandoffKey, _Joined] = {}
        self._ends: list[tuple[int, int, HandoffKey]] = []
        self._entries = 0
        self._phases: dict[int, int] = {}  # sequences of each phase
        self._blocks: list[int] = []  # taken and in nobody's table yet
        self._context = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._sequences

    def values(self) -> Iterable[Sequence]:
        """All of them, up to date."""
        self._part()
        return self._sequences.values()

    def add(self, sequence: Sequence) -> None:
        """Behind the others, if it is not here already."""
        if self._together and not self._join(sequence):
            self._part()
        self._sequences[sequence.key] = sequence

    def pop(self, key: HandoffKey) -> Sequence | None:
        """Takes the sequence out, up to date."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None and self._together:
            self._bring(sequence)
        return sequence

    @property
    def context(self) -> int:
        """Tokens whose KV is computed, of all."""
        if self._together:
            return self._context
        return sum(sequence.num_computed for sequence in self._sequences.values())

    # steps of the whole batch

    def steps_left(self) -> int:
        """Steps up to the first that ends a sequence by its length; 0 for an empty batch, and for one with a
        sequence that has more blocks than it uses."""
        if not self._sequences or not (self._together or self._gather()):
            return 0
        ends = self._ends
        while self._is_void(ends[0]):
            heapq.heappop(ends)
        return ends[0][0] - self._steps

    def blocks_to_advance(self, steps: int) -> int:
        """Blocks that the next steps, at most steps_left(), take from the pool beyond those that are taken
        already."""
        size, taken, until = self._tables.blocks.block_size, self._with_blocks, self._steps + steps
        if until <= taken:
            return 0
        return sum(
            count * ((until - phase) // size - (taken - phase) // size)
            for phase, count in self._phases.items()
        )

    def take_blocks(self, steps: int) -> None:
        """Takes the blocks of the next steps.

        Raises:
            OutOfBlocks: the pool has too few; nothing was taken.
        """
        missing = self.blocks_to_advance(steps)
        if missing:
            self._blocks += self._tables.blocks.allocate(missing)
        self._with_blocks = max(self._with_blocks, self._steps + steps)

    def advance(self, steps: int, token_id: int) -> list[Sequence]:
        """Takes steps, at most steps_left(), that all sample `token_id`; sequences that the last of them ends
        are taken out and returned.

        Raises:
            OutOfBlocks: the pool has too few; nothing happened.
        """
        if token_id != self._token_id:
            self._part()
            self._token_id = token_id
            self._gather()
        self.take_blocks(steps)
        self._steps += steps
        self._context += steps * len(self._sequences)
        ended: list[Sequence] = []
        while self._ends and (self._ends[0][0] <= self._steps or self._is_void(self._ends[0])):
            end = heapq.heappop(self._ends)
            if not self._is_void(end):
                sequence = self._sequences.pop(end[2])
                self._bring(sequence)
                ended.append(sequence)
        return ended

    # inside

    def _gather(self) -> bool:
        """Whether the batch can take steps together from now on."""
        self._together = True
        self._steps = self._with_blocks = self._context = 0
        self._ends, self._phases = [], {}
        for sequence in self._sequences.values():
            if not self._join(sequence):
                self._part()
                return False
        return True

    def _part(self) -> None:
        """Everybody is up to date, and the batch is kept by sequence again."""
        if not self._together:
            return
        for sequence in self._sequences.values():
            if sequence.key in self._joined:
                self._bring(sequence)
        self._together = False

    def _join(self, sequence: Sequence) -> bool:
        """Whether the sequence, which is up to date, can take steps with the others."""
        size, tokens = self._tables.blocks.block_size, sequence.num_tokens
        room = len(sequence.block_table) * size - sequence.num_computed
        if not 0 <= room < size or self._with_blocks > self._steps:
            return False
        self._entries += 1
        phase = (self._steps + room + 1) % size
        self._phases[phase] = self._phases.get(phase, 0) + 1
        self._joined[sequence.key] = _Joined(self._entries, self._steps, phase)
        left = min(sequence.params.max_tokens - sequence.num_generated, self._limits.context_length - tokens)
        heapq.heappush(self._ends, (self._steps + left, self._entries, sequence.key))
        self._context += sequence.num_computed
        return True

    def _bring(self, sequence: Sequence) -> None:
        """Up to date, and no longer one of those that take steps together."""
        _, since, phase = self._joined.pop(sequence.key)
        size, lag = self._tables.blocks.block_size, self._steps - since
        blocks = (self._with_blocks - phase) // size - (since - phase) // size
        if blocks:
            sequence.block_table += self._blocks[-blocks:]
            del self._blocks[-blocks:]
        if lag:
            # As in a step: its token comes after the KV of those before it.
            sequence.token_ids.extend(repeat(self._token_id, lag - 1))
            self._tables.computed(sequence, lag)
            sequence.token_ids.append(self._token_id)
        self._context -= sequence.num_computed
        if self._phases[phase] == 1:
            del self._phases[phase]
        else:
            self._phases[phase] -= 1

    def _is_void(self, end: tuple[int, int, HandoffKey]) -> bool:
        joined = self._joined.get(end[2])
        return joined is None or joined.entry != end[1]
