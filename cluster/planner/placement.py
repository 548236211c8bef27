"""A placement: pools of equal workers, and the deployment that is simulated. Knows no search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.step_time import StepShape
from .bounds import saturating_tokens
from .deployment import ROLES, Deployment, WorkerSpec
from .machines import Machine, Parallel
from .topology import Topology

LEAST_BUDGET, MOST_BUDGET = 64, 4096
"""Prompt tokens that a colocated worker computes beside its batch."""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Pool:
    """Equal workers."""

    count: int
    parallel: Parallel
    budget: int = 0
    """Of a colocated worker: prompt tokens beside its batch."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count = {self.count}; a pool has at least 1 worker")

    @property
    def gpus(self) -> int:
        return self.count * self.parallel.gpus

    def times(self, factor: int) -> Pool:
        """So many times the workers."""
        return Pool(count=self.count * factor, parallel=self.parallel, budget=self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Pools by role; both of prefill and decode, or neither."""

    prefill: Pool | None = None
    decode: Pool | None = None
    colocated: Pool | None = None

    def __post_init__(self) -> None:
        if (self.prefill is None) != (self.decode is None):
            raise ConfigError("a placement has a prefill and a decode pool, or neither of them")
        if self.decode is None and self.colocated is None:
            raise ConfigError("a placement without workers serves nothing")
        if self.colocated is not None and self.colocated.budget < 1:
            raise ConfigError(f"budget = {self.colocated.budget}; a colocated worker needs at least 1 token")

    def pools(self) -> Iterator[tuple[str, Pool]]:
        """(role, pool), in the order of a deployment's workers."""
        for role in ("prefill", "decode", "colocated"):
            pool = getattr(self, role)
            if pool is not None:
                yield role, pool

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for _, pool in self.pools())

    @property
    def workers(self) -> int:
        return sum(pool.count for _, pool in self.pools())

    @property
    def kind(self) -> str:
        """disaggregated, colocated or mixed."""
        if self.colocated is None:
            return "disaggregated"
        return "colocated" if self.decode is None else "mixed"

    def __str__(self) -> str:
        return " + ".join(
            f"{pool.count} {role} ({pool.parallel}{f', {pool.budget} tokens a step' if pool.budget else ''})"
            for role, pool in self.pools()
        )

    def times(self, factor: int) -> Placement:
        """So many of it beside each other."""
        return Placement(**{role: pool.times(factor) for role, pool in self.pools()})

    def unit(self) -> tuple[Placement, int]:
        """(the smallest placement of the same proportions, how many of it this is)."""
        share = math.gcd(*(pool.count for _, pool in self.pools()))
        pools = {
            role: Pool(count=pool.count // share, parallel=pool.parallel, budget=pool.budget)
            for role, pool in self.pools()
        }
        return Placement(**pools), share


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


class MachinePool(NamedTuple):
    """A pool and what its workers are."""

    role: str
    pool: Pool
    machine: Machine


def build(placement: Placement, machine: Machine) -> Deployment:
    """The deployment on one type of GPU; see build_pools().

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    return build_pools([MachinePool(role, pool, machine) for role, pool in placement.pools()])


def build_pools(pools: Sequence[MachinePool]) -> Deployment:
    """The deployment, of machines for one model.

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    machine = pools[0].machine
    block_size = machine.limits.block_size
    specs: list[WorkerSpec] = []
    for role, pool, own in pools:
        spec = WorkerSpec(
            role=role,
            step_time=own.step_time(pool.parallel),
            num_blocks=own.kv_tokens(pool.parallel) // block_size,
            scheduler=scheduler_of(role, pool, own),
            gpus=pool.parallel.gpus,
        )
        specs += [spec] * pool.count
    return Deployment(
        workers=tuple(specs),
        block_size=block_size,
        block_bytes=machine.kv_bytes_per_token * block_size,
        num_layers=machine.num_layers,
        context_length=machine.limits.context_length,
        topology=_topology(pools),
        first_token_s=machine.first_token_s,
    )


def scheduler_of(role: str, pool: Pool, machine: Machine) -> PrefillSchedulerConfig | DecodeSchedulerConfig:
    """What the pool's workers are configured with."""
    limits = machine.limits
    if role == "prefill":
        saturation = saturating_tokens(machine.step_time(pool.parallel), limits.chunk_budget)
        return PrefillSchedulerConfig(chunk_budget=limits.chunk_budget, saturation_tokens=saturation)
    if role == "decode":
        return DecodeSchedulerConfig(max_running=limits.max_running)
    return ColocatedSchedulerConfig(max_running=limits.max_running, prefill_budget=pool.budget)


def _topology(pools: Sequence[MachinePool]) -> Topology:
    """A link of each worker as wide as its GPUs' together. GPUs of one type that fit a node are in one; types
    do not share nodes."""
    node = pools[0].machine.hardware
    one_type = all(machine == pools[0].machine for _, _, machine in pools)
    one_node = one_type and sum(pool.gpus for _, pool, _ in pools) <= node.gpus_per_node
    bandwidths: list[float] = []
    by_role: dict[str, list[int]] = {role: [] for role in ROLES}
    for role, pool, machine in pools:
        hardware = machine.hardware
        per_gpu = hardware.intra_node_gb_per_s if one_node else hardware.inter_node_gb_per_s
        for _ in range(pool.count):
            by_role[role].append(len(bandwidths))
            bandwidths.append(per_gpu * 1e9 * hardware.link_share * pool.parallel.gpus)
    paths: dict[tuple[int, int], tuple[int, ...]] = {
        (source, target): (source, target) for source in by_role["prefill"] for target in by_role["decode"]
    }
    if not paths:
        return Topology(bandwidths=(), paths={})
    return Topology(bandwidths=tuple(bandwidths), paths=paths, latency_s=node.handoff_s)
