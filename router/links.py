"""One gateway's stream to one worker, over gRPC. Knows frames, not what they mean.

A link is dialled once and carries everything between the two processes. What is sent within one turn of the
event loop, or while an earlier frame is still being written, leaves in one frame.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from ..proto import worker_pb2 as pb
from ..proto.errors import WorkerLost
from ..proto.frames import take_frame
from ..proto.rpc import INTERNAL_OPTIONS
from ..proto.worker_pb2_grpc import WorkerStub

FIRST_FRAME_S = 5.0
"""A worker that was dialled answers the hello within this."""


class WorkerSilent(TimeoutError):
    """Somebody is there, and says nothing."""


FrameSink = Callable[[pb.WorkerFrame], None]


class Link(Protocol):
    """A stream that is used once: run() until it ends."""

    def send(self, message: pb.GatewayMessage) -> None:
        """Queues a message; never blocks. After the end of the stream it goes nowhere."""
        ...

    def send_later(self, message: pb.GatewayMessage) -> None:
        """Queues a message that nobody waits for: it leaves with the next one, or at flush()."""
        ...

    def flush(self) -> None:
        """Lets what is queued leave."""
        ...

    async def run(self, on_frame: FrameSink) -> None:
        """Dials, says hello, and calls `on_frame` with every frame, in order, until the stream ends. Once it
        has returned, raised or been cancelled, nothing is delivered any more.

        Raises:
            WorkerLost: when the stream ends; the message says why.
            WorkerSilent: nothing came within FIRST_FRAME_S.
        """
        ...


LinkFactory = Callable[[str, pb.GatewayHello], Link]
"""(the worker's address, the first message) -> a link that is not yet dialled."""


class GrpcLink:
    """The live link."""

    def __init__(self, address: str, hello: pb.GatewayHello) -> None:
        self._address = address
        self._outgoing = deque([pb.GatewayMessage(hello=hello)])
        self._has_outgoing = asyncio.Event()
        self._has_outgoing.set()

    def send(self, message: pb.GatewayMessage) -> None:
        self._outgoing.append(message)
        self._has_outgoing.set()

    def send_later(self, message: pb.GatewayMessage) -> None:
        self._outgoing.append(message)

    def flush(self) -> None:
        if self._outgoing:
            self._has_outgoing.set()

    async def run(self, on_frame: FrameSink) -> None:
        async with grpc.aio.insecure_channel(self._address, options=INTERNAL_OPTIONS) as channel:
            call: grpc.aio.StreamStreamCall[pb.GatewayFrame, pb.WorkerFrame] = WorkerStub(channel).Attach()
            writer = asyncio.create_task(self._write(call))
            try:
                async with asyncio.timeout(FIRST_FRAME_S) as until_first_frame:
                    async for frame in call:
                        until_first_frame.reschedule(None)
                        on_frame(frame)
            except TimeoutError:
                raise WorkerSilent(
                    f"the worker at {self._address} did not answer in {FIRST_FRAME_S:g} s"
                ) from None
            except grpc.aio.AioRpcError as exc:
                raise WorkerLost(
                    f"the stream to the worker at {self._address} broke: {exc.code().name} {exc.details()}"
                ) from exc
            finally:
                call.cancel()
                writer.cancel()
                await asyncio.wait([writer])
        raise WorkerLost(f"the worker at {self._address} ended its stream")

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.GatewayFrame, pb.WorkerFrame]) -> None:
        """Until the stream ends; why it did, its reader hears too."""
        try:
            while True:
                await self._has_outgoing.wait()
                while self._outgoing:
                    await call.write(pb.GatewayFrame(messages=take_frame(self._outgoing)))
                self._has_outgoing.clear()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
