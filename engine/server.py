"""A worker on its feet: host, engine thread, gRPC server and /metrics, from parts that a role's module has
built."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Protocol

import grpc.aio
from prometheus_client import start_http_server

from ..proto.clock import Clock
from ..proto.errors import ConfigError, DiphaseError
from ..proto.ids import PROTOCOL_VERSION
from ..proto.rpc import INTERNAL_OPTIONS, host_port
from ..proto.worker_pb2 import WorkerHello
from .base import Engine
from .config import EngineConfig
from .engine_thread import EngineThread
from .host import WorkerHost
from .host_config import HostConfig
from .role import Role
from .service import WorkerService

logger = logging.getLogger(__name__)

STOP_GRACE_S = 0.1
"""Seconds that open streams have to end when the server stops."""

Progress = Callable[[str, float], None]
"""(what is being done, share of it that is done)."""


class LoadEngine(Protocol):
    """Blocks until the engine can run."""

    def __call__(self, config: EngineConfig, *, progress: Progress | None) -> Engine: ...


def hello_of(
    engine: Engine,
    *,
    worker_id: str,
    incarnation: str,
    role: str,
    max_running: int,
    chunk_budget: int,
    transports: Sequence[str] = (),
) -> WorkerHello:
    """What a worker says of itself to gateways."""
    return WorkerHello(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        model=engine.limits.name,
        block_size=engine.layout.block_size,
        num_blocks=engine.num_blocks,
        context_length=engine.limits.context_length,
        max_running=max_running,
        chunk_budget=chunk_budget,
        layout_hash=engine.layout.fingerprint(),
        protocol_version=PROTOCOL_VERSION,
        transports=transports,
        kv_sharding=f"tp{engine.sharding.tp} pp{engine.sharding.pp}",
        package_version=version(__name__.partition(".")[0]),
    )


class RunningWorker:
    """What `start` of a worker module returns. Made by `serve`."""

    def __init__(
        self,
        host: WorkerHost,
        server: grpc.aio.Server,
        *,
        address: str,
        metrics_address: str,
        parts: ExitStack,
    ) -> None:
        self.host = host
        self.hello = host.hello
        self.incarnation = host.hello.incarnation
        self.address = address
        """host:port of the gRPC server."""
        self.metrics_address = metrics_address
        """host:port of /metrics."""
        self._server = server
        self._parts = parts
        self._closing = False
        self._running = asyncio.create_task(self._run(), name=f"worker {host.hello.worker_id}")

    async def _run(self) -> None:
        try:
            await self.host.run()
        finally:
            # Also when the engine is broken: nobody should find a worker here that serves nothing.
            await self._server.stop(STOP_GRACE_S)

    async def wait_closed(self) -> None:
        """Returns when the worker has been closed.

        Raises:
            InternalError: the engine is broken; the process should end.
        WorkerLost: it has lost one of its ranks; likewise.
        """
        await asyncio.wait((self._running,))
        if not self._running.cancelled():
            self._running.result()

    async def drain(self) -> None:
        """Takes no new work and returns when nothing is left, leases included. The worker still has to be
        closed."""
        await self.host.drain()

    async def close(self) -> None:
        """Ends everything at once. Idempotent."""
        if not self._closing:
            self._closing = True
            self._running.cancel()
        await asyncio.wait((self._running,))
        await asyncio.get_running_loop().run_in_executor(None, self._parts.close)


async def load_engine(
    load: LoadEngine, config: EngineConfig, progress: Progress | None, parts: ExitStack
) -> tuple[Engine, EngineThread]:
    """Loads an engine on a thread of its own; `parts` will end both. `progress` is called from that thread.

    Raises:
        DiphaseError: what `load` raises.
    """
    thread = EngineThread()
    parts.callback(thread.close)
    engine = await thread.call(partial(load, config, progress=progress))
    # A step may still run when all is closed: its thread has to end before the memory goes.
    parts.pop_all()
    parts.callback(engine.close)
    parts.callback(thread.close)
    return engine, thread


async def serve(
    *,
    role: Role,
    engine: Engine,
    thread: EngineThread,
    hello: WorkerHello,
    config: HostConfig,
    clock: Clock,
    parts: ExitStack,
) -> RunningWorker:
    """Starts the server and the host. The worker takes `parts` over and closes them at its end; when this
    raises they stay the caller's.

    Raises:
        ConfigError: a port is in use, or the address is not this machine's.
    """
    host = WorkerHost(
        role=role, execute=partial(thread.execute, engine), hello=hello, config=config, clock=clock
    )
    server = grpc.aio.server(options=INTERNAL_OPTIONS)
    try:
        WorkerService(host, config.hello_timeout_s).add_to(server)
        for add in role.servicers():
            add(server)
        address = host_port(config.host, _bind(server, config))
        metrics_address = _serve_metrics(host, config, parts)
        await server.start()
    except BaseException:
        await server.stop(None)
        raise
    running = RunningWorker(
        host, server, address=address, metrics_address=metrics_address, parts=parts.pop_all()
    )
    loop = asyncio.get_running_loop()

    def lost(error: DiphaseError) -> None:
        loop.call_soon_threadsafe(host.broken, error)

    engine.watch(lost)
    logger.info("worker_started worker_id=%s role=%s address=%s", hello.worker_id, hello.role, address)
    return running


def _bind(server: grpc.aio.Server, config: HostConfig) -> int:
    wanted = host_port(config.host, config.port)
    try:
        return server.add_insecure_port(wanted)
    except RuntimeError as exc:
        raise ConfigError(
            f"cannot listen on {wanted}: it is in use or not an address of this machine"
        ) from exc


def _serve_metrics(host: WorkerHost, config: HostConfig, parts: ExitStack) -> str:
    """Starts /metrics on a thread that `parts` ends; returns its host:port."""
    try:
        server, thread = start_http_server(config.metrics_port, config.host, host.metrics.registry)
    except OSError as exc:
        raise ConfigError(
            f"host.metrics_port = {config.metrics_port} cannot be used ({exc.strerror}); "
            "choose another, or 0 for any free one"
        ) from exc
    parts.callback(thread.join)
    parts.callback(server.server_close)
    parts.callback(server.shutdown)
    return host_port(config.host, server.server_port)
