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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from ..base import CancelKind, Capabilities, Region, TransportContext
from .framing import FrameError
from .shm_copier import Copier, Copy, Lane
from .shm_slices import slices
from .socket_medium import Targets
from .socket_peer import Job, Peer, commit
from .socket_transport import SocketTransport
from .unix_door import UnixDoor

MAX_INLINE = 256 * 1024
"""Bytes of a job that the transport's thread copies itself when nothing is before it: a word to the copier
and back would take longer."""
MAX_COPIES = 16
"""Jobs of a peer that the copier has."""
PREFAULT_BYTES = 8 * 1024 * 1024
"""Of a peer's pool that are mapped page by page in one go, while nothing is to be copied: the first transfers
need not pay for it."""
MAX_FRAMES = 64
"""Tags that a peer has not taken from the socket before the next copy to it begins."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; the module mmap does not have it."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Attachment:
    """The peer's regions as they are mapped here."""

    regions: list[NDArray[np.uint8]]
    unmapped: deque[tuple[mmap.mmap, int]] = field(default_factory=deque)
    """Ranges whose pages this process has not seen: from an offset to the end of the mapping."""
    lane: Lane = field(default_factory=Lane)
    """The copier's."""
    copies: list[Copy] = field(default_factory=list)
    """In the lane, or finished and not looked at."""


class ShmMedium(UnixDoor):
    """See socket_medium.Medium."""

    name = "shm"
    capabilities = Capabilities(name="shm", device_memory=False, same_host=True, cancel=CancelKind.FENCE)
    hello_fields: Mapping[str, type] = MappingProxyType({})
    welcome_fields: Mapping[str, type] = MappingProxyType({})
    severs = False
    lanes = 1

    def __init__(self, regions: list[Region], stir: Callable[[], None]) -> None:
        """`stir`, called from any thread, has the transport's thread look at poll_in_s again.

        Raises:
            TransferError: this is not Linux.
        """
        super().__init__(self.name)
        self._regions = regions
        self._sources: list[NDArray[np.uint8]] = []
        self._copier = Copier(stir)
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
        self._prefaulting.pop(peer.incarnation, None)
        self._part(peer)

    def ready(self, peer: Peer) -> bool:
        attachment: _Attachment = peer.attachment
        return (
            len(attachment.copies) < MAX_COPIES
            and peer.writer is not None
            and peer.writer.num_queued < MAX_FRAMES
        )

    def begin(self, peer: Peer, job: Job) -> None:
        attachment: _Attachment = peer.attachment
        cut = slices(job.segments, self._sources, attachment.regions)
        if attachment.copies or job.num_bytes > MAX_INLINE:
            copy = Copy(peer=peer, job=job, slices=cut, left=job.num_bytes)
            attachment.copies.append(copy)
            self._copier.submit(attachment.lane, copy)
        else:
            for _, put in cut:
                put()
            commit(peer, job)

    def abandon(self, peer: Peer, job: Job) -> None:
        attachment: _Attachment = peer.attachment
        for copy in attachment.copies:
            if copy.job is job:
                copy.void = True
                return
        if peer.writer is not None:
            peer.writer.retract(job)

    def quiet(self, peer: Peer) -> bool:
        attachment: _Attachment | None = peer.attachment
        # Of a peer that is being dropped nothing may come later, not even a notice that waits behind copies.
        over = peer.down is not None
        return attachment is None or not any(copy.void or over for copy in attachment.copies)

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
        return 0.0 if self._copier.has_finished or self._prefaulting else None

    def work(self) -> list[Peer]:
        changed = {}
        for copy in self._copier.finished():
            peer = copy.peer
            peer.attachment.copies.remove(copy)
            if not copy.void:
                commit(peer, copy.job)
            self._part(peer)
            changed[peer.incarnation] = peer
        if not changed and self._prefaulting:
            self._prefault()
        return list(changed.values())

    def close(self) -> None:
        self._copier.close()

    def _part(self, peer: Peer) -> None:
        """Lets go of the pool of a peer that is being dropped, once nothing is copied there."""
        attachment: _Attachment | None = peer.attachment
        if peer.down is not None and attachment is not None and not attachment.copies:
            peer.attachment = None

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


class ShmTransport(SocketTransport):
    """See base.Transport."""

    def __init__(self, context: TransportContext) -> None:
        regions: list[Region] = []
        super().__init__(context, ShmMedium(regions, self._stir), regions)
