"""What befalls the workers of a simulation: crashes, drains, changes of role. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...engine.host_config import HostConfig
from ...proto.errors import ConfigError
from ...router.worker_handle import TICK_S
from .deployment import Deployment, WorkerSpec

KILLED_NOTICED_S = 0.1
"""Until gateways know of a worker whose process has ended: its streams break
(`docs/results/recovery.json`: 0.09 s at most)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Of the worker at that place of the deployment; where nobody runs at that time, nothing happens."""

    at_s: float
    worker: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.at_s < 1e9:
            raise ConfigError(f"incidents: at_s = {self.at_s} is out of range; use 0 and more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash(Incident):
    """Its process is killed, or stops and is killed when that is noticed. KV, queue and cache are gone."""

    hangs: bool = False
    """It stops instead of ending: noticed by its silence (`router.hang_after_s`)."""
    noticed_after_s: float | None = None
    """Until gateways know of it; None: as long as that takes by the configuration."""
    back_s: float | None = None
    """Until a new process serves in its place, from the crash on; None: never."""

    def __post_init__(self) -> None:
        Incident.__post_init__(self)
        if self.back_s is not None and not self.back_s > 0.0:
            raise ConfigError(f"incidents: back_s = {self.back_s}; a worker needs some time to come back")
        if self.noticed_after_s is not None and not self.noticed_after_s >= 0.0:
            raise ConfigError(f"incidents: noticed_after_s = {self.noticed_after_s}; use 0 or more")

    def noticed_s(self, hang_after_s: float) -> float:
        """Until gateways know of it."""
        if self.noticed_after_s is not None:
            return self.noticed_after_s
        return hang_after_s + TICK_S if self.hangs else KILLED_NOTICED_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(Incident):
    """It takes nothing new, finishes what it has and ends. What is not finished in time goes to others."""

    timeout_s: float = field(default_factory=lambda: HostConfig().drain_timeout_s)

    def __post_init__(self) -> None:
        Incident.__post_init__(self)
        if not self.timeout_s > 0.0:
            raise ConfigError(f"incidents: timeout_s = {self.timeout_s}; a drain needs some time")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChange(Drain):
    """It drains, and another worker starts where it was: what scaling one pool down and another one up comes
    to, or, with the same role, a rolling restart."""

    successor: WorkerSpec
    start_s: float
    """From the end of the drain until the successor serves."""

    def __post_init__(self) -> None:
        Drain.__post_init__(self)
        if not self.start_s > 0.0:
            raise ConfigError(f"incidents: start_s = {self.start_s}; a worker needs some time to start")


def check_incidents(incidents: Sequence[Incident], deployment: Deployment) -> None:
    """
    Raises:
        ConfigError: a worker is not there, or a new role has no link to those that it would work with.
    """
    roles = [{spec.role} for spec in deployment.workers]
    for incident in incidents:
        if not 0 <= incident.worker < len(roles):
            raise ConfigError(
                f"incidents: worker {incident.worker} is not one of the {len(roles)} of the deployment"
            )
        if isinstance(incident, RoleChange):
            roles[incident.worker].add(incident.successor.role)
    if not any(isinstance(incident, RoleChange) for incident in incidents):
        return
    for source, before in enumerate(roles):
        for target, after in enumerate(roles):
            pair = source != target and "prefill" in before and "decode" in after
            if pair and (source, target) not in deployment.topology.paths:
                raise ConfigError(
                    f"incidents: worker {source} may come to hand over to worker {target}, and the topology "
                    "has no path between them; add one"
                )
