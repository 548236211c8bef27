"""The store learns who is there, and nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from diphase.cluster.announcer import REPEAT_S, Announcer
from diphase.cluster.roles import Started, Traits
from diphase.router.membership import Member, RedisMembership
from redis.exceptions import ConnectionError as StoreAway

from ..simulation.virtual_loop import run_virtually


class Store(RedisMembership):
    """Keeps members in memory; away as long as `away`."""

    def __init__(self) -> None:
        self.members_now: dict[str, str] = {}
        self.away = False

    async def publish(self, members: Sequence[Member]) -> None:
        if self.away:
            raise StoreAway("away")
        self.members_now = {member.worker_id: member.incarnation for member in members}


def started(worker_id: str, incarnation: str) -> Started:
    return Started(
        worker_id=worker_id,
        role="decode",
        address="127.0.0.1:1",
        metrics_address="127.0.0.1:2",
        incarnation=incarnation,
        pid=1,
        ticks=1,
        node_id="n",
    )


def test_only_the_newest_word_reaches_a_store_that_was_away() -> None:
    async def main() -> None:
        store = Store()
        announcer = Announcer(store)
        running = asyncio.create_task(announcer.run())
        announcer.publish(started("a", "a-1"))
        announcer.publish(started("b", "b-1"))
        await asyncio.sleep(0.1)
        assert store.members_now == {"a": "a-1", "b": "b-1"}
        store.away = True
        announcer.remove(started("a", "a-1"))
        await asyncio.sleep(5.0)
        announcer.publish(started("a", "a-2"))
        announcer.remove(started("b", "b-1"))
        await asyncio.sleep(5.0)
        assert store.members_now == {"a": "a-1", "b": "b-1"}
        store.away = False
        await asyncio.sleep(5.0)
        assert store.members_now == {"a": "a-2"}
        running.cancel()
        await asyncio.wait((running,))

    run_virtually(main())


def test_a_store_that_was_emptied_while_it_ran_soon_knows_everybody_again() -> None:
    async def main() -> None:
        store = Store()
        announcer = Announcer(store)
        running = asyncio.create_task(announcer.run())
        for name in ("a", "b", "c"):
            announcer.publish(started(name, f"{name}-1"))
        announcer.remove(started("c", "c-1"))
        await asyncio.sleep(60.0)
        store.members_now = {}
        await asyncio.sleep(REPEAT_S + 0.1)
        assert store.members_now == {"a": "a-1", "b": "b-1"}
        running.cancel()
        await asyncio.wait((running,))

    run_virtually(main())


def test_a_cancellation_that_the_stores_error_hides_ends_it_all_the_same() -> None:
    class Hiding(Store):
        async def publish(self, members: Sequence[Member]) -> None:
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                raise StoreAway("broken") from None

    async def main() -> None:
        announcer = Announcer(Hiding())
        running = asyncio.create_task(announcer.run())
        announcer.publish(started("a", "a-1"))
        await asyncio.sleep(0.5)
        running.cancel()
        done, _ = await asyncio.wait((running,), timeout=10.0)
        assert done

    run_virtually(main())


def test_a_member_that_drains_stays_with_what_it_is_and_the_supervisor_is_one_too() -> None:
    async def main() -> None:
        seen: list[Member] = []

        class Recording(Store):
            async def publish(self, members: Sequence[Member]) -> None:
                seen[:] = members

        announcer = Announcer(Recording())
        running = asyncio.create_task(announcer.run())
        announcer.add(Member(worker_id="supervisor", role="supervisor", address="s:1", incarnation="1"))
        worker = replace(started("a", "a-1"), traits=Traits(layout_hash="L", protocol_version=1))
        announcer.publish(worker)
        announcer.drains(worker)
        announcer.drains(started("nobody", "x"))
        await asyncio.sleep(0.1)
        supervisor, drains = seen
        assert (supervisor.role, supervisor.draining) == ("supervisor", False)
        assert (drains.worker_id, drains.layout_hash, drains.draining) == ("a", "L", True)
        announcer.publish(worker)
        await asyncio.sleep(0.1)
        assert not seen[1].draining
        running.cancel()
        await asyncio.wait((running,))

    run_virtually(main())
