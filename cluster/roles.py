"""What a process of a cluster can be, and how each role is started in its process: by name, without torch
here."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields, replace
from types import ModuleType

from ..checkpoints import lookup
from ..decode_workers.config import DecodeWorkerConfig
from ..prefill_workers.config import PrefillWorkerConfig
from ..proto.clock import system_rng
from ..proto.ids import draw_id
from ..proto.rpc import host_port
from ..proto.worker_pb2 import WorkerHello
from .config import ClusterConfig

_PACKAGE = __name__.split(".", maxsplit=1)[0]
MODULES = {
    "prefill": f"{_PACKAGE}.prefill_workers.worker",
    "decode": f"{_PACKAGE}.decode_workers.worker",
    "colocated": f"{_PACKAGE}.decode_workers.worker",
    "gateway": f"{_PACKAGE}.router.gateway",
}
"""Where each role's `start` is."""

WILDCARDS = ("0.0.0.0", "::")
"""Hosts to listen on that no peer can dial."""

Progress = Callable[[str, float], None]
"""(what is being done, share of it that is done)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a process is told to be."""

    worker_id: str
    role: str
    config: ClusterConfig
    """Resolved: with name and token."""
    store_url: str
    """Of the store, for gateways."""
    port: int = 0
    """Of a gateway; 0 takes any free one. A restarted gateway is given the ports it had."""
    metrics_port: int = 0
    cores: list[int] = field(default_factory=list)
    """CPU cores to run on; empty leaves the choice to the system. A worker's further processes have the last
    of them."""

    @property
    def own_cores(self) -> list[int]:
        """Of the process that is told this."""
        placement = self.config.pools.placements().get(self.role)
        return self.cores[: len(self.cores) // placement.tensor_parallel] if placement else self.cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What decides with whom a worker hands over, as `membership.Member` has it. A gateway has none."""

    layout_hash: str = ""
    protocol_version: int = 0
    kv_sharding: str = ""
    package_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A process that serves."""

    worker_id: str
    role: str
    address: str
    """host:port of its gRPC server."""
    metrics_address: str
    """host:port of its /metrics."""
    incarnation: str
    pid: int
    ticks: int
    """When the process started, see processes.started_at."""
    node_id: str
    """Of Ray."""
    traits: Traits = Traits()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """Why a role did not start. A value, since Ray wraps exceptions in its own."""

    code: str
    """Of proto/errors.py."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProgress:
    """How far a start is."""

    stage: str
    share: float
    """0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A role that serves in this process, whichever it is."""

    address: str
    metrics_address: str
    incarnation: str
    wait: Callable[[], Awaitable[None]]
    """Returns when the role was closed, and raises when it cannot go on: the process should then end."""
    drain: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]
    traits: Traits = Traits()


async def start(assignment: Assignment, node_ip: str, progress: Progress) -> Running:
    """Starts the role that `assignment` names, in this process and on the running loop.

    Args:
        node_ip: where other nodes reach this one; announced by what listens on every interface.
        progress: called from any thread.

    Raises:
        DiphaseError: it cannot run as configured.
    """
    module = importlib.import_module(MODULES[assignment.role])
    if assignment.role == "gateway":
        running = await _start_gateway(module, assignment, progress)
    else:
        running = await _start_worker(module, assignment, node_ip, progress)
    return replace(
        running,
        address=reachable(running.address, node_ip),
        metrics_address=reachable(running.metrics_address, node_ip),
    )


async def _start_gateway(module: ModuleType, assignment: Assignment, progress: Progress) -> Running:
    config = assignment.config
    gateway = await module.start(
        gateway_id=assignment.worker_id,
        cluster=config.name,
        files=await asyncio.to_thread(lookup.resolve, config.model.name, progress=progress),
        store_url=assignment.store_url,
        config=config.gateway,
        router=config.router,
        slo=config.slo,
        cluster_token=config.security.cluster_token,
        port=assignment.port,
        metrics_port=assignment.metrics_port,
    )
    return Running(
        address=gateway.address,
        metrics_address=gateway.metrics_address,
        incarnation=gateway.incarnation,
        wait=gateway.wait,
        drain=gateway.drain,
        close=gateway.stop,
    )


async def _start_worker(
    module: ModuleType, assignment: Assignment, node_ip: str, progress: Progress
) -> Running:
    worker = await module.start(
        _worker_config(assignment, node_ip),
        worker_id=assignment.worker_id,
        incarnation=draw_id(system_rng()),
        progress=progress,
    )
    return Running(
        address=worker.address,
        metrics_address=worker.metrics_address,
        incarnation=worker.incarnation,
        wait=worker.wait_closed,
        drain=worker.drain,
        close=worker.close,
        traits=traits_of(worker.hello),
    )


def traits_of(hello: WorkerHello) -> Traits:
    """What the registry says of a worker that says this of itself."""
    return Traits(**{item.name: getattr(hello, item.name) for item in fields(Traits)})


def _worker_config(assignment: Assignment, node_ip: str) -> PrefillWorkerConfig | DecodeWorkerConfig:
    config = assignment.config
    transfer = config.kv_transfer
    engine = replace(config.engine_of(assignment.role), cores=tuple(assignment.cores))
    if config.host.host in WILDCARDS:
        # The transports of a worker that other nodes shall reach listen where they can be dialled.
        transfer = replace(transfer, host=node_ip)
    if assignment.role == "prefill":
        return PrefillWorkerConfig(
            engine=engine,
            host=config.host,
            scheduler=config.pools.prefill.scheduler,
            kv_transfer=transfer,
        )
    pool = config.pools.decode if assignment.role == "decode" else config.pools.colocated
    return DecodeWorkerConfig(
        engine=engine,
        host=config.host,
        scheduler=pool.scheduler,
        kv_transfer=transfer,
    )


def reachable(address: str, node_ip: str) -> str:
    """What others dial to reach a listener at `address` on the node `node_ip`."""
    host, _colon, port = address.rpartition(":")
    return host_port(node_ip, int(port)) if host.strip("[]") in WILDCARDS else address
