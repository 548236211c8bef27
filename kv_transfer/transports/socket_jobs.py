"""The jobs of a socket transport: from write() to the one terminal event, and at the other end from COMMIT to
the notice and its acknowledgement."""

from __future__ import annotations

from collections import deque
from functools import partial

from ..base import Done, Failed, Notified
from .framing import FrameError
from .socket_medium import Medium
from .socket_peer import ID, Job, Kind, Peer
from .socket_thread import SocketThread

MAX_COMMITS = 4096
"""COMMITs of a peer that wait for their bytes; until they have come, no more are read."""


class SocketJobs:
    """Begins, ends and acknowledges. Who marks a peer in `dirty` has queued something for it."""

    def __init__(
        self, medium: Medium, thread: SocketThread, peers: dict[str, Peer], dirty: dict[str, Peer]
    ) -> None:
        self._medium = medium
        self._thread = thread
        self._peers = peers
        self._dirty = dirty
        self._jobs: dict[int, Job] = {}

    def add(self, job: Job) -> None:
        peer = self._peers.get(job.peer)
        if job.transfer_id:
            self._jobs[job.transfer_id] = job
            self._thread.at(job.deadline, partial(self._expire, job.transfer_id))
        if peer is None or peer.down is not None:
            self._fail(job, "peer_lost", f"there is no connection to {job.peer}")
            return
        peer.waiting.append(job)
        self.advance(peer)

    def cancel(self, transfer_id: int) -> None:
        job = self._jobs.get(transfer_id)
        if job is not None:
            self._fail(job, "cancelled", "the transfer was cancelled")

    def lose(self, peer: Peer, message: str) -> None:
        """Whatever was to go to this peer fails."""
        for job in [*peer.waiting, *peer.unacknowledged.values()]:
            self._fail(job, "peer_lost", message)
        peer.waiting.clear()

    def advance(self, peer: Peer) -> None:
        """Begins waiting jobs as far as the medium takes them."""
        while peer.waiting and peer.joined == self._medium.lanes and self._medium.ready(peer):
            job = peer.waiting.popleft()
            if job.transfer_id:
                peer.unacknowledged[job.transfer_id] = job
            self._medium.begin(peer, job)
            self._dirty[peer.incarnation] = peer

    def acknowledged(self, peer: Peer, transfer_ids: list[int]) -> None:
        for transfer_id in transfer_ids:
            if peer.unacknowledged.pop(transfer_id, None) is not None:
                del self._jobs[transfer_id]
                self._thread.emit(Done(transfer_id))

    def committed(self, peer: Peer, transfer_id: int, tag: bytes) -> None:
        """The peer says that the bytes of a transfer are there or on their way."""
        peer.commits.append((transfer_id, tag))
        self.deliver(peer)

    def withdrawn(self, peer: Peer, transfer_id: int) -> None:
        """The bytes of a transfer will never all be there."""
        waiting = [commit for commit in peer.commits if commit[0] != transfer_id]
        if len(waiting) < len(peer.commits):
            peer.commits = deque(waiting)
            self.deliver(peer)

    def deliver(self, peer: Peer) -> None:
        """Hands on what has landed, in the order of the COMMITs."""
        acknowledgements = b""
        while peer.commits and not self._thread.paused:
            transfer_id, tag = peer.commits[0]
            if transfer_id and not self._medium.landed(peer, transfer_id):
                break
            peer.commits.popleft()
            if tag:
                self._thread.emit(Notified(peer.incarnation, tag))
            if transfer_id:
                acknowledgements += ID.pack(transfer_id)
        if acknowledgements and peer.reader is not None:
            peer.reader.queue(Kind.ACK, acknowledgements)
            self._dirty[peer.incarnation] = peer

    def hears(self, peer: Peer) -> bool:
        """Whether more COMMITs of this peer may be read."""
        return not self._thread.paused and len(peer.commits) < MAX_COMMITS

    def _expire(self, transfer_id: int) -> None:
        """Told by its id: a timer outlives most jobs, and must not keep their segments."""
        job = self._jobs.get(transfer_id)
        if job is not None:
            self._fail(job, "deadline_exceeded", "the transfer's deadline passed")

    def _fail(self, job: Job, code: str, message: str) -> None:
        """The terminal event of a job that is not done."""
        peer = self._peers.get(job.peer)
        if peer is not None and peer.unacknowledged.pop(job.transfer_id, None) is not None:
            self._medium.abandon(peer, job)
            self._dirty[peer.incarnation] = peer
        elif peer is not None and job in peer.waiting:
            peer.waiting.remove(job)
        if self._jobs.pop(job.transfer_id, None) is not None:
            self._thread.emit(Failed(job.transfer_id, code, message))
        if peer is not None and peer.down is None:
            self.advance(peer)


def read_ids(body: bytearray) -> list[int]:
    """
    Raises:
        FrameError: they are no ids.
    """
    if not body or len(body) % ID.size:
        raise FrameError(f"an ACK of {len(body)} bytes")
    return [transfer_id for (transfer_id,) in ID.iter_unpack(body)]
