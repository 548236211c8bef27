"""Which prompts a prefill step computes."""

from __future__ import annotations

import pytest
from diphase.engine.base import StepPlan
from diphase.engine.block_manager import BlockManager
from diphase.engine.block_tables import BlockTables
from diphase.engine.fake import FakeEngine
from diphase.engine.requests import Outcome
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.prefill_workers.scheduler import PrefillScheduler
from diphase.proto.errors import ConfigError, Overloaded, PromptTooLong
from diphase.proto.ids import HandoffKey
from diphase.proto.slo import Priority

from ..engine.sequences import make_sequence


class Bench:
    """A scheduler with a fake engine."""

    def __init__(self, num_blocks: int = 64, **config: int) -> None:
        self.engine = FakeEngine(num_blocks=num_blocks)
        self.blocks = BlockManager(num_blocks, 16)
        values = {"chunk_budget": 64, "saturation_tokens": 64, **config}
        self.scheduler = PrefillScheduler(
            PrefillSchedulerConfig(**values), BlockTables(self.blocks, b"root"), self.engine.limits
        )

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        return plan

    def finish(self, plan: StepPlan) -> list[Outcome]:
        return self.scheduler.complete(plan, self.engine.execute(plan))

    def step(self) -> list[tuple[str, int]]:
        """What a step computed, as (request, tokens); blocks of ended prompts are given back."""
        plan = self.plan()
        for outcome in self.finish(plan):
            self.scheduler.release(outcome.sequence)
        return [(chunk.sequence.key.request_id, chunk.num_tokens) for chunk in plan.chunks]


def test_prompts_run_in_order_of_arrival_inside_their_class() -> None:
    bench = Bench(saturation_tokens=1)
    for i, (name, priority) in enumerate(
        [("batch", Priority.BATCH), ("first", Priority.STANDARD), ("second", Priority.STANDARD)]
    ):
        bench.scheduler.add(make_sequence(name, 20, priority=priority, arrived_at=float(i)))
    bench.scheduler.add(make_sequence("urgent", 20, priority=Priority.INTERACTIVE, arrived_at=9.0))
    assert [bench.step()[0][0] for _ in range(4)] == ["urgent", "first", "second", "batch"]
    assert bench.scheduler.plan() is None


def test_a_long_prompt_goes_in_chunks_that_end_at_blocks() -> None:
    bench = Bench(chunk_budget=40)
    bench.scheduler.add(make_sequence("long", 100))
    assert [bench.step() for _ in range(3)] == [[("long", 32)], [("long", 32)], [("long", 36)]]


def test_further_prompts_join_only_below_saturation() -> None:
    bench = Bench(chunk_budget=64, saturation_tokens=48)
    for i, (name, length) in enumerate([("a", 20), ("b", 20), ("c", 40), ("d", 60)]):
        bench.scheduler.add(make_sequence(name, length, arrived_at=float(i)))
    # c gets no whole block of the 8 tokens left below saturation
    assert bench.step() == [("a", 20), ("b", 20)]
    assert bench.step() == [("c", 40)]
    assert bench.step() == [("d", 60)]


def test_something_more_important_passes_a_prompt_under_way() -> None:
    bench = Bench(chunk_budget=32, saturation_tokens=32)
    bench.scheduler.add(make_sequence("long", 64))
    assert bench.step() == [("long", 32)]
    bench.scheduler.add(make_sequence("urgent", 32, priority=Priority.INTERACTIVE, arrived_at=1.0))
    assert bench.step() == [("urgent", 32)]
    assert bench.step() == [("long", 32)]


def test_the_sampled_token_is_the_engines_and_ends_what_it_ends() -> None:
    bench = Bench()
    sequences = [
        make_sequence("one", 30, max_tokens=1),
        make_sequence("many", 30, max_tokens=5, arrived_at=1.0),
    ]
    for sequence in sequences:
        bench.scheduler.add(sequence)
    expected = [bench.engine.continuation(s.token_ids, s.params, 1)[0] for s in sequences]
    outcomes = bench.finish(bench.plan())
    assert [outcome.token.token_id for outcome in outcomes] == expected
    assert [bool(outcome.finish_reason) for outcome in outcomes] == [True, False]


def test_a_prompt_that_was_computed_before_is_found_in_the_cache() -> None:
    bench = Bench()
    prompt = make_sequence("x", 40).token_ids
    bench.scheduler.add(make_sequence("a", prompt))
    bench.step()
    again = make_sequence("b", prompt)
    bench.scheduler.add(again)
    expected = bench.engine.continuation(prompt, again.params, 1)
    plan = bench.plan()
    assert [chunk.num_tokens for chunk in plan.chunks] == [8]
    assert again.num_cached == 32
    assert [outcome.token.token_id for outcome in bench.finish(plan)] == expected


def test_a_cached_prompt_of_whole_blocks_still_computes_its_last_block() -> None:
    bench = Bench()
    prompt = make_sequence("x", 32).token_ids
    for name in ("a", "b"):
        bench.scheduler.add(make_sequence(name, prompt))
    bench.step()
    third = make_sequence("c", prompt)
    bench.scheduler.add(third)
    assert bench.step() == [("c", 16)]
    assert third.token_ids[32:] == bench.engine.continuation(prompt, third.params, 1)


def test_a_prompt_without_room_waits_until_blocks_come_back_and_nothing_passes_it() -> None:
    bench = Bench(num_blocks=4, saturation_tokens=1)
    holder, waiting, small = (
        make_sequence("holder", 40),
        make_sequence("waiting", 40, arrived_at=1.0),
        make_sequence("small", 5, arrived_at=2.0),
    )
    for sequence in (holder, waiting, small):
        bench.scheduler.add(sequence)
    bench.finish(bench.plan())  # its hand-off keeps the blocks
    assert bench.scheduler.plan() is None
    bench.scheduler.release(holder)
    assert bench.step() == [("waiting", 40)]
    assert bench.step() == [("small", 5)]


def test_a_cancelled_prompt_frees_its_blocks_at_once_or_after_its_step() -> None:
    bench = Bench(chunk_budget=16, saturation_tokens=1)
    bench.scheduler.add(make_sequence("started", 40))
    bench.scheduler.add(make_sequence("queued", 40, arrived_at=1.0))
    bench.scheduler.cancel(HandoffKey("queued", 0))
    plan = bench.plan()
    bench.scheduler.cancel(HandoffKey("started", 0))
    assert bench.blocks.counts().used == 3
    assert bench.finish(plan) == []
    assert bench.blocks.counts().used == 0
    assert bench.scheduler.plan() is None
    assert (bench.scheduler.num_waiting, bench.scheduler.waiting_tokens) == (0, 0)


def test_a_started_prompt_can_be_cancelled_between_steps() -> None:
    bench = Bench(chunk_budget=16)
    bench.scheduler.add(make_sequence("a", 40))
    bench.step()
    bench.scheduler.cancel(HandoffKey("a", 0))
    assert bench.blocks.counts().used == 0
    assert bench.scheduler.plan() is None


def test_a_failed_step_drops_its_prompts_only() -> None:
    bench = Bench(saturation_tokens=1)
    lost, kept = make_sequence("lost", 20), make_sequence("kept", 20, arrived_at=1.0)
    bench.scheduler.add(lost)
    bench.scheduler.add(kept)
    assert bench.scheduler.fail(bench.plan()) == [lost]
    assert bench.blocks.counts().used == 0
    assert bench.step() == [("kept", 20)]


def test_the_queue_is_bounded_and_impossible_prompts_are_refused() -> None:
    bench = Bench(num_blocks=4, max_waiting=1)
    with pytest.raises(PromptTooLong, match="5 KV blocks"):
        bench.scheduler.add(make_sequence("large", 65))
    bench.scheduler.add(make_sequence("a", 64))
    with pytest.raises(Overloaded):
        bench.scheduler.add(make_sequence("b", 5))


def test_the_load_counts_tokens_still_to_be_computed() -> None:
    bench = Bench(chunk_budget=16, saturation_tokens=1)
    bench.scheduler.add(make_sequence("a", 40))
    bench.scheduler.add(make_sequence("b", 10, arrived_at=1.0))
    assert (bench.scheduler.num_waiting, bench.scheduler.waiting_tokens) == (2, 50)
    bench.step()
    assert (bench.scheduler.num_waiting, bench.scheduler.waiting_tokens) == (1, 34)
    assert (bench.scheduler.num_started, bench.scheduler.started_context) == (1, 16)


@pytest.mark.parametrize("field", ["chunk_budget", "saturation_tokens", "max_waiting"])
def test_a_configuration_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        PrefillSchedulerConfig(**{field: 0})
