"""A cluster from its start to its stop: places every process, keeps it running, publishes who is there.

Nothing here is on the path of a request. Ray restarts processes, slots notice and publish it, gateways
judge who hangs; the supervisor ties them together and, at the end, stops what it started and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Set
from typing import Any, TypeVar

import ray
from redis.exceptions import RedisError

from ..checkpoints import lookup
from ..kv_transfer.registry import load_factory
from ..proto.clock import MonotonicClock, system_rng
from ..proto.errors import ConfigError, InternalError
from ..proto.ids import draw_id
from ..router.config import is_loopback
from ..router.membership import Member, RedisMembership
from . import name_lease, ray_process, store
from .announcer import Announcer
from .changes import Changes
from .config import ClusterConfig, PlacementConfig
from .control import Control
from .endpoint import StatusClient, wait_linked
from .fleet import POOLS, Fleet
from .foundation import Foundation, foundation
from .liveness import LivenessWatch
from .places import Place, Places
from .ray_process import NodeAgents, RayProcess
from .roles import Assignment, reachable
from .slot import ProcessGone, Slot

logger = logging.getLogger(__name__)

T = TypeVar("T")

Report = Callable[[str, str, float], None]
"""(who, what is being done, share of it that is done)."""

PROGRESS_S = 0.2
RAY_S = 0.5
"""Between two looks at Ray's own processes."""
WORKER_DRAIN_S = 10.0
"""Workers have nothing left to do once the gateways are drained, but for leases and last messages."""


@contextlib.asynccontextmanager
async def running(
    config: ClusterConfig, report: Report, hurry: asyncio.Event | None = None
) -> AsyncIterator[Cluster]:
    """A cluster that serves, until the block is left. Enter it on the main thread.

    Args:
        hurry: once it is set, the end waits for no process to stop by itself.

    Raises:
        DiphaseError: it could not be started; nothing is left behind.
    """
    await _check(config, report)
    async with _name(config, report):
        report("cluster", "starting Ray" if not config.ray.address else "joining Ray", 0.0)
        with foundation(config) as base:
            cluster = Cluster(config, base, report, hurry or asyncio.Event())
            try:
                await cluster.start()
                yield cluster
            finally:
                await cluster.close()


def _name(config: ClusterConfig, report: Report) -> contextlib.AbstractAsyncContextManager[None]:
    """Holds the cluster's name where other clusters may be: in a store that is not its own."""
    if not config.store.url:
        return contextlib.nullcontext()
    return name_lease.held(
        config.store.url,
        config.name,
        draw_id(system_rng()),
        lambda: report("cluster", f"waiting for the name {config.name}, which a supervisor had or has", 0.0),
    )


async def _check(config: ClusterConfig, report: Report) -> None:
    """Finds what cannot work before anything is started. On a joined Ray the places are not known yet."""
    if config.kv_transfer.transport != "auto":
        load_factory(config.kv_transfer.transport)
    if config.ray.address:
        return
    for replica in range(config.gateway.replicas if config.gateway.port else 0):
        _check_port(config.gateway.host, config.gateway.port + replica)
    await asyncio.to_thread(
        lookup.resolve, config.model.name, progress=lambda stage, share: report("model", stage, share)
    )


async def until(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `event` is set first; `work` is then cancelled and has ended."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        waiter.cancel()
        task.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        raise ConfigError(
            f"gateway.port: cannot listen on {host}:{port}: {exc.strerror}; choose another port, or 0 for any"
        ) from exc


class Cluster:
    """The processes of a cluster. Made by `running`."""

    def __init__(self, config: ClusterConfig, base: Foundation, report: Report, hurry: asyncio.Event) -> None:
        self.config = config
        self._base = base
        self._report = report
        self._hurry = hurry
        self._agents = NodeAgents(base.folder.name)
        self._tasks: list[asyncio.Task[None]] = []
        self._status = StatusClient(config.security.cluster_token)
        self._redis = base.store.client()
        self._members = RedisMembership(self._redis, config.name)
        self._announcer = Announcer(self._members)
        self._places = Places(self._reserve, ray.util.remove_placement_group)
        self._fleet = Fleet(
            config,
            places=self._places,
            announcer=self._announcer,
            create=self._create,
            linked=self._linked,
            store_url=base.store.url,
        )
        self._control = Control(Changes(self._fleet, config), config.security.cluster_token)

    @property
    def slots(self) -> list[Slot]:
        """Of every process that runs or starts."""
        return self._fleet.slots

    @property
    def addresses(self) -> list[str]:
        """host:port of the gateways that run now."""
        return [
            slot.started.address for slot in self.slots if slot.started and slot.started.role == "gateway"
        ]

    async def start(self) -> None:
        """Returns once every process serves."""
        await self._fleet.open()
        self._own(self._fleet.run())
        self._own(self._watch_ray())
        self._own(self._announcer.run())
        await self._all_started()
        # Before that a decode worker would compute prompts, as it does when the prefill pool is dead.
        await self._linked(
            {slot.assignment.worker_id for slot in self.slots if slot.assignment.role in POOLS}
        )
        await self._listen()
        self._own(store.keep_running(self._restart_store))
        self._own(
            LivenessWatch(self.slots, self._status.glance, MonotonicClock(), self.config.supervisor).run()
        )

    async def wait(self) -> None:
        """Until the cluster cannot go on.

        Raises:
            InternalError: always; what keeps the cluster running has ended, most likely Ray.
        """
        done, _running = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if isinstance(error, ProcessGone):
                raise InternalError(str(error)) from error
            if isinstance(error, InternalError):
                raise error
            if error is not None:
                raise InternalError(f"the supervisor failed: {type(error).__name__}: {error}") from error
        raise InternalError("the supervisor ended without a reason")

    async def drain(self) -> None:
        """Takes no new requests and returns once the accepted ones are over, or after gateway.drain_s."""
        for roles, timeout_s in (
            (("gateway",), self.config.gateway.drain_s),
            (("prefill", "decode", "colocated"), WORKER_DRAIN_S),
        ):
            draining = [slot.process.drain() for slot in self.slots if slot.assignment.role in roles]
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.gather(*draining)
            except TimeoutError:
                logger.warning("drain_incomplete roles=%s after_s=%.0f", ",".join(roles), timeout_s)

    async def close(self) -> None:
        """Ends every process of the cluster. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await until(self._hurry, self._take_leave())
        if self._hurry.is_set():
            for slot in self.slots:
                slot.process.abandon()
        self._agents.close()
        if not self._base.runtime.private:  # with a private Ray they end, and a dead one would not answer
            self._places.clear()
        await self._status.close()
        await self._redis.aclose()

    async def _take_leave(self) -> None:
        """What takes long when a process or the store does not answer."""
        await self._control.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fleet.close()
        await asyncio.gather(*(slot.process.close() for slot in self.slots))
        with contextlib.suppress(RedisError, OSError):
            await self._members.publish([])

    async def _reserve(self, role: str, placement: PlacementConfig, workers: int) -> Any:
        return await ray_process.reserve(role, placement, workers, self.config.ray.placement_timeout_s)

    def _create(self, assignment: Assignment, place: Place | None) -> RayProcess:
        mark = self._base.folder.name
        if place is None:
            node_id = None if self.config.store.url else self._base.runtime.node_id
            return RayProcess(ray_process.create_gateway(node_id, mark), self._agents)
        actor = ray_process.create_worker(
            assignment.role,
            assignment.config.pools.placements()[assignment.role],
            (place.group, place.index),
            mark,
            assignment.config.engine.threads,
        )
        return RayProcess(actor, self._agents)

    async def _listen(self) -> None:
        """Operators' changes come from now on, by way of the gateways."""
        beyond = not is_loopback(self.config.host.host)
        address = await self._control.open("0.0.0.0" if beyond else self.config.host.host)
        self._announcer.add(
            Member(
                worker_id="supervisor",
                role="supervisor",
                address=reachable(address, ray.util.get_node_ip_address()),
                incarnation=draw_id(system_rng()),
            )
        )

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _all_started(self) -> None:
        shows = [asyncio.get_running_loop().create_task(self._show_progress(slot)) for slot in self.slots]
        try:
            await asyncio.gather(*(slot.first_start() for slot in self.slots))
        finally:
            for show in shows:
                show.cancel()
            await asyncio.gather(*shows, return_exceptions=True)

    async def _linked(self, workers: Set[str]) -> None:
        """Until every gateway has a stream to each of `workers`."""
        for address in self.addresses:
            await wait_linked(self._status, address, workers)

    async def _show_progress(self, slot: Slot) -> None:
        while slot.started is None:
            if (progress := await slot.process.progress()) is not None:
                self._report(slot.assignment.worker_id, progress.stage, progress.share)
            await asyncio.sleep(PROGRESS_S)
        self._report(slot.assignment.worker_id, "ready", 1.0)

    async def _watch_ray(self) -> None:
        while True:
            if (dead := self._base.runtime.dead()) is not None:
                raise InternalError(
                    f"{dead} of this cluster's Ray has died, and no process can be started or watched "
                    "without it; start the cluster again"
                )
            await asyncio.sleep(RAY_S)

    async def _restart_store(self) -> bool:
        return await asyncio.to_thread(self._base.store.restart_if_dead)
