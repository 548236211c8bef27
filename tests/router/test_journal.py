"""RedisJournal against a real server: off the path of requests, bounded, and indifferent to its absence."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import redis.asyncio
from diphase.router.journal import JournalRecord, JournalUnavailable, RedisJournal

from .fakes import until
from .stores import client_of, private_store

PLACED = JournalRecord("placed", "g0", 1, "p0", "d0", 2**64 - 1)


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    with private_store() as (_, url):
        yield url


def journal_of(client: redis.asyncio.Redis, cluster: str = "c", max_pending: int = 100) -> RedisJournal:
    return RedisJournal(client, cluster, flush_s=0.001, ttl_s=60, max_pending=max_pending)


async def test_any_gateway_reads_what_one_wrote(store_url: str) -> None:
    async with client_of(store_url) as client:
        journal = journal_of(client, "shared")
        journal.record("r1", JournalRecord("accepted", "g0"))
        journal.record("r1", PLACED)
        await journal.flush()
        other = journal_of(client, "shared")
        assert await other.lookup("r1") == PLACED
        assert await other.lookup("r2") is None
        assert await journal_of(client, "another cluster").lookup("r1") is None
        assert 0 < await client.ttl("diphase:shared:request:r1") <= 60


async def test_records_are_written_in_the_background(store_url: str) -> None:
    async with client_of(store_url) as client:
        journal = journal_of(client, "background")
        task = asyncio.create_task(journal.run())
        for i in range(1200):
            journal.record(f"r{i % 50}", PLACED._replace(attempt=i))
        other = journal_of(client, "background")

        async def written() -> bool:
            return await other.lookup("r49") == PLACED._replace(attempt=1199)

        async with asyncio.timeout(10):
            await until(written)
        task.cancel()
        await asyncio.wait([task])
        assert journal.dropped == 0


async def test_what_waits_is_found_without_the_store() -> None:
    async with client_of("unix:///nonexistent.sock") as client:
        journal = journal_of(client)
        journal.record("r", PLACED)
        assert await journal.lookup("r") == PLACED
        with pytest.raises(JournalUnavailable):
            await journal.lookup("other")


async def test_without_a_store_the_newest_records_wait_and_the_oldest_are_dropped() -> None:
    async with client_of("unix:///nonexistent.sock") as client:
        journal = journal_of(client, max_pending=10)
        for i in range(25):
            journal.record(f"r{i}", PLACED)
        assert journal.dropped == 15
        await journal.flush()
        assert [await journal.lookup(f"r{i}") for i in (15, 24)] == [PLACED, PLACED]
        journal.record("r25", PLACED)
        assert journal.dropped == 16


class StuckClient:
    """A client whose pipeline waits until it is told to work or to fail."""

    def __init__(self) -> None:
        self.writing = asyncio.Event()
        self.works = asyncio.Event()
        self.fails = asyncio.Event()
        self.hides_cancellation = False
        self.written: list[object] = []
        self._queued: list[object] = []

    def pipeline(self, transaction: bool) -> StuckClient:
        return self

    async def __aenter__(self) -> StuckClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    def set(self, key: str, value: str, ex: int) -> None:
        self._queued.append(key)

    async def execute(self) -> None:
        queued, self._queued = self._queued, []
        self.writing.set()
        if self.works.is_set():
            self.written += queued
            return
        try:
            await self.fails.wait()
        except asyncio.CancelledError:
            if self.hides_cancellation:
                raise ConnectionError("broken") from None
            raise
        raise ConnectionError("gone")


async def test_records_that_could_not_be_written_never_replace_newer_ones() -> None:
    client = StuckClient()
    journal = journal_of(client)  # type: ignore[arg-type]
    journal.record("r", PLACED)
    writing = asyncio.create_task(journal.flush())
    await asyncio.sleep(0)
    journal.record("r", PLACED._replace(state="finished"))
    client.fails.set()
    await writing
    assert await journal.lookup("r") == PLACED._replace(state="finished")


async def test_a_record_whose_write_is_cut_off_is_written_at_the_end() -> None:
    client = StuckClient()
    journal = journal_of(client)  # type: ignore[arg-type]
    task = asyncio.create_task(journal.run())
    journal.record("r", PLACED)
    await client.writing.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    client.works.set()
    await journal.flush()
    assert client.written == ["diphase:c:request:r"]


async def test_a_cancellation_that_the_stores_error_hides_ends_it_all_the_same() -> None:
    client = StuckClient()
    client.hides_cancellation = True
    journal = journal_of(client)  # type: ignore[arg-type]
    task = asyncio.create_task(journal.run())
    journal.record("r", PLACED)
    await client.writing.wait()
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([task])
    assert await journal.lookup("r") == PLACED


async def test_it_goes_on_when_the_store_is_back() -> None:
    with private_store() as (server, url):
        async with client_of(url) as client:
            journal = journal_of(client)
            server.stop()
            journal.record("r", PLACED)
            await journal.flush()
            server.start()
            await journal.flush()
            assert await journal_of(client).lookup("r") == PLACED
