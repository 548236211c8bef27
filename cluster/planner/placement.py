"""A placement: pools of equal workers, and the deployment that is simulated. Knows no search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.step_time import StepShape
from .bounds import saturating_tokens
from .deployment import Deployment, WorkerSpec
from .machines import Machine, Parallel
from .topology import Topology, flat_topology

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


def build(placement: Placement, machine: Machine) -> Deployment:
    """The deployment. Within a node hand-offs go over its links, else over the network; each GPU has its own.

    Raises:
        ConfigError: the model does not fit, or cannot be divided so.
    """
    block_size = machine.limits.block_size
    specs: list[WorkerSpec] = []
    for role, pool in placement.pools():
        step_time = machine.step_time(pool.parallel)
        spec = WorkerSpec(
            role=role,
            step_time=step_time,
            num_blocks=machine.kv_tokens(pool.parallel) // block_size,
            scheduler=scheduler_of(role, pool, machine),
            gpus=pool.parallel.gpus,
        )
        specs += [spec] * pool.count
    return Deployment(
        workers=tuple(specs),
        block_size=block_size,
        block_bytes=machine.kv_bytes_per_token * block_size,
        num_layers=machine.num_layers,
        context_length=machine.limits.context_length,
        topology=_topology(placement, machine),
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


def _topology(placement: Placement, machine: Machine) -> Topology:
    if placement.prefill is None or placement.decode is None:
        return Topology(bandwidths=(), paths={})
    hardware = machine.hardware
    one_node = placement.gpus <= hardware.gpus_per_node
    link = hardware.intra_node_gb_per_s if one_node else hardware.inter_node_gb_per_s
    gpus = min(placement.prefill.parallel.gpus, placement.decode.parallel.gpus)
    prefills, decodes = placement.prefill.count, placement.decode.count
    return flat_topology(
        range(prefills),
        range(prefills, prefills + decodes),
        link * 1e9 * hardware.link_share * gpus,
        hardware.handoff_s,
    )
