"""Links within one process, for simulation: the same frames, with delays, cuts and silence that the caller
sets.

Each direction of a stream keeps its order, as TCP does; different streams overtake each other. A frame is
copied through its wire form, so that no object is shared between the two sides.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..proto import worker_pb2 as pb
from ..proto.errors import WorkerLost
from .links import FrameSink, Link


class WorkerEnd(Protocol):
    """A worker's side of one stream."""

    def send(self, frame: pb.WorkerFrame) -> None: ...

    def close(self) -> None: ...


class WorkerService(Protocol):
    """A worker that gateways attach to."""

    def attached(self, end: WorkerEnd) -> None:
        """A gateway dialled; its hello is in the first frame."""
        ...

    def received(self, end: WorkerEnd, frame: pb.GatewayFrame) -> None: ...

    def detached(self, end: WorkerEnd) -> None:
        """The stream is gone; nothing that is sent arrives."""
        ...


class MemoryNetwork:
    """Workers by address. `delay` gives the seconds that each frame takes, in either direction."""

    def __init__(self, delay: Callable[[], float] = lambda: 0.0) -> None:
        self._delay = delay
        self._services: dict[str, WorkerService] = {}
        self._streams: dict[str, set[_Stream]] = {}
        self._silent: set[str] = set()

    def serve(self, address: str, service: WorkerService) -> None:
        self._services[address] = service

    def kill(self, address: str) -> None:
        """The process at `address` is dead: its streams end, dialling it fails."""
        self._services.pop(address, None)
        for stream in list(self._streams.get(address, ())):
            stream.end("connection reset")

    def silence(self, address: str) -> None:
        """Frames from and to `address` stay on the way while its streams stay open: a stopped process, a
        partition."""
        self._silent.add(address)

    def unsilence(self, address: str) -> None:
        """What was on the way arrives."""
        self._silent.discard(address)
        for stream in list(self._streams.get(address, ())):
            stream.deliver()

    def is_silent(self, address: str) -> bool:
        return address in self._silent

    def link(self, address: str, hello: pb.GatewayHello) -> Link:
        """A LinkFactory."""
        return _MemoryLink(self, address, hello)

    def open(self, address: str, on_frame: FrameSink, ended: asyncio.Future[str]) -> _Stream:
        """The gateway's dial.

        Raises:
            WorkerLost: nobody serves that address.
        """
        service = self._services.get(address)
        if service is None:
            raise WorkerLost(f"nobody listens at {address}")
        stream = _Stream(self, address, service, on_frame, ended)
        self._streams.setdefault(address, set()).add(stream)
        service.attached(stream)
        return stream

    def forget(self, stream: _Stream) -> None:
        self._streams[stream.address].discard(stream)

    def draw_delay(self) -> float:
        return self._delay()


class _Stream:
    """One stream; it is its worker's end."""

    def __init__(
        self,
        network: MemoryNetwork,
        address: str,
        service: WorkerService,
        on_frame: FrameSink,
        ended: asyncio.Future[str],
    ) -> None:
        self.address = address
        self._network = network
        self._service = service
        self._on_frame = on_frame
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._down: deque[tuple[float, bytes]] = deque()  # (due, frame) on the way to the gateway
        self._up: deque[tuple[float, bytes]] = deque()

    def send(self, frame: pb.WorkerFrame) -> None:
        """Worker to gateway."""
        self._enqueue(self._down, frame.SerializeToString())

    def send_up(self, frame: pb.GatewayFrame) -> None:
        """Gateway to worker."""
        self._enqueue(self._up, frame.SerializeToString())

    def close(self) -> None:
        self.end("the worker closed it")

    def end(self, reason: str) -> None:
        """Idempotent."""
        if not self._open:
            return
        self._open = False
        self._network.forget(self)
        self._service.detached(self)
        if not self._ended.done():
            self._ended.set_result(reason)

    def deliver(self) -> None:
        """Hands over what is due, in order."""
        now = self._loop.time()
        while self._down and self._down[0][0] <= now and self._passes():
            try:
                self._on_frame(pb.WorkerFrame.FromString(self._down.popleft()[1]))
            except WorkerLost as exc:
                self.end(exc.message)
        while self._up and self._up[0][0] <= now and self._passes():
            self._service.received(self, pb.GatewayFrame.FromString(self._up.popleft()[1]))

    def _enqueue(self, queue: deque[tuple[float, bytes]], data: bytes) -> None:
        due = self._loop.time() + self._network.draw_delay()
        if queue:
            due = max(due, queue[-1][0])  # a stream keeps its order
        queue.append((due, data))
        self._loop.call_at(due, self.deliver)

    def _passes(self) -> bool:
        return self._open and not self._network.is_silent(self.address)


class _MemoryLink:
    """The gateway's side; messages of one turn of the loop leave in one frame."""

    def __init__(self, network: MemoryNetwork, address: str, hello: pb.GatewayHello) -> None:
        self._network = network
        self._address = address
        self._outgoing = [pb.GatewayMessage(hello=hello)]
        self._stream: _Stream | None = None
        self._flushing = False

    def send(self, message: pb.GatewayMessage) -> None:
        self._outgoing.append(message)
        self.flush()

    def send_later(self, message: pb.GatewayMessage) -> None:
        self._outgoing.append(message)

    async def run(self, on_frame: FrameSink) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stream = self._network.open(self._address, on_frame, ended)
        self.flush()
        try:
            reason = await ended
        finally:
            self._stream.end("the gateway closed it")
        raise WorkerLost(f"the stream to the worker at {self._address} ended: {reason}")

    def flush(self) -> None:
        if self._outgoing and self._stream is not None and not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._send_frame)

    def _send_frame(self) -> None:
        self._flushing = False
        messages, self._outgoing = self._outgoing, []
        assert self._stream is not None
        self._stream.send_up(pb.GatewayFrame(messages=messages))
