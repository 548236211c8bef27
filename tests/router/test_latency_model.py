"""LatencyModel: finds the coefficients behind step times."""

from __future__ import annotations

import random

import pytest
from diphase.router.latency_model import Coefficients, LatencyModel
from diphase.router.step_time import StepShape
from hypothesis import given, settings
from hypothesis import strategies as st

from .shapes import prompt_shape

COEFFICIENTS = st.builds(
    Coefficients,
    st.floats(1e-3, 5e-2),
    st.floats(5e-5, 2e-3),
    st.floats(1e-9, 1e-7),
    st.floats(5e-5, 5e-3),
    st.floats(1e-7, 1e-5),
)


def true_s(c: Coefficients, shape: StepShape) -> float:
    return float(sum(a * b for a, b in zip(c, (1.0, *shape), strict=True)))


def mixed_step(rng: random.Random) -> StepShape:
    tokens = rng.choice([0, rng.randrange(1, 512)])
    prompt = prompt_shape(tokens, rng.randrange(0, 4000)) if tokens else StepShape()
    batch = rng.randrange(0 if tokens else 1, 17)
    return StepShape(tokens, prompt.prefill_context, batch, batch * rng.uniform(50, 2000))


@settings(max_examples=25, deadline=None)
@given(COEFFICIENTS, st.integers(0, 2**32))
def test_known_coefficients_are_recovered(truth: Coefficients, seed: int) -> None:
    rng = random.Random(seed)
    model = LatencyModel()
    for _ in range(300):
        shape = mixed_step(rng)
        model.observe(shape, true_s(truth, shape))
    for _ in range(50):
        shape = mixed_step(rng)
        assert model.step_s(shape) == pytest.approx(true_s(truth, shape), rel=0.02)
    found = Coefficients(*model.terms)
    assert found.base == pytest.approx(truth.base, rel=0.1)
    assert found.per_prefill_token == pytest.approx(truth.per_prefill_token, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(COEFFICIENTS, st.integers(0, 2**32))
def test_a_pure_decode_worker_is_predicted_for_its_own_steps(truth: Coefficients, seed: int) -> None:
    rng = random.Random(seed)
    model = LatencyModel()
    for _ in range(300):
        batch = rng.randrange(1, 17)
        shape = StepShape(decode_batch=batch, decode_context=batch * rng.uniform(50, 2000))
        model.observe(shape, true_s(truth, shape) * rng.uniform(0.9, 1.1))
    shape = StepShape(decode_batch=8, decode_context=8000)
    assert model.step_s(shape) == pytest.approx(true_s(truth, shape), rel=0.05)


def test_the_prior_speaks_while_nothing_was_seen() -> None:
    model = LatencyModel(Coefficients(base=0.5))
    assert model.step_s(StepShape()) == 0.5
    assert not model.informed


def test_one_sample_already_moves_the_prediction() -> None:
    model = LatencyModel()
    model.observe(prompt_shape(512), 5.0)
    assert model.step_s(prompt_shape(512)) == pytest.approx(5.0, rel=0.05)


def test_old_steps_are_forgotten() -> None:
    model = LatencyModel(memory=50)
    shape = StepShape(decode_batch=4, decode_context=400)
    for _ in range(200):
        model.observe(shape, 0.02)
    for _ in range(300):
        model.observe(shape, 0.04)
    assert model.step_s(shape) == pytest.approx(0.04, rel=0.02)


def test_a_single_stalled_step_changes_little() -> None:
    model = LatencyModel()
    shape = StepShape(decode_batch=4, decode_context=400)
    for _ in range(100):
        model.observe(shape, 0.02)
    model.observe(shape, 5.0)
    for _ in range(8):
        model.observe(shape, 0.02)
    assert model.step_s(shape) == pytest.approx(0.02, rel=0.05)


def test_coefficients_are_never_negative() -> None:
    model = LatencyModel()
    rng = random.Random(1)
    for _ in range(200):  # time falls as the batch grows: no physical model explains it
        batch = rng.randrange(1, 17)
        model.observe(StepShape(decode_batch=batch, decode_context=batch * 100.0), 0.05 - 0.002 * batch)
    assert min(model.terms) >= 0.0


def test_steps_without_work_or_time_teach_nothing() -> None:
    model = LatencyModel()
    model.observe(StepShape(), 1.0)
    model.observe(StepShape(decode_batch=1), 0.0)
    assert model.num_samples == 0


def test_the_context_of_a_prompt_counts_what_lies_before_it() -> None:
    assert prompt_shape(100).prefill_context == 5000
    assert prompt_shape(100, 400).prefill_context == 45_000
    halves = prompt_shape(50).prefill_context + prompt_shape(50, 50).prefill_context
    assert halves == prompt_shape(100).prefill_context
