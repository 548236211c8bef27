"""A worker's end of the stream to one gateway: what is waiting to be sent, bounded, and the way in.

Knows frames and queues, neither gRPC nor requests: service.py connects it to a socket, simulations to memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ..proto.errors import DiphaseError, Overloaded
from ..proto.frames import take_frame
from ..proto.worker_pb2 import GatewayFrame, GatewayMessage, WorkerFrame, WorkerMessage


class GatewayLink:
    """Made by WorkerHost.attach. Closed by either side, once; then nothing is sent or received any more."""

    def __init__(
        self,
        gateway_id: str,
        *,
        max_queued: int,
        on_message: Callable[[GatewayLink, GatewayMessage], None],
        on_close: Callable[[GatewayLink], None],
    ) -> None:
        self.gateway_id = gateway_id
        self.error: DiphaseError | None = None
        """Why the worker closed it; None when the gateway did, or nobody yet."""
        self._max_queued = max_queued
        self._on_message = on_message
        self._on_close = on_close
        self._queued: deque[WorkerMessage] = deque()
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def send(self, message: WorkerMessage) -> None:
        """Queues a message. A gateway that lets `max_queued` of them wait is disconnected."""
        if self.closed:
            return
        if len(self._queued) >= self._max_queued:
            self.close(
                Overloaded(f"gateway {self.gateway_id} does not read: {len(self._queued)} messages wait")
            )
            return
        self._queued.append(message)
        self._empty.clear()
        self._changed.set()

    def receive(self, frame: GatewayFrame) -> None:
        """Handles what the gateway sent. Never raises: a bad message is answered."""
        for message in frame.messages:
            if not self.closed:
                self._on_message(self, message)

    async def next_frame(self) -> WorkerFrame | None:
        """What there is to send, as soon as there is something; None once the link is closed. Cancelling it
        loses nothing."""
        while not self._queued and not self.closed:
            self._changed.clear()
            await self._changed.wait()
        if self.closed:
            return None
        frame = WorkerFrame(messages=take_frame(self._queued))
        if not self._queued:
            self._empty.set()
        return frame

    async def wait_empty(self) -> None:
        """Returns when everything has been taken by next_frame, or the link is closed."""
        await self._empty.wait()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def close(self, error: DiphaseError | None = None) -> None:
        """Idempotent."""
        if self.closed:
            return
        self.error = error
        self._queued.clear()
        self._closed.set()
        self._empty.set()
        self._changed.set()
        self._on_close(self)
