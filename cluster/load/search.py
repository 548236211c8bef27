"""Goodput from measured points: at which rate does attainment cross the target, and which rate to try next.

Pure arithmetic over (rate, requests that met their SLO, requests sent). A point's rate is what was offered; a
request that was rejected or failed did not meet anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...proto.errors import ConfigError

TARGET = 0.9
"""Share of requests that must meet both objectives (DistServe, OSDI 2024)."""

_Z95 = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one run at one rate came to."""

    rate: float
    """Requests a second."""
    met: int
    total: int

    @property
    def attainment(self) -> float:
        return self.met / self.total

    def interval(self, z: float = _Z95) -> tuple[float, float]:
        """Wilson's score interval of the attainment; 95 % by default. Requests of one run queue behind each
        other, so that it is somewhat too narrow near saturation."""
        n, p = self.total, self.attainment
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """The largest rate at which the target is met, by interpolation between measured rates."""

    rate: float
    """Requests a second; 0 when no measured rate met the target."""
    low: float
    """Where the curve of the points' lower 95 % bounds crosses; 0 when it is below the target throughout."""
    high: float
    """Where the curve of the upper bounds crosses; infinite when it is above throughout."""
    bracketed: bool
    """False: the true value lies outside the measured rates and `rate` is the nearest end of what is
    known."""


def merge(points: Sequence[Point]) -> list[Point]:
    """Points of one rate pooled, by ascending rate."""
    pooled: dict[float, Point] = {}
    for point in points:
        known = pooled.get(point.rate)
        pooled[point.rate] = (
            point
            if known is None
            else Point(rate=point.rate, met=known.met + point.met, total=known.total + point.total)
        )
    return [pooled[rate] for rate in sorted(pooled)]


def decreasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest non-increasing sequence in weighted least squares: pool adjacent violators (Ayer et al.,
    1955). More load never helps, so that a rise is chance."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = value, weight, 1
        while blocks and blocks[-1][0] < mean:
            last_mean, last_total, last_length = blocks.pop()
            mean = (mean * total + last_mean * last_total) / (total + last_total)
            total, length = total + last_total, length + last_length
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]


def crossing(rates: Sequence[float], values: Sequence[float], target: float) -> float:
    """The rate at which the non-increasing `values` fall below `target`, linear between neighbours; 0 when
    they begin below it, infinite when they never do."""
    if not rates or values[0] < target:
        return 0.0
    for i in range(1, len(rates)):
        if values[i] < target:
            share = (values[i - 1] - target) / (values[i - 1] - values[i])
            return rates[i - 1] + share * (rates[i] - rates[i - 1])
    return math.inf


def goodput(points: Sequence[Point], target: float = TARGET) -> Goodput:
    """Goodput of a sweep.

    Raises:
        ConfigError: there are no points.
    """
    if not points:
        raise ConfigError("a goodput needs at least one measured rate")
    pooled = merge(points)
    rates = [point.rate for point in pooled]
    weights = [float(point.total) for point in pooled]

    def cross(values: list[float]) -> float:
        return crossing(rates, decreasing(values, weights), target)

    rate = cross([point.attainment for point in pooled])
    bracketed = 0.0 < rate < math.inf
    return Goodput(
        rate=rates[-1] if rate == math.inf else rate,
        low=cross([point.interval()[0] for point in pooled]),
        high=cross([point.interval()[1] for point in pooled]),
        bracketed=bracketed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSearch:
    """Chooses rates: first outwards until every curve is bracketed, then bisecting the widest bracket.

    One sweep may serve several curves (the same runs judged by different SLOs); a rate is a point of each.
    """

    start: float
    """Requests a second, the first to try."""
    factor: float = 1.5
    """Step of the outward search."""
    lowest: float = 0.05
    highest: float = 1000.0
    """Nothing outside of these is tried."""
    tolerance: float = 0.08
    """A bracket this narrow, relative to its low end, is not bisected further."""
    target: float = TARGET

    def __post_init__(self) -> None:
        if not 0.0 < self.lowest <= self.start <= self.highest < math.inf:
            raise ConfigError(
                f"a rate search from {self.start} needs lowest <= start <= highest, all above 0; "
                f"they are {self.lowest} and {self.highest}"
            )
        if self.factor <= 1.0 or self.tolerance <= 0.0 or not 0.0 < self.target <= 1.0:
            raise ConfigError(
                "a rate search needs a factor above 1, a tolerance above 0 and a target in (0, 1]"
            )

    def next_rate(self, curves: Mapping[str, Sequence[Point]], floor: float = 0.0) -> float | None:
        """The next rate to run, given what was measured; None when every bracket is narrow enough or at a
        limit.

        `floor`: nothing below it is proposed, because a run at a low rate would take more time than is left.
        """
        lowest = max(self.lowest, floor)
        brackets = [self._bracket(points) for points in curves.values() if points]
        if not brackets:
            return max(self.start, lowest) if lowest <= self.highest else None
        tried = [point.rate for points in curves.values() for point in points]
        top, bottom = max(tried), min(tried)
        # High rates first: they cost the least time.
        if any(high == math.inf for _, high in brackets) and lowest <= top < self.highest:
            return min(top * self.factor, self.highest)
        if any(low == 0.0 for low, _ in brackets) and lowest * (1.0 + self.tolerance) <= bottom:
            return max(bottom / self.factor, lowest)
        wide = [
            (high / low, math.sqrt(low * high))
            for low, high in brackets
            if low > 0.0 and low * (1.0 + self.tolerance) < high < math.inf
        ]
        return max(((ratio, rate) for ratio, rate in wide if rate >= lowest), default=(0.0, None))[1]

    def _bracket(self, points: Sequence[Point]) -> tuple[float, float]:
        """(largest rate still at the target, smallest below it) on the non-increasing curve; 0, infinite if
        none."""
        pooled = merge(points)
        values = decreasing([p.attainment for p in pooled], [float(p.total) for p in pooled])
        good = [p.rate for p, value in zip(pooled, values, strict=True) if value >= self.target]
        bad = [p.rate for p, value in zip(pooled, values, strict=True) if value < self.target]
        return max(good, default=0.0), min(bad, default=math.inf)
