"""Transfers between GPUs of one host: the peer's pool is mapped, and the writer copies into it on a stream of
its own. Only offsets travel; the one handle of each region is in the WELCOME.

A COMMIT follows the event behind its copy. It could carry the event, for the destination's stream to wait on;
but then a stopped writer would hang the compute stream of a healthy destination, "Notified" would no longer
mean that the bytes are there, and nothing is won: the destination verifies on the host before it computes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from ...proto.errors import TransferError
from ..base import CancelKind, Capabilities, Region, TransportContext
from .cuda_device import DeviceFactory, cuda_device_of
from .cuda_memory import Device, Runs, cuda_runtime, num_devices
from .framing import FrameError
from .peer_process import PeerProcess
from .socket_medium import Targets
from .socket_peer import Job, Peer, commit
from .socket_transport import SocketTransport
from .unix_door import UnixDoor

MAX_COPIES = 4
"""On the stream at a time and peer: enough that it never runs dry, few enough that a cancel is soon over."""
MAX_FRAMES = 64
"""Tags that a peer has not taken from the socket before the next copy to it begins."""
DYING_S = 0.005
"""How often a dying process is looked at."""


@dataclass(slots=True, eq=False)
class _Copy:
    job: Job
    copy: object
    """What Device.passed() takes; None where there was nothing to copy."""
    is_abandoned: bool = False


@dataclass(slots=True, eq=False)
class _Attachment:
    """A peer that we write to."""

    handles: list[bytes]
    bases: list[int]
    """Where its regions are here."""
    copies: deque[_Copy] = field(default_factory=deque)
    """In the order of the jobs; a COMMIT waits for those before it."""


class CudaIpcMedium(UnixDoor):
    """See socket_medium.Medium."""

    name = "cuda_ipc"
    capabilities = Capabilities(name="cuda_ipc", device_memory=True, same_host=True, cancel=CancelKind.FENCE)
    fields: Mapping[str, type] = MappingProxyType({**UnixDoor.fields, "device": bytes, "pids": int})
    hello_fields: Mapping[str, type] = MappingProxyType({"pid": int})
    welcome_fields: Mapping[str, type] = MappingProxyType({"handles": bytes})
    severs = False
    lanes = 1

    def __init__(self, regions: list[Region], device_of: DeviceFactory) -> None:
        super().__init__(self.name)
        self._regions = regions
        self._device_of = device_of
        self._device: Device | None = None
        self._handles: list[bytes] = []
        self._writing: dict[str, Peer] = {}
        """Peers with copies on the stream."""
        self._dying: dict[str, Peer] = {}
        """Dropped peers whose process was ending when we last looked."""
        self._failed: dict[str, Peer] = {}
        self._passed = threading.Event()
        self.ring: Callable[[], None] = _nobody
        """Wakes the transport's thread, from any other."""

    @property
    def device(self) -> Device:
        assert self._device is not None  # nothing runs before check() has seen a region
        return self._device

    def check(self, region: Region) -> None:
        if self._device is None:
            self._device = self._device_of(region, self._on_passed)
            self._device.prepare()
        self._handles.append(self._device.export(region))

    def describe(self, address: Any) -> dict[str, Any]:
        return {**super().describe(address), "device": self.device.uuid, "pids": _pid_namespace()}

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        if endpoint["pids"] != _pid_namespace():
            return "the peer is in another PID namespace, where the end of a process cannot be watched"
        return super().reaches(endpoint) or self.device.why_unreachable(endpoint["device"])

    def hello(self, peer: Peer) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        peer.inbox = PeerProcess(fields["pid"])

    def welcome(self, peer: Peer) -> dict[str, Any]:
        return {"handles": b"".join(self._handles)}

    def offer(self) -> list[int]:
        return []

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        told: bytes = fields["handles"]
        if not sizes or len(told) % len(sizes):
            raise TransferError(f"handles: {len(told)} bytes for {len(sizes)} regions")
        each = len(told) // len(sizes)
        attachment = peer.attachment = _Attachment([], [])
        try:
            for i, size in enumerate(sizes):
                handle = told[i * each : (i + 1) * each]
                attachment.bases.append(self.device.map(handle, size))
                attachment.handles.append(handle)
        except TransferError:
            self._forget(peer)
            raise

    def detach(self, peer: Peer) -> None:
        if peer.attachment is not None and not peer.attachment.copies:
            self._forget(peer)

    def ready(self, peer: Peer) -> bool:
        return (
            len(peer.attachment.copies) < MAX_COPIES
            and peer.writer is not None
            and peer.writer.num_queued < MAX_FRAMES
        )

    def begin(self, peer: Peer, job: Job) -> None:
        try:
            copy = self.device.copy(self._runs(peer.attachment, job)) if job.num_bytes else None
        except TransferError as error:
            self._fail(peer, error)
            return
        peer.attachment.copies.append(_Copy(job, copy))
        self._writing[peer.incarnation] = peer
        if copy is None:
            self._advance(peer)

    def abandon(self, peer: Peer, job: Job) -> None:
        for copy in peer.attachment.copies:
            if copy.job is job:
                copy.is_abandoned = True  # the stream has it: it ends by itself, and quiet() says when
                return
        if peer.writer is not None:
            peer.writer.retract(job)

    def quiet(self, peer: Peer) -> bool:
        attachment: _Attachment | None = peer.attachment
        if attachment is not None and any(copy.is_abandoned for copy in attachment.copies):
            return False
        if peer.down is None or peer.inbox is None:
            return True
        if peer.inbox.is_dying:
            self._dying[peer.incarnation] = peer
            return False
        if not peer.readers:
            peer.inbox.close()
            peer.inbox = None
        return True

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        raise FrameError("transport cuda_ipc announces no transfers")

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        raise FrameError("transport cuda_ipc brings no bulk")

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        raise FrameError("transport cuda_ipc has one lane")

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return True  # the COMMIT follows the copy

    @property
    def poll_in_s(self) -> float | None:
        if self._failed or self._passed.is_set():
            return 0.0
        return DYING_S if self._dying else None

    def work(self) -> list[Peer]:
        self._passed.clear()
        changed = [peer for peer in list(self._writing.values()) if self._advance(peer)]
        changed += [*self._failed.values(), *self._dying.values()]
        self._failed.clear()
        self._dying.clear()
        return changed

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    def _advance(self, peer: Peer) -> bool:
        """Commits what has been copied; whether anything was."""
        copies: deque[_Copy] = peer.attachment.copies
        before = len(copies)
        while copies and self._has_ended(peer, copies[0]):
            ended = copies.popleft()
            if not ended.is_abandoned:
                commit(peer, ended.job)
        if not copies:
            self._writing.pop(peer.incarnation, None)
            if peer.down is not None:
                self._forget(peer)
        return len(copies) < before

    def _has_ended(self, peer: Peer, copy: _Copy) -> bool:
        if copy.copy is None:
            return True
        try:
            return self.device.passed(copy.copy)
        except TransferError as error:
            # A device that has failed moves nothing any more; the job fails with its peer.
            copy.is_abandoned = True
            self._fail(peer, error)
            return True

    def _fail(self, peer: Peer, error: TransferError) -> None:
        peer.failure = error.message
        self._failed[peer.incarnation] = peer

    def _forget(self, peer: Peer) -> None:
        """Nothing is being copied there."""
        self.device.unmap_all(peer.attachment.handles)
        peer.attachment = None

    def _runs(self, attachment: _Attachment, job: Job) -> Runs:
        segments = job.segments
        sources = np.array([self.device.address(region) for region in self._regions], dtype=np.int64)
        runs = np.empty((len(segments), 3), dtype=np.int64)
        runs[:, 0] = sources[segments[:, 0]] + segments[:, 1]
        runs[:, 1] = np.array(attachment.bases, dtype=np.int64)[segments[:, 2]] + segments[:, 3]
        runs[:, 2] = segments[:, 4]
        return runs

    def _on_passed(self) -> None:
        self._passed.set()
        self.ring()


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _nobody() -> None:
    """Until the transport says otherwise."""


class CudaIpcTransport(SocketTransport):
    """See base.Transport."""

    needs = ("cupy", "triton")

    def __init__(self, context: TransportContext, *, device_of: DeviceFactory | None = None) -> None:
        """
        Raises:
            TransferError: no GPU is usable here.
        """
        if device_of is None:
            num_devices(cuda_runtime())
        regions: list[Region] = []
        medium = CudaIpcMedium(regions, device_of or cuda_device_of)
        super().__init__(context, medium, regions)
        medium.ring = partial(self._thread.post, _nobody)
