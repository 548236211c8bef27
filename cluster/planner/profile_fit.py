"""The latency model's terms, fitted to a profile of steps so that a disturbed or odd one moves them little.

Each cell of the grid counts once, with the median of its runs. Least squares on the relative error, as the
live router's fit (router/latency_model.py), but reweighted until it settles (Huber's weights, Robust
Estimation of a Location Parameter, 1964): a cell that is off by more than the others usually are counts less.
Coefficients are not negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError
from ...router.latency_model import Coefficients
from ...router.step_time import StepShape
from .regime_step_time import Regimes, RegimeStepTime, kind_of, size_of

Floats = NDArray[np.float64]
Terms = tuple[int, ...]

HUBER = 1.345
"""Deviations from which a cell counts less: 95 % as good as plain least squares where errors are normal."""
ROUNDS = 30
"""Of reweighting, at most; a handful do."""
WORTH = 0.9
"""A second regime is used when it brings the mean hold-out error below this share of one regime's."""
EXACT = 1e-6
"""Mean hold-out error that no second regime needs to lower."""
SMALLEST_REGIME = 2
"""Sizes of steps that a regime must have seen."""
TERMS = {"prefill": (0, 1, 2), "decode": (0, 3, 4), "mixed": (0, 1, 2, 3, 4)}
"""Coefficients that steps of a kind have, by their place."""
SPARE = 2
"""Cells that a regime must have beyond its terms: one that is held out, and one to be judged by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCell:
    """One kind of step, and what its runs took."""

    shape: StepShape
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or not all(0.0 < s < float("inf") for s in self.seconds):
            raise ConfigError(f"the profile's step {tuple(self.shape)} has no times, or some that are none")
        if self.shape.prefill_tokens == 0 and self.shape.decode_batch == 0:
            raise ConfigError("the profile has a step without work")

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """What a profile came to."""

    step_time: RegimeStepTime
    coefficients: Coefficients
    """One set for all kinds of steps, as the live router's model has: to compare it with."""
    errors: tuple[float, ...]
    """By cell: predicted / measured - 1."""
    hold_out: tuple[float, ...]
    """By cell: the same, of a fit that had not seen it."""


def fit_steps(cells: Sequence[StepCell]) -> StepFit:
    """Terms for each kind of step: one set, or two where a boundary between small and large steps lowers the
    hold-out error (each cell predicted by a fit to the others) by more than a tenth. The boundary is the size
    that lowers it most.

    Raises:
        ConfigError: there are too few cells of a kind.
    """
    by_kind = {kind: [cell for cell in cells if kind_of(cell.shape) == kind] for kind in TERMS}
    for kind, some in by_kind.items():
        if len(some) < (least := len(TERMS[kind]) + SPARE):
            raise ConfigError(f"the profile has {len(some)} kinds of {kind} steps; a fit needs {least}")
    boundaries = {kind: _choose_boundary(some, TERMS[kind]) for kind, some in by_kind.items()}
    fits = {kind: _fit(some, TERMS[kind], boundaries[kind]) for kind, some in by_kind.items()}
    held_out = {
        id(cell): error
        for kind, some in by_kind.items()
        for cell, error in zip(some, _hold_out(some, TERMS[kind], boundaries[kind]), strict=True)
    }
    step_time = RegimeStepTime(**fits)
    return StepFit(
        step_time=step_time,
        coefficients=_terms_of(cells, TERMS["mixed"]),
        errors=tuple(step_time.step_s(cell.shape) / cell.median_s - 1.0 for cell in cells),
        hold_out=tuple(held_out[id(cell)] for cell in cells),
    )


def robust_fit(features: Floats, seconds: Floats) -> Floats:
    """Non-negative coefficients of the columns of `features` ([cells, terms]) for times in seconds."""
    relative = features / seconds[:, None]
    weights = np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        before = coefficients
        coefficients = _non_negative(relative * weights[:, None], weights)
        residuals = np.abs(relative @ coefficients - 1.0)
        scale = 1.4826 * float(np.median(residuals))  # a standard deviation, of normal errors
        if scale < 1e-9 or np.allclose(coefficients, before, rtol=1e-6, atol=0.0):
            break
        weights = np.sqrt(np.minimum(1.0, HUBER * scale / np.maximum(residuals, 1e-12)))
    return coefficients


def _non_negative(rows: Floats, target: Floats) -> Floats:
    """Least squares; negative coefficients become 0 and the others are fitted anew."""
    scale = np.sqrt((rows**2).sum(axis=0))
    free = np.flatnonzero(scale > 0.0)
    found = np.zeros(rows.shape[1])
    while len(free):
        solution = np.linalg.lstsq(rows[:, free] / scale[free], target, rcond=None)[0] / scale[free]
        if (solution >= 0.0).all():
            found[free] = solution
            break
        free = free[solution >= 0.0]
    return found


def _features(cells: Sequence[StepCell]) -> Floats:
    """A row a cell, in the order of latency_model.Coefficients."""
    return np.array([(1.0, *cell.shape) for cell in cells])


def _times(cells: Sequence[StepCell]) -> Floats:
    return np.array([cell.median_s for cell in cells])


def _fit(cells: Sequence[StepCell], terms: Terms, boundary: int) -> Regimes:
    small, large = _split(cells, boundary)
    found = _terms_of(large, terms)
    return Regimes(small=_terms_of(small, terms) if small else found, large=found, boundary=boundary)


def _terms_of(cells: Sequence[StepCell], terms: Terms) -> Coefficients:
    coefficients = np.zeros(len(TERMS["mixed"]))
    coefficients[list(terms)] = robust_fit(_features(cells)[:, terms], _times(cells))
    return Coefficients(*coefficients.tolist())


def _split(cells: Sequence[StepCell], boundary: int) -> tuple[list[StepCell], list[StepCell]]:
    """Below the boundary, and from there on."""
    small = [cell for cell in cells if size_of(cell.shape) < boundary]
    return small, [cell for cell in cells if size_of(cell.shape) >= boundary]


def _choose_boundary(cells: Sequence[StepCell], terms: Terms) -> int:
    """Size from which the second regime holds; 0: there is but one."""
    sizes = sorted({size_of(cell.shape) for cell in cells})
    tried = {
        boundary: _mean_hold_out(cells, terms, boundary)
        for boundary in sizes[SMALLEST_REGIME : len(sizes) - SMALLEST_REGIME + 1]
        if min(map(len, _split(cells, boundary))) >= len(terms) + SPARE
    }
    best = min(tried, key=lambda boundary: tried[boundary], default=0)
    one = _mean_hold_out(cells, terms, 0)
    return best if best and one > EXACT and tried[best] < WORTH * one else 0


def _mean_hold_out(cells: Sequence[StepCell], terms: Terms, boundary: int) -> float:
    return float(np.mean(np.abs(_hold_out(cells, terms, boundary))))


def _hold_out(cells: Sequence[StepCell], terms: Terms, boundary: int) -> list[float]:
    """Relative error of each cell by a fit to its regime's others."""
    errors = []
    for cell in cells:
        small, large = _split(cells, boundary)
        regime = small if size_of(cell.shape) < boundary else large
        found = _terms_of([other for other in regime if other is not cell], terms)
        predicted = float(found.step_s(cell.shape))
        errors.append(predicted / cell.median_s - 1.0)
    return errors
