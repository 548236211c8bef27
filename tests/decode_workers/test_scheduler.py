"""Which sequences a decode step runs, and what happens when blocks run out."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.decode_workers.scheduler import DecodeScheduler
from diphase.engine.base import Chunk, SampledToken, StepPlan, StepResult
from diphase.engine.block_manager import BlockManager
from diphase.engine.block_tables import BlockTables
from diphase.engine.fake import FakeEngine
from diphase.engine.sequence import Sequence
from diphase.proto.errors import ConfigError, Overloaded, PromptTooLong
from diphase.proto.ids import HandoffKey
from diphase.proto.slo import Priority
from hypothesis import given, settings
from hypothesis import strategies as st

from ..engine.sequences import make_sequence


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


def test_hand_offs_decode_from_their_second_token_on() -> None:
    bench = Bench()
    sequences = [make_sequence(name, 30, max_tokens=10) for name in "abc"]
    for sequence in sequences:
        bench.hand_off(sequence)
    assert bench.step() == [("a", 1), ("b", 1), ("c", 1)]
    bench.run()
    assert bench.finished == bench.expected(sequences)
    assert bench.blocks.counts().used == 0


def test_the_batch_is_bounded_and_places_go_to_the_most_important() -> None:
    bench = Bench(max_running=2)
    for i, name in enumerate("abc"):
        bench.hand_off(make_sequence(name, 10, arrived_at=float(i)))
    bench.hand_off(make_sequence("urgent", 10, priority=Priority.INTERACTIVE, arrived_at=9.0))
    assert bench.step() == [("urgent", 1), ("a", 1)]
    assert bench.scheduler.num_waiting == 2


def test_prompts_are_computed_in_chunks_beside_the_batch() -> None:
    bench = Bench(prefill_budget=32)
    bench.hand_off(make_sequence("decoding", 10, max_tokens=20))
    bench.scheduler.add(make_sequence("prompt", 70))
    assert bench.step() == [("decoding", 1), ("prompt", 32)]
    assert bench.step() == [("decoding", 1), ("prompt", 32)]
    assert bench.step() == [("decoding", 1), ("prompt", 6)]
    assert bench.step() == [("decoding", 1), ("prompt", 1)]


def test_several_short_prompts_share_the_budget() -> None:
    bench = Bench(prefill_budget=32)
    for i, name in enumerate("abc"):
        bench.scheduler.add(make_sequence(name, 12, arrived_at=float(i)))
    # c gets no whole block of the 8 tokens left
    assert bench.step() == [("a", 12), ("b", 12)]
    assert bench.step() == [("a", 1), ("b", 1), ("c", 12)]


def test_a_cached_prompt_costs_only_its_rest() -> None:
    bench = Bench(prefill_budget=512)
    prompt = make_sequence("x", 100).token_ids
    bench.scheduler.add(make_sequence("first", prompt, max_tokens=1))
    bench.run()
    again = make_sequence("again", prompt, max_tokens=4)
    bench.scheduler.add(again)
    assert bench.step() == [("again", 4)]
    assert again.num_cached == 96
    bench.run()
    assert bench.finished["again"] == bench.expected([again])["again"]


def test_generated_text_is_found_by_the_next_turn_of_a_conversation() -> None:
    bench = Bench(prefill_budget=512)
    first = make_sequence("first", 20, max_tokens=30)
    bench.scheduler.add(first)
    bench.run()
    bench.scheduler.add(make_sequence("next", [*first.token_ids, 7, 8, 9]))
    # The last token of `first` was never computed: 49 tokens have KV, 3 blocks are full.
    assert bench.step() == [("next", 53 - 48)]


def test_when_blocks_run_out_the_youngest_of_the_lowest_class_is_preempted() -> None:
    bench = Bench(num_blocks=8)
    for i, (name, priority) in enumerate(
        [
            ("old", Priority.STANDARD),
            ("batch", Priority.BATCH),
            ("young", Priority.STANDARD),
            ("four", Priority.STANDARD),
        ]
    ):
        bench.hand_off(make_sequence(name, 30, max_tokens=6, priority=priority, arrived_at=float(i)))
    # All four have two blocks and 31 tokens; the third step needs a third block each.
    bench.step()
    bench.step()
    assert [name for name, _ in bench.step()] == ["old", "young"]
    assert bench.scheduler.preemptions == 2


@pytest.mark.parametrize("seed", range(8))
def test_preempted_sequences_end_with_the_same_tokens(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(num_blocks=12, max_running=rng.randint(2, 6), prefill_budget=rng.choice([16, 48, 512]))
    sequences = []
    for i in range(14):
        sequence = make_sequence(
            f"s{i}",
            rng.randint(1, 60),
            max_tokens=rng.randint(1, 70),
            priority=rng.choice(list(Priority)),
            arrived_at=float(i),
        )
        sequences.append(sequence)
        if rng.random() < 0.4 and bench.blocks.available >= 5 and sequence.params.max_tokens > 1:
            bench.hand_off(sequence)
        else:
            bench.scheduler.add(sequence)
        for _ in range(rng.randint(0, 12)):
            bench.step()
    bench.run()
    assert bench.finished == bench.expected(sequences)
    assert bench.scheduler.preemptions > 0
    assert bench.scheduler.take_outgrown() == []
    assert bench.blocks.counts().used == 0


def test_a_sequence_that_outgrows_the_pool_is_dropped_and_the_others_go_on() -> None:
    bench = Bench(num_blocks=4)
    large = make_sequence("large", 40, max_tokens=100)
    small = make_sequence("small", 8, max_tokens=8, arrived_at=1.0)
    bench.scheduler.add(large)
    bench.scheduler.add(small)
    bench.run()
    assert bench.scheduler.take_outgrown() == [large]
    assert large.num_tokens == 65
    assert bench.finished == bench.expected([small])
    assert bench.blocks.counts().used == 0


def test_nothing_more_is_reserved_while_a_sequence_waits_for_blocks() -> None:
    bench = Bench(num_blocks=4)
    bench.hand_off(make_sequence("a", 30, max_tokens=40))
    bench.hand_off(make_sequence("b", 30, max_tokens=40, arrived_at=1.0))
    bench.step()
    assert bench.scheduler.growth_blocks == 2
    bench.step()
    bench.step()
    assert bench.scheduler.preemptions == 1
    assert bench.scheduler.growth_blocks == 4
    bench.run()
    assert bench.scheduler.growth_blocks == 0


def test_a_cancelled_sequence_frees_its_blocks_at_once_or_after_its_step() -> None:
    bench = Bench(max_running=2)
    for i, name in enumerate(["running", "other", "ready"]):
        bench.hand_off(make_sequence(name, 10, arrived_at=float(i)))
    bench.scheduler.add(make_sequence("waiting", 10, arrived_at=3.0))
    plan = bench.scheduler.plan()
    assert plan is not None
    for name in ("running", "ready", "waiting"):
        bench.scheduler.cancel(HandoffKey(name, 0))
    assert bench.blocks.counts().used == 2
    outcomes = bench.scheduler.complete(plan, bench.engine.execute(plan))
    assert [outcome.sequence.key.request_id for outcome in outcomes] == ["other"]
    assert bench.blocks.counts().used == 1
    bench.scheduler.cancel(HandoffKey("other", 0))
    assert bench.blocks.counts().used == 0
    assert bench.scheduler.plan() is None


def test_a_failed_step_drops_its_sequences_only() -> None:
    bench = Bench(max_running=1)
    lost, kept = make_sequence("lost", 10), make_sequence("kept", 10, arrived_at=1.0)
    bench.hand_off(lost)
    bench.hand_off(kept)
    plan = bench.scheduler.plan()
    assert plan is not None
    assert bench.scheduler.fail(plan) == [lost]
    assert bench.step() == [("kept", 1)]


def test_the_queue_is_bounded_and_impossible_prompts_are_refused() -> None:
    bench = Bench(num_blocks=4, max_waiting=1)
    with pytest.raises(PromptTooLong, match="5 KV blocks"):
        bench.scheduler.add(make_sequence("large", 65))
    bench.scheduler.add(make_sequence("a", 64))
    with pytest.raises(Overloaded):
        bench.scheduler.add(make_sequence("b", 5))


def test_the_context_length_ends_a_sequence() -> None:
    bench = Bench(num_blocks=256)
    bench.hand_off(make_sequence("a", 4090, max_tokens=100))
    bench.run()
    assert len(bench.finished["a"]) == 6


FILLER = 0


def filler_step(scheduler: DecodeScheduler) -> list[str]:
    plan = scheduler.plan()
    assert plan is not None
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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_blocks=st.integers(4, 40),
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(2, 60)), min_size=1, max_size=6),
    warm_up=st.integers(0, 20),
    share=st.floats(0.0, 1.0),
)
def test_advancing_equals_single_steps(
    num_blocks: int, lengths: list[tuple[int, int]], warm_up: int, share: float
) -> None:
    bench = Bench(num_blocks=num_blocks)
    for i, (prompt, max_tokens) in enumerate(lengths):
        if -(-prompt // 16) <= num_blocks:
            bench.scheduler.add(make_sequence(f"s{i}", prompt, max_tokens=max_tokens, arrived_at=float(i)))
    for _ in range(warm_up):
        bench.step()
    steps = int(bench.scheduler.steady_steps() * share)
    one_by_one, one_by_one_blocks = copy.deepcopy((bench.scheduler, bench.blocks), {id(bench.engine): None})
    batches = {tuple(sorted(filler_step(one_by_one))) for _ in range(steps)}
    bench.scheduler.advance(steps, FILLER)
    assert len(batches) <= 1
    assert state(bench.scheduler, bench.blocks) == state(one_by_one, one_by_one_blocks)


def test_advancing_further_than_steady_is_refused() -> None:
    bench = Bench()
    bench.hand_off(make_sequence("a", 10, max_tokens=10))
    bench.step()
    # 2 of 10 tokens are there: the eighth more ends the sequence.
    assert bench.scheduler.steady_steps() == 8
    with pytest.raises(ValueError, match="steady for 8"):
        bench.scheduler.advance(9)


def test_a_batch_that_may_change_is_not_steady() -> None:
    bench = Bench()
    assert bench.scheduler.steady_steps() == 0
    bench.scheduler.add(make_sequence("a", 70, max_tokens=50))
    assert bench.scheduler.steady_steps() == 0
    for _ in range(3):
        bench.step()
    assert bench.scheduler.steady_steps() == 49
    bench.hand_off(make_sequence("b", 10, max_tokens=50))
    assert bench.scheduler.steady_steps() == 0


def test_a_colocated_worker_has_the_full_chunk_budget() -> None:
    assert ColocatedSchedulerConfig().prefill_budget > DecodeSchedulerConfig().prefill_budget


@pytest.mark.parametrize("field", ["max_running", "prefill_budget", "max_waiting"])
def test_a_configuration_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        DecodeSchedulerConfig(**{field: 0})  # type: ignore[arg-type]


def running_keys(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    return [chunk.sequence.key.request_id for chunk in plan.chunks]


class TestSeveralPlansOnTheirWay:
    """An engine of several pipeline stages asks for the next plan before the last one is complete."""

    def test_no_sequence_is_in_two(self) -> None:
        bench = Bench()
        for name in ("a", "b"):
            bench.hand_off(make_sequence(name, 20))
        first = bench.scheduler.plan()
        assert running_keys(first) == ["a", "b"]
        assert bench.scheduler.plan() is None
        bench.hand_off(make_sequence("c", 20))
        second = bench.scheduler.plan()
        assert running_keys(second) == ["c"]
        assert first is not None
        bench.scheduler.complete(first, bench.engine.execute(first))
        assert running_keys(bench.scheduler.plan()) == ["a", "b"]

    def test_who_is_on_its_way_is_not_preempted(self) -> None:
        bench = Bench(num_blocks=4)
        bench.hand_off(make_sequence("old", 16, arrived_at=1.0))
        bench.hand_off(make_sequence("young", 16, arrived_at=2.0))
        first = bench.scheduler.plan()  # both take a second block: the pool is full
        assert running_keys(first) == ["old", "young"]
        assert bench.blocks.counts().free == 0
        assert bench.scheduler.plan() is None
        assert bench.scheduler.preemptions == 0


def test_prompts_first_leaves_the_batch_waiting() -> None:
    bench = Bench(prompts_first=True, prefill_budget=64)
    bench.hand_off(make_sequence("decoding", 20))
    bench.scheduler.add(make_sequence("prompt", 40))
    plan = bench.scheduler.plan()
    assert running_keys(plan) == ["prompt"]
    assert plan is not None
    bench.scheduler.complete(plan, bench.engine.execute(plan))
    assert running_keys(bench.scheduler.plan()) == ["decoding", "prompt"]


def test_sequences_whose_contexts_do_not_fit_a_step_take_turns() -> None:
    bench = Bench(max_step_context=50)
    for name in ("a", "b", "c"):
        bench.hand_off(make_sequence(name, 20))
    turns = []
    for _ in range(3):
        plan = bench.scheduler.plan()
        turns.append(running_keys(plan))
        assert plan is not None
        bench.scheduler.complete(plan, bench.engine.execute(plan))
    assert turns == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_a_sequence_larger_than_a_step_s_contexts_runs_alone() -> None:
    bench = Bench(max_step_context=10)
    bench.hand_off(make_sequence("large", 20))
    assert running_keys(bench.scheduler.plan()) == ["large"]


def test_a_batch_is_steady_until_its_contexts_fill_a_step() -> None:
    bench = Bench(max_step_context=50)
    for name in ("a", "b"):
        bench.hand_off(make_sequence(name, 20, max_tokens=30))
    plan = bench.scheduler.plan()
    assert plan is not None
    bench.scheduler.complete(plan, bench.engine.execute(plan))
    steady = bench.scheduler.steady_steps()
    assert steady == 4  # 22 tokens each (one comes with the hand-off): 44, 46, 48, 50
    bench.scheduler.advance(steady)
    assert running_keys(bench.scheduler.plan()) == ["a"]
