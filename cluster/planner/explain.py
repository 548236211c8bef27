"""Why a placement is what it is: what makes objectives infeasible, what binds the goodput of the chosen one,
and how it moves with rate and objectives.

What binds is found by relaxing one thing at a time and searching the goodput anew. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...router.step_time import Line, StepShape, StepTime
from ..load.search import TARGET, Goodput, Point, goodput
from .bounds import Floor
from .deployment import Deployment
from .goodput import Mapped, Objectives, Pattern, Question, answer_all, point, run_length, simulate
from .machines import Parallel
from .phase_rates import PhaseRates
from .placement import Kind, Placement, Pool, build, build_part, colocated_budgets
from .search import FINE, Asked, Candidate
from .sim_workload import Workload
from .topology import Topology

RELAXED = 1.25
"""Factor by which a thing is relaxed, memory apart, which doubles, and links, which are free."""
NEAR_FLOOR = 0.75
"""Share of an objective from which on the floor, not the load, is what binds."""
LEAST_GAIN = 0.02
"""Relative; less is within the search's tolerance."""
MOST_GAIN = 1.0
"""Relative; more is not tried."""
LOWEST_RATE = 0.01
"""Requests/s at which requests hardly meet each other."""
RATE_FACTORS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Of the goodput: rates of the attainment curve."""
SLO_FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
"""Of both objectives: points of goodput over SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """What the goodput would be if one thing were better."""

    what: str
    """compute of prefill, compute of decode, memory, link, TTFT objective or TPOT objective."""
    gain: float
    """Relative."""
    at_least: bool = False
    """More was not tried."""

    @property
    def said(self) -> str:
        """The gain, for a sentence."""
        return f"{'≥ ' if self.at_least else ''}{self.gain:+.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What holds the goodput down."""

    what: str
    sentence: str
    relaxations: tuple[Relaxation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Of one placement over rates."""

    points: tuple[Point, ...]
    by_slo: dict[float, Goodput]
    """Goodput when both objectives are so many times as long, judged from the same runs."""


@dataclass(frozen=True)
class FasterStepTime:
    """Another step time whose prompt and decode parts take a share of their time."""

    whole: StepTime
    prefill: float = 1.0
    decode: float = 1.0

    @property
    def stages(self) -> int:
        """See step_time.StepTime."""
        stages: int = self.whole.stages
        return stages

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime. The decode part of a mixed step is what it would be without the prompt."""
        whole = self.whole.stage_s(shape)
        if not shape.decode_batch:
            return tuple(seconds * self.prefill for seconds in whole)
        if not shape.prefill_tokens:
            return tuple(seconds * self.decode for seconds in whole)
        alone = self.whole.stage_s(shape._replace(prefill_tokens=0, prefill_context=0.0))
        return tuple(
            one * self.decode + max(0.0, both - one) * self.prefill
            for both, one in zip(whole, alone, strict=True)
        )

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return sum(self.stage_s(shape))

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime."""
        line = self.whole.decode_line(batch, context)
        return Line(line.intercept_s * self.decode, line.slope_s * self.decode, line.until)


def infeasible(asked: Asked, hardware: str, phases: PhaseRates) -> str:
    """Why no placement on the hardware serves any rate: the floor above its objective, too little room, or
    what lone requests take."""
    reasons = []
    if floors := phases.ttft_floors:
        at, floor = _quickest(floors)
        if floor.feasible < TARGET:
            reasons.append(
                f"a lone prefill of {floor.tokens:,} tokens takes {_ms(floor.quantile_ms)} at best ({at}), "
                f"the objective is {asked.objectives.ttft_ms:g}; of the workload's prompts "
                f"{floor.feasible:.0%} can meet it, {TARGET:.0%} are to"
            )
    at, floor = _quickest(phases.tpot_floors)
    if floor.feasible < TARGET:
        reasons.append(
            f"a lone decode step with a context of {floor.tokens:,} tokens takes {_ms(floor.quantile_ms)} "
            f"at best ({at}), the objective is {asked.objectives.tpot_ms:g}; of the workload's requests "
            f"{floor.feasible:.0%} can meet it, {TARGET:.0%} are to"
        )
    machine = asked.machines[hardware]
    roomiest = max(phases.fitting, key=machine.kv_tokens)
    if phases.fitting[roomiest] < TARGET:
        reasons.append(
            f"of the workload's requests {phases.fitting[roomiest]:.0%} fit the "
            f"{machine.kv_tokens(roomiest):,} tokens of KV of the roomiest worker ({roomiest}), "
            f"{TARGET:.0%} are to"
        )
    return "; ".join(reasons) or _when_alone(asked, hardware, list(phases.tpot_floors))


def _when_alone(asked: Asked, hardware: str, parallels: Sequence[Parallel]) -> str:
    """No floor is above its objective, and yet nothing is served: what the quickest worker gives to requests
    that hardly meet each other."""
    machine, objectives = asked.machines[hardware], asked.objectives
    parallel = max(parallels, key=lambda parallel: (parallel.tp, -parallel.pp))
    budget = max(colocated_budgets(machine, parallel, objectives.tpot_ms))
    placement = Placement((Pool(Kind("colocated", parallel, budget), 1, hardware),))
    count = run_length(asked.workload, objectives, LOWEST_RATE)
    deployment, pattern = build(placement, asked.machines), Pattern(asked.seeds[0], count)
    result = simulate(deployment, asked.workload, objectives, LOWEST_RATE, pattern, policy=asked.policy)
    met = result.attainment(objectives.ttft_ms, objectives.tpot_ms)
    late = float((result.ttft_ms > objectives.ttft_ms).mean())
    slow = float((result.tpot_ms > objectives.tpot_ms).mean())
    unfit = result.rejected + result.truncated
    return (
        f"of requests that hardly meet each other on one worker ({parallel}) only {met:.0%} meet both "
        f"objectives: {late:.0%} miss TTFT, {slow:.0%} miss TPOT, {unfit} of {count} do not fit "
        f"its {machine.kv_tokens(parallel):,} tokens of KV"
    )


def _quickest(floors: dict[Parallel, Floor]) -> tuple[Parallel, Floor]:
    return min(floors.items(), key=lambda item: (item[1].quantile_ms, item[0]))


def binding(asked: Asked, phases: PhaseRates | None, best: Candidate, mapped: Mapped = map) -> Binding:
    """What binds the goodput of the chosen placement; with phases, which are of one type of GPU, it may be a
    floor."""
    gains = relaxations(asked, best, mapped)
    near = None if phases is None else _near_floor(asked.objectives, phases, best.placement, gains)
    return near or strongest(gains)


def relaxations(asked: Asked, candidate: Candidate, mapped: Mapped = map) -> tuple[Relaxation, ...]:
    """What each thing relaxed alone would bring to a simulated candidate."""
    assert candidate.answer is not None  # it was simulated
    deployment, times = build_part(candidate.placement, asked.machines)
    base = next(iter(candidate.answer.estimates.values())).rates[0] / times
    objectives = asked.objectives
    relaxed: dict[str, tuple[Deployment, Objectives]] = {
        "compute of prefill": (_faster(deployment, prefill=1.0 / RELAXED), objectives),
        "compute of decode": (_faster(deployment, decode=1.0 / RELAXED), objectives),
        "memory": (_roomier(deployment), objectives),
        "TTFT objective": (deployment, objectives.scaled(ttft=RELAXED)),
        "TPOT objective": (deployment, objectives.scaled(tpot=RELAXED)),
    }
    if deployment.topology.paths:
        relaxed["link"] = (_unlinked(deployment), objectives)
    ceiling = (1.0 + MOST_GAIN) * base
    questions = [
        Question(
            deployment=changed,
            workload=asked.workload,
            objectives=loosened,
            guess=base,
            ceiling=ceiling,
            count=candidate.answer.count,
            seeds=asked.seeds[:1],
            tolerance=FINE,
            policy=asked.policy,
        )
        for changed, loosened in relaxed.values()
    ]
    return tuple(
        Relaxation(what=what, gain=reply.rate / base - 1.0, at_least=reply.rate >= ceiling)
        for what, reply in zip(relaxed, answer_all(questions, mapped), strict=True)
    )


def _near_floor(
    objectives: Objectives, phases: PhaseRates, placement: Placement, gains: tuple[Relaxation, ...]
) -> Binding | None:
    """The floor of a phase that leaves little of its objective."""
    workers = [pool.worker for pool in placement.pools]
    first = next(worker.parallel for worker in workers if worker.role != "decode")
    second = next(worker.parallel for worker in workers if worker.role != "prefill")
    by_what = {gain.what: gain.gain for gain in gains}
    for name, phase, floor, objective_ms in (
        ("TTFT", "prefill", phases.ttft_floors.get(first), objectives.ttft_ms),
        ("TPOT", "decode step", phases.tpot_floors[second], objectives.tpot_ms),
    ):
        share = 0.0 if floor is None else floor.quantile_ms / objective_ms
        if floor is not None and share >= NEAR_FLOOR and by_what[f"{name} objective"] > LEAST_GAIN:
            return Binding(
                what=f"{name} floor",
                sentence=f"a lone {phase} ({floor.tokens:,} tokens) takes {_ms(floor.quantile_ms)}, "
                f"{share:.0%} of the objective: little is left for waiting",
                relaxations=gains,
            )
    return None


def strongest(gains: tuple[Relaxation, ...]) -> Binding:
    """The resource whose relaxation brings most; an objective where none brings anything."""
    resources = [gain for gain in gains if not gain.what.endswith("objective")]
    top = max(resources, key=lambda gain: gain.gain)
    if top.gain <= LEAST_GAIN:
        top = max(gains, key=lambda gain: gain.gain)
    how = {"memory": "twice the KV memory", "link": "free hand-offs"}.get(top.what)
    how = how or f"{RELAXED - 1.0:.0%} more {top.what}"
    return Binding(what=top.what, sentence=f"{how} would serve {top.said} requests", relaxations=gains)


def _faster(deployment: Deployment, *, prefill: float = 1.0, decode: float = 1.0) -> Deployment:
    known: dict[int, StepTime] = {}
    workers = []
    for spec in deployment.workers:
        step_time = known.setdefault(
            id(spec.step_time), FasterStepTime(spec.step_time, prefill=prefill, decode=decode)
        )
        workers.append(replace(spec, step_time=step_time))
    return replace(deployment, workers=tuple(workers))


def _roomier(deployment: Deployment) -> Deployment:
    workers = tuple(replace(spec, num_blocks=2 * spec.num_blocks) for spec in deployment.workers)
    return replace(deployment, workers=workers)


def _unlinked(deployment: Deployment) -> Deployment:
    free = Topology(bandwidths=(), paths=dict.fromkeys(deployment.topology.paths, ()))
    return replace(deployment, topology=free)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CurveRun:
    deployment: Deployment
    times: int
    """How many of it the placement is."""
    workload: Workload
    objectives: Objectives
    rate: float
    """Of the deployment."""
    pattern: Pattern
    policy: str


def _run_curve(run: _CurveRun) -> list[Point]:
    """The run, as one of the placement, judged by every multiple of the objectives."""
    result = simulate(run.deployment, run.workload, run.objectives, run.rate, run.pattern, policy=run.policy)
    rate = run.rate * run.times
    return [point(rate, result, run.objectives.scaled(factor, factor)) for factor in SLO_FACTORS]


def curves(asked: Asked, candidates: Sequence[Candidate], mapped: Mapped = map) -> list[Curve]:
    """Attainment over rate, and goodput over objectives, of each simulated candidate, at the same rates."""
    top = max(candidate.rate for candidate in candidates)
    runs: list[_CurveRun] = []
    for candidate in candidates:
        assert candidate.answer is not None  # it was simulated
        deployment, times = build_part(candidate.placement, asked.machines)
        pattern = Pattern(asked.seeds[0], candidate.answer.count)
        runs += [
            _CurveRun(
                deployment=deployment,
                times=times,
                workload=asked.workload,
                objectives=asked.objectives,
                rate=factor * top / times,
                pattern=pattern,
                policy=asked.policy,
            )
            for factor in RATE_FACTORS
        ]
    judged = list(mapped(_run_curve, runs))
    found: list[Curve] = []
    for i in range(0, len(judged), len(RATE_FACTORS)):
        columns = list(zip(*judged[i : i + len(RATE_FACTORS)], strict=True))
        by_slo = {factor: goodput(column) for factor, column in zip(SLO_FACTORS, columns, strict=True)}
        found.append(Curve(points=columns[SLO_FACTORS.index(1.0)], by_slo=by_slo))
    return found


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 100.0 else f"{milliseconds:,.0f} ms"
