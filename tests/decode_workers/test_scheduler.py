"""Which sequences a decode step runs, and what happens when blocks run out."""

from __future__ import annotations

import random

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.proto.errors import ConfigError, Overloaded, PromptTooLong
from diphase.proto.ids import HandoffKey
from diphase.proto.slo import Priority

from ..engine.sequences import make_sequence
from .benches import Bench, running_keys


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


def test_a_colocated_worker_has_the_full_chunk_budget() -> None:
    assert ColocatedSchedulerConfig().prefill_budget > DecodeSchedulerConfig().prefill_budget


@pytest.mark.parametrize("field", ["max_running", "prefill_budget", "max_waiting"])
def test_a_configuration_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        DecodeSchedulerConfig(**{field: 0})  # type: ignore[arg-type]


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


def test_who_loses_the_only_place_leaves_it_to_the_next_hand_off() -> None:
    bench = Bench(num_blocks=4, max_running=1)
    young = make_sequence("young", 31, max_tokens=20, arrived_at=2.0)
    old = make_sequence("old", 20, max_tokens=10, arrived_at=1.0)
    bench.hand_off(young)
    assert bench.step() == [("young", 1)]
    bench.hand_off(old)  # the pool is full, and young needs a third block
    assert bench.step() == [("old", 1)]
    assert bench.scheduler.preemptions == 1
    bench.run()
    assert bench.finished == bench.expected([young, old])


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
