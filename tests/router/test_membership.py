"""RedisMembership against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from diphase.router.membership import FixedMembership, Member, RedisMembership

from .fakes import until
from .stores import client_of, private_store


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    with private_store() as (_, url):
        yield url


def member(name: str, incarnation: str = "1") -> Member:
    return Member(
        worker_id=name, role="decode", address=f"{name}:1", incarnation=incarnation, metrics_address="m:2"
    )


async def test_members_are_published_replaced_and_removed(store_url: str) -> None:
    async with client_of(store_url) as client:
        membership = RedisMembership(client, "plain")
        await membership.publish([member("b"), member("a")])
        await membership.publish([member("b"), member("a", "2")])
        assert await membership.members() == [member("a", "2"), member("b")]
        assert await RedisMembership(client, "other").members() == []
        await membership.remove("b")
        assert await membership.members() == [member("a", "2")]
        await membership.publish([member("c")])
        assert await membership.members() == [member("c")]
        await membership.publish([])
        assert await membership.members() == []


async def test_a_watcher_hears_of_every_change(store_url: str) -> None:
    async with client_of(store_url) as client, client_of(store_url) as watching:
        membership = RedisMembership(client, "watched")
        await membership.publish([member("a")])
        async with aclosing(RedisMembership(watching, "watched").watch()) as changes, asyncio.timeout(10):
            assert await anext(changes) == [member("a")]
            await membership.publish([member("a"), member("b")])
            assert await anext(changes) == [member("a"), member("b")]
            await membership.remove("a")
            assert await anext(changes) == [member("b")]


async def test_the_last_known_members_stay_while_the_store_is_away_or_empty() -> None:
    with private_store() as (server, url):
        async with client_of(url) as watching:
            async with client_of(url) as client:
                await RedisMembership(client, "c").publish([member("a")])
            async with aclosing(RedisMembership(watching, "c").watch()) as changes:
                assert await anext(changes) == [member("a")]
                following = asyncio.ensure_future(anext(changes))
                await asyncio.sleep(0)
                server.stop()
                server.start()  # it kept nothing
                async with client_of(url) as client, asyncio.timeout(20):

                    async def watched_again() -> bool:
                        channel = b"diphase:c:members:changed"
                        return await client.pubsub_numsub(channel) == [(channel, 1)]

                    await until(watched_again)
                    assert not following.done()
                    await RedisMembership(client, "c").publish([member("b")])
                    assert await following == [member("b")]


def test_what_a_newer_release_says_of_a_member_is_passed_over() -> None:
    text = member("a").to_json()
    assert Member.from_json(text[:-1] + ', "rack": "r7"}') == member("a")


async def test_fixed_members_are_told_once() -> None:
    found = [members async for members in FixedMembership([member("a")]).watch()]
    assert found == [[member("a")]]
