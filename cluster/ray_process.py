"""The supervisor's handle of one Ray actor: start, notice the end, kill, drain. The live `slot.Process`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..proto.errors import ConfigError, InternalError
from .actors import ACTORS
from .config import PlacementConfig
from .node_agent import NodeAgent
from .roles import Assignment, Started, StartFailed, StartProgress
from .slot import ProcessGone

logger = logging.getLogger(__name__)

RETRY_S = 0.05
AGENT_S = 5.0
MAX_CONCURRENCY = 64
"""Calls of one actor that may be pending; a handful are."""
_KEYS = {"CPU": "cpus", "GPU": "gpus"}
"""Ray's name of what a worker takes to the pool's key."""
_NOT_SHOWN = re.compile(r":|_group_(\d+_)?[0-9a-f]{24,}$")
"""Resources that Ray makes up itself: one for each node, and some for each bundle of each placement group."""


class NodeAgents:
    """A NodeAgent for each node, started when first needed."""

    def __init__(self, mark: str) -> None:
        """`mark`: of the cluster's processes, see processes.py."""
        self._mark = mark
        self._agents: dict[str, Any] = {}

    def on(self, node_id: str) -> Any:
        """The handle of the agent on that node."""
        if node_id not in self._agents:
            self._agents[node_id] = ray.remote(NodeAgent).options(
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(self._mark)  # fmt: skip
        return self._agents[node_id]

    def close(self) -> None:
        for agent in self._agents.values():
            ray.kill(agent)
        self._agents.clear()


class RayProcess:
    """One actor that Ray restarts whenever its process ends."""

    def __init__(self, actor: Any, agents: NodeAgents) -> None:
        """Takes over `actor`: close() ends it."""
        self._actor = actor
        self._agents = agents
        self._started: Started | None = None

    async def start(self, assignment: Assignment) -> Started | StartFailed:
        while True:
            try:
                answer: Started | StartFailed = await self._actor.start.remote(assignment)
                self._started = answer if isinstance(answer, Started) else None
                return answer
            except ActorUnavailableError:  # Ray has not noticed the death, or is restarting
                await asyncio.sleep(RETRY_S)
            except ActorDiedError as exc:
                raise ProcessGone(f"Ray gave {assignment.worker_id} up: {_last_line(exc)}") from exc
            except RayError as exc:  # no place or environment for it, or it raised
                raise InternalError(f"Ray did not start {assignment.worker_id}: {_last_line(exc)}") from exc

    async def progress(self) -> StartProgress | None:
        """How far a start is; None while the process is not there."""
        try:
            answer: StartProgress = await self._actor.progress.remote()
            return answer
        except RayError:
            return None

    async def ended(self, started: Started) -> None:
        """The node's agent notices within milliseconds, a call that is pending in the process within two
        seconds."""
        async with asyncio.TaskGroup() as group:
            watchers = [
                group.create_task(self._agent_notices(started)),
                group.create_task(self._call_fails()),
            ]
            await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                watcher.cancel()

    async def _agent_notices(self, started: Started) -> None:
        while True:
            try:
                await self._agents.on(started.node_id).wait_exit.remote(started.pid, started.ticks)
                return
            except RayError as exc:
                logger.debug("node_agent_lost node=%s error=%s", started.node_id, exc)
                await asyncio.sleep(AGENT_S)

    async def _call_fails(self) -> None:
        with contextlib.suppress(RayError):
            await self._actor.wait_closed.remote()

    async def kill(self, started: Started) -> None:
        try:
            async with asyncio.timeout(AGENT_S):
                await self._agents.on(started.node_id).kill.remote(started.pid, started.ticks)
        except (RayError, TimeoutError) as exc:
            # Slower on a stopped process (seconds), but needs no agent.
            logger.warning("node_agent_silent node=%s error=%s", started.node_id, exc)
            ray.kill(self._actor, no_restart=False)

    async def drain(self) -> None:
        with contextlib.suppress(RayError):  # what has died has nothing left to do
            await self._actor.drain.remote()

    async def close(self) -> None:
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(AGENT_S):
                await self._actor.stop.remote()
        # First, so that nothing is started again; but Ray takes seconds to end a stopped process.
        self.abandon()
        if self._started is not None:
            with contextlib.suppress(RayError, TimeoutError):
                async with asyncio.timeout(AGENT_S):
                    await self._agents.on(self._started.node_id).kill.remote(
                        self._started.pid, self._started.ticks
                    )

    def abandon(self) -> None:
        ray.kill(self._actor)


def _last_line(exc: RayError) -> str:
    """What happened, without Ray's stack traces."""
    lines = str(exc).strip().splitlines()
    return lines[-1] if lines else type(exc).__name__


async def reserve(role: str, placement: PlacementConfig, workers: int, timeout_s: float) -> PlacementGroup:
    """A placement group with one bundle for each of `workers` workers of the pool.

    Raises:
        ConfigError: no nodes with that much room within `timeout_s`.
    """
    bundles = [placement.bundle() for _ in range(workers)]
    group = ray.util.placement_group(bundles, strategy=placement.strategy)
    try:
        async with asyncio.timeout(timeout_s):
            await group.ready()
    except TimeoutError:
        ray.util.remove_placement_group(group)
        has = {
            name: amount for name, amount in ray.cluster_resources().items() if not _NOT_SHOWN.search(name)
        }
        raise no_room(role, placement, workers, timeout_s, has) from None
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return group


def no_room(
    role: str, placement: PlacementConfig, workers: int, timeout_s: float, has: Mapping[str, float]
) -> ConfigError:
    """The refusal of a pool that a Ray cluster with so much in all has no room for."""
    bundle = placement.bundle()
    keys = dict.fromkeys(_KEYS.get(name, "resources") for name in bundle)
    return ConfigError(
        f"pools.{role}: no room for {workers} workers of {bundle} with strategy {placement.strategy} within "
        f"{timeout_s:.0f} s; the Ray cluster has {has} in all: start it with less in "
        f"{' or '.join(f'pools.{role}.{key}' for key in keys)}, or with more nodes"
    )


def create_worker(
    role: str, placement: PlacementConfig, bundle: tuple[PlacementGroup, int], mark: str, threads: int
) -> Any:
    """The actor of a pool's worker, in that bundle of a placement group."""
    group, index = bundle
    return _create(
        role,
        mark,
        threads,
        # The bundle has reserved them. An actor that takes none leaves room for its successor beside it; but
        # GPUs are given to processes by name.
        num_cpus=0,
        num_gpus=placement.gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    )


def create_gateway(node_id: str | None, mark: str) -> Any:
    """The actor of a gateway, on that node or, with None, on any; it reserves no resources."""
    here = "SPREAD" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _create("gateway", mark, 1, num_cpus=0, scheduling_strategy=here)


def _create(role: str, mark: str, threads: int, **options: Any) -> Any:
    actor = ray.remote(ACTORS[role]).options(max_restarts=-1, max_concurrency=MAX_CONCURRENCY, **options)
    return actor.remote(mark, threads)
