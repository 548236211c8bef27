"""Transfers on one host without a GPU: the writer maps the peer's pool and copies into it.

Each pool lives in a memfd that is passed over an abstract unix socket (SCM_RIGHTS): nothing has a name in the
file system, nothing survives the processes. Tags and acknowledgements go over the same socket, after the
copy. Since the writer writes into the destination's memory itself, the destination is safe only when the
writer has answered a fence, or the socket has ended: the kernel closes it after the last thread of a killed
process has left its memory.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from ..base import CancelKind, Capabilities, Region, TransportContext
from .framing import FrameError
from .socket_medium import Targets
from .socket_peer import Job, Peer, commit
from .socket_transport import SocketTransport
from .unix_door import UnixDoor

SLICE_BYTES = 4 * 1024 * 1024
"""Copied before commands, deadlines and other peers get their turn."""
PREFAULT_BYTES = 8 * 1024 * 1024
"""Of a peer's pool that are mapped page by page in one go, while nothing is to be copied: the first transfers
need not pay for it."""
MAX_FRAMES = 64
"""Tags that a peer has not taken from the socket before the next copy to it begins."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; the module mmap does not have it."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Copy:
    """A job in progress."""

    job: Job
    segments: list[list[int]]
    next_segment: int = 0
    offset: int = 0
    """Bytes of that segment that are done."""


@dataclass(slots=True, eq=False)
class _Attachment:
    """The peer's regions as they are mapped here."""

    regions: list[NDArray[np.uint8]]
    unmapped: deque[tuple[mmap.mmap, int]] = field(default_factory=deque)
    """Ranges whose pages this process has not seen: from an offset to the end of the mapping."""
    copy: _Copy | None = None


class ShmMedium(UnixDoor):
    """See socket_medium.Medium."""

    name = "shm"
    capabilities = Capabilities(name="shm", device_memory=False, same_host=True, cancel=CancelKind.FENCE)
    hello_fields: Mapping[str, type] = MappingProxyType({})
    welcome_fields: Mapping[str, type] = MappingProxyType({})
    severs = False
    lanes = 1

    def __init__(self, regions: list[Region]) -> None:
        """
        Raises:
            TransferError: this is not Linux.
        """
        super().__init__(self.name)
        self._regions = regions
        self._sources: list[NDArray[np.uint8]] = []
        self._copying: dict[str, Peer] = {}
        self._prefaulting: dict[str, _Attachment] = {}

    def check(self, region: Region) -> None:
        buffer = region.host_bytes()
        if region.fd is None:
            raise TransferError("transport shm needs memory in a memfd")
        size = os.fstat(region.fd).st_size
        if size < len(buffer):
            raise TransferError(f"the memfd has {size} bytes, the region {len(buffer)}")
        self._sources.append(np.frombuffer(buffer, dtype=np.uint8))

    def hello(self, peer: Peer) -> dict[str, Any]:
        return {}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        """A HELLO says nothing more."""

    def welcome(self, peer: Peer) -> dict[str, Any]:
        return {}

    def offer(self) -> list[int]:
        return [region.fd for region in self._regions if region.fd is not None]

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        if len(fds) != len(sizes):
            raise TransferError(f"{len(fds)} memfds came for {len(sizes)} regions")
        attachment = _Attachment([])
        for fd, size in zip(fds, sizes, strict=True):
            if os.fstat(fd).st_size < size:
                raise TransferError(f"a memfd has {os.fstat(fd).st_size} bytes, not {size}")
            if size == 0:
                attachment.regions.append(np.empty(0, dtype=np.uint8))
                continue
            mapping = mmap.mmap(fd, size)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
            # The mapping lives as long as an array looks at it; the descriptor is not needed for that.
            attachment.regions.append(np.frombuffer(mapping, dtype=np.uint8))
            if os.fstat(fd).st_blocks * 512 >= size:  # a pool; a staging buffer's pages are taken when used
                attachment.unmapped.append((mapping, 0))
        peer.attachment = self._prefaulting[peer.incarnation] = attachment

    def detach(self, peer: Peer) -> None:
        self._copying.pop(peer.incarnation, None)
        self._prefaulting.pop(peer.incarnation, None)
        peer.attachment = None

    def ready(self, peer: Peer) -> bool:
        attachment: _Attachment = peer.attachment
        return attachment.copy is None and peer.writer is not None and peer.writer.num_queued < MAX_FRAMES

    def begin(self, peer: Peer, job: Job) -> None:
        if job.num_bytes:
            peer.attachment.copy = _Copy(job, job.segments.tolist())
            self._copying[peer.incarnation] = peer
        else:
            commit(peer, job)

    def abandon(self, peer: Peer, job: Job) -> None:
        if peer.attachment.copy is not None and peer.attachment.copy.job is job:
            self._stop_copy(peer)
        elif peer.writer is not None:
            peer.writer.retract(job)

    def quiet(self, peer: Peer) -> bool:
        return True  # the copy is on this thread: abandoned is stopped

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        raise FrameError("transport shm announces no transfers")

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        raise FrameError("transport shm brings no bulk")

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        raise FrameError("transport shm has one lane")

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return True  # the COMMIT follows the copy

    @property
    def poll_in_s(self) -> float | None:
        return 0.0 if self._copying or self._prefaulting else None

    def work(self) -> list[Peer]:
        if not self._copying:
            self._prefault()
        finished = []
        for peer in list(self._copying.values()):
            copy: _Copy = peer.attachment.copy
            if self._copy_slice(copy, peer.attachment.regions):
                self._stop_copy(peer)
                commit(peer, copy.job)
                finished.append(peer)
        return finished

    def close(self) -> None:
        """Every mapping ended with its peer."""

    def _prefault(self) -> None:
        """Some more pages of one peer's pool."""
        incarnation, attachment = next(iter(self._prefaulting.items()))
        if not attachment.unmapped:
            del self._prefaulting[incarnation]
            return
        mapping, begin = attachment.unmapped.popleft()
        end = min(begin + PREFAULT_BYTES, len(mapping))
        try:
            mapping.madvise(_MADV_POPULATE_WRITE, begin, end - begin)
        except OSError as error:  # an older kernel, or no memory: transfers pay as they come
            _log.debug("prefault_failed peer=%s why=%r", incarnation, str(error))
            return
        if end < len(mapping):
            attachment.unmapped.appendleft((mapping, end))

    def _stop_copy(self, peer: Peer) -> None:
        peer.attachment.copy = None
        del self._copying[peer.incarnation]

    def _copy_slice(self, copy: _Copy, targets: list[NDArray[np.uint8]]) -> bool:
        """Copies some bytes; True when the job has none left. numpy lets go of the interpreter lock."""
        left, i, done = SLICE_BYTES, copy.next_segment, copy.offset
        sources, segments = self._sources, copy.segments
        while i < len(segments) and left > 0:
            region, begin, target, target_begin, length = segments[i]
            if done or length > left:
                begin, target_begin, length = begin + done, target_begin + done, min(length - done, left)
                done += length
            targets[target][target_begin : target_begin + length] = sources[region][begin : begin + length]
            left -= length
            if done in (0, segments[i][4]):
                i, done = i + 1, 0
        copy.next_segment, copy.offset = i, done
        return i == len(segments)


class ShmTransport(SocketTransport):
    """See base.Transport."""

    def __init__(self, context: TransportContext) -> None:
        regions: list[Region] = []
        super().__init__(context, ShmMedium(regions), regions)
