"""Transfers by NCCL: grouped sends here, grouped receives there. The socket of the pair carries the unique id
(in the WELCOME), what is about to be sent (WRITE without bulk) and the tags; each direction of a pair has a
communicator of its own in an owner process of its own (nccl_owner.py), because a library call that hangs can
only be ended with its process.

NCCL takes nothing back: what was posted is sent and received to its end. A job that is abandoned after that
is followed by one byte in the other direction; when it has come, the receives before it are over as well.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ...proto.errors import DiphaseError, TransferError
from ..base import CancelKind, Capabilities, Region, Segments, TransportContext
from .cuda_device import DeviceFactory, cuda_device_of
from .cuda_memory import Device, cuda_runtime, num_devices
from .framing import Connection, FrameError
from .nccl_communicator import load_nccl
from .nccl_owner import UNIQUE_ID_BYTES
from .nccl_process import Named, Opened, OwnerProcess, Passed, Told
from .socket_medium import Targets
from .socket_peer import Job, Peer, announce, commit
from .socket_thread import SocketThread
from .socket_transport import SocketTransport
from .tcp import TcpMedium

MAX_POSTED = 4
"""Transfers of a peer with its owner at a time: the next one's launch hides behind the last one's bytes."""
MAX_EXPECTED = 4096
"""Transfers that a peer announced and that have not come."""
OPEN_TIMEOUT_S = 30.0
"""How long the two owners may take to start and find each other."""
GRACE_S = 0.5
"""How long an owner may take to end by itself; aborts have been seen to hang."""
ENDING_S = 0.005
"""How often an owner that is ending is looked at."""
COMMUNICATOR = "diphase.kv_transfer.transports.nccl_communicator:CupyCommunicator"

_NOTHING: Segments = np.empty((0, 5), dtype=np.int64)
_log = logging.getLogger(__name__)


class Crew(Protocol):
    """What this medium asks of the transport's thread."""

    def watch(self, connection: Connection) -> None: ...
    def unwatch(self, connection: Connection) -> None: ...
    def at(self, in_s: float, action: Callable[[], None]) -> None: ...
    def wake(self) -> None:
        """Calls work() soon, though a timer said nothing about it."""
        ...


@dataclass(slots=True, eq=False)
class _Posted:
    """A transfer that the owner has, or a job without bytes that waits for those before it."""

    job: Job
    has_passed: bool
    is_abandoned: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """One direction of a pair."""

    owner: OwnerProcess
    unique_id: bytes = b""
    is_open: bool = False
    is_closing: bool = False
    posted: deque[_Posted] = field(default_factory=deque)
    """Writer: in the order of the jobs."""
    expected: deque[int] = field(default_factory=deque)
    """Destination: announced, not here; in the order of the announcements."""


class NcclMedium:
    """See socket_medium.Medium."""

    name = "nccl"
    capabilities = Capabilities(
        name="nccl", device_memory=True, same_host=False, cancel=CancelKind.KILL, stage_below_bytes=64 * 1024
    )
    fields: Mapping[str, type] = MappingProxyType({**TcpMedium.fields, "device": bytes})
    hello_fields: Mapping[str, type] = MappingProxyType({})
    welcome_fields: Mapping[str, type] = MappingProxyType({"unique_id": bytes})
    severs = True
    lanes = 1

    def __init__(
        self,
        host: str,
        regions: list[Region],
        device_of: DeviceFactory,
        communicator: str,
        open_timeout_s: float,
    ) -> None:
        """
        Raises:
            ConfigError: `host` cannot be resolved.
        """
        self._door = TcpMedium(host, [])
        self._regions = regions
        self._device_of = device_of
        self._communicator = communicator
        self._open_timeout_s = open_timeout_s
        self._device: Device | None = None
        self._handles: list[bytes] = []
        self._changed: dict[str, Peer] = {}
        """Peers whose owners have said something."""
        self._ending: dict[str, Peer] = {}
        """Dropped peers whose owners have not ended."""
        self._owners: set[OwnerProcess] = set()
        self.crew: Crew | None = None

    def check(self, region: Region) -> None:
        if self._device is None:
            self._device = self._device_of(region, _nobody)
        self._handles.append(self._device.export(region))

    def describe(self, address: Any) -> dict[str, Any]:
        assert self._device is not None  # nobody asks before check() has seen a region
        return {**self._door.describe(address), "device": self._device.uuid}

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        if self._device is not None and endpoint["device"] == self._device.uuid:
            return "both ends are on one GPU, which NCCL does not take twice"
        return self._door.reaches(endpoint)

    def listen(self) -> Any:
        return self._door.listen()

    def dial(self, endpoint: dict[str, Any]) -> Any:
        return self._door.dial(endpoint)

    def greet(self, sock: Any) -> str | None:
        return self._door.greet(sock)

    def hello(self, peer: Peer) -> dict[str, Any]:
        peer.attachment = self._start(peer)  # it starts while the other end makes the id
        return {}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        peer.inbox = self._start(peer)
        self._open(peer, peer.inbox, 1)

    def welcome(self, peer: Peer) -> dict[str, Any] | None:
        """None until the owner has made the unique id."""
        unique_id = peer.inbox.unique_id
        return {"unique_id": unique_id} if unique_id else None

    def offer(self) -> list[int]:
        return []

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        if len(fields["unique_id"]) != UNIQUE_ID_BYTES:
            raise TransferError(f"unique_id: {len(fields['unique_id'])} bytes, not {UNIQUE_ID_BYTES}")
        self._open(peer, peer.attachment, 0, fields["unique_id"])

    def detach(self, peer: Peer) -> None:
        for lane in _lanes(peer):
            self._end(lane)
            self._ending[peer.incarnation] = peer

    def ready(self, peer: Peer) -> bool:
        return peer.attachment.is_open and len(peer.attachment.posted) < MAX_POSTED

    def begin(self, peer: Peer, job: Job) -> None:
        lane: _Lane = peer.attachment
        if job.num_bytes:
            # Both ends post what the announcement says: as many, in this order, of these lengths. It is not
            # retracted with the job, therefore it is of another.
            announced = replace(job)
            announce(peer, announced)
            self._move(peer, lane, job.transfer_id, announced.segments[:, (0, 1, 4)])
        lane.posted.append(_Posted(job, has_passed=not job.num_bytes))
        self._commit(peer)

    def abandon(self, peer: Peer, job: Job) -> None:
        lane: _Lane = peer.attachment
        posted = next((posted for posted in lane.posted if posted.job is job), None)
        if posted is not None:
            posted.is_abandoned = True
        elif peer.writer is not None:
            peer.writer.retract(job)
        if peer.down is None and job.num_bytes:
            # Also if all has left here: it need not have arrived.
            answer = replace(job, segments=_NOTHING, num_bytes=0)
            announce(peer, answer)
            self._move(peer, lane, job.transfer_id, _NOTHING[:, :3])
            lane.posted.append(_Posted(answer, has_passed=False, is_abandoned=True))

    def quiet(self, peer: Peer) -> bool:
        lane: _Lane | None = peer.attachment
        if peer.down is not None:
            return all(lane.owner.ended for lane in _lanes(peer))
        return lane is None or not any(posted.is_abandoned for posted in lane.posted)

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        lane: _Lane = peer.inbox
        if len(lane.expected) >= MAX_EXPECTED:
            raise FrameError(f"{MAX_EXPECTED} transfers were announced and have not come")
        lane.expected.append(transfer_id)
        self._move(peer, lane, transfer_id, targets)

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        raise FrameError("transport nccl brings no bulk")

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        raise FrameError("transport nccl has one lane")

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return transfer_id not in peer.inbox.expected

    @property
    def poll_in_s(self) -> float | None:
        if self._changed:
            return 0.0
        return ENDING_S if self._ending else None

    def work(self) -> list[Peer]:
        changed, self._changed = self._changed, {}
        for incarnation, peer in list(self._ending.items()):
            if all(lane.owner.ended for lane in _lanes(peer)):
                del self._ending[incarnation]
                changed[incarnation] = peer
                for lane in _lanes(peer):
                    self._owners.discard(lane.owner)
                    lane.owner.release()
        return list(changed.values())

    def close(self) -> None:
        for owner in self._owners:
            owner.kill()
        for owner in self._owners:
            owner.wait()
            owner.release()
        self._owners.clear()
        if self._device is not None:
            self._device.close()

    # Owners.

    def _start(self, peer: Peer) -> _Lane:
        """
        Raises:
            TransferError: no process can be started.
        """
        try:
            owner = OwnerProcess(self._communicator)
        except OSError as error:
            raise TransferError(f"no process can be started for the communicator: {error}") from error
        self._owners.add(owner)
        lane = _Lane(owner)
        owner.connection.on_ready = partial(self._on_owner, peer, lane)
        self._watch(lane)
        return lane

    def _open(self, peer: Peer, lane: _Lane, rank: int, unique_id: bytes = b"") -> None:
        regions: Sequence[tuple[bytes, int]] = [
            (handle, region.num_bytes) for handle, region in zip(self._handles, self._regions, strict=True)
        ]
        self._say(peer, lane, partial(lane.owner.open, rank, regions, unique_id))
        assert self.crew is not None  # bound before the thread starts
        self.crew.at(self._open_timeout_s, partial(self._expire_open, peer, lane))

    def _expire_open(self, peer: Peer, lane: _Lane) -> None:
        if not lane.is_open and not lane.is_closing:
            self._fail(peer, lane, TransferError("the communicator was not made in time"))

    def _move(self, peer: Peer, lane: _Lane, transfer_id: int, runs: Targets) -> None:
        self._say(peer, lane, partial(lane.owner.move, transfer_id, runs))

    def _say(self, peer: Peer, lane: _Lane, say: Callable[[], None]) -> None:
        if lane.is_closing:
            return
        try:
            say()
        except DiphaseError as error:
            self._fail(peer, lane, error)
        else:
            self._watch(lane)

    def _watch(self, lane: _Lane) -> None:
        if self.crew is not None and not lane.is_closing:
            self.crew.watch(lane.owner.connection)

    def _on_owner(self, peer: Peer, lane: _Lane, mask: int) -> None:
        if lane.is_closing:
            return
        try:
            lane.owner.flush()
            told = lane.owner.read()
        except DiphaseError as error:
            self._fail(peer, lane, error)
            return
        for word in told:
            self._hear(peer, lane, word)
        self._changed[peer.incarnation] = peer
        self._watch(lane)

    def _hear(self, peer: Peer, lane: _Lane, word: Told) -> None:
        if isinstance(word, Named):
            lane.unique_id = word.unique_id
        elif isinstance(word, Opened):
            lane.is_open = True
        elif isinstance(word, Passed) and lane is peer.inbox:
            lane.expected.popleft()
        else:
            next(posted for posted in lane.posted if not posted.has_passed).has_passed = True
            self._commit(peer)

    def _commit(self, peer: Peer) -> None:
        """Queues the COMMITs of what has been sent; the destination holds each until it is there."""
        posted: deque[_Posted] = peer.attachment.posted
        while posted and posted[0].has_passed:
            ended = posted.popleft()
            if not ended.is_abandoned:
                commit(peer, ended.job)

    def _fail(self, peer: Peer, lane: _Lane, error: DiphaseError) -> None:
        """A communicator with an error is of no use any more, and so is the connection."""
        _log.warning("owner_failed pid=%d code=%s why=%r", lane.owner.pid, error.code, error.message)
        self._end(lane)
        peer.failure = f"{error.code}: {error.message}"
        self._changed[peer.incarnation] = peer
        if self.crew is not None:
            self.crew.wake()

    def _end(self, lane: _Lane) -> None:
        """Asks the owner to end, and sees to it that it does."""
        if lane.is_closing or self.crew is None:
            return
        lane.is_closing = True
        self.crew.unwatch(lane.owner.connection)
        lane.owner.close()
        self.crew.at(GRACE_S, lane.owner.kill)


def _lanes(peer: Peer) -> list[_Lane]:
    return [lane for lane in (peer.attachment, peer.inbox) if lane is not None]


def _nobody() -> None:
    """Nothing to do: the device copies nothing by itself here, and who is woken finds out why."""


class _ThreadCrew:
    """See Crew."""

    def __init__(self, thread: SocketThread) -> None:
        self._thread = thread

    def watch(self, connection: Connection) -> None:
        self._thread.watch(connection)

    def unwatch(self, connection: Connection) -> None:
        self._thread.unwatch(connection)

    def at(self, in_s: float, action: Callable[[], None]) -> None:
        self._thread.at(self._thread.clock.now() + in_s, action)

    def wake(self) -> None:
        self._thread.post(_nobody)


class NcclTransport(SocketTransport):
    """See base.Transport."""

    needs = ("cupy",)

    def __init__(
        self,
        context: TransportContext,
        *,
        device_of: DeviceFactory | None = None,
        communicator: str = COMMUNICATOR,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """
        Raises:
            TransferError: no GPU is usable here, or NCCL is not installed.
        """
        if device_of is None:
            load_nccl()
            num_devices(cuda_runtime())
        regions: list[Region] = []
        medium = NcclMedium(context.host, regions, device_of or cuda_device_of, communicator, open_timeout_s)
        super().__init__(context, medium, regions)
        medium.crew = _ThreadCrew(self._thread)
