"""A gateway process: composes router, services, health, reflection and metrics, and runs them until
stopped."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
import prometheus_client
import redis.asyncio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..checkpoints.model_files import ModelFiles
from ..proto import worker_pb2
from ..proto.clock import Clock, MonotonicClock, Rng, system_rng
from ..proto.errors import ConfigError
from ..proto.ids import PROTOCOL_VERSION, draw_id
from ..proto.rpc import host_port, server_options
from .config import GatewayConfig, RouterConfig, SloConfig, is_loopback
from .dispatcher import Dispatcher
from .journal import Journal, RedisJournal
from .links import GrpcLink, LinkFactory
from .membership import MembershipSource, RedisMembership
from .metrics import GatewayMetrics
from .placement_policy import make_policy
from .prefix_index import PrefixIndex
from .services import CLUSTER, INFERENCE, GatewayServices
from .supervisor_link import SupervisorLink
from .text import ServedModel, TextProcessor
from .worker_handle import WorkerState
from .workers import ROLES, WorkerPool

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 3.0
HOUSEKEEPING_S = 0.1
LAST_FRAMES_S = 0.02
"""For the cancels of what was running to leave, when a gateway stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayParts:
    """What a gateway is given. Tests and simulations give it others than the live ones."""

    gateway_id: str
    model: ServedModel
    membership: MembershipSource
    journal: Journal
    config: GatewayConfig
    router: RouterConfig
    slo: SloConfig
    cluster_token: str = ""
    link_factory: LinkFactory = GrpcLink
    clock: Clock
    rng: Rng


class Router:
    """A gateway without its listeners: pool, policy, dispatcher and text, composed."""

    def __init__(self, parts: GatewayParts) -> None:
        router = parts.router
        self.incarnation = draw_id(parts.rng)
        self.metrics = GatewayMetrics()
        prefixes = PrefixIndex(router.max_prefix_blocks)
        self.pool = WorkerPool(
            hello=worker_pb2.GatewayHello(
                gateway_id=parts.gateway_id,
                incarnation=self.incarnation,
                cluster_token=parts.cluster_token,
                protocol_version=PROTOCOL_VERSION,
            ),
            model=parts.model.name,
            membership=parts.membership,
            link_factory=parts.link_factory,
            prefixes=prefixes,
            clock=parts.clock,
            hang_after_s=router.hang_after_s,
        )
        self.dispatcher = Dispatcher(
            gateway_id=parts.gateway_id,
            config=router,
            max_open_requests=parts.config.max_open_requests,
            pool=self.pool,
            policy=make_policy(router, prefixes),
            journal=parts.journal,
            metrics=self.metrics,
            clock=parts.clock,
        )
        self.text = TextProcessor(parts.model, parts.slo.slo(), parts.clock, parts.rng)
        self._add_gauges(parts.journal)

    def _add_gauges(self, journal: Journal) -> None:
        admission, pool, gauge = self.dispatcher.admission, self.pool, self.metrics.gauge
        gauge("queued_requests", "Requests without a token yet", lambda: admission.queued_requests)
        gauge("queued_tokens", "Their prompt tokens", lambda: admission.queued_tokens)
        gauge("open_requests", "Requests in any state", lambda: self.dispatcher.open_requests)
        gauge("journal_dropped", "Journal records given up", lambda: journal.dropped)
        self.metrics.gauges(
            "step_error",
            "How far recent steps are from their prediction: mean of |measured / predicted - 1|",
            "role",
            ROLES,
            pool.step_error,
        )
        for role in ROLES:
            gauge(
                f"{role}_workers_ready",
                "Workers that take requests",
                lambda role=role: sum(  # type: ignore[misc]
                    worker.role == role and worker.state is WorkerState.READY for worker in pool.handles()
                ),
            )


class RunningGateway:
    """A gateway that serves. Whoever started it stops it."""

    def __init__(self, parts: GatewayParts, router: Router) -> None:
        self._parts = parts
        self.router = router
        self.incarnation = router.incarnation
        self.address = ""
        """host:port of its gRPC server."""
        self.metrics_address = ""
        """host:port of /metrics."""
        self._services = GatewayServices(
            dispatcher=router.dispatcher,
            pool=router.pool,
            text=router.text,
            clock=parts.clock,
            client_stall_s=parts.config.client_stall_s,
            client_token="" if is_loopback(parts.config.host) else parts.cluster_token,
            supervisor=SupervisorLink(lambda: router.pool.supervisor, parts.cluster_token),
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(options=server_options(parts.config.max_message_bytes))
        self._metrics_server: Any = None
        self._background: asyncio.Task[None] | None = None
        self._cleanup = AsyncExitStack()

    async def open(self, port: int, metrics_port: int) -> None:
        """Listens, and looks for workers.

        Raises:
            ConfigError: a port is taken, or the host is none of this machine's.
        """
        host = self._parts.config.host
        self._services.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (INFERENCE, CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            bound = self._server.add_insecure_port(host_port(host, port))
        except RuntimeError as exc:
            raise ConfigError(_taken("gateway.port", host, port)) from exc
        self.address = host_port(host, bound)
        try:
            self._metrics_server, _ = prometheus_client.start_http_server(
                metrics_port, host, self.router.metrics.registry
            )
        except OSError as exc:
            await self._server.stop(None)
            raise ConfigError(_taken("gateway.metrics_port", host, metrics_port)) from exc
        self.metrics_address = host_port(host, self._metrics_server.server_port)
        await self._server.start()
        self._background = asyncio.create_task(self._run())
        logger.info("gateway_started gateway=%s address=%s", self._parts.gateway_id, self.address)

    def on_stop(self, client: redis.asyncio.Redis) -> None:
        """A client that is closed when the gateway has stopped."""
        self._cleanup.push_async_callback(client.aclose)

    async def wait(self) -> None:
        """Returns when the gateway was stopped; raises what its background work failed with."""
        assert self._background is not None
        with suppress(asyncio.CancelledError):
            await asyncio.shield(self._background)

    async def drain(self) -> None:
        """Takes no new requests; returns when none runs, or after gateway.drain_s."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._parts.config.drain_s):
                await self.router.dispatcher.drain()

    async def stop(self) -> None:
        """Cancels what still runs and lets go of everything. Idempotent."""
        await self._server.stop(0.0)
        await asyncio.sleep(LAST_FRAMES_S)
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait([self._background])
        await self._parts.journal.flush()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
            self._metrics_server = None
        await self._cleanup.aclose()

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.router.pool.run())
                group.create_task(self._parts.journal.run())
                group.create_task(self._keep_house())
        except Exception:
            logger.exception("gateway_background_failed gateway=%s", self._parts.gateway_id)
            await self._set_health(False)
            raise

    async def _keep_house(self) -> None:
        """The standard health service follows the pool; clients that stopped reading are let go."""
        before: bool | None = None
        while True:
            ready = self._services.ready
            if ready is not before:
                await self._set_health(ready)
                before = ready
            self._services.end_stalled()
            await asyncio.sleep(HOUSEKEEPING_S)

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if ready else status.NOT_SERVING
        for service in (health.OVERALL_HEALTH, INFERENCE, CLUSTER):
            await self._health.set(service, value)


async def start_parts(
    parts: GatewayParts, port: int | None = None, metrics_port: int | None = None
) -> RunningGateway:
    """A gateway of given parts, listening at these ports or at the configured ones.

    Raises:
        ConfigError: a port is taken; the host is beyond loopback and there is no cluster token.
    """
    config = parts.config
    if not is_loopback(config.host) and not parts.cluster_token:
        raise ConfigError(
            f"gateway.host = {config.host} is reachable from other machines; set security.cluster_token"
        )
    gateway = RunningGateway(parts, Router(parts))
    await gateway.open(
        config.port if port is None else port, config.metrics_port if metrics_port is None else metrics_port
    )
    return gateway


async def start(
    *,
    gateway_id: str,
    cluster: str,
    files: ModelFiles,
    store_url: str,
    config: GatewayConfig,
    router: RouterConfig,
    slo: SloConfig,
    cluster_token: str = "",
    port: int | None = None,
    metrics_port: int | None = None,
) -> RunningGateway:
    """The live gateway of a cluster: members and journal in the store at `store_url`.

    Raises:
        ConfigError: a port is taken; the host is beyond loopback and there is no cluster token.
        CheckpointError: the tokenizer or the chat template cannot be read.
    """
    model = await asyncio.to_thread(ServedModel.load, files)
    client = redis.asyncio.Redis.from_url(
        store_url, socket_timeout=STORE_TIMEOUT_S, socket_connect_timeout=STORE_TIMEOUT_S
    )
    parts = GatewayParts(
        gateway_id=gateway_id,
        model=model,
        membership=RedisMembership(client, cluster),
        journal=RedisJournal(
            client,
            cluster,
            flush_s=router.journal_flush_s,
            ttl_s=router.journal_ttl_s,
            max_pending=router.max_journal_pending,
        ),
        config=config,
        router=router,
        slo=slo,
        cluster_token=cluster_token,
        clock=MonotonicClock(),
        rng=system_rng(),
    )
    try:
        gateway = await start_parts(parts, port, metrics_port)
    except BaseException:
        await client.aclose()
        raise
    gateway.on_stop(client)
    return gateway


def _taken(name: str, host: str, port: int) -> str:
    return f"{name} = {port} cannot be listened on at {host}: it is in use, or the host is not this machine's"
