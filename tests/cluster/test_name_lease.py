from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis
from diphase.cluster import name_lease
from diphase.cluster.name_lease import NameLease
from diphase.cluster.store import PrivateServer
from diphase.proto.errors import ConfigError

KEY = "diphase:twin:supervisor"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    # Short: unix socket paths have at most 107 bytes.
    server = PrivateServer(tmp_path_factory.mktemp(f"n{os.getpid()}-"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: PrivateServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def test_one_owner_at_a_time_has_a_name(client: redis.Redis) -> None:
    first, second = NameLease(client, "twin", "first"), NameLease(client, "twin", "second")
    assert first.take()
    assert not second.take()
    second.release()
    second.renew()
    assert first.holder()[0] == "first"
    assert NameLease(client, "other", "second").take()
    first.release()
    assert second.take()


def test_a_renewal_makes_the_lease_last_its_whole_time(client: redis.Redis) -> None:
    lease = NameLease(client, "twin", "first", lease_s=60.0)
    assert lease.take()
    client.pexpire(KEY, 30_000)
    lease.renew()
    assert lease.holder()[1] > 30_000


def test_a_name_that_was_lost_is_taken_again_but_not_from_another(client: redis.Redis) -> None:
    lease = NameLease(client, "twin", "first")
    assert lease.take()
    client.flushall()
    lease.renew()
    assert client.get(KEY) == b"first"
    client.set(KEY, "second")
    lease.renew()
    lease.release()
    assert client.get(KEY) == b"second"


async def test_a_name_in_use_is_refused_with_what_to_change(
    server: PrivateServer, client: redis.Redis
) -> None:
    waits: list[str] = []
    async with name_lease.held(server.url, "twin", "a", lambda: waits.append("first"), lease_s=2.0):
        with pytest.raises(ConfigError) as caught:
            async with name_lease.held(server.url, "twin", "b", lambda: waits.append("second")):
                raise AssertionError("it has the name")
        assert caught.value.message.startswith('name = "twin": a cluster of that name runs')
        assert f"process {os.getpid()} on " in caught.value.message
        assert "--set name=..." in caught.value.message
        assert waits == ["second"]
    assert not client.exists(KEY)


async def test_the_name_of_a_killed_supervisor_is_waited_for(
    server: PrivateServer, client: redis.Redis
) -> None:
    assert NameLease(client, "twin", "killed", lease_s=0.6).take()
    waits: list[str] = []
    second = NameLease(client, "twin", "not the killed one")
    async with name_lease.held(server.url, "twin", "b", lambda: waits.append("second")):
        assert waits == ["second"]
        assert second.holder()[0].endswith(", b")


async def test_a_store_that_goes_away_does_not_end_who_has_a_name(server: PrivateServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        lease = NameLease(client, "twin", "first")
        assert lease.take()
        async with name_lease.held(server.url, "other", "a", lambda: None):
            server.stop()
            lease.renew()
            lease.release()
            server.start()
            lease.renew()
            assert lease.holder()[0] == "first"


async def test_a_store_that_cannot_be_used_is_named(server: PrivateServer) -> None:
    server.stop()
    for url, sentence in ((server.url, "no Redis server"), ("http://x", "is no address")):
        with pytest.raises(ConfigError, match=f"store.url.*{sentence}"):
            async with name_lease.held(url, "twin", "a", lambda: None):
                pass
