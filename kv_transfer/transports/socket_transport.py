"""The event loop's half of a transport over sockets: checks, ids, commands to the thread, events from it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from ...proto.errors import InternalError, TransferError
from ..base import Done, Event, Failed, PeerDown, Region, Segments, TransportContext
from ..segments import coalesce
from .endpoint import read_endpoint, read_sizes, write_endpoint
from .regions import check_segments, check_tag
from .socket_medium import Medium
from .socket_peer import Job
from .socket_peers import SocketPeers
from .socket_thread import MAX_UNREAD, SocketThread

MAX_OUTSTANDING = 4096
"""Transfers to one peer that are not terminal; more are refused."""
_NO_SEGMENTS: Segments = np.empty((0, 5), dtype=np.int64)


class SocketTransport:
    """See base.Transport. `medium` moves the bytes."""

    def __init__(self, context: TransportContext, medium: Medium, regions: list[Region]) -> None:
        """`regions` is the list that the medium looks at; register() fills it."""
        self.capabilities = medium.capabilities
        self._context = context
        self._medium = medium
        self._regions = regions
        self._thread = SocketThread(context, medium.name)
        self._peers = SocketPeers(context, medium, regions, self._thread)
        self._destinations: dict[str, list[int]] = {}
        self._outstanding: Counter[str] = Counter()
        self._peer_of: dict[int, str] = {}
        self._ids = itertools.count(1)
        self._closed = False

    def register(self, region: Region) -> int:
        self._medium.check(region)
        self._regions.append(region)
        if len(self._regions) == 1:
            self._thread.start(self._peers)
        return len(self._regions) - 1

    def endpoint(self) -> bytes:
        return write_endpoint(
            self._medium.name,
            self._context.incarnation,
            regions=[region.num_bytes for region in self._regions],
            **self._medium.describe(self._peers.address),
        )

    def reaches(self, endpoint: bytes) -> str | None:
        try:
            return self._medium.reaches(self._parse(endpoint))
        except TransferError as error:
            return error.message

    def admit(self, peer: str) -> None:
        self._thread.post(partial(self._peers.admit, peer))

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        fields = self._parse(endpoint)
        peer: str = fields["incarnation"]
        if peer not in self._destinations:
            self._destinations[peer] = read_sizes(fields["regions"])
            self._thread.post(partial(self._peers.connect, fields, self._deadline(deadline_s)))
        return peer

    def write(self, peer: str, segments: Segments, tag: bytes, deadline_s: float) -> int:
        sizes = self._destinations.get(peer)
        if sizes is None:
            raise TransferError(f"transport {self._medium.name} has no peer {peer}")
        if self._outstanding[peer] >= MAX_OUTSTANDING:
            raise TransferError(f"{MAX_OUTSTANDING} transfers to {peer} are not done")
        check_tag(tag)
        num_bytes = check_segments(segments, [region.num_bytes for region in self._regions], sizes)
        transfer_id = next(self._ids)
        self._outstanding[peer] += 1
        self._peer_of[transfer_id] = peer
        job = Job(
            transfer_id=transfer_id,
            peer=peer,
            segments=coalesce(segments),
            num_bytes=num_bytes,
            tag=tag,
            deadline=self._deadline(deadline_s),
        )
        self._thread.post(partial(self._peers.jobs.add, job))
        return transfer_id

    def notify(self, peer: str, tag: bytes) -> None:
        if peer not in self._destinations:
            raise TransferError(f"transport {self._medium.name} has no peer {peer}")
        check_tag(tag)
        job = Job(transfer_id=0, peer=peer, segments=_NO_SEGMENTS, num_bytes=0, tag=tag, deadline=math.inf)
        self._thread.post(partial(self._peers.jobs.add, job))

    def poll(self, max_events: int = 64) -> list[Event]:
        if self._thread.crash is not None:
            raise InternalError(f"transport {self._medium.name} crashed: {self._thread.crash!r}")
        events: list[Event] = []
        while self._thread.events and len(events) < max_events:
            event = self._thread.events.popleft()
            if isinstance(event, Done | Failed):
                self._outstanding[self._peer_of.pop(event.transfer_id)] -= 1
            elif isinstance(event, PeerDown):
                self._destinations.pop(event.peer, None)
                self._outstanding.pop(event.peer, None)
            events.append(event)
        if self._thread.paused and len(self._thread.events) < MAX_UNREAD:
            self._thread.post(self._peers.resume)
        return events

    def cancel(self, transfer_id: int) -> None:
        self._thread.post(partial(self._peers.jobs.cancel, transfer_id))

    def fence(self, peer: str, deadline_s: float) -> None:
        self._thread.post(partial(self._peers.fence, peer, self._deadline(deadline_s)))

    def disconnect(self, peer: str) -> None:
        self._thread.post(partial(self._peers.disconnect, peer))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._thread.stop(self._peers)

    def _stir(self) -> None:
        """From any thread, for a medium with threads of its own."""
        self._thread.stir()

    def _deadline(self, seconds: float) -> float:
        return self._context.clock.now() + seconds

    def _parse(self, endpoint: bytes) -> dict[str, Any]:
        fields = read_endpoint(endpoint, self._medium.name, {"regions": list, **self._medium.fields})
        read_sizes(fields["regions"])
        return fields
