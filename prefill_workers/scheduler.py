"""Which prompts the next step computes: first come, first served inside a priority class, in chunks.

A plain object: no torch, no clock, no hand-off. A prompt gets all its blocks when it starts, so that what has
started always ends; a prompt that finds too few blocks waits until hand-offs give some back, and nothing less
important starts before it.
"""

from __future__ import annotations

from ..engine.base import Chunk, ModelLimits, StepPlan, StepResult
from ..engine.block_tables import BlockTables
from ..engine.chunking import next_chunk
from ..engine.requests import Outcome, append_sampled
from ..engine.sequence import Sequence
from ..engine.wait_queue import WaitQueue, rank
from ..proto.errors import OutOfBlocks
from ..proto.ids import HandoffKey
from .config import PrefillSchedulerConfig


class PrefillScheduler:
    """Owns sequences from `add` until `complete` reports their token; then their blocks are the caller's."""

    def __init__(self, config: PrefillSchedulerConfig, tables: BlockTables, limits: ModelLimits) -> None:
        self._config = config
        self._tables = tables
        self._limits = limits
        self._waiting = WaitQueue()
        self._started: dict[HandoffKey, Sequence] = {}
        self._in_step: set[HandoffKey] = set()
        self._cancelled: set[HandoffKey] = set()

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            Overloaded: `max_waiting` sequences wait already.
            PromptTooLong: the pool cannot hold the prompt even when it is empty.
        """
        self._waiting.check_room(self._config.max_waiting)
        self._tables.check_fits(sequence)
        self._waiting.add(sequence)

    def cancel(self, key: HandoffKey) -> None:
        """Forgets a sequence and frees its blocks: at once, or when the step that it is in completes."""
        if key in self._in_step:
            self._cancelled.add(key)
            return
        self._waiting.remove(key)
        if started := self._started.pop(key, None):
            self._tables.release(started)

    def plan(self) -> StepPlan | None:
        """The next step; None when nothing can run. The plan's sequences must not change until `complete`.
        An engine of several pipeline stages has several plans on their way; no sequence is in two."""
        chunks: list[Chunk] = []
        started = [s for s in self._started.values() if s.key not in self._in_step]
        for sequence in sorted(started, key=rank):
            # What is more important than a prompt under way goes first, if it can start at all.
            self._start_before(sequence, chunks)
            self._add_chunk(sequence, chunks)
        self._start_before(None, chunks)
        if not chunks:
            return None
        self._in_step.update(chunk.sequence.key for chunk in chunks)
        return StepPlan(chunks=chunks)

    def complete(self, plan: StepPlan, result: StepResult) -> list[Outcome]:
        """Takes a step's tokens. Sequences that sampled leave the scheduler; their blocks stay in their table
        until the caller releases them (`release`)."""
        outcomes: list[Outcome] = []
        for chunk, token in zip(plan.chunks, result.tokens, strict=True):
            sequence = chunk.sequence
            self._tables.computed(sequence, chunk.num_tokens)
            if sequence.key in self._cancelled:
                self._drop(sequence)
            elif token is not None:
                del self._started[sequence.key]
                outcomes.append(append_sampled(sequence, token, self._limits))
        self._end_step(plan)
        return outcomes

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """The step did not run. Drops its sequences and returns those that nobody had cancelled."""
        lost = [chunk.sequence for chunk in plan.chunks if chunk.sequence.key not in self._cancelled]
        for chunk in plan.chunks:
            self._drop(chunk.sequence)
        self._end_step(plan)
        return lost

    def release(self, sequence: Sequence) -> None:
        """Gives back the blocks of a sequence that `complete` reported."""
        self._tables.release(sequence)

    @property
    def num_waiting(self) -> int:
        """Sequences whose prompt has not started."""
        return len(self._waiting)

    @property
    def num_started(self) -> int:
        return len(self._started)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to be computed, queued and started."""
        return self._waiting.num_tokens + sum(s.num_uncomputed for s in self._started.values())

    @property
    def started_context(self) -> int:
        """Tokens computed of the prompts under way."""
        return sum(s.num_computed for s in self._started.values())

    @property
    def started_blocks(self) -> int:
        return sum(len(s.block_table) for s in self._started.values())

    def _start_before(self, other: Sequence | None, chunks: list[Chunk]) -> None:
        """Starts waiting sequences that rank before `other` while the step has room for them."""
        while self._budget(chunks) > 0:
            head = self._waiting.head()
            if head is None or (other is not None and rank(head) > rank(other)) or not self._start(head):
                return
            self._add_chunk(head, chunks)

    def _start(self, sequence: Sequence) -> bool:
        self._tables.start(sequence)
        try:
            self._tables.grow(sequence, sequence.num_tokens)
        except OutOfBlocks:
            self._tables.release(sequence)
            return False
        self._waiting.remove(sequence.key)
        self._started[sequence.key] = sequence
        return True

    def _add_chunk(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        chunk = next_chunk(sequence, self._budget(chunks), self._tables.blocks.block_size)
        if chunk is not None:
            chunks.append(chunk)

    def _budget(self, chunks: list[Chunk]) -> int:
        if not chunks:
            return max(self._config.chunk_budget, self._tables.blocks.block_size)
        return self._config.saturation_tokens - sum(chunk.num_tokens for chunk in chunks)

    def _drop(self, sequence: Sequence) -> None:
        self._started.pop(sequence.key, None)
        self._tables.release(sequence)

    def _end_step(self, plan: StepPlan) -> None:
        keys = [chunk.sequence.key for chunk in plan.chunks]
        self._in_step.difference_update(keys)
        self._cancelled.difference_update(keys)
