"""The configuration of a whole cluster: every folder's own dataclasses, composed, from one TOML file and
`--set`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from ..engine.config import MOST_KV_CACHE_MIB, MOST_RANKS, EngineConfig
from ..engine.host_config import HostConfig
from ..kv_transfer.config import KvTransferConfig
from ..prefill_workers.config import PrefillSchedulerConfig
from ..proto.clock import Rng
from ..proto.errors import ConfigError
from ..proto.ids import draw_id
from ..router.config import GatewayConfig, RouterConfig, SloConfig, is_loopback
from .config_reader import FLATTEN, SECRET, Drawn, Source, apply_overrides, build, read_file, section

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

MOST_WORKERS = 1024
MOST_CPUS = 10_000
"""Of one worker, and GPUs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """Where the workers of a pool run and what each of them takes."""

    workers: int = 1
    """Worker processes of the pool."""
    tensor_parallel: int = 1
    """Processes of each worker, which share the model's heads and the KV between them. Pools may differ."""
    cpus: float = 1.0
    """CPUs a worker takes of its node with all its processes, as Ray counts them."""
    gpus: float = 0.0
    """GPUs a worker takes."""
    resources: dict[str, float] = field(default_factory=dict)
    """Further Ray resources a worker takes, by name."""
    strategy: Strategy = "PACK"
    """Over nodes: PACK on few, SPREAD over many; STRICT_ makes it a condition."""
    cores: list[int] = field(default_factory=list)
    """CPU cores to pin the workers to, dealt out evenly in order; empty leaves them to the system."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers = {self.workers} is negative")
        if self.workers > MOST_WORKERS:
            raise ConfigError(f"workers = {self.workers} is out of range; use up to {MOST_WORKERS}")
        # More CPUs than any node has, a private Ray would make up: it does not come up with a billion.
        for name, value in {"cpus": self.cpus, "gpus": self.gpus}.items():
            if not 0.0 <= value <= MOST_CPUS:
                raise ConfigError(f"{name} = {value} is out of range; use 0 to {MOST_CPUS}")
        for name, value in self.resources.items():
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"resources: {name} = {value} is out of range; use 0 or more")
        if not 1 <= self.tensor_parallel <= MOST_RANKS:
            raise ConfigError(
                f"tensor_parallel = {self.tensor_parallel} is out of range; use 1 to {MOST_RANKS}"
            )
        if self.cores and len(self.cores) % (max(self.workers, 1) * self.tensor_parallel):
            sharers = f"{self.workers} workers"
            if self.tensor_parallel > 1:
                sharers += f" of {self.tensor_parallel} processes"
            raise ConfigError(f"cores has {len(self.cores)} entries, which {sharers} cannot share evenly")
        if len(set(self.cores)) != len(self.cores) or any(core < 0 for core in self.cores):
            raise ConfigError(f"cores = {self.cores} must be different core numbers from 0 on")

    def bundle(self) -> dict[str, float]:
        """What one worker reserves."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        # Ray refuses an empty bundle; a thousandth of a CPU is its smallest unit worth naming.
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}

    def cores_of(self, index: int) -> list[int]:
        """The cores of the pool's worker `index`."""
        share = len(self.cores) // max(self.workers, 1)
        return self.cores[index * share : (index + 1) * share]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What the workers of one pool have for KV."""

    kv_cache_mib: int = 0
    """Memory of each worker's KV pool, MiB, of all its processes together; 0 takes engine.kv_cache_mib."""

    def __post_init__(self) -> None:
        if not 0 <= self.kv_cache_mib <= MOST_KV_CACHE_MIB:
            raise ConfigError(
                f"kv_cache_mib = {self.kv_cache_mib} is out of range; use 1 to {MOST_KV_CACHE_MIB}, "
                "or 0 for engine.kv_cache_mib"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPoolConfig:
    """Workers that compute prompts and hand their KV to decode workers."""

    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=FLATTEN)
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata=FLATTEN)
    scheduler: PrefillSchedulerConfig = field(default_factory=PrefillSchedulerConfig, metadata=FLATTEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePoolConfig:
    """Workers that generate tokens from KV that was handed to them."""

    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=FLATTEN)
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata=FLATTEN)
    scheduler: DecodeSchedulerConfig = field(default_factory=DecodeSchedulerConfig, metadata=FLATTEN)


def _no_workers() -> PlacementConfig:
    return PlacementConfig(workers=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColocatedPoolConfig:
    """Workers that do both phases, prompts in chunks beside running sequences."""

    placement: PlacementConfig = field(default_factory=_no_workers, metadata=FLATTEN)
    memory: MemoryConfig = field(default_factory=MemoryConfig, metadata=FLATTEN)
    scheduler: ColocatedSchedulerConfig = field(default_factory=ColocatedSchedulerConfig, metadata=FLATTEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolsConfig:
    """The worker pools."""

    prefill: PrefillPoolConfig = field(default_factory=PrefillPoolConfig)
    decode: DecodePoolConfig = field(default_factory=DecodePoolConfig)
    colocated: ColocatedPoolConfig = field(default_factory=ColocatedPoolConfig)

    def placements(self) -> dict[str, PlacementConfig]:
        """By role."""
        return {
            "prefill": self.prefill.placement,
            "decode": self.decode.placement,
            "colocated": self.colocated.placement,
        }

    def __post_init__(self) -> None:
        if not self.decode.placement.workers and not self.colocated.placement.workers:
            raise ConfigError(
                "no worker can decode; set pools.decode.workers or pools.colocated.workers to 1 or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served."""

    name: str = "smollm2"
    """smollm2 (built in), dummy:PRESET[@SEED], a directory, a .gguf file or a Hugging Face repository."""
    dtype: str = "bf16"
    """bf16, fp32 (exact and slow) or int8 (weights of the layers only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where membership and the request journal live."""

    url: str = ""
    """redis://, rediss:// or unix:// address of a server. Empty starts a private Valkey; gateways then run
    on the supervisor's node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """The Ray cluster that processes run on."""

    address: str = ""
    """host:port of a running Ray to join, or "auto"; its token is read from RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH. Empty starts a private Ray on this machine."""
    object_store_mib: int = 80
    """Shared memory of a private Ray's object store, MiB; neither tokens nor KV go through it."""
    placement_timeout_s: float = 30.0
    """How long to wait for nodes with room for a pool, seconds."""

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise ConfigError(
                "ray.address must be the host:port of Ray's control store, not a ray:// client address"
            )
        if self.object_store_mib < 80:
            raise ConfigError(f"ray.object_store_mib = {self.object_store_mib} is too small; use 80 or more")
        if not 0.0 < self.placement_timeout_s <= 86_400.0:
            raise ConfigError(
                f"ray.placement_timeout_s = {self.placement_timeout_s} is out of range; use up to 86400"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Who may talk to workers and gateways."""

    cluster_token: str = field(default="", metadata=SECRET)
    """Shared by the cluster's processes and checked in every handshake. Empty draws one at each start."""

    def __post_init__(self) -> None:
        token = self.cluster_token
        # It travels as gRPC metadata, which carries nothing else and strips spaces around it.
        if not (token.isascii() and token.isprintable() and token == token.strip() and len(token) <= 1024):
            raise ConfigError(
                "security.cluster_token must be up to 1024 ASCII letters, digits, punctuation marks and "
                "spaces, and neither begin nor end with a space"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """Starting, watching and stopping of processes."""

    start_timeout_s: float = 900.0
    """How long a process may take to start, its model's load included, seconds."""
    hang_grace_s: float = 0.25
    """A worker that every gateway calls hung for so long is killed and started anew, seconds."""
    gateway_hang_s: float = 0.8
    """A gateway that takes longer than this for two answers in a row is killed and started anew, some two
    seconds after it stopped; seconds."""
    change_timeout_s: float = 1800.0
    """How long a scale or a rolling restart may take unless it says so itself, seconds."""
    restart_pause_s: float = 5.0
    """Longest pause before a process that keeps failing is started again; it doubles from 0.1, seconds."""

    log_dir: str = ""
    """Folder in which every process keeps a log, on its own node; empty leaves them to Ray's, which a
    private Ray takes along when it ends."""

    def __post_init__(self) -> None:
        for name in (
            "start_timeout_s", "hang_grace_s", "gateway_hang_s", "change_timeout_s", "restart_pause_s",
        ):  # fmt: skip
            if not 0.0 < getattr(self, name) <= 86_400.0:
                raise ConfigError(
                    f"supervisor.{name} = {getattr(self, name)} is out of range; use up to 86400"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Everything."""

    name: str = ""
    """Of the cluster in its store; two clusters on one store need two names. Empty draws one at each
    start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: HostConfig = field(default_factory=HostConfig)
    pools: PoolsConfig = field(default_factory=PoolsConfig)
    kv_transfer: KvTransferConfig = field(default_factory=KvTransferConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)

    def engine_of(self, role: str) -> EngineConfig:
        """What the workers of a pool load, cores apart."""
        pool: PrefillPoolConfig | DecodePoolConfig | ColocatedPoolConfig = getattr(self.pools, role)
        return replace(
            self.engine,
            tensor_parallel=pool.placement.tensor_parallel,
            kv_cache_mib=pool.memory.kv_cache_mib or self.engine.kv_cache_mib,
        )

    def __post_init__(self) -> None:
        if not all(char.isalnum() or char in "-_." for char in self.name) or len(self.name) > 64:
            raise ConfigError(f'name = "{self.name}" must be up to 64 letters, digits and - _ .')


GIVEN = (
    "engine.model", "engine.dtype", "engine.tensor_parallel", "engine.cores",
    "host.cluster_token", "host.port", "host.metrics_port",
)  # fmt: skip
"""Values that the composition sets and a file may not: the engine's model is [model]'s, its processes and
cores are the pool's, every process has the cluster's token, and each takes ports of its own."""


def given(model: ModelConfig, token: str) -> dict[str, object]:
    """The values of GIVEN, by path."""
    return dict(zip(GIVEN, (model.name, model.dtype, 1, (), token, 0, 0), strict=True))


def load(file: Path | None, settings: Iterable[str], rng: Rng) -> ClusterConfig:
    """The configuration of `file` (or of nothing but defaults), changed by `settings` ("section.key=value").

    What it leaves open, the cluster's name and token, is drawn from `rng`.

    Raises:
        ConfigError: the file or a setting is wrong; the message says where and what to write instead.
    """
    source = Source(str(file) if file is not None else "configuration")
    table: dict[str, Any] = read_file(file) if file is not None else {}
    apply_overrides(table, settings, source)
    # These first, by themselves: others take values of theirs.
    security = section(SecurityConfig, table, "security", source)
    model = section(ModelConfig, table, "model", source)
    token = security.cluster_token or Drawn(f"{rng.getrandbits(256):064x}")
    source.given = given(model, token)
    config = build(ClusterConfig, table, source)
    if not is_loopback(config.gateway.host) and not security.cluster_token:
        raise ConfigError(
            f"{source.of('gateway.host')}: gateway.host = {config.gateway.host} is reachable from other "
            "machines; set security.cluster_token, which clients then have to send"
        )
    name = config.name or Drawn(draw_id(rng, "c-")[:14])
    return replace(config, name=name, security=replace(security, cluster_token=token))
