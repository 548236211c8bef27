"""The search for a placement: workers are judged alone, pools are matched by their rates, and the few best
combinations are simulated jointly.

Within a budget of GPUs the placement with the highest goodput is chosen, or, for a wanted rate, the one with
the fewest GPUs that serves it. Ties go to fewer GPUs, then to no hand-off. Deterministic. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...proto.errors import ConfigError
from .goodput import ROUTER, Answer, Definition, Mapped, Objectives, Question, answer_all
from .machines import Machine, feasible_parallels
from .phase_rates import PhaseRates, measure_phases
from .placement import KINDS, Kind, Placement, Pool, build_part
from .sim_workload import Workload

JOINT = {"disaggregated": 5, "colocated": 2, "mixed": 2}
"""Placements of each kind that are simulated jointly."""
FINAL = 0.8
"""All seeds are simulated of the best of each kind, unless it is below this share of the best of all; of the
best colocated one always."""
TIE = 0.02
"""Goodputs this near, relatively, are equal."""
HOPELESS = 0.5
"""Placements that serve less than this share of what the best colocated workers are expected to, or of the
wanted rate, are dropped."""
LEAST_RATE, MOST_RATE = 1e-3, 1e6
"""Requests/s that may be asked for."""
COARSE, FINE = 0.08, 0.03
"""Tolerances of the joint search and of the final estimate."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for, of whatever hardware."""

    workload: Workload
    objectives: Objectives
    rate: float | None = None
    """Requests/s that are to be served with as little as possible; None: as many as possible."""
    max_pp: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    policy: str = ROUTER.policy
    """Of the router, in every joint simulation."""

    def __post_init__(self) -> None:
        if self.rate is not None and not LEAST_RATE <= self.rate <= MOST_RATE:
            raise ConfigError(
                f"rate = {self.rate:g} requests/s is out of range; use {LEAST_RATE:g} to {MOST_RATE:,.0f}"
            )
        if self.max_pp < 1:
            raise ConfigError(f"max_pp = {self.max_pp}; a worker has at least 1 pipeline stage")
        if not self.seeds:
            raise ConfigError("seeds is empty; simulate at least one")

    @property
    def machines(self) -> Mapping[str, Machine]:
        """By the names that pools have for their hardware."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Task(Asked):
    """What is to be planned on GPUs of one type."""

    machine: Machine
    gpus: int
    """The most that may be used."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"gpus = {self.gpus}; plan for at least 1 GPU")
        super().__post_init__()

    @property
    def machines(self) -> Mapping[str, Machine]:
        """The one."""
        return {"": self.machine}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement and what is known of it."""

    placement: Placement
    expected: float
    """Requests/s by the rates of its workers alone, or those that a fleet was packed for."""
    bound: float = math.inf
    """Requests/s that it cannot exceed."""
    answer: Answer | None = None

    @property
    def rate(self) -> float:
        """Simulated goodput, else the expected one."""
        return self.expected if self.answer is None else self.answer.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    candidates: tuple[Candidate, ...]
    """Best first, those that all seeds were simulated of; empty when nothing serves any rate."""
    others: tuple[Candidate, ...] = ()
    """Simulated jointly, but with one seed and coarsely."""
    phases: Mapping[str, PhaseRates]
    """By the names that pools have for their hardware."""
    sentence: str = ""
    """What an algorithm has to say of its choice."""
    reached: bool = True
    """False: nothing within GPUs and budget serves the wanted rate; the candidates serve most."""
    alone: Mapping[str, Candidate | None] = field(default_factory=dict)
    """Of several types: the best of each by itself; None: it serves nothing within the objectives."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Of several types: those that cannot be had or used alone, and why."""

    @property
    def known(self) -> tuple[Candidate, ...]:
        """All that were simulated jointly."""
        return (*self.candidates, *self.others)


def search(task: Task, mapped: Mapped = map) -> Found:
    """
    Raises:
        ConfigError: the model does not fit the GPUs.
    """
    parallels = feasible_parallels(task.machine, task.gpus, task.max_pp)
    phases = measure_phases(task.machine, task.workload, task.objectives, parallels, mapped)
    return best_of(task, phases, mapped)


def best_of(task: Task, phases: PhaseRates, mapped: Mapped = map) -> Found:
    """The best placements of workers whose rates are known."""
    pool = list(proposals(phases, task.gpus, task.rate))
    found = _judge(task, phases, pool, mapped)
    if task.rate is None or any(candidate.rate >= task.rate for candidate in found.candidates):
        return found
    return replace(_judge(task, phases, list(proposals(phases, task.gpus, None)), mapped), reached=False)


def _judge(task: Task, phases: PhaseRates, pool: Sequence[Candidate], mapped: Mapped) -> Found:
    order = _order(task.rate)
    chosen: list[Candidate] = []
    for kind, count in JOINT.items():
        chosen += sorted((c for c in pool if c.placement.kind == kind), key=order)[:count]
    colocated = max((c.expected for c in chosen if c.placement.kind == "colocated"), default=0.0)
    floor = HOPELESS * min(colocated, math.inf if task.rate is None else task.rate)
    joint = sorted(simulated(task, chosen, mapped, floor=floor), key=order)
    joint = [candidate for candidate in joint if candidate.rate > 0.0]
    if not joint:
        return Found(candidates=(), phases={"": phases})
    best = {kind: next((c for c in joint if c.placement.kind == kind), None) for kind in JOINT}
    finalists = [
        c for kind, c in best.items() if c and (kind == "colocated" or c.rate >= FINAL * joint[0].rate)
    ]
    final = simulated(task, finalists, mapped)
    others = tuple(candidate for candidate in joint if candidate not in finalists)
    return Found(candidates=tuple(ranked(final, task.rate)), others=others, phases={"": phases})


def proposals(phases: PhaseRates, gpus: int, rate: float | None) -> Iterable[Candidate]:
    """Every combination of pools within the budget whose rates match: no pool has a worker more than the
    slowest one needs."""
    for pools, expected in _pools(phases, gpus, rate):
        placement = Placement(pools)
        yield Candidate(placement=placement, expected=expected, bound=phases.bound(placement))


def _pools(phases: PhaseRates, gpus: int, rate: float | None) -> Iterable[tuple[tuple[Pool, ...], float]]:
    colocated = phases.of_role("colocated")
    for kind, one in colocated.items():
        for count in _counts(one, gpus // kind.parallel.gpus, rate):
            yield (Pool(kind, count),), count * one
    best = max(colocated, key=lambda kind: colocated[kind] / kind.parallel.gpus, default=None)
    for prefill, prefill_rate in phases.of_role("prefill").items():
        for decode, decode_rate in phases.of_role("decode").items():
            for pair, expected in _pairs((prefill, prefill_rate), (decode, decode_rate), gpus, rate):
                yield pair, expected
                if best is None or (rate is not None and expected >= rate):
                    continue
                rest = (gpus - sum(pool.gpus for pool in pair)) // best.parallel.gpus
                for count in _counts(colocated[best], rest, None if rate is None else rate - expected):
                    yield (*pair, Pool(best, count)), expected + count * colocated[best]


def _pairs(
    first: tuple[Kind, float], second: tuple[Kind, float], gpus: int, rate: float | None
) -> Iterable[tuple[tuple[Pool, Pool], float]]:
    """Of one kind of prefill and one kind of decode worker, each with its rate, with every number of the
    first."""
    (prefill, prefill_rate), (decode, decode_rate) = first, second
    for count in range(1, (gpus - decode.parallel.gpus) // prefill.parallel.gpus + 1):
        room = (gpus - count * prefill.parallel.gpus) // decode.parallel.gpus
        needed = math.ceil(count * prefill_rate / decode_rate - TIE)
        # One more or less than the rates of single workers ask for: pools share their load better than one.
        for decodes in sorted({max(1, min(room, needed + more)) for more in (-1, 0, 1)}):
            expected = min(count * prefill_rate, decodes * decode_rate)
            if rate is None or 0.7 * rate <= expected <= 3.0 * rate + prefill_rate:
                yield (Pool(prefill, count), Pool(decode, decodes)), expected


def _counts(one: float, most: int, rate: float | None) -> list[int]:
    """Numbers of workers worth trying: all there is room for, or about as many as the rate needs."""
    if most < 1 or rate is None:
        return [most] if most else []
    needed = math.ceil(rate / one)
    return sorted({max(1, min(most, needed + more)) for more in (-1, 0, 1)})


def _order(rate: float | None) -> Callable[[Candidate], tuple[float, ...]]:
    """Best first, before the tie rule: the highest rate, or enough of it with the fewest GPUs."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        gpus = candidate.placement.gpus
        if rate is None:
            return (-candidate.rate, gpus)
        return (candidate.rate < rate, gpus if candidate.rate >= rate else 0, -candidate.rate)

    return key


def ranked(candidates: Iterable[Candidate], rate: float | None) -> list[Candidate]:
    """Best first; within TIE of the best, fewer GPUs and no hand-off go first."""
    ordered = sorted(candidates, key=_order(rate))
    top = ordered[0]
    if rate is not None and top.rate >= rate:
        near = [c for c in ordered if c.rate >= rate and c.placement.gpus == top.placement.gpus]
    else:
        near = [c for c in ordered if c.rate >= (1.0 - TIE) * top.rate]
    near.sort(key=lambda c: (c.placement.gpus, KINDS.index(c.placement.kind), -c.rate))
    return near + [candidate for candidate in ordered if candidate not in near]


def simulated(
    asked: Asked,
    candidates: Sequence[Candidate],
    mapped: Mapped,
    floor: float | None = None,
) -> list[Candidate]:
    """The candidates with their goodputs: with a floor, coarsely and of one seed; else of all seeds and by
    both definitions."""
    fine = floor is None
    parts = [build_part(candidate.placement, asked.machines) for candidate in candidates]
    questions = [
        Question(
            deployment=part,
            workload=asked.workload,
            objectives=asked.objectives,
            guess=candidate.rate / times,
            ceiling=max(candidate.bound, candidate.rate) / times,
            floor=(floor or 0.0) / times,
            seeds=asked.seeds if fine else asked.seeds[:1],
            tolerance=FINE if fine else COARSE,
            definitions=(Definition.BOTH, Definition.EACH) if fine else (Definition.BOTH,),
            policy=asked.policy,
        )
        for candidate, (part, times) in zip(candidates, parts, strict=True)
    ]
    return [
        replace(candidate, answer=reply.times(times))
        for candidate, (_, times), reply in zip(candidates, parts, answer_all(questions, mapped), strict=True)
    ]
