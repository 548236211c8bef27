"""What is simulated: workers with their step times and memory, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ...prefill_workers.config import PrefillSchedulerConfig
from ...proto.errors import ConfigError
from ...router.config import RouterConfig
from ...router.step_time import StepTime
from .topology import Topology

ROLES = ("prefill", "decode", "colocated")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker."""

    role: str
    """prefill, decode or colocated."""
    step_time: StepTime
    num_blocks: int
    """Of its KV pool."""
    scheduler: PrefillSchedulerConfig | DecodeSchedulerConfig
    gpus: int = 1

    def __post_init__(self) -> None:
        wanted: type = {
            "prefill": PrefillSchedulerConfig,
            "decode": DecodeSchedulerConfig,
            "colocated": ColocatedSchedulerConfig,
        }.get(self.role, type(None))
        if self.role not in ROLES:
            raise ConfigError(f"role = {self.role!r} is unknown; use prefill, decode or colocated")
        if not isinstance(self.scheduler, wanted):
            raise ConfigError(
                f"a {self.role} worker needs a {wanted.__name__}, not {type(self.scheduler).__name__}"
            )
        if self.num_blocks < 1 or self.gpus < 1:
            raise ConfigError(
                f"a {self.role} worker has {self.num_blocks} KV blocks and {self.gpus} GPUs; "
                "it needs one at least of each"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A cluster for one model."""

    workers: tuple[WorkerSpec, ...]
    block_size: int = 16
    """Tokens in a KV block."""
    block_bytes: int = 1
    """Of the whole model's KV."""
    num_layers: int = 1
    layerwise_tokens: int = 0
    """Prompts of fewer tokens are not pushed layer by layer while they are computed, but whole afterwards."""
    context_length: int = 2**31 - 1
    first_token_s: float = 0.0
    """What lies around a first token, from the client to the worker and back: a part of each TTFT."""
    topology: Topology = field(default_factory=lambda: Topology(bandwidths=(), paths={}))

    def __post_init__(self) -> None:
        if not self.workers:
            raise ConfigError("a deployment without workers serves nothing; name at least one")
        roles = [spec.role for spec in self.workers]
        if "colocated" not in roles and "decode" not in roles:
            raise ConfigError("a deployment of prefill workers alone can end no request; add a decode worker")
        for name in ("block_size", "block_bytes", "num_layers", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        if not 0.0 <= self.first_token_s < 3600.0:
            raise ConfigError(f"first_token_s = {self.first_token_s} is out of range; use 0 to 3600")

    @property
    def gpus(self) -> int:
        return sum(spec.gpus for spec in self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """How the deployment is driven."""

    router: RouterConfig = field(default_factory=RouterConfig)
    ttft_ms: float = 2000.0
    """Objectives that all requests carry."""
    tpot_ms: float = 100.0
    most_missed: int | None = None
    """The run ends as soon as more requests than this missed TTFT, or TPOT; what is unfinished then counts as
    missed. None: it goes on to its end."""
    exact: bool = False
    """Every step is an event of its own; else stretches in which a batch does not change are one. The results
    are the same."""
