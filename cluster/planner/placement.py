"""A placement: pools of equal workers, on GPUs of one type or of several, and the deployment that is
simulated. Knows no search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.step_time import StepShape
from .bounds import saturating_tokens
from .deployment import ROLES, Deployment, WorkerSpec
from .machines import Machine, Parallel
from .node_links import Seat, links_of

LEAST_BUDGET, MOST_BUDGET = 64, 4096
"""Prompt tokens that a colocated worker computes beside its batch."""
UNIT_WORKERS = 4
"""A placement of several equal parts is simulated as the smallest part with so many workers: the others do
the same. A larger one would share its load a little better."""
KINDS = ("colocated", "disaggregated", "mixed")
"""Of placements; the fewer hand-offs the earlier."""


class Kind(NamedTuple):
    """Of a worker that pools may be made of."""

    role: str
    parallel: Parallel
    budget: int = 0
    """Of a colocated worker: prompt tokens beside its batch."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal workers."""

    worker: Kind
    count: int
    hardware: str = ""
    """Name of their type of GPU; empty where there is only one."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count = {self.count}; a pool has at least 1 worker")
        if self.worker.role == "colocated" and self.worker.budget < 1:
            raise ConfigError(f"budget = {self.worker.budget}; a colocated worker needs at least 1 token")

    @property
    def gpus(self) -> int:
        return self.count * self.worker.parallel.gpus

    def __str__(self) -> str:
        role, parallel, budget = self.worker
        on = f" on {self.hardware}" if self.hardware else ""
        tokens = f", {budget} tokens a step" if budget else ""
        return f"{self.count} {role}{on} ({parallel}{tokens})"


@dataclass(frozen=True, slots=True)
class Placement:
    """Pools in the order of a deployment's workers; on several types of GPUs a role may have several."""

    pools: tuple[Pool, ...]

    def __post_init__(self) -> None:
        roles = {pool.worker.role for pool in self.pools}
        if not roles or not roles <= set(ROLES) or ("prefill" in roles) != ("decode" in roles):
            raise ConfigError("a placement has prefill and decode workers, or colocated ones, or all of them")

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    @property
    def workers(self) -> int:
        return sum(pool.count for pool in self.pools)

    @property
    def kind(self) -> str:
        """One of KINDS."""
        roles = {pool.worker.role for pool in self.pools}
        if "colocated" not in roles:
            return "disaggregated"
        return "mixed" if "decode" in roles else "colocated"

    @property
    def hardware(self) -> tuple[str, ...]:
        """Names of the types of GPUs that it uses."""
        return tuple(dict.fromkeys(pool.hardware for pool in self.pools))

    def on(self, hardware: str) -> Placement:
        """The same on one type of GPU."""
        return Placement(tuple(replace(pool, hardware=hardware) for pool in self.pools))

    def part(self) -> tuple[Placement, int]:
        """(what is simulated of it, how many of that it is)."""
        share = math.gcd(*(pool.count for pool in self.pools))
        for times in range(share, 1, -1):
            if share % times == 0 and self.workers // times >= UNIT_WORKERS:
                pools = (replace(pool, count=pool.count // times) for pool in self.pools)
                return Placement(tuple(pools)), times
        return self, 1

    def __str__(self) -> str:
        return " + ".join(map(str, self.pools))


def colocated_budgets(machine: Machine, parallel: Parallel, tpot_ms: float) -> tuple[int, ...]:
    """Prompt tokens a step that are worth trying: as many as leave a step inside the objective, which guards
    TPOT, and four times as many, which trade some of it for TTFT."""
    step_time = machine.step_time(parallel)
    fitting, most = LEAST_BUDGET, min(MOST_BUDGET, machine.limits.chunk_budget)
    while fitting < most:
        tokens = fitting * 2
        shape = StepShape(
            prefill_tokens=tokens, prefill_context=tokens * tokens / 2, decode_batch=1, decode_context=1024
        )
        if step_time.step_s(shape) * 1e3 > tpot_ms:
            break
        fitting = tokens
    return tuple(sorted({min(most, fitting * factor) for factor in (1, 4)}))


def build(placement: Placement, machines: Mapping[str, Machine], parts: int = 1) -> Deployment:
    """The deployment.

    Args:
        machines: for one model, by the names that the pools have for their hardware.
        parts: of which the placement is one, see Placement.part(): of links it has its share.

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    pools = [(pool, machines[pool.hardware]) for pool in placement.pools]
    machine = pools[0][1]
    seats = [
        Seat(pool.worker.role, own.hardware, pool.worker.parallel.gpus)
        for pool, own in pools
        for _ in range(pool.count)
    ]
    return Deployment(
        workers=tuple(spec for pool, own in pools for spec in [worker_spec(pool.worker, own)] * pool.count),
        block_size=machine.limits.block_size,
        block_bytes=machine.kv_bytes_per_token * machine.limits.block_size,
        num_layers=machine.num_layers,
        context_length=machine.limits.context_length,
        topology=links_of(seats, parts),
        first_token_s=machine.first_token_s,
    )


def build_part(placement: Placement, machines: Mapping[str, Machine]) -> tuple[Deployment, int]:
    """(deployment of what is simulated of it, how many of that it is); see Placement.part() and build()."""
    part, times = placement.part()
    return build(part, machines, times), times


def worker_spec(worker: Kind, machine: Machine) -> WorkerSpec:
    """One worker.

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    return WorkerSpec(
        role=worker.role,
        step_time=machine.step_time(worker.parallel),
        num_blocks=machine.kv_tokens(worker.parallel) // machine.limits.block_size,
        scheduler=_scheduler(worker, machine),
        gpus=worker.parallel.gpus,
    )


def _scheduler(worker: Kind, machine: Machine) -> PrefillSchedulerConfig | DecodeSchedulerConfig:
    limits = machine.limits
    if worker.role == "prefill":
        saturation = saturating_tokens(machine.step_time(worker.parallel), limits.chunk_budget)
        return PrefillSchedulerConfig(chunk_budget=limits.chunk_budget, saturation_tokens=saturation)
    if worker.role == "decode":
        return DecodeSchedulerConfig(max_running=limits.max_running)
    return ColocatedSchedulerConfig(max_running=limits.max_running, prefill_budget=worker.budget)
