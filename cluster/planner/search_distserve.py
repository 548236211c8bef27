"""DistServe's two placement algorithms (OSDI 2024, section 4; its released simulator): one for a network as
quick as the links of a node, one that keeps each prefill worker and its decode worker in one node.

Both maximise goodput a GPU by its bisection and replicate what they find; its simplifications are on:
hand-offs take no time, prompts are batched without bound, and decode steps have at most 50,000 tokens of
context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.step_time import StepTime
from .deployment import Deployment, WorkerSpec
from .goodput import PUBLISHED_STEP, Objectives, published_goodput
from .machines import Machine, Parallel, divisors, feasible_parallels
from .phase_rates import FirstTokens, FreeStepTime
from .sim_workload import Workload
from .topology import free_topology

MOST_STEP_CONTEXT = 50_000
_UNBOUNDED = 2**31 - 1
_BLOCK_SIZE, _BLOCKS = 64, 16_384
"""A million tokens: the simplification that memory has no end, which 300 requests do not reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What an algorithm chose."""

    prefill: Parallel
    decode: Parallel
    prefills: int
    """Workers."""
    decodes: int
    per_gpu: float
    """Requests/s: of the pair by the second algorithm, of the matched pools by the first."""

    @property
    def gpus(self) -> int:
        return self.prefills * self.prefill.gpus + self.decodes * self.decode.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTask:
    """What both algorithms are given."""

    machine: Machine
    workload: Workload
    objectives: Objectives
    nodes: int
    gpus_per_node: int
    rate: float
    """Requests/s that are to be served: how often what is found is replicated."""
    step: float = PUBLISHED_STEP
    """Requests/s a GPU at which a bisection ends."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; use at least 1")
        if not self.rate > 0.0 or not self.step > 0.0:
            raise ConfigError(f"rate = {self.rate} and step = {self.step}; use numbers above 0")


def high_affinity(task: PublishedTask) -> Published | None:
    """Algorithm 1: each phase by itself over all parallelisms of the cluster, then as many workers of each as
    the rate needs. None: a phase serves nothing."""
    gpus = task.nodes * task.gpus_per_node
    parallels = feasible_parallels(task.machine, gpus, gpus)
    prefill = _best_phase(task, parallels, "prefill")
    decode = _best_phase(task, parallels, "decode")
    if prefill is None or decode is None:
        return None
    (prefill_at, prefill_rate), (decode_at, decode_rate) = prefill, decode
    prefills, decodes = math.ceil(task.rate / prefill_rate), math.ceil(task.rate / decode_rate)
    served = min(prefills * prefill_rate, decodes * decode_rate)
    used = prefills * prefill_at.gpus + decodes * decode_at.gpus
    return Published(
        prefill=prefill_at, decode=decode_at, prefills=prefills, decodes=decodes, per_gpu=served / used
    )


def low_affinity(task: PublishedTask) -> Published | None:
    """Algorithm 2: pairs whose equal pipeline stages share a node, simulated jointly. None: no pair serves
    anything."""
    best: tuple[float, int, Parallel, Parallel] | None = None
    for prefill, decode in _pairs(task):
        used = prefill.gpus + decode.gpus
        per_gpu = published_goodput(
            _pair(task.machine, prefill, decode), task.workload, task.objectives, step=task.step
        )
        if per_gpu > 0.0 and (best is None or (per_gpu, -used) > (best[0], -best[1])):
            best = (per_gpu, used, prefill, decode)
    if best is None:
        return None
    per_gpu, used, prefill, decode = best
    times = math.ceil(task.rate / (per_gpu * used))
    return Published(prefill=prefill, decode=decode, prefills=times, decodes=times, per_gpu=per_gpu)


def _pairs(task: PublishedTask) -> Iterator[tuple[Parallel, Parallel]]:
    """Of each number of stages over nodes: the parallelisms of a stage of both phases that fit one node."""
    machine, per_node = task.machine, task.gpus_per_node
    whole = set(feasible_parallels(machine, task.nodes * per_node, task.nodes * per_node))
    for across in divisors(machine.num_layers, task.nodes):
        stages = [p for p in sorted(whole) if p.pp % across == 0 and p.gpus // across < per_node]
        for prefill in stages:
            for decode in stages:
                if (prefill.gpus + decode.gpus) // across <= per_node:
                    yield prefill, decode


def _best_phase(task: PublishedTask, parallels: list[Parallel], role: str) -> tuple[Parallel, float] | None:
    """(parallelism, requests/s of one worker) with the most requests a GPU; ties go to fewer GPUs."""
    best: tuple[float, int, Parallel] | None = None
    for parallel in parallels:
        alone = Objectives(
            ttft_ms=task.objectives.ttft_ms if role == "prefill" else math.inf,
            tpot_ms=task.objectives.tpot_ms if role == "decode" else math.inf,
        )
        workload = FirstTokens(task.workload) if role == "prefill" else task.workload
        per_gpu = published_goodput(
            _alone(task.machine, parallel, role), workload, alone, step=task.step, gpus=parallel.gpus
        )
        if per_gpu > 0.0 and (best is None or (per_gpu, -parallel.gpus) > best[:2]):
            best = (per_gpu, -parallel.gpus, parallel)
    return None if best is None else (best[2], best[0] * best[2].gpus)


def _alone(machine: Machine, parallel: Parallel, role: str) -> Deployment:
    own = simplified_worker(role, machine.step_time(parallel), parallel.gpus)
    if role == "prefill":
        return simplified_deployment(own, simplified_worker("decode", FreeStepTime()))
    return simplified_deployment(simplified_worker("prefill", FreeStepTime()), own)


def _pair(machine: Machine, prefill: Parallel, decode: Parallel) -> Deployment:
    return simplified_deployment(
        simplified_worker("prefill", machine.step_time(prefill), prefill.gpus),
        simplified_worker("decode", machine.step_time(decode), decode.gpus),
    )


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
