"""What one worker serves: of each phase alone and of both, by simulation, unless a bound says it beforehand.

The other phase costs nothing while one is judged alone. Knows no pools.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from ...decode_workers.config import DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...router.step_time import Line, StepShape
from ..load.search import TARGET
from .bounds import Floor, decode_rate, prefill_rate, tpot_floor, ttft_floor
from .deployment import ROLES, Deployment, WorkerSpec
from .goodput import Answer, Mapped, Objectives, Question, answer_all
from .machines import Limits, Machine, Parallel
from .placement import Kind, Placement, Pool, build, colocated_budgets, worker_spec
from .sim_request import SimRequest
from .sim_workload import Workload, usual_lengths
from .topology import free_topology

WORTH = 0.4
"""A worker whose bound for each GPU is below this share of its role's best bound is not simulated."""
TOLERANCE = 0.12
"""Of a worker's rate, which only says what is simulated together."""
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """A workload of which only the first tokens are asked for."""

    whole: Workload

    @property
    def shares(self) -> bool:
        """See the whole."""
        return self.whole.shares

    @property
    def least(self) -> int:
        """See the whole."""
        return self.whole.least

    def requests(self, rate: float, seed: int, count: int) -> list[SimRequest]:
        """Of the whole, each ending with its first token."""
        requests = self.whole.requests(rate, seed, count)
        for request in requests:
            request.output_tokens = 1
        return requests

    def lengths(self, seed: int, count: int) -> list[tuple[int, int]]:
        """One token each."""
        return [(prompt, 1) for prompt, _ in self.whole.lengths(seed, count)]

    def most(self, count: int) -> int:
        """See the whole."""
        return self.whole.most(count)


class FreeStepTime:
    """Steps that take a microsecond: of a phase that is not judged."""

    stages = 1

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        return (1e-6,)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return 1e-6

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime."""
        return Line(1e-6, 0.0, math.inf)


@dataclass(slots=True, kw_only=True)
class PhaseRates:
    """Of all kinds of workers of one machine."""

    ttft_floors: dict[Parallel, Floor] = field(default_factory=dict)
    """Empty where prompts share blocks: a cached prompt has no floor."""
    tpot_floors: dict[Parallel, Floor] = field(default_factory=dict)
    bounds: dict[Kind, float] = field(default_factory=dict)
    """Requests/s of one worker that cannot be exceeded in the long run."""
    rates: dict[Kind, float] = field(default_factory=dict)
    """Goodput of one worker; kinds that are infeasible or not worth a simulation are absent."""

    def of_role(self, role: str) -> dict[Kind, float]:
        """Simulated kinds of a role that serve anything."""
        return {kind: rate for kind, rate in self.rates.items() if kind.role == role and rate > 0.0}

    def bound(self, placement: Placement) -> float:
        """Requests/s that the placement cannot exceed."""
        by_role = {
            pool.worker.role: pool.count * self.bounds.get(pool.worker, math.inf) for pool in placement.pools
        }
        pair = min(by_role.get("prefill", 0.0), by_role.get("decode", 0.0))
        return pair + by_role.get("colocated", 0.0)


def bound_phases(
    machine: Machine, workload: Workload, objectives: Objectives, parallels: Sequence[Parallel]
) -> PhaseRates:
    """Floors and bounds of all kinds; nothing is simulated."""
    found, chunk = PhaseRates(), machine.limits.chunk_budget
    lengths = usual_lengths(workload)
    for parallel in parallels:
        step_time = machine.step_time(parallel)
        if not workload.shares:
            found.ttft_floors[parallel] = ttft_floor(step_time, lengths, chunk, objectives.ttft_ms)
        found.tpot_floors[parallel] = tpot_floor(step_time, lengths, objectives.tpot_ms)
        prefill = math.inf if workload.shares else prefill_rate(step_time, lengths, chunk)
        decode = decode_rate(step_time, lengths, objectives.tpot_ms, machine.kv_tokens(parallel))
        for kind in _kinds(machine, parallel, objectives.tpot_ms):
            bound = {"prefill": prefill, "decode": decode}.get(kind.role, min(prefill, decode))
            found.bounds[kind] = bound if _feasible(found, kind) else 0.0
    return found


def measure_phases(
    machine: Machine,
    workload: Workload,
    objectives: Objectives,
    parallels: Sequence[Parallel],
    mapped: Mapped = map,
    *,
    roles: Collection[str] = ROLES,
) -> PhaseRates:
    """Floors and bounds of all kinds, and goodputs of those of the roles that are worth it."""
    found = bound_phases(machine, workload, objectives, parallels)
    worthy = [kind for kind in _worthy(found.bounds) if kind.role in roles]
    questions = [_question(machine, workload, objectives, kind, found.bounds[kind]) for kind in worthy]
    answers: list[Answer] = answer_all(questions, mapped)
    found.rates = {kind: answer.rate for kind, answer in zip(worthy, answers, strict=True)}
    return found


def _kinds(machine: Machine, parallel: Parallel, tpot_ms: float) -> list[Kind]:
    budgets = colocated_budgets(machine, parallel, tpot_ms)
    return [
        Kind("prefill", parallel),
        Kind("decode", parallel),
        *(Kind("colocated", parallel, budget) for budget in budgets),
    ]


def _feasible(found: PhaseRates, kind: Kind) -> bool:
    ttft = found.ttft_floors.get(kind.parallel)
    late = ttft is not None and ttft.feasible < TARGET and kind.role != "decode"
    slow = found.tpot_floors[kind.parallel].feasible < TARGET and kind.role != "prefill"
    return not late and not slow


def _worthy(bounds: dict[Kind, float]) -> list[Kind]:
    """Kinds whose bound for each GPU is not far below the best of their role."""
    best: dict[str, float] = {}
    for kind, bound in bounds.items():
        best[kind.role] = max(best.get(kind.role, 0.0), bound / kind.parallel.gpus)
    return [
        kind
        for kind, bound in bounds.items()
        if bound > 0.0 and (math.isinf(bound) or bound / kind.parallel.gpus >= WORTH * best[kind.role])
    ]


def alone(workload: Workload, objectives: Objectives, role: str) -> tuple[Workload, Objectives]:
    """What a phase is asked for by itself."""
    if role == "prefill":
        return FirstTokens(workload), replace(objectives, tpot_ms=math.inf)
    return workload, replace(objectives, ttft_ms=math.inf)


def _question(
    machine: Machine, workload: Workload, objectives: Objectives, kind: Kind, bound: float
) -> Question:
    if kind.role == "colocated":
        deployment = build(Placement((Pool(kind, 1),)), {"": machine})
    else:
        own, limits = worker_spec(kind, machine), machine.limits
        workers = {role: _free(role, own.num_blocks, limits) for role in ("prefill", "decode")}
        workers[kind.role] = own
        workload, objectives = alone(workload, objectives, kind.role)
        deployment = Deployment(
            workers=tuple(workers.values()),
            block_size=limits.block_size,
            topology=free_topology([0], [1]),
            context_length=limits.context_length,
            first_token_s=machine.first_token_s,
        )
    return Question(
        deployment=deployment,
        workload=workload,
        objectives=objectives,
        guess=0.6 * bound if math.isfinite(bound) else 1.0,
        ceiling=bound,
        tolerance=TOLERANCE,
    )


def _free(role: str, blocks: int, limits: Limits) -> WorkerSpec:
    scheduler: PrefillSchedulerConfig | DecodeSchedulerConfig
    if role == "prefill":
        scheduler = PrefillSchedulerConfig(
            chunk_budget=_NO_LIMIT, saturation_tokens=_NO_LIMIT, max_waiting=_NO_LIMIT
        )
    else:
        scheduler = DecodeSchedulerConfig(max_running=limits.max_running)
    return WorkerSpec(role=role, step_time=FreeStepTime(), num_blocks=blocks, scheduler=scheduler)
