"""Which kinds of workers, and how many of each, carry a load at the least cost: Mélange's integer program
(Griggs et al., arXiv 2404.14527, section 5.4), with a packing for each phase and GPUs that run out.

A bucket of requests is cut into slices, a slice goes to one kind of worker and takes a share of one worker
there; the shares on a kind fit its workers. Knows costs, loads and numbers, nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...proto.errors import ConfigError

SLICES = 4
"""Of a bucket; Mélange found no gain in more."""
_TIE = 1e-5
"""Cost of a GPU, relative to the cheapest worker: of equally cheap packings the one with fewer GPUs."""
_ROUNDING = 1e-9
"""Relative; a load that is over a whole worker by less is one worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A kind of worker."""

    hardware: str
    """GPU type, of which there may be few."""
    gpus: int
    """That one worker takes."""
    cost: float
    """Of one worker, in whatever is to be small."""
    loads: tuple[float, ...]
    """Workers that each bucket would keep busy; infinite: it cannot serve that bucket."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or not 0.0 < self.cost < math.inf:
            raise ConfigError(
                f"a worker on {self.hardware} has {self.gpus} GPUs and costs {self.cost:g}; both are above 0"
            )
        if not self.loads or not all(load >= 0.0 for load in self.loads):
            raise ConfigError(f"loads of a worker on {self.hardware}: give one of 0 or more for each bucket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What is bought."""

    counts: tuple[tuple[int, ...], ...]
    """Workers by phase, then by bin."""
    cost: float


def pack(
    phases: Sequence[Sequence[Bin]],
    available: Mapping[str, int],
    slices: int = SLICES,
    gap: float = 0.0,
) -> Packing | None:
    """The cheapest workers that carry all buckets of all phases; None: no workers do.

    Without a shortage of a GPU type the phases are independent packings; one program finds both, so that a
    scarce type goes to the phase that gains most by it.

    Args:
        available: GPUs of each type; types that are not named have no end.
        gap: how much more than the cheapest it may cost, relatively; the proof of the last of it takes
            longest.

    Raises:
        ConfigError: a phase's bins differ in their number of buckets.
    """
    if slices < 1:
        raise ConfigError(f"slices = {slices}; cut a bucket into at least 1")
    for bins in phases:
        if len({len(one.loads) for one in bins}) > 1:
            raise ConfigError("loads differ in length; give each kind of worker one for each bucket")
        if not bins or any(math.isinf(min(loads)) for loads in zip(*(b.loads for b in bins), strict=True)):
            return None
    counts = _solve(phases, available, slices, gap)
    if counts is None:
        return None
    cost = math.fsum(
        count * one.cost
        for bins, numbers in zip(phases, counts, strict=True)
        for one, count in zip(bins, numbers, strict=True)
    )
    return Packing(counts=counts, cost=cost)


def _solve(
    phases: Sequence[Sequence[Bin]], available: Mapping[str, int], slices: int, gap: float
) -> tuple[tuple[int, ...], ...] | None:
    import highspy  # only heterogeneous plans need it

    model: Any = highspy.Highs()
    model.silent()
    model.setOptionValue("mip_rel_gap", gap)
    model.setOptionValue("mip_abs_gap", _TIE / 10.0)
    model.setOptionValue("threads", 1)  # the same path, the same answer among equals
    cheapest = min(one.cost for bins in phases for one in bins)
    workers = [[model.addIntegral(lb=0) for _ in bins] for bins in phases]
    used: dict[str, list[Any]] = {}
    costs: list[Any] = []
    for bins, numbers in zip(phases, workers, strict=True):
        for one, number in zip(bins, numbers, strict=True):
            used.setdefault(one.hardware, []).append(number * one.gpus)
            costs.append(number * (one.cost / cheapest + one.gpus * _TIE))
        _packed(model, bins, numbers, slices)
    for hardware, gpus in used.items():
        if hardware in available:
            model.addConstr(model.qsum(gpus) <= available[hardware])
    model.minimize(model.qsum(costs))
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return tuple(tuple(round(model.val(number)) for number in numbers) for numbers in workers)


def _packed(model: Any, bins: Sequence[Bin], numbers: Sequence[Any], slices: int) -> None:
    """Every slice is on one bin, and the slices of a bin fit its workers. Slices of a bucket are alike, so
    that how many of them a bin has says all."""
    on: list[list[Any]] = [[] for _ in bins]
    for bucket in range(len(bins[0].loads)):
        shares = []
        for i, one in enumerate(bins):
            load = one.loads[bucket]
            if math.isinf(load):
                continue
            share = model.addIntegral(lb=0, ub=slices)
            shares.append(share)
            on[i].append(share * (load / slices * (1.0 - _ROUNDING)))
        model.addConstr(model.qsum(shares) == slices)
    for terms, number in zip(on, numbers, strict=True):
        if terms:
            model.addConstr(model.qsum(terms) - number <= 0.0)
        else:
            model.addConstr(number + 0.0 <= 0.0)
