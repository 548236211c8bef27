"""Goodput from points and the choice of rates, on attainment curves whose goodput is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from diphase.cluster.load.search import Point, RateSearch, crossing, decreasing, goodput, merge
from diphase.proto.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

Curve = Callable[[float], float]


def logistic(middle: float, steepness: float = 6.0) -> Curve:
    """Attainment that falls through 1/2 at `middle`; 90 % is met up to middle * 9 ** (-1 / steepness)."""
    return lambda rate: 1.0 / (1.0 + (rate / middle) ** steepness)


def measure(curve: Curve, rate: float, total: int = 1000) -> Point:
    return Point(rate=rate, met=round(curve(rate) * total), total=total)


def run_search(
    search: RateSearch, curves: dict[str, Curve], most: int = 40, total: int = 1000
) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {name: [] for name in curves}
    for _ in range(most):
        rate = search.next_rate(points)
        if rate is None:
            return points
        for name, curve in curves.items():
            points[name].append(measure(curve, rate, total))
    raise AssertionError("the search did not end")


@pytest.mark.parametrize("middle", [0.3, 2.0, 37.0])
def test_a_search_finds_the_goodput_of_a_known_curve(middle: float) -> None:
    points = run_search(RateSearch(start=1.0), {"c": logistic(middle)})["c"]
    found = goodput(points)
    assert found.bracketed
    assert found.rate == pytest.approx(middle * 9 ** (-1 / 6), rel=0.05)
    assert found.low <= found.rate <= found.high
    assert len(points) < 20


def test_one_sweep_brackets_several_curves() -> None:
    curves = {"tight": logistic(0.8), "loose": logistic(6.0)}
    points = run_search(RateSearch(start=2.0), curves)
    for name, middle in (("tight", 0.8), ("loose", 6.0)):
        assert goodput(points[name]).rate == pytest.approx(middle * 9 ** (-1 / 6), rel=0.05)
    assert [p.rate for p in points["tight"]] == [p.rate for p in points["loose"]]


def test_a_search_ends_under_noise() -> None:
    rng = np.random.default_rng(2)
    curve = logistic(3.0)
    points: list[Point] = []
    search = RateSearch(start=1.0, tolerance=0.15)
    while (rate := search.next_rate({"c": points})) is not None:
        points.append(Point(rate=rate, met=int(rng.binomial(120, curve(rate))), total=120))
        assert len(points) < 40
    assert goodput(points).rate == pytest.approx(3.0 * 9 ** (-1 / 6), rel=0.2)


def test_high_rates_are_tried_before_low_ones() -> None:
    search = RateSearch(start=2.0, factor=2.0)
    both_open = {"a": [Point(rate=2.0, met=99, total=100)], "b": [Point(rate=2.0, met=1, total=100)]}
    assert search.next_rate(both_open) == 4.0


def test_a_search_stays_within_its_limits() -> None:
    search = RateSearch(start=1.0, lowest=0.5, highest=2.0)
    always = run_search(search, {"c": lambda _: 1.0})["c"]
    assert max(p.rate for p in always) == 2.0
    never = run_search(search, {"c": lambda _: 0.0})["c"]
    assert min(p.rate for p in never) == 0.5


def test_what_takes_too_long_gives_way_to_what_fits() -> None:
    search = RateSearch(start=2.0, factor=2.0)
    points = {
        "open": [Point(rate=2.0, met=0, total=100), Point(rate=4.0, met=0, total=100)],
        "wide": [Point(rate=2.0, met=100, total=100), Point(rate=4.0, met=0, total=100)],
    }
    assert search.next_rate(points) == 1.0
    assert search.next_rate(points, floor=1.5) == 1.5
    assert search.next_rate(points, floor=1.9) == pytest.approx(math.sqrt(8.0))
    assert search.next_rate(points, floor=3.0) is None
    assert search.next_rate({}, floor=3.0) == 3.0
    assert search.next_rate({}, floor=1e6) is None


def test_goodput_interpolates_between_rates() -> None:
    points = [Point(rate=1.0, met=100, total=100), Point(rate=2.0, met=80, total=100)]
    assert goodput(points).rate == pytest.approx(1.5)
    assert goodput(points[::-1]).rate == pytest.approx(1.5)


def test_goodput_outside_of_the_rates_is_not_claimed() -> None:
    above = goodput([Point(rate=2.0, met=100, total=100), Point(rate=3.0, met=95, total=100)])
    assert (above.rate, above.bracketed, above.high) == (3.0, False, math.inf)
    below = goodput([Point(rate=2.0, met=50, total=100)])
    assert (below.rate, below.bracketed, below.low) == (0.0, False, 0.0)
    with pytest.raises(ConfigError, match="at least one"):
        goodput([])


def test_a_lucky_point_at_a_high_rate_does_not_make_the_goodput() -> None:
    points = [
        Point(rate=1.0, met=99, total=100),
        Point(rate=2.0, met=60, total=100),
        Point(rate=3.0, met=91, total=100),
        Point(rate=4.0, met=10, total=100),
    ]
    found = goodput(points)
    assert 1.0 < found.rate < 2.0


def test_more_requests_give_a_narrower_interval() -> None:
    def width(total: int) -> float:
        points = [measure(logistic(2.0), rate, total) for rate in (0.5, 1.0, 1.3, 1.6, 2.0, 3.0)]
        found = goodput(points)
        return found.high - found.low

    assert width(10_000) < width(200) / 3


def test_the_interval_is_wilsons() -> None:
    low, high = Point(rate=1.0, met=9, total=10).interval()
    assert [low, high] == pytest.approx([0.596, 0.982], abs=1e-3)
    assert Point(rate=1.0, met=10, total=10).interval()[1] == 1.0
    assert Point(rate=1.0, met=0, total=10).interval()[0] == 0.0


def test_points_of_one_rate_are_pooled() -> None:
    points = [
        Point(rate=2.0, met=1, total=4),
        Point(rate=1.0, met=4, total=4),
        Point(rate=2.0, met=3, total=4),
    ]
    assert merge(points) == [Point(rate=1.0, met=4, total=4), Point(rate=2.0, met=4, total=8)]


VALUES = st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 100)), min_size=1, max_size=12)


@given(VALUES)
def test_pooling_gives_a_falling_curve_of_the_same_mean(pairs: list[tuple[float, float]]) -> None:
    values, weights = [v for v, _ in pairs], [w for _, w in pairs]
    fitted = decreasing(values, weights)
    assert len(fitted) == len(values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fitted))
    assert np.dot(fitted, weights) == pytest.approx(np.dot(values, weights), abs=1e-6)


def test_a_falling_curve_is_left_alone() -> None:
    assert decreasing([0.9, 0.5, 0.5, 0.1], [1, 2, 3, 4]) == [0.9, 0.5, 0.5, 0.1]


def test_crossings_at_the_ends() -> None:
    assert crossing([], [], 0.9) == 0.0
    assert crossing([1.0, 2.0], [0.9, 0.0], 0.9) == 1.0
    assert crossing([1.0, 2.0], [0.8, 0.0], 0.9) == 0.0
    assert crossing([1.0, 2.0], [1.0, 0.9], 0.9) == math.inf


@pytest.mark.parametrize(
    "options",
    [{"start": 0.01}, {"start": 1.0, "factor": 1.0}, {"start": 1.0, "tolerance": 0.0}, {"start": 2e3}],
)
def test_impossible_searches_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="rate search"):
        RateSearch(**options)
