"""A worker on its feet: host, engine thread, gRPC server and /metrics, from parts that a role's module has
built."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

import grpc.aio
from prometheus_client import start_http_server

from ..proto.clock import Clock
from ..proto.errors import ConfigError
from ..proto.ids import PROTOCOL_VERSION
from ..proto.rpc import INTERNAL_OPTIONS
from ..proto.worker_pb2 import WorkerHello
from .base import Engine
from .engine_thread import EngineThread
from .host import WorkerHost
from .host_config import HostConfig
from .host_metrics import HostMetrics
from .role import Role
from .service import WorkerService

logger = logging.getLogger(__name__)

STOP_GRACE_S = 0.5
"""Seconds that open streams have to end when the server stops."""


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
    )


class RunningWorker:
    """What `start` of a worker module returns. Made by `serve`."""

    def __init__(
        self,
        host: WorkerHost,
        config: HostConfig,
        server: grpc.aio.Server,
        address: str,
        close_parts: Callable[[], None],
    ) -> None:
        self.host = host
        self.hello = host.hello
        self.incarnation = host.hello.incarnation
        self.address = address
        """host:port of the gRPC server."""
        self._server = server
        self._close_parts = close_parts
        try:
            self._metrics_server, self._metrics_thread = start_http_server(
                config.metrics_port, config.host, host.metrics.registry
            )
        except OSError as exc:
            raise ConfigError(
                f"host.metrics_port = {config.metrics_port} cannot be used ({exc.strerror}); "
                "choose another, or 0 for any free one"
            ) from exc
        self.metrics_address = f"{config.host}:{self._metrics_server.server_port}"
        """host:port of /metrics."""
        self._running = asyncio.create_task(host.run(), name=f"worker {host.hello.worker_id}")

    async def wait_closed(self) -> None:
        """Returns when the worker has been closed.

        Raises:
            InternalError: the engine is broken; the process should end.
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
        self._running.cancel()
        await asyncio.wait((self._running,))
        await self._server.stop(STOP_GRACE_S)
        await asyncio.get_running_loop().run_in_executor(None, self._close_threads)

    def _close_threads(self) -> None:
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
        self._metrics_thread.join()
        self._close_parts()


async def serve(
    *,
    role: Role,
    engine: Engine,
    thread: EngineThread,
    hello: WorkerHello,
    config: HostConfig,
    clock: Clock,
    close_transports: Callable[[], None],
) -> RunningWorker:
    """Starts the server and the host. The worker owns engine, thread and transports from now on; when this
    raises, they are closed.

    Raises:
        ConfigError: a port is in use, or the address is not this machine's.
    """

    def close_parts() -> None:
        # A step may still run: the thread ends after it, and only then may its memory go.
        thread.close()
        close_transports()
        engine.close()

    host = WorkerHost(
        role=role,
        execute=partial(thread.execute, engine),
        hello=hello,
        config=config,
        clock=clock,
        metrics=HostMetrics(),
    )
    server = grpc.aio.server(options=INTERNAL_OPTIONS)
    try:
        WorkerService(host, config.hello_timeout_s).add_to(server)
        for add in role.servicers():
            add(server)
        address = f"{config.host}:{_bind(server, config)}"
        await server.start()
        running = RunningWorker(host, config, server, address, close_parts)
    except BaseException:
        await server.stop(None)
        close_parts()
        raise
    logger.info("worker_started worker_id=%s role=%s address=%s", hello.worker_id, hello.role, address)
    return running


def _bind(server: grpc.aio.Server, config: HostConfig) -> int:
    wanted = f"{config.host}:{config.port}"
    try:
        return server.add_insecure_port(wanted)
    except RuntimeError as exc:
        raise ConfigError(
            f"cannot listen on {wanted}: it is in use or not an address of this machine"
        ) from exc
