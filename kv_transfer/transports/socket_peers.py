"""The life of a socket transport's peers: dialled or let in, joined by all lanes, fenced, dropped, buried.

Who writes dials. Over the connections the writer sends HELLO, WRITE, COMMIT, FENCED; the other end answers
WELCOME (or REFUSED), ACK, FENCE. A transfer is done when its COMMIT, which follows the bytes, was
acknowledged. How bytes move is the medium's business (socket_medium.py). Everything here runs on the
transport's thread.
"""

from __future__ import annotations

import itertools
import logging
import selectors
import socket
import uuid
from functools import partial
from typing import Any

from ...proto.errors import TransferError
from ..base import Fenced, PeerDown, Region, TransportContext
from ..config import MAX_TCP_SOCKETS
from .endpoint import write_endpoint
from .framing import Connection, FrameSink
from .socket_door import Door
from .socket_jobs import SocketJobs
from .socket_medium import Medium
from .socket_peer import ID, Fence, Kind, Peer
from .socket_sinks import ReaderSink, WriterSink
from .socket_thread import SocketThread

WORK_S = 0.002
"""The medium moves bytes at least so long before sockets and deadlines get their turn."""

_log = logging.getLogger(__name__)


class SocketPeers:
    """Commands of the event loop come in through SocketThread.post()."""

    def __init__(
        self, context: TransportContext, medium: Medium, regions: list[Region], thread: SocketThread
    ) -> None:
        self._context = context
        self._medium = medium
        self._regions = regions
        self._thread = thread
        self._door = Door(context, medium, thread, self)
        self._peers: dict[str, Peer] = {}
        self._dirty: dict[str, Peer] = {}
        """Peers with frames queued for them since the last turn."""
        self.jobs = SocketJobs(medium, thread, self._peers, self._dirty)
        self._counter = itertools.count(1)
        self._worked_at = 0.0

    @property
    def address(self) -> Any:
        return self._door.address

    # Commands.

    def admit(self, incarnation: str) -> None:
        self._peer(incarnation).admitted = True

    def connect(self, endpoint: dict[str, Any], deadline: float) -> None:
        if self._thread.stopping:
            self._thread.emit(PeerDown(endpoint["incarnation"], "this end was closed"))
            return
        peer = self._peer(endpoint["incarnation"])
        if peer.writers or peer.down is not None:
            return
        peer.endpoint = endpoint
        self._thread.at(deadline, partial(self._expire_connect, peer))
        self._dial(peer)

    def fence(self, incarnation: str, deadline: float) -> None:
        peer = self._peers.get(incarnation)
        if peer is None:
            self._thread.emit(Fenced(incarnation, True))
            return
        # Without a reader nobody there has a way to write; what we cancelled ourselves ends with quiet().
        fence = Fence(number=next(self._counter), missing=set(peer.readers))
        peer.fences.append(fence)
        self._thread.at(deadline, partial(self._expire_fence, peer, fence))
        if peer.reader is not None and peer.down is None:
            peer.reader.queue(Kind.FENCE, ID.pack(fence.number))
            self._dirty[incarnation] = peer
        self._settle(peer)

    def disconnect(self, incarnation: str) -> None:
        peer = self._peers.get(incarnation)
        if peer is not None:
            self.drop(peer, "disconnected")

    def resume(self) -> None:
        """Somebody polled: reads notices again."""
        self._thread.paused = False
        for peer in list(self._peers.values()):
            self.jobs.deliver(peer)
            self._hear(peer)

    # For the thread.

    def open(self) -> None:
        self._door.open()

    def work(self) -> float | None:
        medium, clock = self._medium, self._context.clock
        self.flush()  # what has begun is announced before it moves
        began = now = clock.now()
        while (wait := medium.poll_in_s) is not None:
            if self._worked_at + wait > now or now >= began + WORK_S:
                return max(0.0, self._worked_at + wait - now)
            for peer in medium.work():
                if peer.failure is not None:
                    self.drop(peer, peer.failure)
                self._answer(peer)
                self.jobs.deliver(peer)
                self._settle(peer)
                self.jobs.advance(peer)
                self._hear(peer)
                self._dirty[peer.incarnation] = peer
            self.flush()  # the COMMIT of a job need not wait for a part of the next one
            self._worked_at = now = clock.now()
        return None

    def flush(self) -> None:
        while self._dirty:
            _, peer = self._dirty.popitem()
            for connection in peer.writers if peer.down is None else ():
                self._flush(peer, connection)
            if peer.reader is not None and peer.down is None:
                self._flush(peer, peer.reader)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self.drop(peer, "this end was closed")
        self._medium.close()
        for peer in list(self._peers.values()):
            self._bury(peer)
        self._door.close()

    # For the door.

    def welcome(self, connection: Connection, fields: dict[str, Any]) -> None:
        lane, incarnation = fields["lane"], fields["incarnation"]
        peer = self._peers.get(incarnation)
        if lane == 0:
            if peer is None or not peer.admitted or peer.readers:
                raise TransferError(f"incarnation {incarnation} is not expected here")
            self._welcome_first(peer, connection, fields)
        else:
            if peer is None or peer.down is not None or not peer.readers:
                raise TransferError(
                    f"lane: incarnation {incarnation} has no connection to add lane {lane} to"
                )
            if fields["session"] != peer.reader_session:
                raise TransferError(f"session: lane {lane} belongs to another connection of {incarnation}")
            if not 0 < lane < peer.reader_lanes or lane in peer.readers:
                raise TransferError(
                    f"lane: {lane} of {incarnation} is there, or not one of the {peer.reader_lanes} announced"
                )
            peer.readers[lane] = connection
            connection.queue(Kind.WELCOME, write_endpoint(self._medium.name, self._context.incarnation))
        sink = ReaderSink(self, peer, jobs=self.jobs, lane=lane, medium=self._medium, regions=self._regions)
        connection.on_ready = partial(self._on_reader, peer, lane, connection, sink)
        self._flush(peer, connection)

    def _welcome_first(self, peer: Peer, connection: Connection, fields: dict[str, Any]) -> None:
        if not 1 <= fields["lanes"] <= MAX_TCP_SOCKETS:
            raise TransferError(f"lanes: {fields['lanes']}, not 1 to {MAX_TCP_SOCKETS}")
        self._medium.heard(peer, fields)
        peer.reader_session = uuid.uuid4().hex
        peer.readers[0] = connection
        peer.reader_lanes = fields["lanes"]
        self._answer(peer)

    def _answer(self, peer: Peer) -> None:
        """Says WELCOME, if it has not been said and the medium has what goes with it."""
        medium, connection = self._medium, peer.reader
        if connection is None or peer.is_answered or peer.down is not None:
            return
        try:
            more = medium.welcome(peer)
        except TransferError as error:
            self.drop(peer, error.message)
            return
        if more is None:
            return
        peer.is_answered = True
        body = write_endpoint(
            medium.name,
            self._context.incarnation,
            regions=[region.num_bytes for region in self._regions],
            session=peer.reader_session,
            **more,
        )
        connection.queue(Kind.WELCOME, body, fds=medium.offer())

    # For the sinks.

    def joined(self, peer: Peer) -> None:
        """The other end has taken one of our HELLOs; jobs begin when it has taken all."""
        peer.joined += 1
        if peer.joined < self._medium.lanes:
            self._dial(peer)
        else:
            self.jobs.advance(peer)

    def asked(self, peer: Peer, number: int) -> None:
        """The peer fences us: answered once the medium is quiet."""
        # What the event loop cancelled before it said so to the peer must have stopped when we answer.
        self._thread.run_commands()
        peer.questions.append(number)
        self._settle(peer)

    def answered(self, peer: Peer, lane: int, number: int) -> None:
        """On this lane, nothing follows any more of what had been cancelled when we asked."""
        for fence in peer.fences:
            if fence.number <= number:
                fence.missing.discard(lane)
        self._settle(peer)

    # The end.

    def drop(self, peer: Peer, message: str) -> None:
        """Ends both directions. What the peer writes ends at once where we are who reads its bytes; where it
        copies into our memory itself, only when it has closed its end, or died. What we write has ended when
        the medium is quiet; until then our end stays open, for the peer goes by that."""
        if peer.down is not None:
            return
        peer.down = message
        peer.admitted = False
        self.jobs.lose(peer, message)
        peer.commits.clear()
        peer.questions.clear()
        self._medium.detach(peer)
        for connection in peer.writers:
            self._thread.unwatch(connection)
        if not self._medium.severs and peer.reader is not None:
            try:
                peer.reader.sock.shutdown(socket.SHUT_WR)
                self._thread.watch(peer.reader)  # _on_reader goes on when the end comes
            except OSError as error:
                _log.debug("shutdown_failed peer=%s why=%r", peer.incarnation, str(error))
                self._discard_readers(peer)
        else:
            self._discard_readers(peer)
        self._settle(peer)

    def _settle(self, peer: Peer) -> None:
        """Goes on with what has waited for the medium to be quiet."""
        if not (peer.fences or peer.questions or peer.down is not None) or not self._medium.quiet(peer):
            return
        while peer.questions:
            body = ID.pack(peer.questions.popleft())
            for connection in peer.writers:
                connection.queue(Kind.FENCED, body)
            self._dirty[peer.incarnation] = peer
        while peer.fences and not peer.fences[0].missing:
            peer.fences.popleft()
            self._thread.emit(Fenced(peer.incarnation, True))
        if peer.down is not None:
            self._discard_writers(peer)
            if not peer.readers:
                self._bury(peer)

    def _bury(self, peer: Peer) -> None:
        """Nothing of this peer can touch our memory any more."""
        self._discard_writers(peer)
        self._discard_readers(peer)
        if self._peers.get(peer.incarnation) is peer:
            del self._peers[peer.incarnation]
            while peer.fences:
                peer.fences.popleft()
                self._thread.emit(Fenced(peer.incarnation, True))
            self._thread.emit(PeerDown(peer.incarnation, peer.down or "gone"))

    def _expire_connect(self, peer: Peer) -> None:
        if peer.joined < self._medium.lanes:
            self.drop(peer, "the connection was not made in time")

    def _expire_fence(self, peer: Peer, fence: Fence) -> None:
        if fence not in peer.fences:
            return
        if self._medium.severs and fence.missing:
            self.drop(peer, "a fence was not answered in time")  # and by that it holds
        while fence in peer.fences:
            self._thread.emit(Fenced(peer.incarnation, False))
            peer.fences.popleft()

    # Connections.

    def _peer(self, incarnation: str) -> Peer:
        return self._peers.setdefault(incarnation, Peer(incarnation=incarnation))

    def _dial(self, peer: Peer) -> None:
        """One more lane."""
        medium, lane = self._medium, len(peer.writers)
        try:
            more = medium.hello(peer) if lane == 0 else {}
            sock = medium.dial(peer.endpoint)
        except (TransferError, OSError) as error:
            self.drop(peer, f"cannot connect: {error}")
            return
        connection = Connection(sock)
        connection.takes_fds = sock.family == socket.AF_UNIX
        hello = write_endpoint(
            medium.name,
            self._context.incarnation,
            token=self._context.token,
            lane=lane,
            lanes=medium.lanes,
            session=peer.session,
            **more,
        )
        connection.queue(Kind.HELLO, hello)
        sink = WriterSink(self, peer, jobs=self.jobs, lane=lane, medium=medium, connection=connection)
        connection.on_ready = partial(self._on_writer, peer, connection, sink)
        peer.writers.append(connection)
        self._thread.watch(connection)

    def _discard_readers(self, peer: Peer) -> None:
        for connection in peer.readers.values():
            self._thread.discard(connection)
        peer.readers.clear()

    def _discard_writers(self, peer: Peer) -> None:
        for connection in peer.writers:
            self._thread.discard(connection)
        peer.writers.clear()

    def _flush(self, peer: Peer, connection: Connection) -> None:
        try:
            connection.flush()
        except OSError as error:
            self.drop(peer, str(error))
        else:
            self._watch(peer, connection)

    def _watch(self, peer: Peer, connection: Connection) -> None:
        muted = connection is peer.reader and peer.down is None and not self.jobs.hears(peer)
        self._thread.watch(connection, reading=not muted)

    def _hear(self, peer: Peer) -> None:
        """Reads on where nobody could take more; frames may wait in a buffer, where no selector sees them."""
        reader = peer.reader
        if reader is not None and not reader.watched & selectors.EVENT_READ and self.jobs.hears(peer):
            reader.on_ready(selectors.EVENT_READ)

    def _on_reader(self, peer: Peer, lane: int, connection: Connection, sink: FrameSink, mask: int) -> None:
        if peer.readers.get(lane) is not connection:
            return
        try:
            if mask & selectors.EVENT_READ:
                connection.read(sink)
            if peer.down is None:
                connection.flush()
        except (OSError, EOFError) as error:
            self._thread.discard(connection)
            if peer.readers.get(lane) is connection:
                del peer.readers[lane]
            if peer.down is None:
                self.drop(peer, str(error))
            else:
                self._settle(peer)
        if peer.readers.get(lane) is connection:
            self._watch(peer, connection)
        self._hear(peer)

    def _on_writer(self, peer: Peer, connection: Connection, sink: FrameSink, mask: int) -> None:
        if peer.down is not None:
            return
        try:
            if mask & selectors.EVENT_READ:
                connection.read(sink)
            if peer.down is None:
                connection.flush()
                self.jobs.advance(peer)  # what it begins is sent at the end of the turn
        except (OSError, EOFError) as error:
            self.drop(peer, str(error))
        if peer.down is None:
            self._thread.watch(connection)
