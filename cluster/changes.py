"""Scaling and restarting pools while they serve: what is checked, and in which order workers come and go.

One change at a time, in the order of their arrival. A change that cannot be made is refused before anything
happens; one that fails on the way leaves what serves and says what there is.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from ..proto import cluster_pb2 as pb
from ..proto.errors import ConfigError, WorkerLost
from .config import MOST_WORKERS, ClusterConfig
from .config_change import changed
from .fleet import POOLS, Fleet, Say, Tenant

logger = logging.getLogger(__name__)


class Changes:
    """What may be asked of a running cluster."""

    def __init__(self, fleet: Fleet, config: ClusterConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._turn = asyncio.Lock()

    async def make(self, request: pb.ChangeRequest, say: Say) -> None:
        """Makes the change that is asked for; returns when it is complete. Cancelled, or at its deadline, it
        starts nothing more and ends what it was starting; who drains, drains on.

        Raises:
            ConfigError: it cannot be made.
            WorkerLost: a worker did not start, or the deadline came first.
        """
        timeout_s = request.timeout_s or self._config.supervisor.change_timeout_s
        if not 0.0 < timeout_s <= 86_400.0:
            raise ConfigError(f"a change cannot take {timeout_s:g} s; give it more than 0 and up to 86400")
        kind = request.WhichOneof("change")
        if kind is None:
            raise ConfigError("the change says neither scale nor restart")
        logger.info("change_asked %s", " ".join(str(request).split()))
        try:
            async with asyncio.timeout(timeout_s):
                if self._turn.locked():
                    say("", "waits for an earlier change")
                async with self._turn:
                    if kind == "scale":
                        await self._scale(request.scale.pool, request.scale.workers, say)
                    else:
                        await self._restart(request.restart.pool, request.restart.settings, say)
        except TimeoutError:
            raise WorkerLost(
                f"not complete after {timeout_s:g} s; now there are {self._standing()}"
            ) from None

    async def _scale(self, pool: str, wanted: int, say: Say) -> None:
        _check_pool(pool)
        if wanted > MOST_WORKERS:
            raise ConfigError(f"{wanted} workers are too many; a pool has up to {MOST_WORKERS}")
        fleet = self._fleet
        if sum(wanted if other == pool else len(fleet.workers(other)) for other in POOLS[1:]) == 0:
            raise ConfigError(
                f"without a worker in {pool} nobody could decode; keep one there, or scale "
                f"{'colocated' if pool == 'decode' else 'decode'} to 1 or more first"
            )
        have = fleet.workers(pool)
        if wanted > len(have):
            placement = fleet.configs[pool].pools.placements()[pool]
            try:
                places = await fleet.places.more(pool, placement, wanted - len(have))
            except ConfigError as exc:
                raise ConfigError(f"{exc.message}. {pool} still has {_workers(len(have))}") from exc
            await _together(fleet.add(pool, place, say) for place in places)
        elif wanted < len(have):
            # Those that do not serve at the moment first, then the youngest.
            order = sorted(range(len(have)), key=lambda i: (have[i].serves, -i))
            await _together(fleet.remove(have[i], say) for i in order[: len(have) - wanted])
        if pool == "prefill" and not wanted:
            say("", "decode workers compute the prompts")
        say("", f"{pool} has {_workers(wanted)}")

    async def _restart(self, pool: str, settings: Sequence[str], say: Say) -> None:
        if pool:
            _check_pool(pool)
        pools = [name for name in POOLS if pool in ("", name) and self._fleet.workers(name)]
        if not pools:
            raise ConfigError(f"there is no worker in {pool or 'any pool'} to restart")
        wanted = {name: changed(self._fleet.configs[name], settings) for name in pools}
        serving = [self._fleet.configs[name] for name in POOLS if self._fleet.workers(name)]
        _check_transports([*serving, *wanted.values()])
        for name in pools:
            before, self._fleet.configs[name] = self._fleet.configs[name], wanted[name]
            for number, tenant in enumerate(self._fleet.workers(name)):
                try:
                    await self._replace(name, tenant, say)
                except BaseException:
                    if not number:  # nobody has the new settings, and perhaps nobody can
                        self._fleet.configs[name] = before
                    raise
        say("", f"every worker of {' and '.join(pools)} is a new one")

    async def _replace(self, pool: str, old: Tenant, say: Say) -> None:
        """A new worker for an old one: it comes first if there is any room for it."""
        fleet = self._fleet
        place = old.place
        assert place is not None  # gateways have none, and are of no pool
        if place.sharable:
            fleet.places.share(place)
            await fleet.add(pool, place, say)
            await fleet.remove(old, say)
            return
        try:
            [beside] = await fleet.places.more(pool, fleet.configs[pool].pools.placements()[pool], 1)
        except ConfigError as exc:
            if not self._others_take_over(pool, old):
                raise ConfigError(
                    f"{old.worker_id} is the only one of its kind, and its successor finds no room beside "
                    f"it: {exc.message}"
                ) from exc
            fleet.places.share(place)
            say("", f"no room beside {old.worker_id}: it ends first")
            try:
                await fleet.remove(old, say)
            except BaseException:  # nobody comes after it
                fleet.places.leave(place)
                raise
            await fleet.add(pool, place, say)
        else:
            await fleet.add(pool, beside, say)
            await fleet.remove(old, say)

    def _others_take_over(self, pool: str, old: Tenant) -> bool:
        """Whether requests are served without this worker."""
        kinds = POOLS[1:] if pool != "prefill" else POOLS
        return any(other.serves for kind in kinds for other in self._fleet.workers(kind) if other is not old)

    def _standing(self) -> str:
        counts = [(pool, len(self._fleet.workers(pool))) for pool in POOLS]
        leaving = [slot.assignment.worker_id for slot in self._fleet.slots if slot.retiring]
        have = ", ".join(f"{count} {pool}" for pool, count in counts if count)
        return have + (f"; still draining, and ending by themselves: {', '.join(leaving)}" if leaving else "")


async def _together(work: Iterable[Coroutine[Any, Any, object]]) -> None:
    """All of it, to the end of each; then the first failure is raised."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        near = difflib.get_close_matches(pool, POOLS, n=1)
        known = f"did you mean {near[0]}?" if near else f"pools are {', '.join(POOLS)}"
        raise ConfigError(f"there is no pool {pool!r}; {known}")


def _check_transports(configs: Iterable[ClusterConfig]) -> None:
    """For the time in which new workers and old ones serve together.

    Raises:
        ConfigError: some would have one transport only, and others another.
    """
    named = sorted({config.kv_transfer.transport for config in configs} - {"auto"})
    if len(named) > 1:
        raise ConfigError(
            f"workers with kv_transfer.transport = {' and with '.join(map(repr, named))} cannot hand over to "
            'each other, and requests would fail while both are there; restart all pools with "auto" first'
        )


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
