"""What each frame means, by the connection that it comes on: of a writer or of a destination."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from ...proto.errors import TransferError
from ..base import MAX_TAG_BYTES, Region
from .endpoint import read_endpoint, read_sizes
from .framing import Connection, FrameError
from .regions import check_segments
from .socket_jobs import SocketJobs, read_ids
from .socket_medium import Medium, Targets
from .socket_peer import ID, WRITE_HEAD, Kind, Peer

ANY_SIZE = [2**63 - 1]
"""Where the bytes come from is the writer's business."""


class Peers(Protocol):
    """What the sinks ask of socket_peers.SocketPeers."""

    def joined(self, peer: Peer) -> None: ...
    def answered(self, peer: Peer, lane: int, number: int) -> None: ...
    def asked(self, peer: Peer, number: int) -> None: ...


class _Sink:
    """Takes no bulk."""

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        raise FrameError(f"a frame of kind {kind} brings {bulk_bytes} bytes of bulk")


class ReaderSink(_Sink):
    """A peer writes to us, over one of its lanes."""

    def __init__(
        self, peers: Peers, peer: Peer, *, jobs: SocketJobs, lane: int, medium: Medium, regions: list[Region]
    ) -> None:
        self._peers = peers
        self._jobs = jobs
        self._peer = peer
        self._lane = lane
        self._medium = medium
        self._sizes = [region.num_bytes for region in regions]
        self._has_bulk = False

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        if kind != Kind.WRITE:
            return super().place(kind, body, bulk_bytes)
        transfer_id, num_lanes, targets, num_bytes = self._read_write(body)
        if num_bytes != bulk_bytes:
            raise FrameError(f"a WRITE of {num_bytes} bytes brings {bulk_bytes}")
        self._has_bulk = True
        return self._medium.place(self._peer, transfer_id, num_lanes, targets)

    def frame(self, kind: int, body: bytearray) -> bool:
        peer = self._peer
        if peer.down is not None:
            return True  # only its end is waited for
        if kind == Kind.WRITE:
            if not self._has_bulk:
                self._announced(body)
            self._has_bulk = False
        elif kind == Kind.COMMIT and len(body) >= ID.size:
            self._commit(body)
        elif kind == Kind.FENCED and len(body) == ID.size:
            self._peers.answered(peer, self._lane, *ID.unpack(body))
        elif kind == Kind.CANCEL and self._lane == 0 and len(body) == ID.size:
            self._jobs.withdrawn(peer, *ID.unpack(body))
        else:
            raise FrameError(
                f"a writer sent a frame of kind {kind} of {len(body)} bytes on lane {self._lane}"
            )
        return self._lane != 0 or self._jobs.hears(peer)

    def _announced(self, body: bytearray) -> None:
        if self._lane != 0:
            raise FrameError(f"a WRITE without bulk on lane {self._lane}")
        transfer_id, _, targets, _ = self._read_write(body)
        self._medium.expect(self._peer, transfer_id, targets)

    def _commit(self, body: bytearray) -> None:
        (transfer_id,) = ID.unpack_from(body)
        tag = bytes(body[ID.size :])
        if len(tag) > MAX_TAG_BYTES:
            raise FrameError(f"a COMMIT has a tag of {len(tag)} bytes, {MAX_TAG_BYTES} at most")
        if self._lane == 0:
            self._jobs.committed(self._peer, transfer_id, tag)
            return
        if tag:
            raise FrameError(f"a COMMIT on lane {self._lane} has a tag")
        self._medium.arrived(self._peer, transfer_id)
        self._jobs.deliver(self._peer)

    def _read_write(self, body: bytearray) -> tuple[int, int, Targets, int]:
        """Transfer id, lanes of the transfer, targets of this frame and their bytes.

        Raises:
            FrameError: malformed, or outside of our regions. What a peer claims is checked against what we
                have: it could be anybody's mistake.
        """
        if len(body) < WRITE_HEAD.size or (len(body) - WRITE_HEAD.size) % 24:
            raise FrameError(f"a WRITE has a malformed table: {len(body)} bytes of body")
        transfer_id, num_lanes = WRITE_HEAD.unpack_from(body)
        targets = np.frombuffer(body, dtype=np.int64, offset=WRITE_HEAD.size).reshape(-1, 3)
        segments = np.zeros((len(targets), 5), dtype=np.int64)
        segments[:, 2:5] = targets
        try:
            num_bytes = check_segments(segments, ANY_SIZE, self._sizes)
        except TransferError as error:
            raise FrameError(f"a WRITE is refused: {error.message}") from error
        if not 1 <= num_lanes <= max(1, self._peer.reader_lanes):
            raise FrameError(f"a WRITE on {num_lanes} lanes, and {self._peer.reader_lanes} were announced")
        return transfer_id, num_lanes, targets, num_bytes


class WriterSink(_Sink):
    """A peer that we write to answers, on one of our lanes."""

    def __init__(
        self,
        peers: Peers,
        peer: Peer,
        *,
        jobs: SocketJobs,
        lane: int,
        medium: Medium,
        connection: Connection,
    ) -> None:
        self._peers = peers
        self._jobs = jobs
        self._peer = peer
        self._lane = lane
        self._connection = connection
        self._medium = medium
        self._welcomed = False

    def frame(self, kind: int, body: bytearray) -> bool:
        peer = self._peer
        if peer.down is not None:
            return False
        if kind == Kind.REFUSED and not self._welcomed:
            raise FrameError(f"the peer refuses the connection: {body.decode(errors='replace')}")
        if kind == Kind.WELCOME and not self._welcomed:
            self._welcome(body)
        elif kind == Kind.ACK and self._lane == 0 and self._welcomed:
            self._jobs.acknowledged(peer, read_ids(body))
        elif kind == Kind.FENCE and self._lane == 0 and len(body) == ID.size:
            self._peers.asked(peer, *ID.unpack(body))
        else:
            raise FrameError(
                f"a destination sent a frame of kind {kind} of {len(body)} bytes on lane {self._lane}"
            )
        return peer.down is None

    def _welcome(self, body: bytearray) -> None:
        connection, peer, medium = self._connection, self._peer, self._medium
        types = {"regions": list, "session": str, **medium.welcome_fields} if self._lane == 0 else {}
        try:
            fields = read_endpoint(body, medium.name, types)
            if fields["incarnation"] != peer.incarnation:
                raise TransferError(f"incarnation {fields['incarnation']} answers")
            if self._lane == 0:
                sizes = read_sizes(fields["regions"])
                announced = peer.endpoint["regions"]  # what write() has checked segments against
                if sizes[: len(announced)] != announced:
                    raise TransferError(f"regions of {sizes} bytes, and {announced} were announced")
                peer.session = fields["session"]
                medium.attach(peer, sizes, connection.fds, fields)
        except (TransferError, OSError) as error:
            raise FrameError(f"the welcome is unusable: {error}") from error
        self._welcomed = True
        connection.takes_fds = False
        for fd in connection.fds:
            os.close(fd)
        connection.fds.clear()
        self._peers.joined(peer)
