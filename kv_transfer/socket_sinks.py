"""What each frame means, by the connection that it comes on: of a writer or of a destination."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

from ..proto.errors import TransferError
from .base import Event, Notified
from .endpoint import read_endpoint, read_sizes
from .framing import Connection, FrameError
from .socket_peer import ID, Kind, Medium, Peer


class Thread(Protocol):
    """What the sinks ask of socket_thread.SocketThread."""

    def run_commands(self) -> None: ...
    def emit(self, event: Event) -> None: ...
    def notified(self) -> bool: ...
    def welcomed(self, peer: Peer) -> None: ...
    def acknowledged(self, peer: Peer, transfer_id: int) -> None: ...
    def fenced(self, peer: Peer, number: int) -> None: ...
    def drop(self, peer: Peer, message: str) -> None: ...


class _Sink:
    """Takes no bulk."""

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        raise FrameError(f"a frame of kind {kind} brings {bulk_bytes} bytes of bulk")


class ReaderSink(_Sink):
    """A peer writes to us."""

    def __init__(self, thread: Thread, peer: Peer, connection: Connection, medium: Medium) -> None:
        self._thread = thread
        self._peer = peer
        self._connection = connection
        self._medium = medium

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        if kind != Kind.WRITE:
            return super().place(kind, body, bulk_bytes)
        return self._medium.place(body, bulk_bytes)

    def frame(self, kind: int, body: bytearray) -> bool:
        if self._peer.down is not None:
            return True  # only its end is waited for
        if kind == Kind.COMMIT and len(body) >= ID.size:
            (transfer_id,) = ID.unpack_from(body)
            if len(body) > ID.size:
                self._thread.emit(Notified(self._peer.incarnation, bytes(body[ID.size :])))
            if transfer_id:
                self._connection.queue(Kind.ACK, bytes(body[: ID.size]))
            return self._thread.notified()
        if kind == Kind.FENCED and len(body) == ID.size:
            self._thread.fenced(self._peer, *ID.unpack(body))
        elif kind != Kind.WRITE:
            raise FrameError(f"a writer sent a frame of kind {kind}")
        return True


class WriterSink(_Sink):
    """A peer that we write to answers."""

    def __init__(self, thread: Thread, peer: Peer, medium: Medium) -> None:
        self._thread = thread
        self._peer = peer
        self._medium = medium

    def frame(self, kind: int, body: bytearray) -> bool:
        connection = self._peer.writer
        if connection is None:
            return False
        if kind == Kind.ACK and len(body) == ID.size:
            self._thread.acknowledged(self._peer, *ID.unpack(body))
        elif kind == Kind.FENCE and len(body) == ID.size:
            # What the event loop cancelled before it said so to the peer must have stopped when we answer.
            self._thread.run_commands()
            connection.queue(Kind.FENCED, bytes(body))
        elif kind == Kind.WELCOME and not self._peer.welcomed:
            self._welcome(connection, body)
        elif kind == Kind.REFUSED:
            raise FrameError(f"the peer refuses the connection: {body.decode(errors='replace')}")
        else:
            raise FrameError(f"a destination sent a frame of kind {kind}")
        return self._peer.writer is connection

    def _welcome(self, connection: Connection, body: bytearray) -> None:
        try:
            fields = read_endpoint(body, self._medium.name, {"regions": list})
            if fields["incarnation"] != self._peer.incarnation:
                raise TransferError(f"incarnation {fields['incarnation']} answers")
            self._medium.attach(self._peer, read_sizes(fields["regions"]), connection.fds)
        except (TransferError, OSError) as error:
            raise FrameError(f"the welcome is unusable: {error}") from error
        connection.takes_fds = False
        for fd in connection.fds:
            os.close(fd)
        connection.fds.clear()
        self._thread.welcomed(self._peer)
