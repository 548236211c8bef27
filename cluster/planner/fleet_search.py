"""The search for a fleet: the best placement on each type of GPU alone, and fleets of several types packed
as Mélange does, once for each phase, and simulated jointly.

Within a budget the fleet with the highest goodput is chosen, or, for a wanted rate, the one that takes least
of it. Deterministic. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from ...proto.errors import ConfigError
from .bin_packing import Bin, Packing, pack
from .fleet import Budget, GpuType
from .fleet_loads import LoadedKind, load_kinds, rate_bound
from .goodput import Mapped, largest_rate
from .machines import Machine, feasible_parallels
from .phase_rates import PhaseRates
from .placement import KINDS, Placement, Pool
from .search import HOPELESS, TIE, Asked, Candidate, Found, Task, search, simulated
from .sim_workload import usual_lengths

BALANCES = ((1.0, 1.0), (1.25, 1.0), (1.0, 1.25))
"""Margins of prefill and of decode that are tried: a pool shares its load better or worse than one worker."""
ROUNDS = 3
"""How often a packing for a wanted rate is corrected by what its simulation served."""
GAP, STEP = 0.01, 0.02
"""How far a packing may be from the cheapest, and the rate that it is packed for from the most."""
FINALISTS = 2
"""Fleets of several types that all seeds are simulated of."""


@dataclass(frozen=True, kw_only=True)
class FleetTask(Asked):
    """What is to be planned on GPUs of several types, or within a budget."""

    types: tuple[GpuType, ...]
    budget: Budget

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("hardware is empty; name at least one type of GPU")
        names = [gpu.name for gpu in self.types]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"hardware {name} is named {names.count(name)} times; name each type once")
        for gpu in self.types:
            gpu.each(self.budget.measure)
        super().__post_init__()

    @cached_property
    def by_name(self) -> Mapping[str, GpuType]:
        """The types."""
        return {gpu.name: gpu for gpu in self.types}

    @cached_property
    def machines(self) -> Mapping[str, Machine]:
        """Of the types."""
        return {gpu.name: gpu.machine for gpu in self.types}

    def takes(self, placement: Placement, measure: str = "") -> float:
        """Dollars an hour, or watts at the GPUs' limit, by default what the budget is of; hosts and network
        are not in it."""
        measure = measure or self.budget.measure
        return math.fsum(pool.gpus * self.by_name[pool.hardware].each(measure) for pool in placement.pools)

    def cost(self, placement: Placement) -> float | None:
        """Dollars an hour; None: a price is not known."""
        priced = all(self.by_name[name].price_per_hour is not None for name in placement.hardware)
        return self.takes(placement, "cost") if priced else None

    def affordable(self, gpu: GpuType) -> int:
        """GPUs of the type alone."""
        most = self.budget.most / gpu.each(self.budget.measure)
        return gpu.available if most >= gpu.available else math.floor(most + 1e-9)

    def within(self, takes: float) -> bool:
        """Whether the budget has so much."""
        return takes <= self.budget.most * (1.0 + 1e-9)


def fleet_search(task: FleetTask, mapped: Mapped = map) -> Found:
    """
    Raises:
        ConfigError: the model fits no type, or the budget no worker.
    """
    phases: dict[str, PhaseRates] = {}
    alone: dict[str, Candidate | None] = {}
    left_out: dict[str, str] = {}
    candidates: list[Candidate] = []
    _check_budget(task)
    for gpu in task.types:
        try:
            found = search(_alone(task, gpu), mapped)
        except ConfigError as exc:
            left_out[gpu.name] = exc.message
            continue
        phases[gpu.name] = found.phases[""]
        own = [replace(c, placement=c.placement.on(gpu.name)) for c in found.candidates]
        candidates += own
        alone[gpu.name] = own[0] if own else None
    if not phases:
        raise ConfigError("the model fits no type: " + "; ".join(left_out.values()))
    if len(phases) > 1:
        best = max((c.rate for c in candidates), default=0.0)
        candidates += _several_types(task, phases, best, mapped)
        if task.rate is not None and max((c.rate for c in candidates), default=0.0) < task.rate:
            candidates += _several_types(replace(task, rate=None), phases, best, mapped)
    ranked = _ranked(task, candidates)
    reached = task.rate is None or bool(ranked and ranked[0].rate >= task.rate)
    return Found(candidates=tuple(ranked), alone=alone, left_out=left_out, phases=phases, reached=reached)


def _alone(task: FleetTask, gpu: GpuType) -> Task:
    gpus = task.affordable(gpu)
    if gpus < 1:
        each = task.budget.text(gpu.each(task.budget.measure))
        raise ConfigError(f"the budget has no GPU of {gpu.name}, which takes {each}")
    shared = {item.name: getattr(task, item.name) for item in fields(Asked)}
    return Task(machine=gpu.machine, gpus=gpus, **shared)


def _check_budget(task: FleetTask) -> None:
    """
    Raises:
        ConfigError: it has no worker of any type; the message says what the least would be.
    """
    least: list[tuple[float, str]] = []
    for gpu in task.types:
        try:
            parallel = feasible_parallels(gpu.machine, gpu.available, task.max_pp)[0]
        except ConfigError:
            continue
        takes = parallel.gpus * gpu.each(task.budget.measure)
        least.append((takes, f"a worker of {parallel} on {gpu.name} takes {task.budget.text(takes)}"))
    if least and not task.within(min(least)[0]):
        raise ConfigError(
            f"budget: {task.budget.text(task.budget.most)} is too small for one worker of any type; "
            f"the least is: {min(least)[1]}"
        )


# fleets of several types


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Phases that are packed together, with margins."""

    phases: tuple[tuple[LoadedKind, ...], ...]
    margins: tuple[float, ...]

    def packed(self, task: FleetTask, rate: float) -> Packing | None:
        """The cheapest workers for so many requests/s; None: they cannot be had."""
        phases = [
            [
                Bin(
                    hardware=kind.gpu.name,
                    gpus=kind.worker.parallel.gpus,
                    cost=kind.worker.parallel.gpus * kind.gpu.each(task.budget.measure),
                    loads=tuple(load * margin * rate for load in kind.loads),
                )
                for kind in kinds
            ]
            for kinds, margin in zip(self.phases, self.margins, strict=True)
        ]
        packing = pack(phases, {gpu.name: gpu.available for gpu in task.types}, gap=GAP)
        return packing if packing is not None and task.within(packing.cost) else None

    def placement(self, packing: Packing) -> Placement:
        """What was packed."""
        pools = (
            Pool(kind.worker, count, kind.gpu.name)
            for kinds, counts in zip(self.phases, packing.counts, strict=True)
            for kind, count in zip(kinds, counts, strict=True)
            if count
        )
        return Placement(tuple(pools))

    def bound(self, placement: Placement, task: FleetTask) -> float:
        """Requests/s that the placement cannot exceed."""
        if task.workload.shares:
            return math.inf  # what is cached takes no time
        lengths = usual_lengths(task.workload)
        counts = {(pool.hardware, pool.worker): pool.count for pool in placement.pools}
        bounds = []
        for kinds in self.phases:
            own = [(k, counts[key]) for k in kinds if (key := (k.gpu.name, k.worker)) in counts]
            bounds.append(rate_bound(own, lengths))
        return min(bounds)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A packing to be found; can be sent to another process."""

    task: FleetTask
    shape: Shape
    rate: float | None
    guess: float


def _found(wanted: _Wanted) -> tuple[float, Packing | None]:
    """(requests/s that it is packed for, the packing): for the rate, or the most that budget and numbers
    allow."""
    task, shape, rate = wanted.task, wanted.shape, wanted.rate
    if rate is None:
        rate = largest_rate(lambda r: shape.packed(task, r) is not None, wanted.guess, math.inf, STEP)
    return rate, shape.packed(task, rate) if rate else None


def shapes(task: FleetTask, phases: Mapping[str, PhaseRates]) -> list[Shape]:
    """Pairs of pools with every balance, and colocated workers."""
    lengths = usual_lengths(task.workload)
    kinds = {
        role: tuple(load_kinds(task.by_name, phases, lengths, task.objectives, role))
        for role in ("prefill", "decode", "colocated")
    }
    found = []
    if kinds["prefill"] and kinds["decode"]:
        pair = (kinds["prefill"], kinds["decode"])
        found = [Shape(phases=pair, margins=margins) for margins in BALANCES]
    if kinds["colocated"]:
        found.append(Shape(phases=(kinds["colocated"],), margins=(1.0,)))
    return found


def _several_types(
    task: FleetTask, phases: Mapping[str, PhaseRates], best: float, mapped: Mapped
) -> list[Candidate]:
    """The best fleets of more than one type, with all seeds.

    Args:
        best: requests/s that one type serves.
    """
    floor = HOPELESS * (best if task.rate is None else min(best, task.rate))
    targets = [(shape, task.rate) for shape in shapes(task, phases)]
    seen: dict[Placement, Candidate] = {}
    for _ in range(1 if task.rate is None else ROUNDS):
        asked = [_Wanted(task, shape, rate, best or task.rate or 1.0) for shape, rate in targets]
        packed = list(mapped(_found, asked))
        fleets = [
            (shape, rate, shape.placement(packing))
            for (shape, _), (rate, packing) in zip(targets, packed, strict=True)
            if packing is not None
        ]
        new = {
            placement: Candidate(placement=placement, expected=rate, bound=shape.bound(placement, task))
            for shape, rate, placement in fleets
            if len(placement.hardware) > 1 and placement not in seen
        }
        seen |= zip(new, simulated(task, list(new.values()), mapped, floor=floor), strict=True)
        # What served more than was wanted, or less, is packed anew for as much less or more.
        targets = [
            (shape, rate * task.rate / seen[placement].rate)
            for shape, rate, placement in fleets
            if task.rate is not None and placement in new and seen[placement].rate > 0.0
        ]
    order = _ranked(task, [candidate for candidate in seen.values() if candidate.rate > 0.0])
    return [candidate for candidate in simulated(task, order[:FINALISTS], mapped) if candidate.rate > 0.0]


def _ranked(task: FleetTask, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first. Goodputs within TIE of each other are equal: then less of the budget, fewer GPUs and no
    hand-off go first."""
    if not candidates:
        return []
    wanted = task.rate if task.rate is not None else (1.0 - TIE) * max(c.rate for c in candidates)

    def key(candidate: Candidate) -> tuple[float, ...]:
        placement = candidate.placement
        if candidate.rate < wanted:
            return (1.0, -candidate.rate, 0.0, 0.0, 0.0)
        takes, kind = task.takes(placement), KINDS.index(placement.kind)
        return (0.0, takes, placement.gpus, kind, -candidate.rate)

    return sorted(candidates, key=key)
