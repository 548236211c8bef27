"""GrpcLink: a real stream to a real server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import WorkerLost
from diphase.proto.frames import FRAME_BYTES, MESSAGES_A_FRAME
from diphase.proto.rpc import INTERNAL_OPTIONS, MAX_MESSAGE_BYTES
from diphase.proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from diphase.router.links import GrpcLink, WorkerSilent

HELLO = pb.GatewayHello(gateway_id="g", cluster_token="secret")


class Peer(WorkerServicer):
    """Notes frames and answers pings; other behaviour by the token of the hello."""

    def __init__(self) -> None:
        self.frames: list[pb.GatewayFrame] = []
        self.ended = asyncio.Event()

    async def Attach(self, request_iterator: AsyncIterator[pb.GatewayFrame], context: Any) -> None:
        try:
            async for frame in request_iterator:
                self.frames.append(frame)
                for message in frame.messages:
                    if message.HasField("hello") and message.hello.gateway_id == "refused":
                        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
                    if message.HasField("hello") and message.hello.gateway_id == "ended":
                        return
                    if message.HasField("ping"):
                        pong = pb.Pong(sent_at=message.ping.sent_at)
                        await context.write(pb.WorkerFrame(messages=[pb.WorkerMessage(pong=pong)]))
        finally:
            self.ended.set()


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Peer, str]]:
    peer = Peer()
    server = grpc.aio.server(options=INTERNAL_OPTIONS)
    add_WorkerServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield peer, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def ping(at: float) -> pb.GatewayMessage:
    return pb.GatewayMessage(ping=pb.Ping(sent_at=at))


async def test_messages_of_one_turn_leave_in_one_frame_and_answers_come_in_order() -> None:
    async with serving() as (peer, address), asyncio.timeout(10):
        link = GrpcLink(address, HELLO)
        for i in range(5):
            link.send(ping(i))
        answers: list[float] = []
        arrived = asyncio.Event()

        def on_frame(frame: pb.WorkerFrame) -> None:
            answers.extend(message.pong.sent_at for message in frame.messages)
            if len(answers) == 6:
                arrived.set()
            elif len(answers) == 5:
                link.send(ping(5))

        task = asyncio.create_task(link.run(on_frame))
        await arrived.wait()
        assert answers == [0, 1, 2, 3, 4, 5]
        first = peer.frames[0]
        assert first.messages[0].hello.cluster_token == "secret"
        assert len(first.messages) == 6
        task.cancel()
        await asyncio.wait([task])
        await peer.ended.wait()  # the worker sees the end at once


async def test_who_takes_the_stream_and_says_nothing_is_silent_and_who_is_not_there_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diphase.router.links.FIRST_FRAME_S", 0.2)
    async with serving() as (_, address), asyncio.timeout(10):
        with pytest.raises(WorkerSilent, match=r"did not answer in 0\.2 s"):
            await GrpcLink(address, HELLO).run(lambda _: None)
    monkeypatch.undo()
    with pytest.raises(WorkerLost):
        await GrpcLink("127.0.0.1:1", HELLO).run(lambda _: None)


async def test_what_nobody_waits_for_leaves_with_the_next_message_or_at_a_flush() -> None:
    async with serving() as (peer, address), asyncio.timeout(10):
        link = GrpcLink(address, HELLO)
        pongs: asyncio.Queue[float] = asyncio.Queue()

        def on_frame(frame: pb.WorkerFrame) -> None:
            for message in frame.messages:
                pongs.put_nowait(message.pong.sent_at)

        task = asyncio.create_task(link.run(on_frame))
        link.send(ping(1))
        assert await pongs.get() == 1
        link.send_later(ping(2))
        link.send(ping(3))
        assert [await pongs.get(), await pongs.get()] == [2, 3]
        assert len(peer.frames[-1].messages) == 2
        link.send_later(ping(4))
        link.flush()
        assert await pongs.get() == 4
        task.cancel()
        await asyncio.wait([task])


async def test_what_piled_up_leaves_in_frames_of_bounded_size() -> None:
    async with serving() as (peer, address), asyncio.timeout(10):
        link = GrpcLink(address, HELLO)
        count = 2 * MESSAGES_A_FRAME + 1
        for i in range(count):
            link.send(ping(i))
        answers: list[float] = []
        arrived = asyncio.Event()

        def on_frame(frame: pb.WorkerFrame) -> None:
            answers.extend(message.pong.sent_at for message in frame.messages)
            if len(answers) == count:
                arrived.set()

        task = asyncio.create_task(link.run(on_frame))
        await arrived.wait()
        assert answers == list(range(count))
        assert max(len(frame.messages) for frame in peer.frames) == MESSAGES_A_FRAME
        task.cancel()
        await asyncio.wait([task])


async def test_a_burst_of_long_prompts_leaves_in_frames_that_fit_and_in_order() -> None:
    tokens = [49_151] * 131_072
    sizes = [131_072] * 50 + [1, 1] + [1_500_000] + [131_072] * 3  # one is larger than a frame
    async with serving() as (peer, address), asyncio.timeout(60):
        link = GrpcLink(address, HELLO)
        for number, size in enumerate(sizes):
            ids = (tokens * (size // len(tokens) + 1))[:size]
            submit = pb.Submit(request_id=str(number), prompt_token_ids=ids)
            link.send(pb.GatewayMessage(submit=submit))
        link.send(ping(1))
        arrived = asyncio.Event()
        task = asyncio.create_task(link.run(lambda frame: arrived.set()))
        await asyncio.wait([task, asyncio.ensure_future(arrived.wait())], return_when="FIRST_COMPLETED")
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
    messages = [message for frame in peer.frames for message in frame.messages]
    submits = [message.submit for message in messages if message.HasField("submit")]
    assert sum(submit.ByteSize() for submit in submits) > MAX_MESSAGE_BYTES
    assert [int(submit.request_id) for submit in submits] == list(range(len(sizes)))
    assert [len(submit.prompt_token_ids) for submit in submits] == sizes
    large = [frame for frame in peer.frames if frame.ByteSize() > FRAME_BYTES + 1024]
    assert [len(frame.messages) for frame in large] == [1]


@pytest.mark.parametrize(
    ("gateway_id", "reason"), [("refused", "UNAUTHENTICATED who are you"), ("ended", "ended")]
)
async def test_the_end_of_a_stream_says_why(gateway_id: str, reason: str) -> None:
    async with serving() as (_, address), asyncio.timeout(10):
        link = GrpcLink(address, pb.GatewayHello(gateway_id=gateway_id))
        with pytest.raises(WorkerLost, match=reason):
            await link.run(lambda frame: None)


async def test_nobody_at_the_address_is_a_lost_worker() -> None:
    async with asyncio.timeout(10):
        with pytest.raises(WorkerLost, match="UNAVAILABLE"):
            await GrpcLink("127.0.0.1:1", HELLO).run(lambda frame: None)


async def test_a_frame_that_ends_the_stream_from_our_side() -> None:
    async with serving() as (peer, address), asyncio.timeout(10):
        link = GrpcLink(address, HELLO)
        link.send(ping(1))

        def refuse(_: pb.WorkerFrame) -> None:
            raise WorkerLost("it serves another model")

        with pytest.raises(WorkerLost, match="another model"):
            await link.run(refuse)
        await peer.ended.wait()
