"""From a gateway to the supervisor and back: a change is asked for, told about, refused, and outlives whoever
asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from diphase.cluster.changes import Changes
from diphase.cluster.control import Control
from diphase.cluster.fleet import Say
from diphase.proto import cluster_pb2 as pb
from diphase.proto.errors import ConfigError, WorkerLost
from diphase.router.supervisor_link import SupervisorLink

SCALE = pb.ChangeRequest(scale=pb.Scale(pool="decode", workers=2))


class FakeChanges(Changes):
    """Says two things, the second when it is let go on, and then ends as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[pb.ChangeRequest] = []
        self.go_on = asyncio.Event()
        self.made = asyncio.Event()

    async def make(self, request: pb.ChangeRequest, say: Say) -> None:
        self.asked.append(request)
        say("decode-1", "starts")
        await self.go_on.wait()
        say("decode-1", "serves")
        self.made.set()
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def linked(changes: Changes, token: str = "secret") -> AsyncIterator[SupervisorLink]:
    control = Control(changes, "secret")
    address = await control.open("127.0.0.1")
    try:
        yield SupervisorLink(lambda: address, token)
    finally:
        await control.close()


async def said(link: SupervisorLink) -> list[tuple[str, str]]:
    async with asyncio.timeout(20.0):
        return [(progress.worker_id, progress.step) async for progress in link.change(SCALE)]


async def test_what_is_asked_arrives_and_what_is_said_comes_back() -> None:
    changes = FakeChanges()
    changes.go_on.set()
    async with linked(changes) as link:
        assert await said(link) == [("decode-1", "starts"), ("decode-1", "serves")]
    assert changes.asked == [SCALE]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("no room"), grpc.StatusCode.INVALID_ARGUMENT, "no room"),
        (WorkerLost("not complete"), grpc.StatusCode.ABORTED, "not complete"),
        (ValueError("a bug"), grpc.StatusCode.ABORTED, "ValueError: a bug"),
    ],
)
async def test_a_refusal_keeps_its_kind_and_its_words(
    error: Exception, code: grpc.StatusCode, words: str
) -> None:
    changes = FakeChanges(error)
    changes.go_on.set()
    async with linked(changes) as link:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await said(link)
    assert (caught.value.code(), caught.value.details()) == (code, words)


async def test_without_the_clusters_token_nothing_is_changed() -> None:
    changes = FakeChanges()
    for token in ("", "wrong"):
        async with linked(changes, token) as link:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await said(link)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not changes.asked


async def test_a_change_goes_on_when_whoever_asked_is_gone() -> None:
    changes = FakeChanges()
    async with linked(changes) as link, asyncio.timeout(20.0):
        stream = link.change(SCALE)
        assert (await anext(stream)).step == "starts"
        await stream.aclose()  # type: ignore[attr-defined]
        changes.go_on.set()
        await changes.made.wait()


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (WorkerLost("not complete"), logging.WARNING, "not complete"),
        (ValueError("a bug"), logging.ERROR, "ValueError: a bug"),
    ],
)
async def test_a_change_that_fails_when_whoever_asked_is_gone_is_in_the_log(
    error: Exception, level: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = FakeChanges(error)
    async with linked(changes) as link, asyncio.timeout(20.0):
        stream = link.change(SCALE)
        assert (await anext(stream)).step == "starts"
        await stream.aclose()  # type: ignore[attr-defined]
        changes.go_on.set()
        await changes.made.wait()
    [record] = [record for record in caplog.records if record.msg.startswith("change_failed")]
    assert record.levelno == level
    assert words in caplog.text


async def test_a_supervisor_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(WorkerLost, match="no supervisor of this cluster is known here"):
        await said(SupervisorLink(lambda: "", ""))
    with pytest.raises(WorkerLost, match=r"the supervisor at 127\.0\.0\.1:1 does not answer"):
        await said(SupervisorLink(lambda: "127.0.0.1:1", ""))


async def test_what_is_under_way_ends_with_the_supervisor(caplog: pytest.LogCaptureFixture) -> None:
    changes = FakeChanges()
    control = Control(changes, "secret")
    address = await control.open("127.0.0.1")
    stream = SupervisorLink(lambda: address, "secret").change(SCALE)
    async with asyncio.timeout(20.0):
        assert (await anext(stream)).step == "starts"
        await control.close()
        with pytest.raises((WorkerLost, grpc.aio.AioRpcError)):
            await anext(stream)
    assert not changes.made.is_set()
    assert "change_given_up" in caplog.text


async def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    control = Control(FakeChanges(), "secret")
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        await control.open("192.0.2.1")
    await control.close()
