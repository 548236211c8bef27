"""Transfers inside one process: memory is copied from pool to pool, nothing crosses a socket or a thread.

Both roles in one process (an intra-GPU split) use it as it is; tests and simulation give the hub a `defer`
that delays, holds or loses what goes from one peer to another.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...proto.errors import TransferError
from ..base import (
    CancelKind,
    Capabilities,
    Done,
    Event,
    Failed,
    Fenced,
    Notified,
    PeerDown,
    Region,
    Segments,
    TransportContext,
)
from .endpoint import read_endpoint, write_endpoint
from .regions import check_segments, check_tag, copy_segments

MAX_QUEUED = 4096
MAX_UNREAD = 4096
"""Notices that a peer has not polled; further transfers to it wait."""

Defer = Callable[[str, str, Callable[[], None]], None]
"""(from, to, action): runs the action now, later, or never. Actions from one peer to another stay in
order."""


def _at_once(source: str, destination: str, action: Callable[[], None]) -> None:
    action()


class LocalHub:
    """Where the transports of one process find each other."""

    def __init__(self, defer: Defer = _at_once) -> None:
        self.defer = defer
        self.members: dict[str, LocalTransport] = {}
        self._identity = f"{os.getpid()}-{uuid.uuid4().hex}".encode()

    def identity(self) -> bytes:
        return self._identity


@dataclass(slots=True, eq=False)
class _Job:
    transfer_id: int
    peer: str
    segments: Segments
    tag: bytes
    deadline: float
    notice_only: bool = False


@dataclass(slots=True)
class _Lane:
    """What goes to one peer, first in, first out."""

    jobs: deque[_Job] = field(default_factory=deque)
    moving: _Job | None = None
    """The job that the hub's defer has in hand."""


class LocalTransport:
    """See base.Transport."""

    capabilities = Capabilities(name="local", device_memory=False, same_host=True, cancel=CancelKind.CLEAN)

    def __init__(self, context: TransportContext) -> None:
        """
        Raises:
            TransferError: the context has no hub.
        """
        if not isinstance(context.hub, LocalHub):
            raise TransferError("transport local needs both roles in one process")
        self.incarnation = context.incarnation
        self.regions: list[Region] = []
        self._hub = context.hub
        self._wake = context.wake
        self._clock = context.clock
        self._admitted: set[str] = set()
        self._lanes: dict[str, _Lane] = {}
        self._live: dict[int, _Job] = {}
        self._events: deque[Event] = deque()
        self._next_id = 0
        self._advancing = False
        self._hub.members[self.incarnation] = self

    def register(self, region: Region) -> int:
        region.host_bytes()
        self.regions.append(region)
        return len(self.regions) - 1

    def endpoint(self) -> bytes:
        return write_endpoint("local", self.incarnation, hub=self._hub.identity().decode())

    def reaches(self, endpoint: bytes) -> str | None:
        try:
            self._parse(endpoint)
        except TransferError as error:
            return error.message
        return None

    def admit(self, peer: str) -> None:
        self._admitted.add(peer)

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        peer = self._parse(endpoint)
        self._lanes.setdefault(peer, _Lane())
        return peer

    def write(self, peer: str, segments: Segments, tag: bytes, deadline_s: float) -> int:
        lane = self._lanes.get(peer)
        if lane is None:
            raise TransferError(f"transport local has no peer {peer}")
        if len(lane.jobs) >= MAX_QUEUED:
            raise TransferError(f"{MAX_QUEUED} transfers to {peer} are queued")
        check_tag(tag)
        other = self._hub.members.get(peer)
        remote = [region.num_bytes for region in other.regions] if other else None
        check_segments(segments, [region.num_bytes for region in self.regions], remote)
        job = self._job(peer, segments, tag, deadline_s)
        self._live[job.transfer_id] = job
        lane.jobs.append(job)
        self._advance_all()
        return job.transfer_id

    def notify(self, peer: str, tag: bytes) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            raise TransferError(f"transport local has no peer {peer}")
        check_tag(tag)
        job = self._job(peer, np.empty((0, 5), dtype=np.int64), tag, float("inf"))
        job.notice_only = True
        lane.jobs.append(job)
        self._advance_all()

    def poll(self, max_events: int = 64) -> list[Event]:
        now = self._clock.now()
        for job in [job for job in self._live.values() if job.deadline <= now]:
            self._end(job, Failed(job.transfer_id, "deadline_exceeded", "the transfer's deadline passed"))
        events = [self._events.popleft() for _ in range(min(max_events, len(self._events)))]
        if events:
            for other in list(self._hub.members.values()):
                other._advance_all()
        return events

    def cancel(self, transfer_id: int) -> None:
        job = self._live.get(transfer_id)
        if job is not None:
            self._end(job, Failed(transfer_id, "cancelled", "the transfer was cancelled"))

    def fence(self, peer: str, deadline_s: float) -> None:
        # A cancelled job has left its lane before cancel returned, at either end.
        self._emit(Fenced(peer, True))

    def disconnect(self, peer: str) -> None:
        other = self._hub.members.get(peer)
        self._drop(peer, "disconnected")
        if other is not None:
            self._hub.defer(
                self.incarnation, peer, lambda: other._drop(self.incarnation, "the peer disconnected")
            )

    def close(self) -> None:
        if self._hub.members.get(self.incarnation) is not self:
            return
        del self._hub.members[self.incarnation]
        for peer in self._peers():
            self.disconnect(peer)

    def _peers(self) -> set[str]:
        return self._admitted | set(self._lanes)

    def _parse(self, endpoint: bytes) -> str:
        fields = read_endpoint(endpoint, "local", {"hub": str})
        if fields["hub"] != self._hub.identity().decode():
            raise TransferError("the peer is in another process")
        incarnation: str = fields["incarnation"]
        return incarnation

    def _job(self, peer: str, segments: Segments, tag: bytes, deadline_s: float) -> _Job:
        self._next_id += 1
        return _Job(self._next_id, peer, segments, tag, self._clock.now() + deadline_s)

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _end(self, job: _Job, event: Done | Failed) -> None:
        """The one terminal event of a job, whatever lane it is in."""
        del self._live[job.transfer_id]
        lane = self._lanes.get(job.peer)
        if lane is not None and job in lane.jobs:
            lane.jobs.remove(job)
        if lane is not None and lane.moving is job:
            lane.moving = None
        self._emit(event)
        self._advance_all()

    def _advance_all(self) -> None:
        if self._advancing:
            return  # a loop below goes on with it: no recursion, however long the queue
        self._advancing = True
        try:
            for peer in list(self._lanes):
                self._advance(peer)
        finally:
            self._advancing = False

    def _advance(self, peer: str) -> None:
        while (lane := self._lanes.get(peer)) is not None and lane.moving is None and lane.jobs:
            other = self._hub.members.get(peer)
            if other is not None and len(other._events) >= MAX_UNREAD:
                return  # poll() at the other end goes on with it
            lane.moving = job = lane.jobs[0]
            self._hub.defer(self.incarnation, peer, partial(self._move, job))

    def _move(self, job: _Job) -> None:
        lane = self._lanes.get(job.peer)
        if lane is None or lane.moving is not job:
            return  # cancelled, expired or disconnected meanwhile: nothing arrives late
        other = self._hub.members.get(job.peer)
        if other is None or self.incarnation not in other._admitted:
            self._drop(job.peer, "the peer is gone or does not admit us")
            return
        copy_segments(job.segments, self.regions, other.regions)
        lane.jobs.popleft()
        lane.moving = None
        if job.tag:
            other._emit(Notified(self.incarnation, job.tag))
        if not job.notice_only:
            self._end(job, Done(job.transfer_id))
        self._advance_all()

    def _drop(self, peer: str, message: str) -> None:
        if peer not in self._peers():
            return
        self._admitted.discard(peer)
        self._lanes.pop(peer, None)
        for job in [job for job in self._live.values() if job.peer == peer]:
            self._end(job, Failed(job.transfer_id, "peer_lost", message))
        self._emit(PeerDown(peer, message))
