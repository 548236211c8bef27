"""Frames over a non-blocking stream socket: a small header, a small body, and bulk bytes that are never
copied.

A frame is `kind, length of body, length of bulk` in 16 bytes, the body, then the bulk, which is sent from and
received into memoryviews (scatter and gather). Knows no peers and no transfers.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

HEADER = struct.Struct("<BxxxIQ")
MAX_BODY = 16 * 1024 * 1024
MAX_VIEWS = 256
"""Views handed to one system call that sends (the kernel takes 1,024)."""
MAX_VIEWS_IN = 128
"""To one that receives: about as many of 16 KiB as there are bytes waiting."""
READ_BUDGET = 16 * 1024 * 1024
"""Bytes read before other sockets get their turn."""
MAX_FDS = 16
BUFFER_BYTES = 4096
"""Small frames are read so many bytes at a time; as much of a bulk at most is copied once more."""

_ZEROS = memoryview(bytes(1024 * 1024))


class FrameError(ConnectionError):
    """What came is no frame; the connection is worthless."""


class FrameSink(Protocol):
    """Who gets the frames of a connection."""

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        """Where the bulk of this frame goes; the lengths add up to `bulk_bytes`.

        Raises:
            FrameError: nowhere.
        """
        ...

    def frame(self, kind: int, body: bytearray) -> bool:
        """A frame is complete, its bulk in place; returns whether more may be read now."""
        ...


class _Outgoing:
    """A frame on its way out."""

    __slots__ = ("begun", "fds", "head_views", "owner", "views")

    def __init__(self, head: bytes, bulk: Iterable[memoryview], owner: object, fds: list[int]) -> None:
        self.views = deque([memoryview(head)])
        self.views.extend(view for view in bulk if len(view))
        self.head_views = 1
        self.owner = owner
        self.begun = False
        self.fds = fds

    def blank(self) -> None:
        """The bulk's memory is not ours any more: zeros take the place of what is not sent."""
        head = [self.views.popleft()] if self.head_views else []
        left = sum(map(len, self.views))
        self.views = deque(head)
        while left:
            self.views.append(_ZEROS[: min(left, len(_ZEROS))])
            left -= len(self.views[-1])


def _nobody(mask: int) -> None:
    """Until the owner says otherwise."""


class Connection:
    """One socket with what is on its way out and in."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fds: list[int] = []
        """File descriptors that came; whoever takes them closes them."""
        self.takes_fds = False
        self.max_body = MAX_BODY
        self.on_ready: Callable[[int], None] = _nobody
        """What the owner's selector calls."""
        self.watched = 0
        """What it waits for."""
        self._out: deque[_Outgoing] = deque()
        self._head = bytearray(HEADER.size)
        self._kind = 0
        self._body = bytearray()
        self._bulk_bytes = 0
        self._into: deque[memoryview] = deque([memoryview(self._head)])
        self._stage = 0  # 0: header, 1: body, 2: bulk
        self._buffer = bytearray(BUFFER_BYTES)
        self._spare = memoryview(b"")

    @property
    def idle(self) -> bool:
        """Whether everything queued has been handed to the kernel."""
        return not self._out

    @property
    def num_queued(self) -> int:
        """Frames that have not been handed to the kernel whole."""
        return len(self._out)

    def queue(
        self,
        kind: int,
        body: bytes,
        bulk: Iterable[memoryview] = (),
        *,
        bulk_bytes: int = 0,
        owner: object = None,
        fds: Iterable[int] = (),
    ) -> None:
        """Sends a frame after the others; flush() moves it. Bulk memory must stay as it is until then."""
        head = HEADER.pack(kind, len(body), bulk_bytes) + body
        self._out.append(_Outgoing(head, bulk, owner, list(fds)))

    def retract(self, owner: object) -> None:
        """Frames of this owner that have not begun are dropped; of one that has, the rest of the bulk is
        blanked."""
        kept: deque[_Outgoing] = deque()
        for frame in self._out:
            if frame.owner is owner:
                if not frame.begun:
                    continue
                frame.blank()
            kept.append(frame)
        self._out = kept

    def flush(self) -> None:
        """Sends until the kernel takes no more.

        Raises:
            OSError: the connection is broken.
        """
        while self._out:
            first = self._out[0]
            try:
                if first.fds and not first.begun:
                    rights = array.array("i", first.fds)
                    wanted = len(first.views[0])
                    sent = self.sock.sendmsg(
                        [first.views[0]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    )
                else:
                    views, wanted = self._gather()
                    sent = self.sock.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                return
            self._sent(sent)
            if sent < wanted:
                return  # the kernel has no room: the selector says when it has

    def _gather(self) -> tuple[list[memoryview], int]:
        """What one system call takes, and its bytes."""
        views: list[memoryview] = []
        for frame in self._out:
            if frame.fds and not frame.begun and views:
                break
            views.extend(islice(frame.views, MAX_VIEWS - len(views)))
            if len(views) == MAX_VIEWS:
                break
        return views, sum(map(len, views))

    def _sent(self, count: int) -> None:
        while self._out:
            frame = self._out[0]
            while frame.views and len(frame.views[0]) <= count:
                count -= len(frame.views.popleft())
                frame.begun = True
                frame.head_views = 0
            if frame.views:
                if count:
                    frame.views[0] = frame.views[0][count:]
                    frame.begun = True
                return
            self._out.popleft()

    def read(self, sink: FrameSink) -> None:
        """Takes what has arrived, up to a budget, and hands complete frames to the sink.

        Raises:
            FrameError: the bytes are no frames.
            OSError: the connection is broken.
            EOFError: the other end closed it.

        When the sink has had enough, frames may be left in the buffer: then read() must be called again
        without waiting for the socket.
        """
        budget = READ_BUDGET
        while budget > 0 or self._spare:
            if not self._spare:
                try:
                    count, more = self._receive()
                except (BlockingIOError, InterruptedError):
                    return
                if count == 0:
                    raise EOFError("the other end closed the connection")
                budget -= count
            else:
                count, more = self._take_spare(), True
            while self._into and len(self._into[0]) <= count:
                count -= len(self._into.popleft())
            if self._into:
                if count:
                    self._into[0] = self._into[0][count:]
            elif not self._arrived(sink):
                return
            if not more and not self._spare:
                return

    def _receive(self) -> tuple[int, bool]:
        """Bytes that came, and whether there may be more. Bulk goes where it belongs; heads and bodies are
        read many at a time into a buffer, from which _take_spare() serves them: a frame need not cost a
        system call."""
        if self.takes_fds:
            return self._receive_fds(), True
        if self._stage == 2 or len(self._into[0]) > len(self._buffer):
            if len(self._into) == 1:
                return self.sock.recv_into(self._into[0]), True
            return self.sock.recvmsg_into(list(islice(self._into, MAX_VIEWS_IN)))[0], True
        count = self.sock.recv_into(self._buffer)
        if count == 0:
            return 0, False
        self._spare = memoryview(self._buffer)[:count]
        return self._take_spare(), count == len(self._buffer)

    def _take_spare(self) -> int:
        target = self._into[0]
        count = min(len(target), len(self._spare))
        target[:count] = self._spare[:count]
        self._spare = self._spare[count:]
        return count

    def _receive_fds(self) -> int:
        size = array.array("i").itemsize
        count, ancillary, _, _ = self.sock.recvmsg_into([self._into[0]], socket.CMSG_LEN(MAX_FDS * size))
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.fds.extend(array.array("i", data[: len(data) - len(data) % size]))
        return count

    def _arrived(self, sink: FrameSink) -> bool:
        """A header, a body or a bulk is complete; goes on to the next that has bytes."""
        if self._stage == 0:
            self._kind, body_bytes, self._bulk_bytes = HEADER.unpack(self._head)
            if body_bytes > self.max_body:
                raise FrameError(f"a frame claims a body of {body_bytes} bytes")
            self._body = bytearray(body_bytes)
            self._stage = 1
            if body_bytes:
                self._into.append(memoryview(self._body))
                return True
        if self._stage == 1:
            self._stage = 2
            if self._bulk_bytes:
                self._into.extend(
                    view for view in sink.place(self._kind, self._body, self._bulk_bytes) if len(view)
                )
                return True
        self._stage = 0
        self._into.append(memoryview(self._head))
        return sink.frame(self._kind, self._body)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self._into.clear()
        self._out.clear()
        self.sock.close()
