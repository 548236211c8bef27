"""StepDrift: says how far steps are from what was predicted, and for how long."""

from __future__ import annotations

import pytest
from diphase.router.step_drift import StepDrift


def test_steps_as_predicted_show_no_drift() -> None:
    drift = StepDrift()
    for _ in range(10):
        drift.observe(0.02, 0.02)
    assert (drift.error, drift.bias, drift.num_steps) == (0.0, 0.0, 10)


def test_error_is_the_size_and_bias_the_direction() -> None:
    drift = StepDrift()
    for measured in (0.03, 0.01) * 200:
        drift.observe(0.02, measured)
    assert drift.error == pytest.approx(0.5)
    assert abs(drift.bias) < 0.02


def test_a_lasting_change_shows_and_is_forgotten_when_it_ends() -> None:
    drift = StepDrift()
    for _ in range(200):
        drift.observe(0.02, 0.02)
    for _ in range(100):
        drift.observe(0.02, 0.03)
    assert drift.bias == pytest.approx(0.5 * (1.0 - 0.98**100), rel=1e-6)
    for _ in range(300):
        drift.observe(0.02, 0.02)
    assert drift.error < 0.01


def test_one_stall_moves_it_by_one_step_at_most() -> None:
    drift = StepDrift()
    for _ in range(200):
        drift.observe(0.02, 0.02)
    drift.observe(0.02, 60.0)
    assert drift.error == pytest.approx(0.02)


def test_steps_without_a_prediction_or_a_time_are_not_counted() -> None:
    drift = StepDrift()
    drift.observe(0.0, 0.02)
    drift.observe(0.02, 0.0)
    assert drift.num_steps == 0
