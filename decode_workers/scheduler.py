"""Which sequences the next step runs: every decoding one, then chunks of prompts that are computed here.

A plain object: no torch, no clock, no hand-off. Sequences come as verified hand-offs with their KV (`admit`),
or with nothing computed (`add`). When blocks run out, the least important sequence (lowest priority, then
youngest) gives its blocks back, keeps its tokens and is computed again later; what a step has sampled is
never lost.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..engine.base import Chunk, ModelLimits, SampledToken, StepPlan, StepResult
from ..engine.block_tables import BlockTables
from ..engine.chunking import next_chunk
from ..engine.requests import Outcome, append_sampled, finish_reason
from ..engine.sequence import Sequence
from ..engine.wait_queue import WaitQueue, rank
from ..proto.errors import OutOfBlocks
from ..proto.ids import HandoffKey
from .config import DecodeSchedulerConfig
from .decode_batch import DecodeBatch


class DecodeScheduler:
    """Owns sequences and their blocks until `complete` reports them finished."""

    def __init__(self, config: DecodeSchedulerConfig, tables: BlockTables, limits: ModelLimits) -> None:
        self._config = config
        self._tables = tables
        self._limits = limits
        self._waiting = WaitQueue()  # without blocks
        self._ready = WaitQueue()  # hand-offs with all their KV, waiting for a place in the batch
        self._prefilling: dict[HandoffKey, Sequence] = {}
        self._running = DecodeBatch(tables, limits)
        self._starved = False  # a waiting sequence found too few blocks
        self._in_step: set[HandoffKey] = set()
        self._cancelled: set[HandoffKey] = set()
        self._outgrown: list[Sequence] = []
        self.preemptions = 0
        """Since start."""

    # arrivals and cancels

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose prompt is to be computed here.

        Raises:
            Overloaded: `max_waiting` sequences wait already.
            PromptTooLong: the pool cannot hold the prompt even when it is empty.
        """
        self._waiting.check_room(self._config.max_waiting)
        self._tables.check_fits(sequence)
        self._waiting.add(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Takes a hand-off: everything but the last token is computed. Its blocks are the scheduler's from
        now on; the full ones may be shared."""
        self._tables.seal_computed(sequence)
        self._ready.add(sequence)

    def cancel(self, key: HandoffKey) -> None:
        """Forgets a sequence and frees its blocks: at once, or when the step that it is in completes."""
        if key in self._in_step:
            self._cancelled.add(key)
            return
        self._waiting.remove(key)
        sequence = self._ready.remove(key) or self._running.pop(key) or self._prefilling.pop(key, None)
        if sequence is not None:
            self._tables.release(sequence)

    # one step

    def plan(self) -> StepPlan | None:
        """The next step; None when nothing can run. The plan's sequences must not change until `complete`.
        An engine of several pipeline stages has several plans on their way; no sequence is in two."""
        self._fill_batch()
        chunks: list[Chunk] = []
        if self._config.prompts_first:
            self._add_prefills(chunks)
        if not chunks:
            chunks += [Chunk(sequence=s, num_tokens=1, samples=True) for s in self._next_batch()]
        if not self._config.prompts_first:
            self._add_prefills(chunks)
        if not chunks:
            return None
        self._in_step.update(chunk.sequence.key for chunk in chunks)
        return StepPlan(chunks=chunks)

    def complete(self, plan: StepPlan, result: StepResult) -> list[Outcome]:
        """Takes a step's tokens. Finished sequences have given their blocks back."""
        outcomes: list[Outcome] = []
        for chunk, token in zip(plan.chunks, result.tokens, strict=True):
            sequence = chunk.sequence
            self._tables.computed(sequence, chunk.num_tokens)
            if sequence.key in self._cancelled:
                self._drop(sequence)
            elif token is not None:
                self._prefilling.pop(sequence.key, None)
                self._running.add(sequence)
                outcome = append_sampled(sequence, token, self._limits)
                if outcome.finish_reason:
                    self._drop(sequence)
                outcomes.append(outcome)
        self._end_step(plan)
        return outcomes

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """The step did not run. Drops its sequences and returns those that nobody had cancelled."""
        lost = [chunk.sequence for chunk in plan.chunks if chunk.sequence.key not in self._cancelled]
        for chunk in plan.chunks:
            self._drop(chunk.sequence)
        self._end_step(plan)
        return lost

    def take_outgrown(self) -> list[Sequence]:
        """Sequences that `plan` dropped because the whole pool is too small for them."""
        outgrown, self._outgrown = self._outgrown, []
        return outgrown

    # steps that change nothing but lengths, for the simulator

    def take_ready(self) -> list[Sequence]:
        """Gives hand-offs that wait for a place in the batch one, as the next step does."""
        taken: list[Sequence] = []
        while self.num_running < self._config.max_running and (sequence := self._ready.head()):
            self._ready.remove(sequence.key)
            self._running.add(sequence)
            taken.append(sequence)
        return taken

    def steady_steps(self) -> int:
        """How many steps from now are of the same batch, if no sequence samples a stop token and nothing
        arrives; the last may end sequences. 0 when the next step may admit or preempt a sequence or compute a
        prompt."""
        if self._in_step or self._prefilling:
            return 0
        if len(self._running) < self._config.max_running and (self._ready or self._waiting):
            return 0
        steps = self._running.steps_left()
        if steps and (limit := self._config.max_step_context):
            context = self._running.context + len(self._running)
            steps = min(steps, (limit - context) // len(self._running) + 1)
        while steps > 0 and self.blocks_to_advance(steps) > self._tables.blocks.available:
            steps //= 2
        return max(0, steps)

    def advance(self, steps: int, token_id: int = 0) -> list[Outcome]:
        """The same as `steps` single steps, at most steady_steps() when the first of them began, that all
        sample `token_id`. Only sequences that ended with the last of them are reported."""
        if not 0 <= steps <= self._running.steps_left():
            raise ValueError(f"the batch is steady for {self._running.steps_left()} steps, not for {steps}")
        outcomes: list[Outcome] = []
        token = SampledToken(token_id=token_id)
        for sequence in self._running.advance(steps, token_id):
            reason = finish_reason(sequence, self._limits)
            outcomes.append(Outcome(sequence=sequence, token=token, finish_reason=reason))
            self._tables.release(sequence)
        return outcomes

    def steady_plan(self) -> StepPlan:
        """The next of steady_steps() as a plan of its own, when its blocks are taken: nobody joins it."""
        chunks = [Chunk(sequence=s, num_tokens=1, samples=True) for s in self._running.values()]
        self._in_step.update(chunk.sequence.key for chunk in chunks)
        return StepPlan(chunks=chunks)

    def blocks_to_advance(self, steps: int) -> int:
        """Blocks that the batch, while it is steady, takes from the pool in its next steps."""
        return self._running.blocks_to_advance(steps)

    def take_blocks(self, steps: int) -> None:
        """Takes the blocks that the next steps of the steady batch need, before others ask for blocks."""
        self._running.take_blocks(steps)

    # what load reports

    @property
    def num_running(self) -> int:
        """Sequences in the batch, those whose prompt is under way included."""
        return len(self._running) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        """Sequences without a place in the batch."""
        return len(self._waiting) + len(self._ready)

    @property
    def growth_blocks(self) -> int:
        """Blocks that should stay available to the sequences here: all that are, while one waits for blocks;
        else one for each that will decode."""
        if self._starved and self._waiting:
            return self._tables.blocks.num_blocks
        return self.num_running + len(self._ready)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens still to be computed here, queued and under way."""
        return self._waiting.num_tokens + sum(s.num_uncomputed for s in self._prefilling.values())

    @property
    def running_context(self) -> int:
        return self._running.context + sum(s.num_computed for s in self._prefilling.values())

    def _batch(self) -> Iterable[Sequence]:
        return (*self._running.values(), *self._prefilling.values())

    def _fill_batch(self) -> None:
        """Hand-offs get the places that are free, and every sequence the block it needs next. Who loses its
        place for that leaves it to the next hand-off."""
        while True:
            self.take_ready()
            for sequence in sorted(self._running.values(), key=rank):
                if sequence.key in self._running and sequence.key not in self._in_step:
                    self._make_room(sequence)
            if not self._ready or self.num_running >= self._config.max_running:
                return

    def _next_batch(self) -> list[Sequence]:
        """The decoding sequences of the next step; those that must share its context take turns."""
        free = [s for s in self._running.values() if s.key not in self._in_step]
        limit = self._config.max_step_context
        if not limit or sum(s.num_tokens for s in free) <= limit:
            return free
        batch: list[Sequence] = []
        for sequence in free:
            limit -= sequence.num_tokens
            if batch and limit < 0:
                break
            batch.append(sequence)
        for sequence in batch:  # behind the others
            self._running.pop(sequence.key)
            self._running.add(sequence)
        return batch

    def _make_room(self, sequence: Sequence) -> None:
        """A block for the token that the sequence computes next, if need be from less important ones."""
        while True:
            try:
                self._tables.grow(sequence, sequence.num_tokens)
                return
            except OutOfBlocks:
                others = (*self._batch(), *self._ready.sequences())
                victim = max((s for s in others if s.key not in self._in_step), key=rank)
                self._preempt(victim)
                if victim is sequence:
                    return

    def _preempt(self, sequence: Sequence) -> None:
        key = sequence.key
        self._running.pop(key)
        self._prefilling.pop(key, None)
        self._ready.remove(key)
        self._tables.release(sequence)
        if self._tables.num_blocks_for(sequence.num_tokens) > self._tables.blocks.num_blocks:
            self._outgrown.append(sequence)
            return
        self.preemptions += 1
        self._starved = True
        self._waiting.add(sequence)

    def _add_prefills(self, chunks: list[Chunk]) -> None:
        budget = max(self._config.prefill_budget, self._tables.blocks.block_size)
        pending = sorted((s for s in self._prefilling.values() if s.key not in self._in_step), key=rank)
        while budget > 0:
            sequence = pending.pop(0) if pending else self._start_next()
            if sequence is None:
                return
            chunk = next_chunk(sequence, budget, self._tables.blocks.block_size)
            if chunk is None:
                return
            chunks.append(chunk)
            budget -= chunk.num_tokens

    def _start_next(self) -> Sequence | None:
        """Gives the next waiting sequence its blocks and a place in the batch, if there are any."""
        sequence = self._waiting.head()
        if sequence is None or self.num_running >= self._config.max_running:
            return None
        self._tables.start(sequence)
        missing = self._tables.shortfall(sequence, sequence.num_tokens)
        # Each sequence of the batch may need a block soon: what starts now should not be preempted at once.
        if missing + self.num_running > self._tables.blocks.available:
            self._tables.release(sequence)
            self._starved = True
            return None
        self._tables.grow(sequence, sequence.num_tokens)
        self._waiting.remove(sequence.key)
        self._starved = False
        self._prefilling[sequence.key] = sequence
        return sequence

    def _drop(self, sequence: Sequence) -> None:
        self._running.pop(sequence.key)
        self._prefilling.pop(sequence.key, None)
        self._tables.release(sequence)

    def _end_step(self, plan: StepPlan) -> None:
        keys = [chunk.sequence.key for chunk in plan.chunks]
        self._in_step.difference_update(keys)
        self._cancelled.difference_update(keys)
