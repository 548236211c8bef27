"""Where workers have room: bundles of Ray's placement groups and pinned cores, handed out, shared and taken
back. Starts no process.

A pool's first workers have one group, so that its strategy holds for all of them; each later one has a group
of its own. A bundle that was left is used again, by any pool that wants as much.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..proto.errors import ConfigError
from .config import PlacementConfig

STRICT = ("STRICT_PACK", "STRICT_SPREAD")

Reserve = Callable[[str, PlacementConfig, int], Awaitable[Any]]
"""(role, placement, workers) -> a group with a bundle for each; raises ConfigError without room."""


@dataclass(slots=True, eq=False)
class Place:
    """Room for one worker, and for its successor while that takes over."""

    role: str
    """Of the pool that it was reserved for."""
    bundle: dict[str, float]
    group: Any
    index: int
    cores: list[int] = field(default_factory=list)
    tenants: int = 0

    @property
    def sharable(self) -> bool:
        """Whether a second process fits in for a while: processors can be shared, what is counted cannot."""
        return set(self.bundle) == {"CPU"}


class Places:
    """All places of a cluster. `reserve` and `remove` are Ray's, live."""

    def __init__(self, reserve: Reserve, remove: Callable[[Any], None]) -> None:
        self._reserve = reserve
        self._remove = remove
        self._all: list[Place] = []

    async def first(self, role: str, placement: PlacementConfig) -> list[Place]:
        """The places of a pool that starts, taken.

        Raises:
            ConfigError: there is no room for all of them.
        """
        if not placement.workers:
            return []
        group = await self._reserve(role, placement, placement.workers)
        places = [
            Place(role, placement.bundle(), group, index, placement.cores_of(index), tenants=1)
            for index in range(placement.workers)
        ]
        self._all += places
        return places

    async def more(self, role: str, placement: PlacementConfig, count: int) -> list[Place]:
        """`count` more places for a pool that runs, taken. Cancelled, or without room, none is kept.

        Raises:
            ConfigError: there is no room for all of them, or the pool's strategy or cores allow no more.
        """
        found = [place for place in self._all if not place.tenants and _fits(place, role, placement)][:count]
        missing = count - len(found)
        if missing and placement.strategy in STRICT:
            raise ConfigError(
                f"pools.{role}.strategy = {placement.strategy} is kept by reserving the whole pool at once, "
                "so it cannot grow while it runs; use PACK or SPREAD, or start it with more workers"
            )
        if missing and placement.cores:
            raise ConfigError(
                f"pools.{role}.cores has {len(placement.cores)} cores for {placement.workers} workers: there "
                f"is none left for {missing} more; start the cluster with more cores, or with none named"
            )
        _take(found)
        try:
            return found + await self._new(role, placement, missing)
        except BaseException:
            for place in found:
                self.leave(place)
            raise

    def share(self, place: Place) -> None:
        """One tenant more."""
        place.tenants += 1

    def leave(self, place: Place) -> None:
        """One tenant less. What nobody uses any more goes back to Ray: whole groups do, and none whose cores
        are pinned, since those go with the place."""
        place.tenants -= 1
        group = [other for other in self._all if other.group is place.group]
        if place.cores or any(other.tenants for other in group):
            return
        self._all = [other for other in self._all if other.group is not place.group]
        self._remove(place.group)

    def clear(self) -> None:
        """Everything goes back."""
        for group in {id(place.group): place.group for place in self._all}.values():
            self._remove(group)
        self._all.clear()

    async def _new(self, role: str, placement: PlacementConfig, count: int) -> list[Place]:
        places: list[Place] = []
        try:
            while len(places) < count:
                group = await self._reserve(role, placement, 1)
                places.append(Place(role, placement.bundle(), group, 0, tenants=1))
                self._all.append(places[-1])
        except BaseException:
            for place in places:
                self.leave(place)
            raise
        return places


def _fits(place: Place, role: str, placement: PlacementConfig) -> bool:
    if place.role != role and placement.strategy in STRICT:
        return False  # it may be on the wrong node
    pinned = len(placement.cores_of(0)) if placement.workers else 0
    return place.bundle == placement.bundle() and len(place.cores) == pinned


def _take(places: Iterable[Place]) -> None:
    for place in places:
        place.tenants += 1
