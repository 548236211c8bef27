"""Step times by fixed coefficients: the formulas, their lines, and what is refused."""

from __future__ import annotations

import pytest
from diphase.proto.errors import ConfigError
from diphase.router.latency_model import Coefficients, LatencyModel
from diphase.router.step_time import StepShape
from diphase.router.two_regime_step_time import DecodeTerms, PrefillTerms, TwoRegimeStepTime
from hypothesis import given
from hypothesis import strategies as st

from .shapes import prompt_shape
from .step_time_laws import check_grows, check_lines, check_stages

LINEAR = Coefficients()
SMALL = DecodeTerms(base=0.02, per_context=1e-6, per_sequence=1e-4)
LARGE = DecodeTerms(base=0.01, per_context=2e-6, per_sequence=2e-4)


def two_regimes(stages: int = 1, **others: float) -> TwoRegimeStepTime:
    return TwoRegimeStepTime(
        prefill=PrefillTerms(base=0.03, per_token=1e-4, per_squared_length=1e-8),
        small=SMALL,
        large=LARGE,
        large_batch=95,
        stages=stages,
        **others,
    )


SHAPES = st.builds(
    lambda tokens, before, batch, context: StepShape(
        tokens, tokens * (before + tokens / 2), batch, batch * context
    ),
    st.integers(1, 4096),
    st.integers(0, 4096),
    st.integers(0, 200),
    st.floats(1, 4096),
)


@given(SHAPES)
def test_fixed_coefficients_say_what_the_fitted_model_says_with_the_same(shape: StepShape) -> None:
    assert LINEAR.step_s(shape) == LatencyModel(Coefficients()).step_s(shape)


@given(SHAPES, st.integers(1, 5))
def test_stages_add_up_to_the_step(shape: StepShape, stages: int) -> None:
    check_stages(LINEAR, shape)
    check_stages(two_regimes(stages, prefill_hop_s=0.001, overhead_s=0.002, overhead_per_token_s=1e-7), shape)


@given(st.integers(1, 300), st.floats(0, 1e6), st.integers(1, 4))
def test_decode_steps_lie_on_their_lines(batch: int, context: float, stages: int) -> None:
    models = (
        LINEAR,
        two_regimes(stages, overhead_s=0.002, overhead_per_token_s=1e-7),
    )
    for model in models:
        check_lines(model, batch, [context])


@given(st.integers(1, 93), st.floats(1, 1e4), st.floats(0, 1e4))
def test_more_to_read_takes_longer(batch: int, context: float, more: float) -> None:
    check_grows(LINEAR, batch, context, more)
    check_grows(two_regimes(), batch, context, more)


def test_the_large_regime_starts_at_its_batch() -> None:
    model = two_regimes()
    assert model.step_s(StepShape(0, 0.0, 94, 9400)) == pytest.approx(0.02 + 1e-6 * 9400 + 1e-4 * 94)
    assert model.step_s(StepShape(0, 0.0, 95, 9500)) == pytest.approx(0.01 + 2e-6 * 9500 + 2e-4 * 95)


def test_a_prompt_counts_its_squared_length() -> None:
    step_s = two_regimes().step_s(prompt_shape(1000))
    assert step_s == pytest.approx(0.03 + 1e-4 * 1000 + 1e-8 * 1000**2)


def test_stages_share_the_work_and_the_first_has_the_overhead() -> None:
    model = two_regimes(2, prefill_hop_s=0.004, overhead_s=0.002, overhead_per_token_s=1e-6)
    part = (0.03 + 1e-4 * 1000 + 1e-8 * 1000**2) / 2 + 0.004
    assert model.stage_s(prompt_shape(1000)) == pytest.approx((part + 0.002 + 1e-6 * 1000, part))
    part = (0.02 + 1e-6 * 808 + 1e-4 * 8) / 2
    # 8 of the 808 tokens of context are those that the step computes.
    assert model.stage_s(StepShape(0, 0.0, 8, 808)) == pytest.approx((part + 0.002 + 1e-6 * 800, part))


def test_a_mixed_step_has_one_base() -> None:
    prompt, decode = prompt_shape(512), StepShape(0, 0.0, 8, 4000)
    mixed = StepShape(prompt.prefill_tokens, prompt.prefill_context, 8, 4000)
    model = two_regimes()
    assert model.step_s(mixed) == pytest.approx(model.step_s(prompt) + model.step_s(decode) - SMALL.base)


def test_no_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 pipeline stages"):
        two_regimes(0)
