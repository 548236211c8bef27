"""Interpolation between measured steps: exact at points, rising, in lines; and what is refused."""

from __future__ import annotations

import random

import pytest
from diphase.cluster.planner.tables import PrefillPoint, TableStepTime
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape
from hypothesis import given
from hypothesis import strategies as st

from ...router.step_time_laws import check_grows, check_lines, check_stages

BATCHES = (1, 4, 16, 64)
CONTEXTS = (128.0, 512.0, 2048.0, 8192.0)


def decode_s(batch: float, context: float) -> float:
    return 0.005 + 2e-5 * batch + 1e-8 * batch * context


def prefill_s(tokens: int, context: float) -> float:
    return max(0.006, 2e-5 * tokens) + 1e-9 * context


PREFILL = [
    PrefillPoint(count * length, count * length**2 / 2, prefill_s(count * length, count * length**2 / 2))
    for count in (1, 2, 4)
    for length in (64, 128, 256, 512, 1024, 2048)
]
DECODE = {(batch, context): decode_s(batch, context) for batch in BATCHES for context in CONTEXTS}
EXACT = TableStepTime(DECODE, PREFILL)


def noisy() -> TableStepTime:
    """As machines measure: a few percent up and down, and the largest batches without long contexts."""
    rng = random.Random(5)
    known = {key: s for key, s in DECODE.items() if key[0] * key[1] < 2e5}
    return TableStepTime({key: s * rng.uniform(0.95, 1.05) for key, s in known.items()}, PREFILL)


NOISY = noisy()


@given(st.integers(1, 300), st.floats(0, 2e4))
def test_a_plane_is_found_everywhere(batch: int, context: float) -> None:
    step_s = EXACT.step_s(StepShape(decode_batch=batch, decode_context=batch * context))
    assert step_s == pytest.approx(decode_s(batch, context), rel=1e-9)


@pytest.mark.parametrize("point", PREFILL)
def test_prefill_points_are_kept(point: PrefillPoint) -> None:
    assert EXACT.step_s(StepShape(point.tokens, point.context)) == pytest.approx(point.seconds, rel=1e-6)


def test_a_cached_prefix_costs_its_attention() -> None:
    plain = EXACT.step_s(StepShape(512, 512 * 256))
    after = EXACT.step_s(StepShape(512, 512 * (4096 + 256)))
    assert after - plain == pytest.approx(1e-9 * 512 * 4096, rel=1e-6)


@given(st.integers(1, 100), st.floats(0, 2e4))
def test_decode_steps_lie_on_lines_that_meet(batch: int, context: float) -> None:
    check_lines(NOISY, batch, [batch * context])


@pytest.mark.parametrize("batch", [1, 3, 4, 17, 64, 100])
def test_lines_start_on_knots(batch: int) -> None:
    check_lines(NOISY, batch, [batch * context for context in (0.0, *CONTEXTS)])
    assert NOISY.decode_line(batch, 0.0).until == batch * 128.0
    assert NOISY.decode_line(batch, batch * 128.0).until == batch * 512.0


@given(st.integers(1, 63), st.floats(1, 2e4), st.floats(0, 1e4))
def test_noise_makes_nothing_faster_that_reads_more(batch: int, context: float, more: float) -> None:
    check_grows(NOISY, batch, context, more)


@given(st.integers(64, 500), st.floats(1, 2e4), st.floats(0, 1e4))
def test_nor_beyond_the_largest_batch(batch: int, context: float, more: float) -> None:
    check_grows(NOISY, batch, context, more)


@given(st.integers(1, 2048), st.floats(1, 2048), st.integers(1, 100), st.floats(1, 8192))
def test_a_mixed_step_costs_no_less_than_either_part(
    tokens: int, prompt_context: float, batch: int, context: float
) -> None:
    shape = StepShape(tokens, tokens * prompt_context, batch, batch * context)
    check_stages(NOISY, shape)
    assert NOISY.step_s(shape) >= NOISY.step_s(StepShape(*shape[:2])) * (1 - 1e-12)


def test_what_cannot_be_interpolated_is_refused() -> None:
    with pytest.raises(ConfigError, match="two batches"):
        TableStepTime({(1, 128.0): 0.01, (1, 256.0): 0.01}, PREFILL)
    with pytest.raises(ConfigError, match="two contexts for every batch"):
        TableStepTime({(1, 128.0): 0.01, (2, 128.0): 0.01, (2, 256.0): 0.01}, PREFILL)
    with pytest.raises(ConfigError, match="two numbers of tokens"):
        TableStepTime(DECODE, PREFILL[:1])


def test_a_step_of_no_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        EXACT.step_s(StepShape())
