"""Control links over gRPC: one bidirectional stream a pair of workers, dialled by the prefill side.

The first frame of each direction is the hello. Messages queued in one turn of the loop travel in one frame.
gRPC sets TCP_NODELAY itself; its keep-alive finds a peer whose machine went away, our deadlines one that
hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from ..proto.errors import DeadlineExceeded, DiphaseError, PeerLost, TransferError, Unauthenticated
from ..proto.handoff_pb2 import HandoffFrame, HandoffMessage, PeerHello
from ..proto.handoff_pb2_grpc import HandoffServicer, HandoffStub, add_HandoffServicer_to_server
from ..proto.rpc import INTERNAL_OPTIONS
from .link import LinkAcceptor, LinkCaller, LinkUser

HELLO_TIMEOUT_S = 5.0
"""How long a listener waits for the hello of who dialled."""
MAX_QUEUED = 65_536
"""Messages that wait for a peer that does not read; then the link is given up."""

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]
_log = logging.getLogger(__name__)

Write = Callable[[HandoffFrame], Awaitable[Any]]
Read = Callable[[], Awaitable[Any]]


class _Stream:
    """One end of a link, over a stream that its task owns."""

    def __init__(self, user: LinkUser) -> None:
        self.user = user
        self.closed = False
        self._outbox: list[HandoffMessage] = []
        self._stirred = asyncio.Event()
        self._overrun = False

    def send(self, message: HandoffMessage) -> None:
        if self.closed:
            return
        self._overrun = self._overrun or len(self._outbox) >= MAX_QUEUED
        if not self._overrun:
            self._outbox.append(message)
        self._stirred.set()

    def close(self) -> None:
        self.closed = True
        self._stirred.set()

    async def carry(self, read: Read, write: Write) -> DiphaseError | None:
        """Both directions until the link ends; why, if not by our own close."""
        writing = asyncio.ensure_future(self._write(write))
        reading = asyncio.ensure_future(self._read(read))
        try:
            await asyncio.wait((writing, reading), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, reading):
                task.cancel()
            results = await asyncio.gather(writing, reading, return_exceptions=True)
        if self.closed:
            return None
        for result in results:
            if isinstance(result, DiphaseError):
                return result
            if isinstance(result, grpc.aio.AioRpcError):
                return error_of(result)
            if isinstance(result, Exception):
                raise result
        return PeerLost("the other end closed the link")

    async def _write(self, write: Write) -> None:
        while not self.closed:
            await self._stirred.wait()
            self._stirred.clear()
            if self._overrun:
                raise TransferError(f"{MAX_QUEUED} messages wait for a peer that does not read")
            messages, self._outbox = self._outbox, []
            if messages and not self.closed:
                await write(HandoffFrame(messages=messages))

    async def _read(self, read: Read) -> None:
        while (frame := await read()) is not _EOF and frame is not None:
            if self.closed:
                return
            self.user.link_messages(self, frame.messages)


class _CallerStream(_Stream):
    """The dialling end."""

    def __init__(self, caller: LinkCaller) -> None:
        super().__init__(caller)
        self.caller = caller


def error_of(error: grpc.aio.AioRpcError) -> DiphaseError:
    """What a failed call means for the pair."""
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(message)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return TransferError(message)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(message)
    return PeerLost(message)


class GrpcDialer:
    """See link.Dialer."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], _Stream] = {}

    def dial(self, address: str, hello: PeerHello, caller: LinkCaller, timeout_s: float) -> _Stream:
        stream = _CallerStream(caller)
        task = asyncio.get_running_loop().create_task(
            self._run(stream, address, hello, timeout_s), name=f"handoff-link-{address}"
        )
        self._tasks[task] = stream
        task.add_done_callback(self._ended)
        return stream

    async def close(self) -> None:
        for stream in self._tasks.values():
            stream.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        stream = self._tasks.pop(task)
        if task.cancelled() or task.exception() is None:
            return
        _log.error("handoff_link_crashed", exc_info=task.exception())
        if not stream.closed:
            stream.closed = True
            stream.user.link_down(stream, PeerLost(f"the link crashed: {task.exception()!r}"))

    async def _run(self, stream: _CallerStream, address: str, hello: PeerHello, timeout_s: float) -> None:
        async with grpc.aio.insecure_channel(address, options=INTERNAL_OPTIONS) as channel:
            call = HandoffStub(channel).Attach()
            try:
                error = await self._greet(stream, call, address, hello, timeout_s)
                if error is None:
                    error = await stream.carry(call.read, call.write)
            finally:
                call.cancel()
        if error is not None and not stream.closed:
            stream.closed = True
            stream.user.link_down(stream, error)

    async def _greet(
        self, stream: _CallerStream, call: Any, address: str, hello: PeerHello, timeout_s: float
    ) -> DiphaseError | None:
        """Exchanges hellos; why it failed, if it did."""
        try:
            async with asyncio.timeout(timeout_s):
                await call.write(HandoffFrame(messages=[HandoffMessage(hello=hello)]))
                answer = await call.read()
            if answer is _EOF:
                return PeerLost(f"{address} closed the link: {await call.details()}")
        except TimeoutError:
            return DeadlineExceeded(f"{address} did not answer within {timeout_s:g} s")
        except grpc.aio.AioRpcError as error:
            return error_of(error)
        if len(answer.messages) != 1 or not answer.messages[0].HasField("hello"):
            return TransferError(f"{address} did not begin with a hello")
        if stream.closed:
            return None
        try:
            stream.caller.link_up(stream, answer.messages[0].hello)
        except DiphaseError as error:
            return error
        return None


class _Servicer(HandoffServicer):
    """Brings every stream that comes in to the acceptor."""

    def __init__(self, acceptor: LinkAcceptor) -> None:
        self._acceptor = acceptor

    async def Attach(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        stream = _Stream(self._acceptor)
        hello = await self._hello(context)
        try:
            answer = self._acceptor.accept(stream, hello)
        except DiphaseError as error:
            await context.abort(_status(error), error.message)
        failure: DiphaseError | None = PeerLost("the other end closed the link")
        try:
            await context.write(HandoffFrame(messages=[HandoffMessage(hello=answer)]))
            failure = await stream.carry(context.read, context.write)
        finally:
            # Also when gRPC cancels this handler because the connection is gone.
            if failure is not None and not stream.closed:
                stream.closed = True
                self._acceptor.link_down(stream, failure)

    async def _hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> PeerHello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                frame = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello came")
        if frame is _EOF or len(frame.messages) != 1 or not frame.messages[0].HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a link begins with one hello")
        hello: PeerHello = frame.messages[0].hello
        return hello


def _status(error: DiphaseError) -> grpc.StatusCode:
    if isinstance(error, TransferError) and not isinstance(error, PeerLost):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode[error.grpc_status]


def handoff_service(acceptor: LinkAcceptor) -> Callable[[grpc.aio.Server], None]:
    """What adds the service Handoff to a gRPC server; `acceptor` is the worker's HandoffReceiver."""

    def add(server: grpc.aio.Server) -> None:
        add_HandoffServicer_to_server(_Servicer(acceptor), server)

    return add
