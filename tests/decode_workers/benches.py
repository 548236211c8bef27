"""A decode scheduler with a fake engine, and what two of them are compared by."""

from __future__ import annotations

from typing import Any

from diphase.decode_workers.config import DecodeSchedulerConfig
from diphase.decode_workers.scheduler import DecodeScheduler
from diphase.engine.base import Chunk, SampledToken, StepPlan, StepResult
from diphase.engine.block_manager import BlockManager
from diphase.engine.block_tables import BlockTables
from diphase.engine.fake import FakeEngine
from diphase.engine.sequence import Sequence


class Bench:
    """A scheduler with a fake engine, whose pool another engine can fill."""

    def __init__(self, num_blocks: int = 64, **config: Any) -> None:
        self.engine = FakeEngine(num_blocks=num_blocks)
        self.blocks = BlockManager(num_blocks, 16)
        self.tables = BlockTables(self.blocks, b"root")
        values: dict[str, Any] = {"max_running": 8, "prefill_budget": 32, **config}
        self.scheduler = DecodeScheduler(DecodeSchedulerConfig(**values), self.tables, self.engine.limits)
        self.finished: dict[str, list[int]] = {}

    def hand_off(self, sequence: Sequence) -> None:
        """Admits the sequence as if its prompt had been computed elsewhere."""
        self.tables.grow(sequence, sequence.num_tokens)
        plan = StepPlan(chunks=[Chunk(sequence=sequence, num_tokens=sequence.num_tokens, samples=True)])
        token = self.engine.execute(plan).tokens[0]
        assert token is not None
        sequence.num_computed = sequence.num_tokens
        sequence.token_ids.append(token.token_id)
        self.scheduler.admit(sequence)

    def step(self) -> list[tuple[str, int]]:
        plan = self.scheduler.plan()
        if plan is None:
            return []
        for outcome in self.scheduler.complete(plan, self.engine.execute(plan)):
            if outcome.finish_reason:
                sequence = outcome.sequence
                self.finished[sequence.key.request_id] = sequence.token_ids[sequence.num_prompt_tokens :]
        return [(chunk.sequence.key.request_id, chunk.num_tokens) for chunk in plan.chunks]

    def run(self, limit: int = 10_000) -> None:
        while self.step():
            limit -= 1
            assert limit, "the scheduler does not come to an end"

    def expected(self, sequences: list[Sequence]) -> dict[str, list[int]]:
        return {
            s.key.request_id: self.engine.continuation(
                s.token_ids[: s.num_prompt_tokens], s.params, s.params.max_tokens
            )
            for s in sequences
        }


FILLER = 0


def filler_step(scheduler: DecodeScheduler) -> list[str]:
    plan = scheduler.plan()
    if plan is None:
        return []
    tokens: list[SampledToken | None] = [SampledToken(token_id=FILLER) for _ in plan.chunks]
    scheduler.complete(plan, StepResult(tokens=tokens, duration_s=0.0))
    return [chunk.sequence.key.request_id for chunk in plan.chunks]


def state(scheduler: DecodeScheduler, blocks: BlockManager) -> object:
    """All that later steps depend on, except which block has which number."""
    running = {
        s.key: (s.token_ids, s.num_computed, s.block_hashes, len(s.block_table))
        for s in scheduler._running.values()
    }
    return running, blocks.counts(), set(blocks.known_hashes()), scheduler.preemptions


def running_keys(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    return [chunk.sequence.key.request_id for chunk in plan.chunks]
