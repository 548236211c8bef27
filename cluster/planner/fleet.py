"""A fleet: pools of workers on GPUs of several types, what it costs, and the deployment that is simulated.
Knows no search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...proto.errors import ConfigError
from .deployment import ROLES, Deployment
from .goodput import Objectives
from .hardware import Hardware
from .machines import Machine
from .placement import MachinePool, Placement, Pool, build_pools
from .plan_toml import TomlPool, cluster_toml
from .search import UNIT_WORKERS

MEASURES: Mapping[str, str] = {"cost": "$/h", "power": "W"}
"""What a budget may be of, with its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """One model on one kind of GPU, of which there are so many."""

    name: str
    machine: Machine
    available: int
    price_per_hour: float | None = None
    """US dollars a GPU."""

    def __post_init__(self) -> None:
        if not isinstance(self.machine.hardware, Hardware):
            raise ConfigError(
                f"{self.name} is no type of GPU with a price and power; plan it without a budget"
            )
        if self.available < 1:
            raise ConfigError(f"gpus: {self.name} = {self.available}; plan for at least 1 GPU of each type")
        if self.price_per_hour is not None and not 0.0 < self.price_per_hour < math.inf:
            raise ConfigError(f"the price of {self.name} is {self.price_per_hour:g}; use dollars above 0")

    @property
    def hardware(self) -> Hardware:
        """What a data sheet says of it."""
        assert isinstance(self.machine.hardware, Hardware)  # checked
        return self.machine.hardware

    def each(self, measure: str) -> float:
        """What a GPU takes of the budget.

        Raises:
            ConfigError: its price is not known.
        """
        if measure == "power":
            return self.hardware.power_w
        if self.price_per_hour is None:
            raise ConfigError(
                f"{self.name} has no price; give one with --prices {self.name}=DOLLARS_PER_HOUR"
            )
        return self.price_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What is to be small, and the most of it."""

    measure: str
    """A key of MEASURES."""
    most: float = math.inf

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ConfigError(f"a budget is of {' or '.join(MEASURES)}, not of {self.measure!r}")
        if not self.most > 0.0:
            raise ConfigError(f"budget: {self.measure} = {self.most:g}; use a number above 0")

    def text(self, value: float) -> str:
        """With its unit."""
        return f"${value:,.2f}/h" if self.measure == "cost" else f"{value:,.0f} W"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPool:
    """Equal workers on one type of GPU."""

    role: str
    gpu: GpuType
    pool: Pool

    def __str__(self) -> str:
        tokens = f", {self.pool.budget} tokens a step" if self.pool.budget else ""
        return f"{self.pool.count} {self.role} on {self.gpu.name} ({self.pool.parallel}{tokens})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Pools in the order of a deployment's workers; a role may have several."""

    pools: tuple[FleetPool, ...]

    def __post_init__(self) -> None:
        roles = {pool.role for pool in self.pools}
        if not roles or not roles <= set(ROLES) or ("prefill" in roles) != ("decode" in roles):
            raise ConfigError("a fleet has prefill and decode workers, or colocated ones, or all of them")

    @classmethod
    def of(cls, placement: Placement, gpu: GpuType) -> Fleet:
        """A placement on one type."""
        return cls(pools=tuple(FleetPool(role=role, gpu=gpu, pool=pool) for role, pool in placement.pools()))

    @property
    def gpus(self) -> int:
        return sum(pool.pool.gpus for pool in self.pools)

    @property
    def workers(self) -> int:
        return sum(pool.pool.count for pool in self.pools)

    @property
    def kind(self) -> str:
        """disaggregated, colocated or mixed."""
        roles = {pool.role for pool in self.pools}
        if "colocated" not in roles:
            return "disaggregated"
        return "mixed" if "decode" in roles else "colocated"

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the types that it uses."""
        return tuple(dict.fromkeys(pool.gpu.name for pool in self.pools))

    def takes(self, measure: str) -> float:
        """Dollars an hour, or watts at the GPUs' limit; hosts and network are not in it."""
        return math.fsum(pool.pool.gpus * pool.gpu.each(measure) for pool in self.pools)

    def part(self) -> tuple[Fleet, int]:
        """(what is simulated of it, how many of that it is); see search.part_of()."""
        share = math.gcd(*(pool.pool.count for pool in self.pools))
        for factor in range(1, share + 1):
            if share % factor == 0 and self.workers // share * factor >= UNIT_WORKERS:
                return self._with_share(factor, share), share // factor
        return self, 1

    def _with_share(self, factor: int, share: int) -> Fleet:
        pools = (
            replace(pool, pool=replace(pool.pool, count=pool.pool.count // share * factor))
            for pool in self.pools
        )
        return Fleet(pools=tuple(pools))

    def __str__(self) -> str:
        return " + ".join(map(str, self.pools))


def build_fleet(fleet: Fleet) -> Deployment:
    """The deployment, as placement.build() makes it of one type."""
    return build_pools([MachinePool(pool.role, pool.pool, pool.gpu.machine) for pool in fleet.pools])


def fleet_toml(fleet: Fleet, objectives: Objectives, model: str, policy: str) -> str:
    """The configuration of a cluster; where types differ, a pool's nodes are found by a Ray resource that has
    the type's name.

    Raises:
        ConfigError: a role has workers of several kinds, or pipeline stages: a cluster's configuration knows
            neither.
    """
    pools: dict[str, TomlPool] = {}
    for pool in fleet.pools:
        if pool.role in pools:
            raise ConfigError(
                f"the {pool.role} workers are of several kinds and a cluster's configuration has one for "
                f"each role: {fleet}"
            )
        resource = pool.gpu.name if len(fleet.types) > 1 else ""
        pools[pool.role] = TomlPool(pool.pool, pool.gpu.machine, resource)
    heading = [f"# Planned: {fleet}; {fleet.gpus} GPUs."]
    if len(fleet.types) > 1:
        heading.append("# A node offers a Ray resource called as its type of GPU, one for each of them.")
    return cluster_toml(heading, pools, objectives=objectives, model=model, policy=policy)
