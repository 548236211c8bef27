"""What the thread of a socket transport knows of a peer, and what it asks of the medium that moves bytes."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from .base import Capabilities, Region, Segments
from .framing import Connection

ID = struct.Struct("<Q")


class Kind(IntEnum):
    """Frames. The first five go from writer to destination, the others back."""

    HELLO = 1
    WRITE = 2
    """Transfer id and table of destinations; the bulk is the data (tcp)."""
    COMMIT = 3
    """Transfer id and tag: the bytes are there. Id 0 wants no acknowledgement."""
    FENCED = 4
    WELCOME = 16
    REFUSED = 17
    """Why, in UTF-8."""
    ACK = 18
    FENCE = 19


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One write, or one notice (id 0)."""

    transfer_id: int
    peer: str
    segments: Segments
    num_bytes: int
    tag: bytes
    deadline: float


@dataclass(slots=True, eq=False, kw_only=True)
class Peer:
    """One incarnation. `writer` is the connection that we dialled, `reader` the one that they did."""

    incarnation: str
    admitted: bool = False
    writer: Connection | None = None
    welcomed: bool = False
    reader: Connection | None = None
    waiting: deque[Job] = field(default_factory=deque)
    """Not begun."""
    unacknowledged: dict[int, Job] = field(default_factory=dict)
    """Begun, not terminal."""
    fences: deque[int] = field(default_factory=deque)
    """Asked over `reader` and not answered."""
    down: str | None = None
    """Why it is being dropped, once it is."""
    attachment: Any = None
    """What the medium keeps for it."""


def commit(peer: Peer, job: Job) -> None:
    """Tells the other end that a job's bytes are there, or precede this on the connection."""
    if peer.writer is not None:
        peer.writer.queue(Kind.COMMIT, ID.pack(job.transfer_id) + job.tag, owner=job)


class Medium(Protocol):
    """How bytes get from here to there."""

    name: str
    capabilities: Capabilities
    fields: Mapping[str, type]
    """What its endpoints have beside regions."""
    severs: bool
    """Whether closing a connection at the destination makes sure that nothing is written any more."""

    def check(self, region: Region) -> None:
        """
        Raises:
            TransferError: this region cannot be moved.
        """
        ...

    def describe(self, address: Any) -> dict[str, Any]:
        """`fields` of our endpoint, given the listener's address."""
        ...

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        """None when that peer can be reached, else the reason."""
        ...

    def listen(self) -> socket.socket: ...

    def dial(self, endpoint: dict[str, Any]) -> socket.socket:
        """A socket whose connect has begun."""
        ...

    def greet(self, sock: socket.socket) -> str | None:
        """Why whoever connected is not welcome; None: he is. Sets the socket's options."""
        ...

    def offer(self) -> list[int]:
        """File descriptors that go with the WELCOME."""
        ...

    def attach(self, peer: Peer, sizes: list[int], fds: list[int]) -> None:
        """The WELCOME has come; takes the descriptors."""
        ...

    def detach(self, peer: Peer) -> None:
        """No job of this peer goes on; forgets its memory."""
        ...

    def begin(self, peer: Peer, job: Job) -> None:
        """Starts to move a job; its COMMIT is queued when the bytes are there, or on their way before it."""
        ...

    def abandon(self, peer: Peer, job: Job) -> None:
        """Neither reads nor writes a byte for this job any more."""
        ...

    def ready(self, peer: Peer) -> bool:
        """Whether another job may begin."""
        ...

    @property
    def busy(self) -> bool:
        """Whether work() has something to do now."""
        ...

    def work(self) -> list[Peer]:
        """Moves some bytes, where the thread itself does it; returns the peers of whom a job is finished."""
        ...

    def place(self, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        """Destinations of a WRITE.

        Raises:
            FrameError: they lie outside of the regions.
        """
        ...
