"""ClockOffset: a worker's clock from pings."""

from __future__ import annotations

import random

import pytest
from diphase.router.clock_offset import ClockOffset


def test_the_exchange_with_the_shortest_round_trip_decides() -> None:
    clock = ClockOffset()
    clock.observe(0.0, 100.5, 0.8)  # slow on its way back
    clock.observe(1.0, 101.001, 1.002)
    clock.observe(2.0, 102.3, 2.4)
    assert clock.to_gateway(200.0) == pytest.approx(100.0, abs=1e-9)
    assert clock.round_trip_s == pytest.approx(0.002)


def test_the_error_is_at_most_half_the_round_trip() -> None:
    rng = random.Random(3)
    clock = ClockOffset()
    for i in range(50):
        there, back = rng.uniform(0.0001, 0.01), rng.uniform(0.0001, 0.01)
        clock.observe(i, i + there - 7.5, i + there + back)
        assert abs(clock.to_gateway(0.0) - 7.5) <= clock.round_trip_s / 2 + 1e-9


def test_drift_is_followed() -> None:
    clock = ClockOffset(window=8)
    for i in range(100):
        clock.observe(i, i + 1e-3 * i + 0.001, i + 0.002)
    assert clock.to_gateway(0.0) == pytest.approx(-0.095, abs=0.005)


def test_nothing_is_assumed_before_the_first_answer() -> None:
    clock = ClockOffset()
    assert not clock.known
    clock.observe(0.0, 5.0, 0.0)
    assert clock.known
    clock.reset()
    assert not clock.known
