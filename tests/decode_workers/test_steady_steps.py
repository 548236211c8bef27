"""Steps that a steady batch takes together are the steps that it takes one by one."""

from __future__ import annotations

import copy

import pytest
from diphase.proto.ids import HandoffKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ..engine.sequences import make_sequence
from .benches import FILLER, Bench, filler_step, running_keys, state


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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    num_blocks=st.integers(8, 40),
    events=st.lists(
        st.tuples(st.integers(1, 60), st.integers(2, 60), st.floats(0.0, 1.0), st.booleans()),
        min_size=1,
        max_size=12,
    ),
)
@example(num_blocks=8, events=[(7, 57, 0.71875, False)])
def test_steps_taken_together_equal_single_ones_whoever_joins_ends_or_leaves(
    num_blocks: int, events: list[tuple[int, int, float, bool]]
) -> None:
    together, single = Bench(num_blocks=num_blocks), Bench(num_blocks=num_blocks)
    for i, (prompt, max_tokens, share, leaves) in enumerate(events):
        for bench in (together, single):
            sequence = make_sequence(f"s{i}", prompt, max_tokens=max_tokens, arrived_at=float(i))
            if bench.tables.num_blocks_for(prompt) + len(events) < bench.blocks.available:
                bench.hand_off(sequence)
            if leaves:
                bench.scheduler.cancel(HandoffKey(f"s{i // 2}", 0))
        together.scheduler.take_ready()
        steps = int(together.scheduler.steady_steps() * share)
        if steps:
            together.scheduler.take_blocks(steps // 2)
            outcomes = together.scheduler.advance(steps, FILLER)
            assert all(outcome.finish_reason for outcome in outcomes)
        else:
            filler_step(together.scheduler)
        for _ in range(max(1, steps)):
            filler_step(single.scheduler)
        assert together.blocks.counts() == single.blocks.counts()
        assert together.scheduler.running_context == single.scheduler.running_context
    assert state(together.scheduler, together.blocks) == state(single.scheduler, single.blocks)


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
