"""The grid of steps and its times, on an engine whose steps take what they are told to."""

from __future__ import annotations

import pytest
from diphase.engine.fake import FAKE_LAYOUT, FAKE_LIMITS, FakeEngine, StepCost
from diphase.engine.profiler import (
    IDLE,
    REFERENCE_CELLS,
    Cell,
    make_grid,
    profile_slowdowns,
    profile_steps,
    run_steps,
)
from diphase.proto.errors import ConfigError

COST = StepCost(base_s=0.02, prefill_token_s=3e-4, decode_sequence_s=1e-3, context_token_s=2e-6)
BLOCKS = 1200


class HandClock:
    """Stands still but for what the engine sleeps."""

    def __init__(self) -> None:
        self.at = 0.0
        self.speed = 1.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds / self.speed


def grid(num_blocks: int = BLOCKS, chunk_budget: int = 512, max_running: int = 16) -> list[Cell]:
    return make_grid(
        chunk_budget=chunk_budget,
        max_running=max_running,
        num_blocks=num_blocks,
        block_size=FAKE_LAYOUT.block_size,
        context_length=FAKE_LIMITS.context_length,
    )


def engine_of(clock: HandClock) -> FakeEngine:
    return FakeEngine(num_blocks=BLOCKS, cost=COST, sleep=clock.sleep)


def test_a_grid_keeps_to_what_workers_with_such_limits_can_meet() -> None:
    cells = grid(num_blocks=900, chunk_budget=256, max_running=8)
    assert {cell.kind for cell in cells} == {"prefill", "decode", "mixed"}
    assert len(set(cells)) == len(cells)
    assert max(cell.prompts * cell.prompt_tokens for cell in cells) == 256
    assert max(cell.decode_batch for cell in cells) == 8
    assert max(cell.blocks(16) for cell in cells) <= 900


def test_sizes_lie_off_the_multiples_that_engines_compute_in_and_end_with_the_budget() -> None:
    alone = [c.prompt_tokens for c in grid(chunk_budget=300) if c.kind == "prefill" and c.prompts == 1]
    assert max(alone) == 300
    assert sum(tokens % 16 == 0 for tokens in alone) <= len(alone) / 4
    assert {*REFERENCE_CELLS.values()} <= {*grid(chunk_budget=240)}, "to be compared with what is timed later"


def test_a_pool_too_small_for_a_fit_says_what_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"a KV pool of 5 blocks .* raise engine\.kv_cache_mib"):
        grid(num_blocks=5)


def test_every_cell_gets_its_own_times_and_none_of_the_first_round() -> None:
    clock = HandClock()
    engine = engine_of(clock)
    rounds: list[int] = []

    def on_round(number: int) -> None:
        rounds.append(number)
        clock.speed = 1.0

    clock.speed = 0.25  # the first round finds everything cold
    found = profile_steps(engine, grid(), rounds=2, clock=clock, on_round=on_round)
    engine.close()
    assert rounds == [0, 1, 2]
    assert [times.cell for times in found] == grid()
    for times in found:
        cell = times.cell
        expected = COST.base_s + COST.prefill_token_s * cell.prompts * cell.prompt_tokens
        expected += cell.decode_batch * (1e-3 + 2e-6 * (cell.decode_context - 1))
        assert times.seconds == pytest.approx([expected] * len(times.seconds), rel=1e-9)
        assert len(times.seconds) >= 2
        assert times.sample.prefill_tokens == cell.prompts * cell.prompt_tokens
        assert times.sample.decode_context == cell.decode_batch * cell.decode_context


def test_slowdowns_are_ratios_to_the_same_steps_alone() -> None:
    clock = HandClock()
    engine = engine_of(clock)
    told: list[str] = []

    def tell(kind: str) -> None:
        told.append(kind)
        clock.speed = {"prefill": 0.5, "decode": 0.8, IDLE: 1.0}[kind]

    found = profile_slowdowns(engine, tell, rounds=3, clock=clock)
    engine.close()
    assert found["prefill"] == pytest.approx({"prefill": 2.0, "decode": 1.25})
    assert found["decode"] == pytest.approx({"prefill": 2.0, "decode": 1.25})
    assert told[-1] == IDLE, "nobody computes when it is over"


def test_a_neighbour_computes_until_it_is_told_otherwise() -> None:
    clock = HandClock()
    engine = engine_of(clock)
    left = [3]

    def go_on() -> bool:
        left[0] -= 1
        return left[0] >= 0

    run_steps(engine, "prefill", go_on)
    engine.close()
    assert clock.at == pytest.approx(3 * (COST.base_s + 256 * COST.prefill_token_s))
