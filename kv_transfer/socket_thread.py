"""The thread of a socket transport: selector, connections, jobs, deadlines, fences.

Who writes dials. Over the connection the writer sends HELLO, WRITE, COMMIT, FENCED; the other end answers
WELCOME (or REFUSED), ACK, FENCE. A transfer is done when its COMMIT, which follows the bytes, was
acknowledged. How bytes move is the medium's business (tcp.py, shm.py). Everything here runs on the one
thread, except post() and stop().
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Any

from .base import Done, Event, Failed, Fenced, PeerDown, Region, TransportContext
from .endpoint import write_endpoint
from .framing import Connection, FrameSink
from .socket_door import Door
from .socket_peer import ID, Job, Kind, Medium, Peer
from .socket_sinks import ReaderSink, WriterSink

MAX_UNREAD = 4096
"""Events that nobody polled; until somebody does, no connection that brings notices is read."""

WORK_S = 0.001
"""The medium moves bytes at least so long before sockets and deadlines get their turn."""

_log = logging.getLogger(__name__)


class SocketThread:
    """`events` is filled here and emptied by poll() on the event loop's thread."""

    def __init__(self, context: TransportContext, medium: Medium, regions: list[Region]) -> None:
        self._thread = threading.Thread(target=self._run, name=f"kv-{medium.name}", daemon=True)
        self.events: deque[Event] = deque()
        self.crash: Exception | None = None
        """What ended the thread, if it was not stop()."""
        self.paused = False
        self._context = context
        self._medium = medium
        self._regions = regions
        self._commands: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._door = Door(context, medium, self._selector, self)
        self._alarm, self._alarm_in = os.pipe()
        os.set_blocking(self._alarm, False)
        os.set_blocking(self._alarm_in, False)
        self._peers: dict[str, Peer] = {}
        self._jobs: dict[int, Job] = {}
        self._dirty: dict[str, Peer] = {}
        """Peers with frames queued for them since the last turn."""
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count(1)
        self._stopping = False

    # From the event loop's thread.

    def start(self) -> None:
        self._thread.start()

    @property
    def address(self) -> Any:
        return self._door.address

    def post(self, command: Callable[[], None]) -> None:
        """Runs a command on this thread, in the order of the calls. Nothing happens once it was stopped."""
        self._commands.append(command)
        if not self._stopping:
            # A full pipe has woken the thread already.
            with contextlib.suppress(BlockingIOError):
                os.write(self._alarm_in, b"!")

    def stop(self) -> None:
        """Ends the thread and everything it has. Blocks."""
        if self._thread.ident is not None:
            self.post(self._end)
            self._thread.join()
        else:
            self._close()
        os.close(self._alarm)
        os.close(self._alarm_in)

    # Commands.

    def admit(self, incarnation: str) -> None:
        self._peer(incarnation).admitted = True

    def connect(self, endpoint: dict[str, Any], deadline: float) -> None:
        peer = self._peer(endpoint["incarnation"])
        if self._stopping:
            self.drop(peer, "this end was closed")
        if peer.writer is not None or peer.down is not None:
            return
        try:
            sock = self._medium.dial(endpoint)
        except OSError as error:
            self.drop(peer, f"cannot connect: {error}")
            return
        peer.writer = Connection(sock)
        peer.writer.takes_fds = sock.family == socket.AF_UNIX
        token = self._context.token
        hello = write_endpoint(self._medium.name, self._context.incarnation, token=token)
        peer.writer.queue(Kind.HELLO, hello)
        peer.writer.on_ready = partial(self._on_writer, peer, WriterSink(self, peer, self._medium))
        self._watch(peer, peer.writer)
        self.at(deadline, partial(self._expire_connect, peer))

    def write(self, job: Job) -> None:
        peer = self._peers.get(job.peer)
        if job.transfer_id:
            self._jobs[job.transfer_id] = job
            self.at(job.deadline, partial(self._expire_job, job))
        if peer is None or peer.down is not None:
            self._fail(job, "peer_lost", f"there is no connection to {job.peer}")
            return
        peer.waiting.append(job)
        self.advance(peer)

    def cancel(self, transfer_id: int) -> None:
        job = self._jobs.get(transfer_id)
        if job is not None:
            self._fail(job, "cancelled", "the transfer was cancelled")

    def fence(self, incarnation: str, deadline: float) -> None:
        peer = self._peers.get(incarnation)
        if peer is None or peer.reader is None:
            # What was cancelled here has stopped (abandon), and nobody there has a way to write.
            self.emit(Fenced(incarnation, True))
            return
        number = next(self._counter)
        peer.fences.append(number)
        self.at(deadline, partial(self._expire_fence, peer, number))
        if peer.down is None:
            peer.reader.queue(Kind.FENCE, ID.pack(number))
            self._flush(peer, peer.reader)

    def disconnect(self, incarnation: str) -> None:
        peer = self._peers.get(incarnation)
        if peer is not None:
            self.drop(peer, "disconnected")

    def resume(self) -> None:
        """Somebody polled: reads notices again."""
        self.paused = False
        for peer in list(self._peers.values()):
            if peer.reader is not None:  # frames may wait in its buffer, where no selector sees them
                peer.reader.on_ready(selectors.EVENT_READ)

    # For the sinks.

    def advance(self, peer: Peer) -> None:
        """Begins waiting jobs as far as the medium takes them."""
        while peer.waiting and peer.welcomed and self._medium.ready(peer):
            job = peer.waiting.popleft()
            if job.transfer_id:
                peer.unacknowledged[job.transfer_id] = job
            self._medium.begin(peer, job)
            self._dirty[peer.incarnation] = peer

    def run_commands(self) -> None:
        """Before anything that must come after what the event loop asked for."""
        while self._commands:
            self._commands.popleft()()

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self._context.wake()

    def notified(self) -> bool:
        """Whether more notices can be taken."""
        self.paused = self.paused or len(self.events) >= MAX_UNREAD
        return not self.paused

    def welcome(self, connection: Connection, incarnation: str) -> bool:
        """Whoever connected is a peer from now on, if he is expected."""
        peer = self._peers.get(incarnation)
        if peer is None or not peer.admitted or peer.reader is not None:
            return False
        peer.reader = connection
        sizes = [len(region.buffer) for region in self._regions]
        body = write_endpoint(self._medium.name, self._context.incarnation, regions=sizes)
        connection.queue(Kind.WELCOME, body, fds=self._medium.offer())
        sink = ReaderSink(self, peer, connection, self._medium)
        connection.on_ready = partial(self._on_reader, peer, sink)
        self._flush(peer, connection)
        return True

    def welcomed(self, peer: Peer) -> None:
        """The other end has taken our HELLO; jobs may begin."""
        peer.welcomed = True
        self.advance(peer)

    def acknowledged(self, peer: Peer, transfer_id: int) -> None:
        if peer.unacknowledged.pop(transfer_id, None) is not None:
            del self._jobs[transfer_id]
            self.emit(Done(transfer_id))

    def fenced(self, peer: Peer, number: int, ok: bool = True) -> None:
        """This fence is answered, and with it those asked for earlier."""
        while peer.fences and peer.fences[0] <= number:
            peer.fences.popleft()
            self.emit(Fenced(peer.incarnation, ok))

    def drop(self, peer: Peer, message: str) -> None:
        """Ends both directions. What the peer writes ends at once where we are who reads its bytes; where it
        copies into our memory itself, only when it has closed its end, or died."""
        if peer.down is not None:
            return
        self._drop_writer(peer, message)
        if peer.reader is not None and not self._medium.severs:
            try:
                peer.reader.sock.shutdown(socket.SHUT_WR)
                self._watch(peer, peer.reader)
                return  # _on_reader buries it when the end comes
            except OSError as error:
                _log.debug("shutdown_failed peer=%s why=%r", peer.incarnation, str(error))
        self._bury(peer)

    def at(self, deadline: float, action: Callable[[], None]) -> None:
        """Runs an action at a time of the clock."""
        heappush(self._timers, (deadline, next(self._counter), action))

    # Inside.

    def _run(self) -> None:
        try:
            self._selector.register(self._alarm, selectors.EVENT_READ, self._on_alarm)
            self._door.open()
            while not self._stopping:
                self._turn()
        except Exception as error:  # the top of this thread: nobody above it could know
            _log.exception("transport_thread_crashed name=%s", self._medium.name)
            self.crash = error
            self._context.wake()
        finally:
            self._close()

    def _turn(self) -> None:
        self.run_commands()
        began = now = self._context.clock.now()
        while self._medium.busy and now < began + WORK_S:
            for peer in self._medium.work():
                self._dirty[peer.incarnation] = peer
                self.advance(peer)
            now = self._context.clock.now()
        while self._timers and self._timers[0][0] <= now:
            heappop(self._timers)[2]()
        self._flush_dirty()
        timeout = None
        if self._medium.busy or self._stopping:  # a stop that was just run sends no alarm
            timeout = 0.0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - now)
        for key, mask in self._selector.select(timeout):
            key.data(mask)

    def _end(self) -> None:
        self._stopping = True

    def _close(self) -> None:
        self._stopping = True
        for peer in list(self._peers.values()):
            if peer.down is None:
                self._drop_writer(peer, "this end was closed")
            self._bury(peer)
        self.run_commands()  # whose writes fail now
        self._door.close()
        self._selector.close()

    def _peer(self, incarnation: str) -> Peer:
        return self._peers.setdefault(incarnation, Peer(incarnation=incarnation))

    def _expire_job(self, job: Job) -> None:
        if self._jobs.get(job.transfer_id) is job:
            self._fail(job, "deadline_exceeded", "the transfer's deadline passed")

    def _expire_connect(self, peer: Peer) -> None:
        if peer.writer is not None and not peer.welcomed:
            self.drop(peer, "the connection was not made in time")

    def _expire_fence(self, peer: Peer, number: int) -> None:
        if number not in peer.fences:
            return
        if self._medium.severs:
            self.drop(peer, "a fence was not answered in time")  # and by that it holds
        else:
            self.fenced(peer, number, ok=False)

    def _fail(self, job: Job, code: str, message: str) -> None:
        """The terminal event of a job that is not done."""
        peer = self._peers.get(job.peer)
        if peer is not None and peer.unacknowledged.pop(job.transfer_id, None) is not None:
            self._medium.abandon(peer, job)
        elif peer is not None and job in peer.waiting:
            peer.waiting.remove(job)
        if self._jobs.pop(job.transfer_id, None) is not None:
            self.emit(Failed(job.transfer_id, code, message))
        if peer is not None:
            self.advance(peer)

    def _drop_writer(self, peer: Peer, message: str) -> None:
        peer.down = message
        peer.admitted = peer.welcomed = False
        for job in [*peer.waiting, *peer.unacknowledged.values()]:
            self._fail(job, "peer_lost", message)
        self._medium.detach(peer)
        if peer.writer is not None:
            self._discard(peer.writer)
            peer.writer = None

    def _bury(self, peer: Peer) -> None:
        """Nothing of this peer can touch our memory any more."""
        if peer.reader is not None:
            self._discard(peer.reader)
            peer.reader = None
        if self._peers.pop(peer.incarnation, None) is not None:
            if peer.fences:
                self.fenced(peer, peer.fences[-1])
            self.emit(PeerDown(peer.incarnation, peer.down or "gone"))

    def _discard(self, connection: Connection) -> None:
        if connection.sock in self._selector.get_map():
            self._selector.unregister(connection.sock)
        connection.close()

    def _watch(self, peer: Peer, connection: Connection) -> None:
        """What the selector waits for: room to send if something is queued, and news unless nobody polls."""
        mask = 0 if connection.idle else selectors.EVENT_WRITE
        if not (self.paused and connection is peer.reader):
            mask |= selectors.EVENT_READ
        key = self._selector.get_map().get(connection.sock)
        if key is None and mask:
            self._selector.register(connection.sock, mask, connection.on_ready)
        elif key is not None and not mask:
            self._selector.unregister(
                connection.sock
            )  # with no mask it would still report a hang-up, for ever
        elif key is not None and key.events != mask:
            self._selector.modify(connection.sock, mask, connection.on_ready)

    def _flush_dirty(self) -> None:
        while self._dirty:
            _, peer = self._dirty.popitem()
            if peer.writer is not None:
                self._flush(peer, peer.writer)

    def _flush(self, peer: Peer, connection: Connection) -> None:
        try:
            connection.flush()
            self._watch(peer, connection)
        except OSError as error:
            self.drop(peer, str(error))

    def _on_alarm(self, mask: int) -> None:
        os.read(self._alarm, 4096)

    def _on_reader(self, peer: Peer, sink: FrameSink, mask: int) -> None:
        connection = peer.reader
        if connection is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                connection.read(sink)
            if peer.reader is connection:
                if peer.down is None:
                    connection.flush()
                self._watch(peer, connection)
        except (OSError, EOFError) as error:
            if peer.down is None:
                self._drop_writer(peer, str(error))
            self._bury(peer)

    def _on_writer(self, peer: Peer, sink: FrameSink, mask: int) -> None:
        connection = peer.writer
        if connection is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                connection.read(sink)
            if peer.writer is connection:
                connection.flush()
                self.advance(peer)
                connection.flush()
                self._watch(peer, connection)
        except (OSError, EOFError) as error:
            self.drop(peer, str(error))
