"""What the simulator says of a cluster of this machine: its configuration with a profile's step times.

The simulated workers have the configuration's schedulers, blocks and router, and the profile's step times,
hand-off cost and what serving adds. Workers of one machine slow each other down: how much depends on how busy
the others are, which the simulation itself says, so that it is repeated until both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...decode_workers.config import DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...proto.slo import Slo
from ...router.step_time import StepShape
from ..config import ClusterConfig
from ..load.workload import Arrival
from .deployment import Deployment, SimulationConfig, WorkerSpec
from .profile import Profile, ServingCost
from .records import SimResult
from .sim_workload import requests_of
from .simulator import Simulation
from .topology import flat_topology

REPEATS = 6
SETTLED = 0.01
"""Change of a worker's busy share that ends the repetition."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of the time that a worker computes steps with prompts, and steps without."""

    prefill: float = 0.0
    decode: float = 0.0


def predict(config: ClusterConfig, profile: Profile, arrivals: Sequence[Arrival], slo: Slo) -> SimResult:
    """Serves the arrivals in virtual time. TTFT is the client's.

    Raises:
        ConfigError: the profile is of another engine, or the configuration has workers of several processes.
    """
    busy = [Busy()] * len(_roles(config))
    simulated = SimulationConfig(router=config.router, ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms)
    for _ in range(REPEATS):
        deployment = deployment_of(config, profile, busy)
        result = Simulation(deployment, simulated, requests_of(arrivals, config.engine.block_size)).run()
        found = _busy_of(result, profile)
        change = max(
            abs(new.prefill + new.decode - old.prefill - old.decode)
            for new, old in zip(found, busy, strict=True)
        )
        if change < SETTLED:
            break
        # Half of the way: a worker that is slowed down by another slows it down less or more in turn.
        busy = [
            Busy((new.prefill + old.prefill) / 2, (new.decode + old.decode) / 2)
            for new, old in zip(found, busy, strict=True)
        ]
    return result


def deployment_of(config: ClusterConfig, profile: Profile, busy: Sequence[Busy] = ()) -> Deployment:
    """The configuration's workers, prefill ones first, on one machine; `busy` by worker.

    Raises:
        ConfigError: as predict().
    """
    _check(config, profile)
    roles = _roles(config)
    busy = busy or [Busy()] * len(roles)
    schedulers: dict[str, PrefillSchedulerConfig | DecodeSchedulerConfig] = {
        "prefill": config.pools.prefill.scheduler,
        "decode": config.pools.decode.scheduler,
        "colocated": config.pools.colocated.scheduler,
    }
    serving, engine = profile.serving, profile.engine
    workers = []
    for i, role in enumerate(roles):
        others = [other for j, other in enumerate(busy) if j != i]
        prefill, decode = (min(sum(getattr(o, name) for o in others), len(others)) for name in _KINDS)
        slowed = profile.step_time.slowed(*(profile.slowdown.of(own, prefill, decode) for own in _KINDS))
        workers.append(
            WorkerSpec(
                role=role,
                step_time=slowed.plus(serving.step_s, serving.step_per_sequence_s),
                num_blocks=engine.num_blocks,
                scheduler=schedulers[role],
            )
        )
    by_role = {role: [i for i, own in enumerate(roles) if own == role] for role in ("prefill", "decode")}
    return Deployment(
        workers=tuple(workers),
        block_size=engine.block_size,
        block_bytes=engine.block_bytes,
        num_layers=engine.num_layers,
        layerwise_tokens=config.kv_transfer.layerwise_tokens,
        context_length=engine.context_length,
        first_token_s=_around_first_token_s(serving, roles, busy),
        topology=flat_topology(
            by_role["prefill"], by_role["decode"], serving.handoff_bytes_per_s, serving.handoff_s
        ),
    )


_KINDS = ("prefill", "decode")


def _roles(config: ClusterConfig) -> list[str]:
    return [role for role, pool in config.pools.placements().items() for _ in range(pool.workers)]


def _around_first_token_s(serving: ServingCost, roles: Sequence[str], busy: Sequence[Busy]) -> float:
    """What lies around a first token, longer the more often the machine's other workers compute beside the
    one that has the prompt; the mean of those that may have it."""
    shares = []
    for i, role in enumerate(roles):
        if role != "decode":
            shares.append(min(1.0, sum(o.prefill + o.decode for j, o in enumerate(busy) if j != i)))
    more = max(0.0, serving.first_token_beside_s - serving.first_token_s)
    return serving.first_token_s + more * sum(shares) / max(1, len(shares))


def _busy_of(result: SimResult, profile: Profile) -> list[Busy]:
    """Of a colocated worker, its prompts' own times, and the rest is decode."""
    prompts = [0.0] * len(result.workers)
    for request in result.requests:
        if request.scheduled >= 0:
            n = request.prompt_tokens - request.cached_tokens
            shape = StepShape(prefill_tokens=n, prefill_context=n * (request.cached_tokens + n / 2))
            prompts[request.prefill_worker] += profile.step_time.step_s(shape) / result.duration_s
    shares = []
    for use, share in zip(result.workers, prompts, strict=True):
        prefill = use.busy if use.role == "prefill" else min(share, use.busy)
        shares.append(Busy(prefill, use.busy - prefill))
    return shares


def _check(config: ClusterConfig, profile: Profile) -> None:
    """
    Raises:
        ConfigError: the profile does not hold for this configuration.
    """
    asked = {
        "dtype": config.model.dtype,
        "block_size": config.engine.block_size,
        "threads": config.engine.threads,
    }
    for name, value in asked.items():
        if (had := getattr(profile.engine, name)) != value:
            raise ConfigError(
                f"the profile was made with {name} = {had}, and the cluster has {value}; "
                "make one with the same settings"
            )
    for role, placement in config.pools.placements().items():
        if placement.workers and placement.tensor_parallel > 1:
            raise ConfigError(
                f"pools.{role}.tensor_parallel = {placement.tensor_parallel}: profiles are of workers of one "
                "process; set it to 1"
            )
        kv_cache_mib = config.engine_of(role).kv_cache_mib
        if placement.workers and kv_cache_mib != profile.engine.kv_cache_mib:
            raise ConfigError(
                f"the profile was made with kv_cache_mib = {profile.engine.kv_cache_mib}, and the {role} "
                f"workers have {kv_cache_mib}; make one with the same settings"
            )
