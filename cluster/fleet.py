"""The processes of a cluster as a set that grows and shrinks while it serves.

A worker that is added serves at every gateway before anybody counts on it; one that leaves drains first. What
is to be added or to leave, and in which order, is decided elsewhere (changes.py). Knows no Ray: places and
processes come from whoever makes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass

from .announcer import Announcer
from .config import ClusterConfig
from .places import Place, Places
from .roles import Assignment
from .slot import Process, Slot

logger = logging.getLogger(__name__)

POOLS = ("prefill", "decode", "colocated")
DRAIN_MARGIN_S = 10.0
"""A worker ends its drain by itself after host.drain_timeout_s, and what takes it so much longer, hangs."""

Say = Callable[[str, str], None]
"""(worker_id, what happens to it)."""

Create = Callable[[Assignment, Place | None], Process]
"""Makes the process of an assignment; gateways have no place."""

Linked = Callable[[Set[str]], Awaitable[None]]
"""Returns once every gateway can place requests on these workers; raises DiphaseError when one does not come
to it."""


@dataclass(slots=True, eq=False)
class Tenant:
    """A slot, where it has room, and the task that keeps it running."""

    slot: Slot
    place: Place | None
    running: asyncio.Task[None]
    leaving: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        return self.slot.assignment.worker_id

    @property
    def serves(self) -> bool:
        return self.slot.started is not None and self.leaving is None


class Fleet:
    """All slots. Everything happens on one event loop."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        places: Places,
        announcer: Announcer,
        create: Create,
        linked: Linked,
        store_url: str,
    ) -> None:
        self.places = places
        self.configs = dict.fromkeys(POOLS, config)
        """What the next worker of each pool is started with."""
        self.slots: list[Slot] = []
        """Of workers and gateways; those that leave included."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._config = config
        self._announcer = announcer
        self._create = create
        self._linked = linked
        self._store_url = store_url
        self._tenants: list[Tenant] = []
        self._numbers: Counter[str] = Counter()

    def workers(self, pool: str) -> list[Tenant]:
        """Those that are to stay, oldest first."""
        return [
            tenant
            for tenant in self._tenants
            if tenant.slot.assignment.role == pool and tenant.leaving is None
        ]

    async def open(self) -> None:
        """Begins to start what the configuration wants.

        Raises:
            ConfigError: there is no room for it.
        """
        for pool, placement in self._config.pools.placements().items():
            for place in await self.places.first(pool, placement):
                self._settle(pool, place)
        for _ in range(self._config.gateway.replicas):
            self._settle("gateway", None)

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            ProcessGone: a process has ended that will never come back.
        """
        await asyncio.shield(self._broken)

    async def add(self, pool: str, place: Place, say: Say) -> Tenant:
        """One more worker in `place`, which is the worker's from now on; returns once every gateway places
        requests on it. When it fails or is cancelled, nothing of it is left.

        Raises:
            DiphaseError: it does not start, or a gateway cannot use it.
        """
        tenant = self._settle(pool, place)
        try:
            say(tenant.worker_id, "starts")
            await tenant.slot.first_start()
            await self._linked({tenant.worker_id})
        except BaseException:
            await self.remove(tenant)
            raise
        say(tenant.worker_id, "serves")
        return tenant

    async def remove(self, tenant: Tenant, say: Say = lambda *_: None) -> None:
        """Has the worker finish what it has, and ends it; returns when it has ended. Once begun it goes on,
        also when this is cancelled; asked again, it is waited for."""
        if tenant.leaving is None:
            say(tenant.worker_id, "drains" if tenant.slot.started else "ends")
            tenant.leaving = asyncio.get_running_loop().create_task(self._leave(tenant))
        await asyncio.shield(tenant.leaving)
        say(tenant.worker_id, "has ended")

    async def close(self) -> None:
        """Lets go of every slot; the processes are whoever closes them."""
        tasks = [task for tenant in self._tenants for task in (tenant.running, tenant.leaving) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._broken.cancel()

    def _settle(self, role: str, place: Place | None) -> Tenant:
        slot = Slot(
            assignment := self._assignment(role, place),
            self._create(assignment, place),
            publish=self._announcer.publish,
            remove=self._announcer.remove,
            drains=self._announcer.drains,
            config=self._config.supervisor,
        )
        tenant = Tenant(slot, place, asyncio.get_running_loop().create_task(slot.run()))
        tenant.running.add_done_callback(lambda task: self._ended(tenant, task))
        self._tenants.append(tenant)
        self.slots.append(slot)
        return tenant

    def _assignment(self, role: str, place: Place | None) -> Assignment:
        """Numbers go up: a name is never used again while the supervisor lives, for its bearer may drain."""
        number = self._numbers[role]
        self._numbers[role] += 1
        gateway = self._config.gateway
        is_gateway = role == "gateway"
        return Assignment(
            worker_id=f"{role}-{number}",
            role=role,
            config=self.configs.get(role, self._config),
            store_url=self._store_url if is_gateway else "",
            port=gateway.port + number if is_gateway and gateway.port else 0,
            metrics_port=gateway.metrics_port + number if is_gateway and gateway.metrics_port else 0,
            cores=place.cores if place is not None else [],
        )

    async def _leave(self, tenant: Tenant) -> None:
        slot = tenant.slot
        try:
            await slot.retire(slot.assignment.config.host.drain_timeout_s + DRAIN_MARGIN_S)
        except Exception:  # the top of a worker's end: whatever it is, the worker must not stay
            logger.exception("leave_failed worker_id=%s", tenant.worker_id)
            slot.process.abandon()
        tenant.running.cancel()
        self._tenants.remove(tenant)
        self.slots.remove(slot)
        if tenant.place is not None:
            self.places.leave(tenant.place)
        logger.info("worker_left worker_id=%s", tenant.worker_id)

    def _ended(self, tenant: Tenant, task: asyncio.Task[None]) -> None:
        """A slot runs until it is told otherwise; it fails when its process will never come back."""
        if task.cancelled() or (error := task.exception()) is None or tenant.slot.retiring:
            return
        if not self._broken.done():
            self._broken.set_exception(error)
