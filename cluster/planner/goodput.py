"""Goodput of a deployment: the largest rate that a simulation of it serves within both objectives.

Two definitions, both from the literature: 90 % of the requests meet both objectives (DistServe, OSDI 2024),
and the 90th percentile of TTFT and that of TPOT are each inside their objective (its released simulator).
Knows how to search a rate, not where deployments come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from ...proto.errors import ConfigError
from ...router.config import RouterConfig
from ..load.search import TARGET, Point
from .deployment import Deployment, SimulationConfig
from .incidents import Incident
from .records import SimResult
from .sim_workload import Workload, usual_lengths
from .simulator import Simulation

ROUTER = RouterConfig(max_queued_requests=10**9, max_queued_tokens=10**9, local_prefill_tokens=0)
"""Bounds of the queue would hide how late what waits there is."""
MOST_REQUESTS = 2000
MOST_UNBOUNDED = 10_000
"""Requests of a run where nothing bounds the rate: what a shorter one takes in at once might pass for it."""
LIVES = 3.0
"""A run lasts at least so many times as long as a request may, else it measures how a cluster fills up."""
GROWTH = 1.15
"""First step away from a guess; each further one is the last one squared."""
HOPELESS = 1 / 500
"""Share of the first rate below which nothing is tried."""
PUBLISHED_HIGH, PUBLISHED_STEP, PUBLISHED_REQUESTS = 32.0, 0.25, 300
"""Of DistServe's bisection: requests/s a GPU, and how many requests a run has."""

_T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, by degrees of freedom."""


_Asked = TypeVar("_Asked")
_Found = TypeVar("_Found")


class Mapped(Protocol):
    """How questions are answered beside each other: map, or that of an executor."""

    def __call__(self, function: Callable[[_Asked], _Found], asked: Iterable[_Asked], /) -> Iterable[_Found]:
        """In the order of the questions."""
        ...


class Definition(StrEnum):
    """What it means that a rate is served."""

    BOTH = "both objectives"
    """90 % of the requests meet both."""
    EACH = "each percentile"
    """P90 of TTFT and P90 of TPOT are each inside."""


class Pattern(NamedTuple):
    """Which requests of a workload, whatever their rate."""

    seed: int
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What every request is to meet; infinite where a phase is judged alone."""

    ttft_ms: float
    tpot_ms: float

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"slo: {name} = {getattr(self, name):g}; use milliseconds above 0")

    def scaled(self, ttft: float = 1.0, tpot: float = 1.0) -> Objectives:
        """Both times a factor."""
        return Objectives(ttft_ms=self.ttft_ms * ttft, tpot_ms=self.tpot_ms * tpot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A search for one goodput; can be sent to another process."""

    deployment: Deployment
    workload: Workload
    objectives: Objectives
    guess: float
    """Requests/s, the first to try."""
    ceiling: float = math.inf
    """Requests/s that no rate can exceed in the long run: a short run at more would only fill the cluster.
    Where none is known, no rate is tried at which all requests of a run arrive within the life of one, and
    runs become longer until they are long enough for the rate that they show."""
    floor: float = 0.0
    """Requests/s below which nothing is of interest: whoever does not serve so many serves 0."""
    count: int = 0
    """Requests of a run; 0: as many as a run at the guess needs. It stays over all rates, which are then one
    pattern."""
    seeds: tuple[int, ...] = (0,)
    tolerance: float = 0.05
    """Relative width at which a bracket is narrow enough."""
    definitions: tuple[Definition, ...] = (Definition.BOTH,)
    policy: str = ROUTER.policy
    """Of the router: who chooses the workers of a request."""
    incidents: tuple[Incident, ...] = ()
    """Of each run."""

    def __post_init__(self) -> None:
        if not 0.0 < self.guess < math.inf or not self.ceiling > 0.0:
            raise ConfigError(
                f"a goodput is searched from {self.guess} up to {self.ceiling} requests/s; give rates above 0"
            )
        if math.isinf(self.objectives.ttft_ms) and math.isinf(self.objectives.tpot_ms):
            raise ConfigError("a goodput needs an objective that is finite; any rate meets none")
        if not self.seeds or not self.definitions or not self.tolerance > 0.0:
            raise ConfigError("a goodput needs a seed, a definition and a tolerance above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A goodput over seeds, requests/s."""

    rates: tuple[float, ...]
    """By seed."""

    @property
    def mean(self) -> float:
        return sum(self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean, by Student's t; (0, infinite) for one seed."""
        degrees = len(self.rates) - 1
        if not degrees:
            return 0.0, math.inf
        spread = math.sqrt(sum((rate - self.mean) ** 2 for rate in self.rates) / degrees)
        half = (_T95[degrees] if degrees < len(_T95) else 1.96) * spread / math.sqrt(len(self.rates))
        return max(0.0, self.mean - half), self.mean + half


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To a Question."""

    estimates: dict[Definition, Estimate]
    count: int
    """Requests that each run had."""

    @property
    def rate(self) -> float:
        """By the first definition that was asked for."""
        return next(iter(self.estimates.values())).mean

    def times(self, factor: int) -> Answer:
        """Of so many equal deployments."""
        return Answer(
            estimates={
                definition: Estimate(rates=tuple(rate * factor for rate in estimate.rates))
                for definition, estimate in self.estimates.items()
            },
            count=self.count,
        )


def run_length(workload: Workload, objectives: Objectives, rate: float) -> int:
    """Requests that a run at `rate` needs."""
    wanted = math.ceil(LIVES * rate * _life_s(workload, objectives))
    return workload.most(max(workload.least, min(wanted, MOST_REQUESTS)))


def _life_s(workload: Workload, objectives: Objectives) -> float:
    """How long a request may take, by the objectives that are finite."""
    lengths = usual_lengths(workload)
    outputs = sum(output for _, output in lengths) / len(lengths)
    return sum(ms for ms in (objectives.ttft_ms, objectives.tpot_ms * outputs) if math.isfinite(ms)) / 1e3


def simulate(
    deployment: Deployment,
    workload: Workload,
    objectives: Objectives,
    rate: float,
    pattern: Pattern,
    *,
    whole: bool = True,
    incidents: Sequence[Incident] = (),
    policy: str = ROUTER.policy,
) -> SimResult:
    """One run. The policy, which knows only finite objectives, is told an hour for those that are not. One
    that is not `whole` ends where no definition can be met any more."""
    config = SimulationConfig(
        router=replace(ROUTER, policy=policy),
        ttft_ms=min(objectives.ttft_ms, 3.6e6),
        tpot_ms=min(objectives.tpot_ms, 3.6e6),
        most_missed=None if whole else math.floor((1.0 - TARGET) * pattern.num_requests) + 1,
    )
    return Simulation(deployment, config, workload.requests(rate, *pattern), incidents).run()


def served(result: SimResult, objectives: Objectives, definition: Definition) -> bool:
    """Whether the run was good enough."""
    if definition is Definition.EACH:
        return result.percentiles_inside(objectives.ttft_ms, objectives.tpot_ms, TARGET)
    return result.attainment(objectives.ttft_ms, objectives.tpot_ms) >= TARGET


def answer(question: Question) -> Answer:
    """Searches each seed's goodput by every definition asked for; runs serve all of them."""
    count = question.count or run_length(question.workload, question.objectives, question.guess)
    if math.isfinite(question.ceiling):
        return _answer(question, count)
    life_s = _life_s(question.workload, question.objectives)
    while True:
        found = _answer(replace(question, ceiling=max(question.floor, count / life_s)), count)
        wanted = math.ceil(LIVES * found.rate * life_s)
        longer = question.workload.most(min(wanted, MOST_UNBOUNDED))
        if question.count or longer <= count:
            return found
        count, question = longer, replace(question, guess=found.rate)


def _answer(question: Question, count: int) -> Answer:
    rates: dict[Definition, list[float]] = {definition: [] for definition in question.definitions}
    guess = question.guess
    for seed in question.seeds:
        runs: dict[float, SimResult] = {}
        for definition in question.definitions:
            found = _search(question, Pattern(seed, count), definition, guess, runs)
            rates[definition].append(found)
            guess = found or guess  # the next is near
    estimates = {definition: Estimate(rates=tuple(found)) for definition, found in rates.items()}
    return Answer(estimates=estimates, count=count)


def point(rate: float, result: SimResult, objectives: Objectives) -> Point:
    """The run as a point of an attainment curve."""
    total = len(result.requests)
    met = round(result.attainment(objectives.ttft_ms, objectives.tpot_ms) * total)
    return Point(rate=rate, met=met, total=total)


def _search(
    question: Question, pattern: Pattern, definition: Definition, guess: float, runs: dict[float, SimResult]
) -> float:
    def good(rate: float) -> bool:
        if rate not in runs:
            runs[rate] = simulate(
                question.deployment,
                question.workload,
                question.objectives,
                rate,
                pattern,
                whole=False,
                incidents=question.incidents,
                policy=question.policy,
            )
        return served(runs[rate], question.objectives, definition)

    guess = max(question.floor, min(guess, question.ceiling))
    return largest_rate(good, guess, question.ceiling, question.tolerance, question.floor)


def largest_rate(
    good: Callable[[float], bool], guess: float, ceiling: float, tolerance: float, floor: float = 0.0
) -> float:
    """The largest rate known to be good, within `tolerance` of one that is not; 0 when `floor` is not good or
    nothing near the guess is, `ceiling` when that is good."""
    low, high, rate, growth = 0.0, math.inf, guess, GROWTH
    while high == math.inf or low == 0.0:
        if good(rate):
            low = rate
            if rate >= ceiling:
                return ceiling
        else:
            high = rate
            if rate <= max(floor, guess * HOPELESS):
                return 0.0
        rate = min(low * growth, ceiling) if high == math.inf else max(floor, high / growth)
        growth *= growth
    while high / low > 1.0 + tolerance:
        rate = math.sqrt(low * high)
        if good(rate):
            low = rate
        else:
            high = rate
    return low


def published_goodput(
    deployment: Deployment,
    workload: Workload,
    objectives: Objectives,
    *,
    step: float = PUBLISHED_STEP,
    high: float = PUBLISHED_HIGH,
    gpus: int | None = None,
) -> float:
    """Requests/s a GPU by the bisection of DistServe's released simulator: percentiles, seed 0, 300 requests,
    from 0 to `high` until the bracket is `step` wide.

    Args:
        gpus: that are counted; None: all of the deployment.
    """
    low, pattern = 0.0, Pattern(0, workload.most(PUBLISHED_REQUESTS))
    while high - low > step:
        middle = (low + high) / 2.0
        rate = middle * (gpus or deployment.gpus)
        result = simulate(deployment, workload, objectives, rate, pattern, whole=False)
        if served(result, objectives, Definition.EACH):
            low = middle
        else:
            high = middle
    return low


def answer_all(questions: Sequence[Question], mapped: Mapped = map) -> list[Answer]:
    """In the order of the questions."""
    return list(mapped(answer, questions))
