"""Transfers by NIXL over UCX: RDMA, GPUDirect, or what else UCX finds between two workers.

Bytes go by NIXL's WRITE between registered regions; admission, deadlines, fences, tags and acknowledgements
go over our own socket, for NIXL has none of them. The writer announces a transfer, posts it in slices, and
when all of them are there sends a notification (its id, eight bytes, compared whole) and the COMMIT; the
destination, which must call NIXL for bytes and notifications to arrive, does so only while it expects some.
NIXL cannot take back what it has posted: a cancelled transfer is over when its last posted slice is.

A peer that NIXL cannot reach any more is dropped: NIXL makes no second connection to an agent.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from ...proto.errors import TransferError
from ..base import CancelKind, Capabilities, Region, TransportContext
from . import nixl_agent
from .framing import FrameError
from .nixl_agent import NixlAgent
from .nixl_moves import Move, Moves
from .nixl_slices import DEVICE, HOST, Bases, bases_of, place
from .socket_medium import Targets
from .socket_peer import ID, WRITE_HEAD, Job, Kind, Peer, announce, commit
from .socket_transport import SocketTransport
from .tcp import TcpMedium
from .ucx_report import REPORT

MAX_METADATA = 1024 * 1024
"""Bytes of an agent's description."""
MAX_NAME = 128
MAX_MOVES = 16
"""Jobs begun for a peer and not ended."""
MAX_FRAMES = 64
"""Frames that a peer has not taken from the socket before the next job begins."""
MAX_EXPECTED = 4096
"""Transfers of a peer that were announced and have not landed; and as many that landed unannounced."""
SPIN_S = 0.0001
"""So long after the last progress work() runs without a pause; longer would keep the interpreter's lock from
the event loop, for milliseconds at a time."""
LONGEST_PAUSE_S = 0.001
DRAIN_S = 0.1
"""How long what a dead writer has left in sockets of this host is taken in before its memory counts as
untouched: over TCP, UCX writes it when it is next called, whoever is dead by then."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Inbox:
    """What comes from a peer."""

    agent: str
    """The name of its agent."""
    expected: set[int] = field(default_factory=set)
    """Announced, not landed."""
    early: set[int] = field(default_factory=set)
    """Landed, not announced: notifications and announcements come on different ways."""
    newest: int = 0
    drained_at: float | None = None


class NixlMedium:
    """See socket_medium.Medium."""

    name = "nixl"
    capabilities = Capabilities(
        name="nixl", device_memory=True, same_host=False, cancel=CancelKind.FENCE, stage_below_bytes=64 * 1024
    )
    fields: Mapping[str, type] = MappingProxyType({"host": str, "port": int, "nixl": str, "backend": str})
    hello_fields: Mapping[str, type] = MappingProxyType({"agent": str})
    welcome_fields: Mapping[str, type] = MappingProxyType(
        {"agent": str, "metadata": bytes, "mac": bytes, "addresses": list, "devices": list}
    )
    severs = False
    lanes = 1

    def __init__(self, context: TransportContext, regions: list[Region]) -> None:
        """
        Raises:
            TransferError: NIXL does not work here.
        """
        self._clock = context.clock
        self._token = context.token.encode()
        self._regions = regions
        self._sockets = TcpMedium(context.host, regions)
        # An incarnation whose transport is opened anew is another agent.
        self._agent = NixlAgent(f"{context.incarnation[: MAX_NAME - 33]}-{uuid.uuid4().hex}")
        self._here = bases_of([])
        self._writing: dict[str, Peer] = {}
        """Peers with moves."""
        self._expecting: dict[str, Peer] = {}
        """Peers with transfers announced, or, dead, not drained."""
        self._senders: dict[str, Peer] = {}
        """By the name of their agents."""
        self._progress_at = 0.0

    def check(self, region: Region) -> None:
        address, device = place(region)
        kind = HOST if device < 0 else DEVICE
        self._agent.register(kind, address, region.num_bytes, max(device, 0))
        self._here = bases_of([*self._regions, region])

    # Connections are made as tcp makes them.

    def describe(self, address: Any) -> dict[str, Any]:
        versions = {"nixl": nixl_agent.version(), "backend": nixl_agent.BACKEND}
        return {**self._sockets.describe(address), **versions}

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        ours, theirs = nixl_agent.version(), endpoint["nixl"]
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            return f"the peer has NIXL {theirs}, this worker {ours}; install the same version on both"
        if endpoint["backend"] != nixl_agent.BACKEND:
            return f"the peer uses NIXL's backend {endpoint['backend']}, this worker {nixl_agent.BACKEND}"
        return None

    def listen(self) -> socket.socket:
        return self._sockets.listen()

    def dial(self, endpoint: dict[str, Any]) -> socket.socket:
        return self._sockets.dial(endpoint)

    def greet(self, sock: socket.socket) -> str | None:
        return self._sockets.greet(sock)

    # The handshake.

    def hello(self, peer: Peer) -> dict[str, Any]:
        return {"agent": self._agent.name}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        name = fields["agent"]
        if not 0 < len(name) <= MAX_NAME or self._senders.get(name, peer) is not peer:
            raise TransferError(f"agent: {name[:MAX_NAME]!r} is no name, or that of another peer")
        peer.inbox = _Inbox(name)
        self._senders[name] = peer

    def welcome(self, peer: Peer) -> dict[str, Any]:
        metadata = self._agent.metadata()
        return {
            "agent": self._agent.name,
            "metadata": metadata,
            "mac": self._mac(metadata),
            "addresses": self._here.addresses.tolist(),
            "devices": self._here.devices.tolist(),
        }

    def offer(self) -> list[int]:
        return []

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        metadata = fields["metadata"]
        if len(metadata) > MAX_METADATA:
            raise TransferError(f"metadata: {len(metadata)} bytes, {MAX_METADATA} at most")
        # A wrong address in it can crash UCX: only who knows the cluster's token is believed.
        if not hmac.compare_digest(fields["mac"], self._mac(metadata)):
            raise TransferError("mac: the metadata was not signed with this cluster's token")
        there = Bases(
            _integers("addresses", fields["addresses"], len(sizes), 0),
            _integers("devices", fields["devices"], len(sizes), -1),
        )
        name = self._agent.meet(metadata)
        if name != fields["agent"]:
            self._agent.leave(name)
            raise TransferError(f"agent: {fields['agent'][:MAX_NAME]!r} announced, {name!r} described")
        peer.attachment = Moves(self._agent, name, self._here, there)

    def detach(self, peer: Peer) -> None:
        inbox: _Inbox | None = peer.inbox
        if inbox is not None:
            self._senders.pop(inbox.agent, None)
        self._part(peer)

    # Writing.

    def ready(self, peer: Peer) -> bool:
        moves: Moves = peer.attachment
        return (
            moves.failure is None
            and len(moves) < MAX_MOVES
            and peer.writer is not None
            and peer.writer.num_queued < MAX_FRAMES
        )

    def begin(self, peer: Peer, job: Job) -> None:
        moves: Moves = peer.attachment
        if job.num_bytes:
            announce(peer, job)
        elif not len(moves):
            commit(peer, job)
            return
        moves.begin(job)
        self._writing[peer.incarnation] = peer
        self._progress_at = self._clock.now()

    def abandon(self, peer: Peer, job: Job) -> None:
        moves: Moves = peer.attachment
        if not moves.abandon(job) and peer.writer is not None:
            peer.writer.retract(job)
            _withdraw(peer, job)

    def quiet(self, peer: Peer) -> bool:
        moves: Moves | None = peer.attachment
        if moves is not None and not moves.settled:
            return False
        # What a writer that has ended left on the way must come in, or not at all.
        return peer.down is None or bool(peer.readers) or peer.incarnation not in self._expecting

    # What is written to us.

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        inbox: _Inbox = peer.inbox
        if len(targets) == 0:
            self._landed(peer, transfer_id)  # withdrawn: nothing of it is on the way
            return
        if transfer_id <= inbox.newest:
            raise FrameError(f"transfer {transfer_id} is announced after {inbox.newest}")
        if len(inbox.expected) >= MAX_EXPECTED:
            raise FrameError(f"{MAX_EXPECTED} transfers are announced and none has landed")
        inbox.newest = transfer_id
        if transfer_id not in inbox.early:
            inbox.expected.add(transfer_id)
            self._expecting[peer.incarnation] = peer
        inbox.early = {early for early in inbox.early if early > transfer_id}
        self._progress_at = self._clock.now()

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        raise FrameError("transport nixl brings no bulk")

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        raise FrameError("transport nixl has one lane")

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return transfer_id not in peer.inbox.expected

    # Progress.

    @property
    def poll_in_s(self) -> float | None:
        if not self._writing and not self._expecting:
            return None
        stalled = self._clock.now() - self._progress_at
        return 0.0 if stalled < SPIN_S else min(stalled / 10, LONGEST_PAUSE_S)

    def work(self) -> list[Peer]:
        changed: dict[str, Peer] = {}
        for peer in list(self._writing.values()):
            if self._push(peer):
                changed[peer.incarnation] = peer
        if self._expecting:
            for peer in [*self._take(), *self._drained()]:
                changed[peer.incarnation] = peer
        if changed:
            self._progress_at = self._clock.now()
        return list(changed.values())

    def close(self) -> None:
        for peer in self._writing.values():
            peer.attachment = None  # with the handles of what is in flight, which would keep the agent
        self._writing.clear()
        self._expecting.clear()
        self._agent.close()
        REPORT.tell()

    # Inside.

    def _push(self, peer: Peer) -> bool:
        moves: Moves = peer.attachment
        ended, changed = moves.work()
        for move in ended:
            self._end(peer, move)
        if moves.failure is not None and peer.down is None:
            peer.failure = moves.failure
        if not len(moves):
            if not moves.told:
                moves.told = True
                REPORT.tell()
            del self._writing[peer.incarnation]
            self._part(peer)
        return changed

    def _end(self, peer: Peer, move: Move) -> None:
        if not move.void:
            commit(peer, move.job)
        elif peer.down is None and move.job.num_bytes:
            _withdraw(peer, move.job)

    def _part(self, peer: Peer) -> None:
        """Forgets the agent of a peer that is being dropped, once nothing is in flight to it."""
        moves: Moves | None = peer.attachment
        if moves is not None and peer.down is not None and not len(moves):
            peer.attachment = None
            self._agent.leave(moves.name)
            REPORT.tell()

    def _take(self) -> list[Peer]:
        landed = []
        for name, messages in self._agent.notifications().items():
            peer = self._senders.get(name)
            for message in messages:
                if peer is None or len(message) != ID.size or not self._landed(peer, *ID.unpack(message)):
                    _log.debug("notification_unknown agent=%s bytes=%d", name, len(message))
                else:
                    landed.append(peer)
        return landed

    def _landed(self, peer: Peer, transfer_id: int) -> bool:
        inbox: _Inbox = peer.inbox
        if transfer_id > inbox.newest and len(inbox.early) < MAX_EXPECTED:
            inbox.early.add(transfer_id)
        elif transfer_id not in inbox.expected:
            return False
        inbox.expected.discard(transfer_id)
        if not inbox.expected:
            self._expecting.pop(peer.incarnation, None)
        return True

    def _drained(self) -> list[Peer]:
        """Dead writers of whom nothing more can be on the way."""
        now = self._clock.now()
        over = []
        for peer in list(self._expecting.values()):
            if peer.down is not None and not peer.readers:
                if peer.inbox.drained_at is None:
                    peer.inbox.drained_at = now + DRAIN_S
                elif now >= peer.inbox.drained_at:
                    del self._expecting[peer.incarnation]
                    over.append(peer)
        return over

    def _mac(self, metadata: bytes) -> bytes:
        return hmac.digest(self._token, metadata, hashlib.sha256)


def _withdraw(peer: Peer, job: Job) -> None:
    """Tells the destination to expect an announced job no longer: announces that it writes nowhere."""
    if peer.writer is not None:
        peer.writer.queue(Kind.WRITE, WRITE_HEAD.pack(job.transfer_id, 1))


def _integers(name: str, values: list[Any], count: int, least: int) -> Any:
    """
    Raises:
        TransferError: these are not so many integers of 63 bits.
    """
    if len(values) != count or not all(type(value) is int and least <= value < 2**63 for value in values):
        raise TransferError(f"{name}: not {count} integers of at least {least}")
    return np.array(values, dtype=np.int64)


class NixlTransport(SocketTransport):
    """See base.Transport."""

    def __init__(self, context: TransportContext) -> None:
        """
        Raises:
            TransferError: NIXL does not work here, or nothing can listen on the context's host.
        """
        regions: list[Region] = []
        super().__init__(context, NixlMedium(context, regions), regions)
