"""The gRPC service `Worker`: carries a gateway's frames between a socket and its GatewayLink. Decides
nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
import grpc.aio

from ..proto.errors import DeadlineExceeded, DiphaseError, InvalidRequest
from ..proto.worker_pb2 import GatewayFrame, WorkerFrame
from ..proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from .gateway_link import GatewayLink
from .host import WorkerHost

Context = grpc.aio.ServicerContext[GatewayFrame, WorkerFrame]


class WorkerService(WorkerServicer):
    """One coroutine a stream."""

    def __init__(self, host: WorkerHost, hello_timeout_s: float) -> None:
        self._host = host
        self._hello_timeout_s = hello_timeout_s

    def add_to(self, server: grpc.aio.Server) -> None:
        add_WorkerServicer_to_server(self, server)

    async def Attach(self, request_iterator: AsyncIterator[GatewayFrame], context: Context) -> None:
        """Serves one gateway until either side ends the stream. Cancelled (the gateway is gone), it
        detaches."""
        frames = aiter(request_iterator)
        try:
            first = await self._first_frame(frames)
            link = self._host.attach(first.messages[0].hello)
        except DiphaseError as error:
            await _refuse(context, error)
        try:
            del first.messages[0]
            link.receive(first)
            await _carry(link, frames, context)
        finally:
            link.close()
        if link.error is not None:
            await _refuse(context, link.error)

    async def _first_frame(self, frames: AsyncIterator[GatewayFrame]) -> GatewayFrame:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first = await anext(frames, None)
        except TimeoutError:
            raise DeadlineExceeded(f"no hello came within {self._hello_timeout_s:g} s") from None
        if first is None or not first.messages or not first.messages[0].HasField("hello"):
            raise InvalidRequest("the first message of a stream must be a hello")
        return first


async def _carry(link: GatewayLink, frames: AsyncIterator[GatewayFrame], context: Context) -> None:
    """Both directions until one ends, or the link is closed for a gateway that does not read."""
    tasks = [
        asyncio.create_task(_read(link, frames)),
        asyncio.create_task(_write(link, context)),
        asyncio.create_task(link.wait_closed()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        # A stream that breaks ends its reader and writer with errors of gRPC's own: the end of the link says
        # it all.
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(link: GatewayLink, frames: AsyncIterator[GatewayFrame]) -> None:
    async for frame in frames:
        link.receive(frame)


async def _write(link: GatewayLink, context: Context) -> None:
    while (frame := await link.next_frame()) is not None:
        await context.write(frame)


async def _refuse(context: Context, error: DiphaseError) -> NoReturn:
    await context.abort(grpc.StatusCode[error.grpc_status], error.message)
