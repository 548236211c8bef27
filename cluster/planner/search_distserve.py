"""DistServe's two placement algorithms (OSDI 2024, section 4; its released simulator): one for a network as
quick as the links of a node, one that keeps each prefill worker and its decode worker in one node.

Both maximise goodput a GPU by its bisection and replicate what they find; its simplifications are on:
hand-offs take no time, prompts are batched without bound, and decode steps have at most 50,000 tokens of
context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.step_time import StepTime
from .deployment import Deployment, WorkerSpec
from .goodput import PUBLISHED_HIGH, PUBLISHED_STEP, Mapped, Objectives, published_goodput
from .machines import Machine, Parallel, divisors, feasible_parallels
from .phase_rates import FreeStepTime, PhaseRates, alone, measure_phases
from .placement import Kind, Placement, Pool
from .search import Candidate, Found, Task, best_of, ranked, simulated
from .sim_workload import Workload
from .topology import free_topology

MOST_STEP_CONTEXT = 50_000
PLANNED_STEPS = 256
"""Into which a plan's bisections divide twice the bound of what they look at: the published ones, in steps of
0.25 requests/s a GPU, would not tell models apart that serve little."""
_UNBOUNDED = 2**31 - 1
_BLOCK_SIZE, _BLOCKS = 64, 16_384
"""A million tokens: the simplification that memory has no end, which 300 requests do not reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What an algorithm chose, to be replicated."""

    prefill: Parallel
    decode: Parallel
    prefill_rate: float
    """Requests/s of one worker; of the second algorithm, of a pair."""
    decode_rate: float
    paired: bool
    """Whether there are as many decode workers as prefill workers."""

    def placement(self, prefills: int, decodes: int) -> Placement:
        pools = Pool(Kind("prefill", self.prefill), prefills), Pool(Kind("decode", self.decode), decodes)
        return Placement(pools)

    def rate(self, placement: Placement) -> float:
        """Requests/s of the placement by its workers alone."""
        each = {"prefill": self.prefill_rate, "decode": self.decode_rate}
        return min(pool.count * each[pool.worker.role] for pool in placement.pools)

    def serving(self, rate: float) -> Placement:
        """As many workers as the rate needs."""
        return self.placement(math.ceil(rate / self.prefill_rate), math.ceil(rate / self.decode_rate))

    def filling(self, gpus: int) -> Placement | None:
        """As many workers as serve most within so many GPUs; None: not one of each."""
        one, other = self.prefill.gpus, self.decode.gpus
        found: list[Placement] = []
        for prefills in range(1, (gpus - other) // one + 1):
            room = (gpus - prefills * one) // other
            needed = prefills if self.paired else math.ceil(prefills * self.prefill_rate / self.decode_rate)
            if needed <= room or not self.paired:
                found.append(self.placement(prefills, min(needed, room)))
        return max(found, key=lambda placement: (self.rate(placement), -placement.gpus), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTask:
    """What both algorithms are given."""

    machine: Machine
    workload: Workload
    objectives: Objectives
    nodes: int
    gpus_per_node: int
    max_pp: int | None = None
    """Most pipeline stages of a worker; None: as many as there are GPUs."""
    phases: PhaseRates | None = None
    """Whose bounds a bisection starts from; None: the published ones."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; use at least 1")
        if self.workload.shares:
            raise ConfigError(
                "prompts of the workload share blocks, which DistServe's algorithms know nothing of; "
                "use --algorithm search, or a workload without"
            )

    def parallels(self) -> list[Parallel]:
        """
        Raises:
            ConfigError: none fits.
        """
        gpus = self.nodes * self.gpus_per_node
        return feasible_parallels(self.machine, gpus, gpus if self.max_pp is None else self.max_pp)


class _Bisection(NamedTuple):
    """One goodput; can be sent to another process."""

    workers: tuple[Kind, ...]
    """One of each; the other phase is free, if it is not among them."""
    deployment: Deployment
    workload: Workload
    objectives: Objectives
    gpus: int
    step: float
    high: float


def _bisection(
    task: PublishedTask, workers: tuple[Kind, ...], workload: Workload, objectives: Objectives
) -> _Bisection:
    specs = {role: simplified_worker(role, FreeStepTime()) for role in ("prefill", "decode")}
    for role, parallel, _ in workers:
        specs[role] = simplified_worker(role, task.machine.step_time(parallel), parallel.gpus)
    gpus = sum(worker.parallel.gpus for worker in workers)
    bound = math.inf if task.phases is None else min(task.phases.bounds[worker] for worker in workers)
    step, high = PUBLISHED_STEP, PUBLISHED_HIGH
    if 0.0 < bound < math.inf:
        high = 2.0 * bound / gpus
        step = high / PLANNED_STEPS
    deployment = simplified_deployment(*specs.values())
    return _Bisection(workers, deployment, workload, objectives, gpus, step, high)


def _bisect(bisection: _Bisection) -> float:
    _, deployment, workload, objectives, gpus, step, high = bisection
    return published_goodput(deployment, workload, objectives, step=step, high=high, gpus=gpus)


def _best(
    task: PublishedTask,
    choices: Iterable[tuple[Kind, ...]],
    workload: Workload,
    objectives: Objectives,
    mapped: Mapped,
) -> tuple[tuple[Kind, ...], float] | None:
    """(the workers with the most requests a GPU, their requests/s); ties go to fewer GPUs, then to the first.
    None: none serves anything."""
    bisections = [_bisection(task, workers, workload, objectives) for workers in choices]
    found = zip(mapped(_bisect, bisections), bisections, strict=True)
    rate, best = max(found, key=lambda each: (each[0], -each[1].gpus), default=(0.0, None))
    return None if best is None or rate <= 0.0 else (best.workers, rate * best.gpus)


def high_affinity(task: PublishedTask, mapped: Mapped = map) -> Published | None:
    """Algorithm 1: each phase by itself over all parallelisms of the cluster, then as many workers of each as
    the rate needs. None: a phase serves nothing."""
    parallels = task.parallels()
    # Each leaves room for a worker of the other phase.
    most = task.nodes * task.gpus_per_node - min(parallel.gpus for parallel in parallels)
    found = []
    for role in ("prefill", "decode"):
        choices = [(Kind(role, parallel),) for parallel in parallels if parallel.gpus <= most]
        best = _best(task, choices, *alone(task.workload, task.objectives, role), mapped)
        if best is None:
            return None
        found.append(best)
    ((prefill,), prefill_rate), ((decode,), decode_rate) = found
    return Published(
        prefill=prefill.parallel,
        decode=decode.parallel,
        prefill_rate=prefill_rate,
        decode_rate=decode_rate,
        paired=False,
    )


def low_affinity(task: PublishedTask, mapped: Mapped = map) -> Published | None:
    """Algorithm 2: pairs whose equal pipeline stages share a node, simulated jointly. None: no pair serves
    anything."""
    best = _best(task, dict.fromkeys(_pairs(task)), task.workload, task.objectives, mapped)
    if best is None:
        return None
    (prefill, decode), rate = best
    return Published(
        prefill=prefill.parallel, decode=decode.parallel, prefill_rate=rate, decode_rate=rate, paired=True
    )


def _pairs(task: PublishedTask) -> Iterator[tuple[Kind, Kind]]:
    """Of each number of stages over nodes: the parallelisms of a stage of both phases that fit one node."""
    whole = sorted(task.parallels())
    for across in divisors(task.machine.num_layers, task.nodes):
        stages = [p for p in whole if p.pp % across == 0 and p.gpus // across < task.gpus_per_node]
        for prefill in stages:
            for decode in stages:
                if (prefill.gpus + decode.gpus) // across <= task.gpus_per_node:
                    yield Kind("prefill", prefill), Kind("decode", decode)


ALGORITHMS = {"distserve-high": high_affinity, "distserve-low": low_affinity}


def search_published(task: Task, algorithm: str, mapped: Mapped = map) -> Found:
    """What an algorithm of ALGORITHMS chooses, judged as search() judges, without its simplifications, beside
    the best colocated workers: the algorithms compare separate pools only, and these need not be the best.

    Raises:
        ConfigError: the model does not fit the GPUs, or prompts share blocks.
    """
    per_node = min(task.gpus, task.machine.hardware.gpus_per_node)
    asked = PublishedTask(
        machine=task.machine,
        workload=task.workload,
        objectives=task.objectives,
        nodes=task.gpus // per_node,
        gpus_per_node=per_node,
        max_pp=task.max_pp,
    )
    phases = measure_phases(
        task.machine, task.workload, task.objectives, asked.parallels(), mapped, roles=("colocated",)
    )
    asked = replace(asked, phases=phases)
    chosen, said = _chosen(task, algorithm, asked, phases, mapped)
    candidates = simulated(task, chosen, mapped)
    if chosen and candidates[0].rate <= 0.0:
        candidates, said = [], f"{said}; without them it serves none"
    beside = best_of(task, phases, mapped).candidates[:1]
    if not candidates and not beside:
        return Found(candidates=(), phases={"": phases}, sentence=said)
    best = ranked([*candidates, *beside], task.rate)
    if best[0] not in candidates:
        said += "; colocated workers serve no less, and are planned instead"
    return Found(
        candidates=tuple(best),
        phases={"": phases},
        sentence=said,
        reached=task.rate is None or best[0].rate >= task.rate,
    )


def _chosen(
    task: Task, algorithm: str, asked: PublishedTask, phases: PhaseRates, mapped: Mapped
) -> tuple[list[Candidate], str]:
    """(the algorithm's choice, if it has one, replicated; what is said of it)."""
    found = ALGORITHMS[algorithm](asked, mapped)
    if found is None:
        return [], f"{algorithm} finds nothing that serves any rate"
    placement = None if task.rate is None else found.serving(task.rate)
    if placement is None or placement.gpus > task.gpus:
        placement = found.filling(task.gpus)
    if placement is None:
        return [], f"a pair that {algorithm} chose does not fit {task.gpus} GPUs"
    expected = found.rate(placement)
    said = f"{algorithm} chose {placement} for {expected:.3g} requests/s with DistServe's simplifications"
    return [Candidate(placement=placement, expected=expected, bound=phases.bound(placement))], said


def simplified_deployment(*workers: WorkerSpec) -> Deployment:
    """Hand-offs take no time."""
    prefills, decodes = (
        [i for i, spec in enumerate(workers) if spec.role == role] for role in ("prefill", "decode")
    )
    return Deployment(workers=workers, block_size=_BLOCK_SIZE, topology=free_topology(prefills, decodes))


def simplified_worker(role: str, step_time: StepTime, gpus: int = 1) -> WorkerSpec:
    """Memory has no end. A colocated one computes prompts before it goes on with decodes, as vLLM did."""
    return WorkerSpec(
        role=role, step_time=step_time, num_blocks=_BLOCKS, scheduler=_simplified_scheduler(role), gpus=gpus
    )


def _simplified_scheduler(role: str) -> PrefillSchedulerConfig | DecodeSchedulerConfig:
    if role == "prefill":
        return PrefillSchedulerConfig(
            chunk_budget=_UNBOUNDED, saturation_tokens=_UNBOUNDED, max_waiting=_UNBOUNDED
        )
    if role == "decode":
        return DecodeSchedulerConfig(
            max_running=_UNBOUNDED, max_waiting=_UNBOUNDED, max_step_context=MOST_STEP_CONTEXT
        )
    return ColocatedSchedulerConfig(
        max_running=_UNBOUNDED,
        max_waiting=_UNBOUNDED,
        max_step_context=MOST_STEP_CONTEXT,
        prefill_budget=_UNBOUNDED,
        prompts_first=True,
    )
