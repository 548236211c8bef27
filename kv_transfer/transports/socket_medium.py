"""What a socket transport asks of the medium that moves its bytes: shm and tcp, and every library whose
transfers need connections, admission, deadlines and fences beside them.

The order of calls for a peer that we write to: hello, attach, (begin, abandon)*, detach. For one that writes
to us: heard, welcome, (expect or place and arrived, landed)*, detach. Everything is called on the transport's
thread, check(), describe() and reaches() before it starts or from the event loop's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..base import Capabilities, Region
from .socket_peer import Job, Peer

Targets = NDArray[np.int64]
"""[n, 3]: region, offset, length at the destination, checked against its regions; bytes."""


class Medium(Protocol):
    """How bytes get from here to there."""

    name: str
    capabilities: Capabilities
    fields: Mapping[str, type]
    """What its endpoints have beside regions."""
    hello_fields: Mapping[str, type]
    """What the writer's HELLO brings beside who it is: str, int, list, dict or bytes."""
    welcome_fields: Mapping[str, type]
    """What the destination's WELCOME brings beside regions."""
    severs: bool
    """Whether closing a connection at the destination makes sure that nothing is written any more."""
    lanes: int
    """Connections that a writer makes to a peer. The first has the commits, the others bulk alone."""

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

    def hello(self, peer: Peer) -> dict[str, Any]:
        """Writer: `hello_fields`.

        Raises:
            TransferError: there can be no connection.
        """
        ...

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        """Destination: the HELLO of an admitted peer has come; its fields are of the types of `hello_fields`.

        Raises:
            TransferError: they are of no use; the peer is refused.
        """
        ...

    def welcome(self, peer: Peer) -> dict[str, Any] | None:
        """Destination: `welcome_fields`, or None while they are not known; then it is asked again when work()
        returns the peer.

        Raises:
            TransferError: there can be no connection.
        """
        ...

    def offer(self) -> list[int]:
        """Destination: file descriptors that go with the WELCOME."""
        ...

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        """Writer: the WELCOME has come. The descriptors are closed afterwards.

        Raises:
            TransferError: it is of no use.
        """
        ...

    def detach(self, peer: Peer) -> None:
        """The peer is being dropped: all of its jobs were abandoned, what came from it counts no more. Its
        connections stay until quiet(); from then on the peer is not mentioned again."""
        ...

    def begin(self, peer: Peer, job: Job) -> None:
        """Writer: starts to move a job; its COMMIT is queued when the bytes are there, or on their way.
        COMMITs are in the order of begin(), that of a job without bytes (a notice, id 0, or an empty write)
        too."""
        ...

    def abandon(self, peer: Peer, job: Job) -> None:
        """Writer: the job failed or was cancelled; no COMMIT of it may follow, and one that may have gone
        before its bytes is withdrawn. Where its bytes may move on, quiet() is false until they cannot."""
        ...

    def ready(self, peer: Peer) -> bool:
        """Writer: whether another job may begin."""
        ...

    def quiet(self, peer: Peer) -> bool:
        """Writer: no job of this peer that failed or was cancelled can read or write memory any more, here or
        there. The peer's fences, and PeerDown once it is dropped, wait for it. When it becomes true later
        than at the call that made it false, work() returns the peer."""
        ...

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        """Destination: a transfer has begun whose bytes come another way (a WRITE without bulk).

        Raises:
            FrameError: this medium does not announce transfers.
        """
        ...

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        """Destination: where the bulk of a WRITE goes, one of `num_lanes` stripes of a transfer.

        Raises:
            FrameError: this medium brings no bulk, or not so.
        """
        ...

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        """Destination: the stripe of a further lane is in place.

        Raises:
            FrameError: this medium has none.
        """
        ...

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        """Destination: all bytes of this transfer are here, or it has none and was not announced. Its COMMIT,
        and those after it, wait until they are; it is asked again after WRITE frames of the peer, and when
        work() returns the peer. Ids of a peer grow; once one has landed, those before it that were never
        committed are over."""
        ...

    @property
    def poll_in_s(self) -> float | None:
        """When work() wants to run again, counted from when it ran last: None (nothing to do), 0.0 (at once),
        or seconds."""
        ...

    def work(self) -> list[Peer]:
        """Moves some bytes, or looks how far they are; returns the peers of whom something changed: a job is
        finished, a transfer has landed, it has become quiet, or cannot be written to (peer.failure)."""
        ...

    def close(self) -> None:
        """All peers were dropped; returns when nothing can be read or written any more. May block."""
        ...
