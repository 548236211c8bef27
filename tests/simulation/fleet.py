"""A supervisor's fleet in virtual time: real slots, places, changes and announcer; its processes are
simulated workers, and real routers watch the registry."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from diphase.cluster.announcer import Announcer
from diphase.cluster.changes import Changes
from diphase.cluster.config import ClusterConfig, PlacementConfig, load
from diphase.cluster.fleet import Fleet
from diphase.cluster.places import Places
from diphase.cluster.roles import Assignment, Started, StartFailed, StartProgress, traits_of
from diphase.engine.fake import StepCost
from diphase.proto import cluster_pb2, inference_pb2
from diphase.proto.clock import system_rng
from diphase.proto.errors import ConfigError
from diphase.router.gateway import Router
from diphase.router.membership import Member, RedisMembership
from redis.exceptions import ConnectionError as StoreAway

from ..router.fakes import MemoryJournal, Outcome, generate
from .cluster import SimWorker, World
from .test_router_with_workers import check, draw_request, router_of
from .virtual_loop import VirtualClock

COST = StepCost(base_s=0.02, prefill_token_s=0.0005, decode_sequence_s=0.001)
"""Slow, so that little is computed while much happens."""
ALWAYS_HANDED_OVER: dict[str, Any] = {"local_prefill_tokens": 0}
START_S = 1.0
"""How long a process takes to start."""


@dataclass(eq=False)
class Group:
    """A placement group."""

    size: int


class Registry(RedisMembership):
    """The store's part of it in memory; unreachable as long as `away`, and then as empty as a new one."""

    def __init__(self) -> None:
        self.members_now: list[Member] = []
        self.away = False
        self._changed = asyncio.Event()

    def lose_everything(self) -> None:
        self.away = True
        self.members_now = []
        self._changed.set()

    async def publish(self, members: Sequence[Member]) -> None:
        if self.away:
            raise StoreAway("away")
        self.members_now = [Member.from_json(member.to_json()) for member in members]
        self._changed.set()

    async def watch(self) -> AsyncGenerator[list[Member], None]:
        known: list[Member] = []
        while True:
            self._changed.clear()
            if self.members_now and self.members_now != known:
                known = list(self.members_now)
                yield list(known)
            await self._changed.wait()


class SimProcess:
    """A worker's process, which dies when the test says so and starts again under its name."""

    def __init__(self, stage: Stage, assignment: Assignment) -> None:
        self.worker: SimWorker | None = None
        self._stage = stage
        self._name = assignment.worker_id
        self._gone = asyncio.Event()
        stage.processes[self._name] = self

    async def start(self, assignment: Assignment) -> Started | StartFailed:
        await asyncio.sleep(START_S)
        if self._stage.start_failures:
            return self._stage.start_failures.pop()
        config = assignment.config
        started = Started(
            worker_id=self._name,
            role=assignment.role,
            address=f"{self._name}:1",
            metrics_address="",
            incarnation=self._name,
            pid=1,
            ticks=1,
            node_id="n",
        )
        self._gone.clear()
        if assignment.role == "gateway":
            return started  # the test's routers are its gateways
        self.worker = SimWorker(
            self._stage.world,
            assignment.role,
            self._name,
            num_blocks=config.engine.kv_cache_mib,  # blocks, here
            block_size=config.engine.block_size,
            host=replace(config.host, cluster_token=""),  # its gateways show none
            transfer=config.kv_transfer,
            cost=COST,
            address=started.address,
        )
        hello = self.worker.host.hello
        return replace(started, incarnation=hello.incarnation, traits=traits_of(hello))

    async def progress(self) -> StartProgress | None:
        return None

    async def ended(self, started: Started) -> None:
        await self._gone.wait()

    async def kill(self, started: Started | None = None) -> None:
        """kill -9."""
        worker, self.worker = self.worker, None
        if worker is not None:
            await worker.kill()
        self._gone.set()

    async def drain(self) -> None:
        if self.worker is not None:
            await self.worker.host.drain()

    async def close(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            await worker.leave()
        self._gone.set()

    def abandon(self) -> None:
        raise AssertionError("nothing in here has to be abandoned")


class Stage:
    """Everything but the gateways. `room` is how many workers fit beside those of the start."""

    def __init__(self, seed: int, *settings: str, room: int = 8) -> None:
        self.config: ClusterConfig = load(None, ("engine.kv_cache_mib=64", *settings), system_rng())
        self.world = World.of(VirtualClock(asyncio.get_running_loop()), seed)
        self.registry = Registry()
        self.journal = MemoryJournal()
        self.processes: dict[str, SimProcess] = {}
        self.routers: dict[str, Router] = {}
        self.start_failures: list[StartFailed] = []
        self.room = room
        self._open = False
        self.said: list[str] = []
        self._starts = count()
        self.places = Places(self._reserve, self._give_back)
        announcer = Announcer(self.registry)
        self.fleet = Fleet(
            self.config,
            places=self.places,
            announcer=announcer,
            create=lambda assignment, _place: SimProcess(self, assignment),
            linked=self._linked,
            store_url="",
        )
        self.changes = Changes(self.fleet, self.config)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(announcer.run()), loop.create_task(self.fleet.run())]

    @classmethod
    @asynccontextmanager
    async def opened(cls, seed: int, *settings: str, room: int = 8) -> AsyncIterator[Stage]:
        """With every worker of the start serving, and at its end none left."""
        stage = cls(seed, *settings, room=room)
        await stage.fleet.open()
        stage._open = True
        for slot in stage.fleet.slots:
            await slot.first_start()
        yield stage
        for task in stage._tasks:
            task.cancel()
        await asyncio.wait(stage._tasks)
        await stage.fleet.close()
        for process in stage.processes.values():
            await process.close()

    @asynccontextmanager
    async def router(self, gateway_id: str = "g0", **options: int) -> AsyncIterator[Router]:
        """A gateway that watches the registry; ready when the workers of the start are."""
        parts = router_of(gateway_id, self.world, self.registry, self.journal, next(self._starts), **options)
        self.routers[gateway_id] = parts
        running = asyncio.create_task(parts.pool.run())
        try:
            await asyncio.sleep(0.2)
            yield parts
        finally:
            del self.routers[gateway_id]
            running.cancel()
            await asyncio.wait((running,))

    def names(self, pool: str) -> list[str]:
        return [tenant.worker_id for tenant in self.fleet.workers(pool)]

    def worker(self, name: str) -> SimWorker:
        found = self.processes[name].worker
        assert found is not None
        return found

    async def scale(self, pool: str, workers: int, timeout_s: float = 0.0) -> None:
        await self._make(
            cluster_pb2.ChangeRequest(
                scale=cluster_pb2.Scale(pool=pool, workers=workers), timeout_s=timeout_s
            )
        )

    async def restart(self, pool: str = "", *settings: str, timeout_s: float = 0.0) -> None:
        restart = cluster_pb2.Restart(pool=pool, settings=settings)
        await self._make(cluster_pb2.ChangeRequest(restart=restart, timeout_s=timeout_s))

    async def _make(self, request: cluster_pb2.ChangeRequest) -> None:
        await self.changes.make(request, lambda who, step: self.said.append(f"{who}: {step}"))

    async def until_idle(self) -> None:
        """Every worker that is there has nothing left, and the registry knows those alone."""
        workers = [process.worker for process in self.processes.values() if process.worker is not None]
        async with asyncio.timeout(60.0):
            while not all(worker.idle for worker in workers):  # noqa: ASYNC110 (virtual time)
                await asyncio.sleep(0.5)
        await asyncio.sleep(3.0)
        there = {slot.assignment.worker_id for slot in self.fleet.slots if slot.started is not None}
        assert {member.worker_id for member in self.registry.members_now} == there
        assert there >= {worker.name for worker in workers}

    async def _linked(self, workers: Set[str]) -> None:
        def ready() -> bool:
            return all(
                workers <= {worker.worker_id for worker in router.pool.ready()}
                for router in self.routers.values()
            )

        while not ready():  # noqa: ASYNC110 (virtual time)
            await asyncio.sleep(0.05)

    async def _reserve(self, role: str, placement: PlacementConfig, workers: int) -> Group:
        await asyncio.sleep(0.5)
        if not self._open:
            return Group(workers)
        if workers > self.room:
            raise ConfigError(f"pools.{role}: no room for {workers} workers")
        self.room -= workers
        return Group(workers)

    def _give_back(self, group: Group) -> None:
        self.room += group.size


class Load:
    """Clients that come one after the other for as long as the block lasts."""

    def __init__(self, router: Router, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self._router = router
        self._rng = random.Random(seed)
        self._stopped = False

    async def __aenter__(self) -> Load:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._source = self._group.create_task(self._come())
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._stopped = True
        await self._group.__aexit__(*exc)

    async def _come(self) -> None:
        number = 0
        while not self._stopped:
            self._group.create_task(self._one(draw_request(self._rng, number)))
            number += 1
            await asyncio.sleep(self._rng.uniform(0.01, 0.2))

    async def _one(self, message: inference_pb2.GenerateRequest) -> None:
        outcome = await generate(self._router, message)
        self.outcomes.append(outcome)
        check(message, outcome)
        assert outcome.error is None, outcome.error


def long_request(number: int, prompt: int = 100, max_tokens: int = 150) -> inference_pb2.GenerateRequest:
    rng = random.Random(f"long {number}")
    return inference_pb2.GenerateRequest(
        request_id=f"long-{number}",
        token_ids=inference_pb2.TokenIds(ids=[rng.randrange(5, 900) for _ in range(prompt)]),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
    )


def states(router: Router) -> dict[str, str]:
    return {worker.worker_id: worker.state.value for worker in router.pool.handles()}
