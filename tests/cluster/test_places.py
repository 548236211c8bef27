"""Bundles and cores: handed out, shared, taken back; no Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from diphase.cluster.config import PlacementConfig
from diphase.cluster.places import Places
from diphase.proto.errors import ConfigError


@dataclass(eq=False)
class Group:
    workers: int


class Ray:
    """As much room as `room` says."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.stuck = False
        self.places = Places(self._reserve, self._remove)

    async def _reserve(self, role: str, placement: PlacementConfig, workers: int) -> Group:
        if self.stuck:
            await asyncio.Event().wait()
        if workers > self.room:
            raise ConfigError(f"pools.{role}: no room for {workers} workers")
        self.room -= workers
        return Group(workers)

    def _remove(self, group: Group) -> None:
        self.room += group.workers


TWO = PlacementConfig(workers=2)


async def test_a_pool_starts_with_one_group_and_grows_by_groups_of_one() -> None:
    ray = Ray(room=4)
    first = await ray.places.first("prefill", TWO)
    assert first[0].group is first[1].group
    assert [place.index for place in first] == [0, 1]
    more = await ray.places.more("prefill", TWO, 2)
    assert len({id(place.group) for place in (*first, *more)}) == 3
    assert ray.room == 0


async def test_a_group_goes_back_when_nobody_is_left_in_it() -> None:
    ray = Ray(room=2)
    one, two = await ray.places.first("prefill", TWO)
    ray.places.leave(one)
    assert ray.room == 0
    ray.places.share(two)
    ray.places.leave(two)
    assert ray.room == 0
    ray.places.leave(two)
    assert ray.room == 2


async def test_a_bundle_that_was_left_is_used_again_by_any_pool_that_wants_as_much() -> None:
    ray = Ray(room=2)
    one, _two = await ray.places.first("prefill", TWO)
    ray.places.leave(one)
    with pytest.raises(ConfigError, match=r"pools.decode: no room for 1 workers"):
        await ray.places.more("decode", PlacementConfig(cpus=2.0), 1)
    assert await ray.places.more("decode", PlacementConfig(), 1) == [one]
    with pytest.raises(ConfigError, match="no room"):
        await ray.places.more("decode", PlacementConfig(), 1)


async def test_without_room_for_all_none_is_kept() -> None:
    ray = Ray(room=4)
    one, _two = await ray.places.first("prefill", TWO)
    ray.places.leave(one)
    with pytest.raises(ConfigError, match="no room"):
        await ray.places.more("decode", PlacementConfig(), 4)
    assert ray.room == 2
    assert len(await ray.places.more("decode", PlacementConfig(), 3)) == 3


async def test_a_reservation_that_is_given_up_keeps_nothing() -> None:
    ray = Ray(room=3)
    one, _two = await ray.places.first("prefill", TWO)
    ray.places.leave(one)
    ray.stuck = True
    waiting = asyncio.create_task(ray.places.more("prefill", TWO, 2))
    await asyncio.sleep(0)
    assert one.tenants == 1
    waiting.cancel()
    await asyncio.wait([waiting])
    assert one.tenants == 0


@pytest.mark.parametrize("strategy", ["STRICT_PACK", "STRICT_SPREAD"])
async def test_a_strict_pool_grows_only_to_where_it_was(strategy: str) -> None:
    ray = Ray(room=9)
    strict = PlacementConfig(workers=2, strategy=strategy)  # type: ignore[arg-type]
    one, _two = await ray.places.first("prefill", strict)
    other, _ = await ray.places.first("decode", TWO)
    ray.places.leave(other)
    with pytest.raises(ConfigError, match=rf"pools.prefill.strategy = {strategy} is kept by reserving"):
        await ray.places.more("prefill", strict, 1)
    ray.places.leave(one)
    assert await ray.places.more("prefill", strict, 1) == [one]


async def test_pinned_cores_stay_with_their_places() -> None:
    ray = Ray(room=9)
    pinned = PlacementConfig(workers=2, cores=[4, 5])
    one, two = await ray.places.first("prefill", pinned)
    assert (one.cores, two.cores) == ([4], [5])
    with pytest.raises(ConfigError, match=r"pools.prefill.cores has 2 cores for 2 workers"):
        await ray.places.more("prefill", pinned, 1)
    ray.places.leave(one)
    ray.places.leave(two)
    assert ray.room == 7, "the cores would be lost with the group"
    [again] = await ray.places.more("decode", PlacementConfig(workers=1, cores=[7]), 1)
    assert again is one
    [free] = await ray.places.more("decode", PlacementConfig(), 1)
    assert free.cores == []


async def test_processors_can_be_shared_for_a_while_and_what_is_counted_cannot() -> None:
    ray = Ray(room=9)
    for placement, sharable in (
        (PlacementConfig(), True),
        (PlacementConfig(gpus=1.0), False),
        (PlacementConfig(resources={"licence": 1.0}), False),
    ):
        [place] = await ray.places.first("decode", placement)
        assert place.sharable is sharable
    ray.places.clear()
    assert ray.room == 9
