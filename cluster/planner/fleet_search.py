"""The search for a fleet: the best placement on each type of GPU alone, and fleets of several types packed
as Mélange does, once for each phase, and simulated jointly.

Within a budget the fleet with the highest goodput is chosen, or, for a wanted rate, the one that takes least
of it. Deterministic. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...proto.errors import ConfigError
from .bin_packing import Bin, Packing, pack
from .fleet import Budget, Fleet, FleetPool, GpuType, build_fleet
from .fleet_loads import LoadedKind, load_kinds, rate_bound
from .goodput import ROUTER, Answer, Definition, Objectives, Question, answer_all, largest_rate
from .machines import feasible_parallels
from .phase_rates import PhaseRates
from .placement import Pool
from .search import COARSE, FINE, HOPELESS, TIE, Task, search
from .sim_workload import Workload

BALANCES = ((1.0, 1.0), (1.25, 1.0), (1.0, 1.25))
"""Margins of prefill and of decode that are tried: a pool shares its load better or worse than one worker."""
ROUNDS = 3
"""How often a packing for a wanted rate is corrected by what its simulation served."""
GAP, STEP = 0.01, 0.02
"""How far a packing may be from the cheapest, and the rate that it is packed for from the most."""
FINALISTS = 2
"""Fleets of several types that all seeds are simulated of."""
_KINDS = ("colocated", "disaggregated", "mixed")


@dataclass(frozen=True, kw_only=True)
class FleetTask:
    """What is to be planned."""

    types: tuple[GpuType, ...]
    workload: Workload
    objectives: Objectives
    budget: Budget
    rate: float | None = None
    """Requests/s that are to be served with the least of the budget; None: as many as it serves."""
    max_pp: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    policy: str = ROUTER.policy

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("hardware is empty; name at least one type of GPU")
        names = [gpu.name for gpu in self.types]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"hardware {name} is named {names.count(name)} times; name each type once")
        for gpu in self.types:
            gpu.each(self.budget.measure)
        if self.rate is not None and not 0.0 < self.rate < math.inf:
            raise ConfigError(f"rate = {self.rate} requests/s; use a number above 0")
        if self.max_pp < 1:
            raise ConfigError(f"max_pp = {self.max_pp}; a worker has at least 1 pipeline stage")

    @cached_property
    def by_name(self) -> Mapping[str, GpuType]:
        """The types."""
        return {gpu.name: gpu for gpu in self.types}

    def affordable(self, gpu: GpuType) -> int:
        """GPUs of the type alone."""
        most = self.budget.most / gpu.each(self.budget.measure)
        return gpu.available if most >= gpu.available else math.floor(most + 1e-9)

    def within(self, takes: float) -> bool:
        """Whether the budget has so much."""
        return takes <= self.budget.most * (1.0 + 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCandidate:
    """A fleet and what is known of it."""

    fleet: Fleet
    answer: Answer
    takes: float
    """Of the budget."""

    @property
    def rate(self) -> float:
        """Simulated goodput."""
        return self.answer.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFound:
    """What a search came to."""

    candidates: tuple[FleetCandidate, ...]
    """Best first, simulated with all seeds; empty when nothing serves any rate."""
    alone: Mapping[str, FleetCandidate | None]
    """The best of each type by itself; None: it serves nothing within the objectives."""
    left_out: Mapping[str, str]
    """Types that cannot be had or used alone, and why."""
    phases: Mapping[str, PhaseRates]
    reached: bool = True
    """False: nothing within budget and numbers serves the wanted rate; the candidates serve most."""


def fleet_search(task: FleetTask, mapped: Callable[..., object] = map) -> FleetFound:
    """
    Raises:
        ConfigError: the model fits no type, or the budget no worker.
    """
    phases: dict[str, PhaseRates] = {}
    alone: dict[str, FleetCandidate | None] = {}
    left_out: dict[str, str] = {}
    homogeneous: list[FleetCandidate] = []
    _check_budget(task)
    for gpu in task.types:
        try:
            found = search(_alone(task, gpu), mapped)
        except ConfigError as exc:
            left_out[gpu.name] = exc.message
            continue
        phases[gpu.name] = found.phases
        own = [
            FleetCandidate(fleet=fleet, answer=c.answer, takes=fleet.takes(task.budget.measure))
            for c in found.candidates
            for fleet in [Fleet.of(c.placement, gpu)]
            if c.answer is not None
        ]
        homogeneous += own
        alone[gpu.name] = own[0] if own else None
    if not phases:
        raise ConfigError("the model fits no type: " + "; ".join(left_out.values()))
    candidates = homogeneous
    if len(phases) > 1:
        candidates = candidates + _several_types(task, phases, homogeneous, mapped)
        if task.rate is not None and max((c.rate for c in candidates), default=0.0) < task.rate:
            most = replace(task, rate=None)
            candidates = candidates + _several_types(most, phases, homogeneous, mapped)
    ranked = _ranked(task, candidates)
    reached = task.rate is None or bool(ranked and ranked[0].rate >= task.rate)
    return FleetFound(
        candidates=tuple(ranked), alone=alone, left_out=left_out, phases=phases, reached=reached
    )


def _alone(task: FleetTask, gpu: GpuType) -> Task:
    gpus = task.affordable(gpu)
    if gpus < 1:
        each = task.budget.text(gpu.each(task.budget.measure))
        raise ConfigError(f"the budget has no GPU of {gpu.name}, which takes {each}")
    return Task(
        machine=gpu.machine,
        workload=task.workload,
        objectives=task.objectives,
        gpus=gpus,
        rate=task.rate,
        max_pp=task.max_pp,
        seeds=task.seeds,
        policy=task.policy,
    )


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
                    gpus=kind.kind.parallel.gpus,
                    cost=kind.kind.parallel.gpus * kind.gpu.each(task.budget.measure),
                    loads=tuple(load * margin * rate for load in kind.loads),
                )
                for kind in kinds
            ]
            for kinds, margin in zip(self.phases, self.margins, strict=True)
        ]
        packing = pack(phases, {gpu.name: gpu.available for gpu in task.types}, gap=GAP)
        return packing if packing is not None and task.within(packing.cost) else None

    def fleet(self, packing: Packing) -> Fleet:
        """What was packed."""
        pools = [
            FleetPool(
                role=kind.kind.role,
                gpu=kind.gpu,
                pool=Pool(count=count, parallel=kind.kind.parallel, budget=kind.kind.budget),
            )
            for kinds, counts in zip(self.phases, packing.counts, strict=True)
            for kind, count in zip(kinds, counts, strict=True)
            if count
        ]
        return Fleet(pools=tuple(pools))

    def bound(self, fleet: Fleet, task: FleetTask) -> float:
        """Requests/s that the fleet cannot exceed."""
        if task.workload.shares:
            return math.inf  # what is cached takes no time
        lengths = task.workload.lengths(0, task.workload.most(task.workload.least))
        counts = {(p.role, p.gpu.name, p.pool.parallel, p.pool.budget): p.pool.count for p in fleet.pools}
        bounds = []
        for kinds in self.phases:
            own = [
                (kind, counts[key])
                for kind in kinds
                if (key := (kind.kind.role, kind.gpu.name, kind.kind.parallel, kind.kind.budget)) in counts
            ]
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
    lengths = task.workload.lengths(0, task.workload.most(task.workload.least))
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
    task: FleetTask,
    phases: Mapping[str, PhaseRates],
    known: Sequence[FleetCandidate],
    mapped: Callable[..., object],
) -> list[FleetCandidate]:
    """The best fleets of more than one type, with all seeds."""
    best = max((candidate.rate for candidate in known), default=0.0)
    floor = HOPELESS * (best if task.rate is None else min(best, task.rate))
    targets = [(shape, task.rate) for shape in shapes(task, phases)]
    seen: dict[str, FleetCandidate] = {}
    bounds: dict[str, float] = {}
    for _ in range(1 if task.rate is None else ROUNDS):
        asked = [_Wanted(task, shape, rate, best or task.rate or 1.0) for shape, rate in targets]
        packed: list[tuple[float, Packing | None]] = list(mapped(_found, asked))  # type: ignore[call-overload]
        fleets = [
            (shape, rate, shape.fleet(packing))
            for (shape, _), (rate, packing) in zip(targets, packed, strict=True)
            if packing is not None
        ]
        new = {
            str(fleet): (fleet, rate, shape.bound(fleet, task))
            for shape, rate, fleet in fleets
            if len(fleet.types) > 1 and str(fleet) not in seen
        }
        bounds |= {name: bound for name, (_, _, bound) in new.items()}
        seen |= zip(new, _simulated(task, list(new.values()), mapped, floor=floor), strict=True)
        # What served more than was wanted, or less, is packed anew for as much less or more.
        targets = [
            (shape, rate * task.rate / seen[str(fleet)].rate)
            for shape, rate, fleet in fleets
            if task.rate is not None and str(fleet) in new and seen[str(fleet)].rate > 0.0
        ]
    order = _ranked(task, [candidate for candidate in seen.values() if candidate.rate > 0.0])
    final = [(c.fleet, c.rate, bounds[str(c.fleet)]) for c in order[:FINALISTS]]
    return [candidate for candidate in _simulated(task, final, mapped) if candidate.rate > 0.0]


def _simulated(
    task: FleetTask,
    fleets: Sequence[tuple[Fleet, float, float]],
    mapped: Callable[..., object],
    floor: float | None = None,
) -> list[FleetCandidate]:
    """Of each (fleet, guess, bound) the goodput: with a floor, coarsely and of one seed; else of all
    seeds and by both definitions."""
    parts = [fleet.part() for fleet, _, _ in fleets]
    questions = [
        Question(
            deployment=build_fleet(part),
            workload=task.workload,
            objectives=task.objectives,
            guess=guess / times,
            ceiling=max(bound, guess) / times,
            floor=(floor or 0.0) / times,
            seeds=task.seeds if floor is None else task.seeds[:1],
            tolerance=FINE if floor is None else COARSE,
            definitions=(Definition.BOTH, Definition.EACH) if floor is None else (Definition.BOTH,),
            policy=task.policy,
        )
        for (part, times), (_, guess, bound) in zip(parts, fleets, strict=True)
    ]
    return [
        FleetCandidate(fleet=fleet, answer=reply.times(times), takes=fleet.takes(task.budget.measure))
        for (fleet, _, _), (_, times), reply in zip(fleets, parts, answer_all(questions, mapped), strict=True)
    ]


def _ranked(task: FleetTask, candidates: Sequence[FleetCandidate]) -> list[FleetCandidate]:
    """Best first. Goodputs within TIE of each other are equal: then less of the budget, fewer GPUs and no
    hand-off go first."""
    if not candidates:
        return []
    wanted = task.rate if task.rate is not None else (1.0 - TIE) * max(c.rate for c in candidates)

    def key(candidate: FleetCandidate) -> tuple[float, ...]:
        fleet = candidate.fleet
        if candidate.rate < wanted:
            return (1.0, -candidate.rate, 0.0, 0.0, 0.0)
        return (0.0, candidate.takes, fleet.gpus, _KINDS.index(fleet.kind), -candidate.rate)

    return sorted(candidates, key=key)
