"""Predicted against measured: percentiles and attainment of the same requests, simulated and served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...proto.slo import Slo
from .records import SimResult

PERCENTILES = (50, 90, 99)
GOOD_ERROR, GOOD_POINTS = 0.10, 5.0
"""Marks: of the median relative error on percentiles, and on attainment in percentage points."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run, milliseconds; None where nothing came back."""

    ttft_ms: dict[str, float] | None
    """By p50, p90, p99, interpolated linearly; of requests that were served."""
    tpot_ms: dict[str, float] | None
    """The same, of requests of two tokens and more."""
    attainment: float
    """Share of all requests that met both objectives."""
    parts_ms: dict[str, float]
    """Medians of what a TTFT is made of: the prompt waits, is computed, and what lies around both."""
    busy: dict[str, float] | None = None
    """Share of the time that workers computed, by role; only the simulation knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """One rate."""

    rate: float
    requests: int
    measured: Figures
    predicted: Figures
    slower: tuple[float, float] = (1.0, 1.0)
    """Factors on the profile's times of steps with prompts and of those without, measured before and after:
    what the machine was slower by."""

    @property
    def errors(self) -> dict[str, float]:
        """Predicted / measured - 1 of each percentile that both have."""
        found: dict[str, float] = {}
        for name in ("ttft_ms", "tpot_ms"):
            measured, predicted = getattr(self.measured, name), getattr(self.predicted, name)
            if measured and predicted:
                found |= {f"{name}_{p}": predicted[p] / measured[p] - 1.0 for p in measured if measured[p]}
        return found

    @property
    def attainment_points(self) -> float:
        """Predicted - measured, percentage points."""
        return (self.predicted.attainment - self.measured.attainment) * 100.0

    def to_dict(self) -> dict[str, object]:
        return {
            "rate": self.rate,
            "requests": self.requests,
            "measured": self.measured,
            "predicted": self.predicted,
            "errors": self.errors,
            "attainment_points": self.attainment_points,
            "slower": self.slower,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Over all rates of a placement."""

    median_error: float | None
    """Of the absolute errors of all percentiles; None without any."""
    median_points: float
    """Of the absolute differences in attainment."""
    inside: bool
    """Both within their marks."""


class Parts(NamedTuple):
    """Milliseconds of one TTFT."""

    queue: float
    prefill: float
    around: float


def figures_of(
    ttft_ms: Sequence[float],
    tpot_ms: Sequence[float],
    parts: Sequence[Parts],
    met: int,
    total: int,
) -> Figures:
    """Of what a client measured."""
    return Figures(
        parts_ms=_medians(parts),
        ttft_ms=_percentiles(np.array(ttft_ms)),
        tpot_ms=_percentiles(np.array(tpot_ms)),
        attainment=met / total,
    )


def figures_of_simulation(results: Sequence[SimResult], slo: Slo) -> Figures:
    """Of the requests of all runs, those refused counting as missed."""
    requests = [request for result in results for request in result.requests]
    ttft_ms = np.concatenate([result.ttft_ms for result in results])
    tpot_ms = np.concatenate([result.tpot_ms for result in results])
    several = np.array([request.output_tokens > 1 for request in requests])
    served = np.isfinite(ttft_ms)
    roles = dict.fromkeys(use.role for result in results for use in result.workers)
    parts = [
        Parts(
            (request.scheduled - request.arrival) / 1e6,
            (request.token0 - request.scheduled) / 1e6,
            ttft - (request.token0 - request.arrival) / 1e6,
        )
        for request, ttft in zip(requests, ttft_ms.tolist(), strict=True)
        if math.isfinite(ttft)
    ]
    met = sum(result.attainment(slo.ttft_ms, slo.tpot_ms) * len(result.requests) for result in results)
    return Figures(
        parts_ms=_medians(parts),
        ttft_ms=_percentiles(ttft_ms[served]),
        tpot_ms=_percentiles(tpot_ms[served & several]),
        attainment=met / len(requests),
        busy={
            role: float(np.mean([use.busy for r in results for use in r.workers if use.role == role]))
            for role in roles
        },
    )


def verdict_of(validations: Sequence[Validation]) -> Verdict:
    """Of at least one rate."""
    errors = [abs(error) for validation in validations for error in validation.errors.values()]
    median_error = float(np.median(errors)) if errors else None
    points = float(np.median([abs(validation.attainment_points) for validation in validations]))
    return Verdict(
        median_error=median_error,
        median_points=points,
        inside=median_error is not None and median_error <= GOOD_ERROR and points <= GOOD_POINTS,
    )


def _medians(parts: Sequence[Parts]) -> dict[str, float]:
    columns = zip(Parts._fields, zip(*parts, strict=True), strict=False)
    return {name: float(np.median(values)) for name, values in columns}


def _percentiles(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
