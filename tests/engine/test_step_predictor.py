"""The predictor learns a worker's own step times."""

from __future__ import annotations

import random

import pytest
from diphase.engine.step_predictor import StepPredictor
from diphase.proto.worker_pb2 import StepSample


def draw(rng: random.Random) -> StepSample:
    batch = rng.randint(0, 16)
    prefill = rng.choice([0, 0, 128, 512])
    sample = StepSample(
        prefill_tokens=prefill,
        prefill_context=prefill * rng.randint(0, 2000),
        decode_batch=batch,
        decode_context=batch * rng.randint(1, 1000),
    )
    sample.duration_s = (
        0.015 + 6e-4 * prefill + 3e-8 * sample.prefill_context + 5e-4 * batch + 2e-6 * sample.decode_context
    )
    return sample


def test_it_knows_nothing_at_first() -> None:
    assert StepPredictor().predict(draw(random.Random(0))) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_it_predicts_steps_that_cost_what_their_parts_cost(seed: int) -> None:
    rng = random.Random(seed)
    predictor = StepPredictor()
    for _ in range(200):
        predictor.observe(draw(rng))
    for _ in range(50):
        sample = draw(rng)
        assert predictor.predict(sample) == pytest.approx(sample.duration_s, rel=0.02)


def test_it_stays_sane_when_only_one_kind_of_step_comes_for_a_long_time() -> None:
    rng = random.Random(0)
    predictor = StepPredictor()
    for _ in range(20_000):
        sample = StepSample(decode_batch=4, decode_context=400)
        sample.duration_s = 0.02 * rng.uniform(0.9, 1.1)
        predictor.observe(sample)
    assert predictor.predict(StepSample(decode_batch=4, decode_context=400)) == pytest.approx(0.02, rel=0.1)
    for _ in range(100):
        predictor.observe(draw(rng))
    sample = draw(rng)
    assert predictor.predict(sample) == pytest.approx(sample.duration_s, rel=0.1)


def test_a_prediction_is_never_negative() -> None:
    predictor = StepPredictor()
    for tokens, seconds in ((100, 1.0), (200, 0.1)):
        predictor.observe(StepSample(prefill_tokens=tokens, duration_s=seconds))
    assert predictor.predict(StepSample(prefill_tokens=1000)) == 0.0
