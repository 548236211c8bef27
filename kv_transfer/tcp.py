"""Transfers over TCP: any host, no RDMA. Bytes go from the source pool into the destination pool without a
copy in user space: scatter and gather by sendmsg and recvmsg_into."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..proto.errors import ConfigError, TransferError
from .base import CancelKind, Capabilities, Region, TransportContext
from .framing import FrameError
from .regions import check_segments
from .socket_peer import ID, Job, Kind, Peer, commit
from .socket_transport import SocketTransport

MAX_FRAMES = 8
"""Frames on their way out of a connection before the next job begins."""


class TcpMedium:
    """See socket_peer.Medium."""

    name = "tcp"
    capabilities = Capabilities(name="tcp", device_memory=False, same_host=False, cancel=CancelKind.FENCE)
    fields: Mapping[str, type] = MappingProxyType({"host": str, "port": int})
    severs = True

    def __init__(self, host: str, regions: list[Region]) -> None:
        """
        Raises:
            ConfigError: `host` cannot be resolved.
        """
        self._regions = regions
        try:
            found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"kv_transfer.host = {host!r} cannot be resolved: {error}") from error
        self._family = found[0][0]
        self._host = str(found[0][4][0])

    def check(self, region: Region) -> None:
        if region.buffer.readonly:
            raise TransferError("a region must be writable")

    def describe(self, address: Any) -> dict[str, Any]:
        return {"host": address[0], "port": address[1]}

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        return None

    def listen(self) -> socket.socket:
        """
        Raises:
            ConfigError: the host is no address of this machine.
            TransferError: the machine has no socket or port left.
        """
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.bind((self._host, 0))
            listener.listen(128)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(
                    f"kv_transfer.host = {self._host!r} is no address of this machine; use one that other "
                    "workers reach it by"
                ) from error
            raise TransferError(f"transport tcp cannot listen on {self._host}: {error}") from error
        return listener

    def dial(self, endpoint: dict[str, Any]) -> socket.socket:
        host, port = endpoint["host"], endpoint["port"]
        # Peers announce numeric addresses: no name is resolved on this thread.
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        self.greet(sock)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, f"connect to {host}:{port}")
        return sock

    def greet(self, sock: socket.socket) -> str | None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return None

    def offer(self) -> list[int]:
        return []

    def attach(self, peer: Peer, sizes: list[int], fds: list[int]) -> None:
        """Nothing to keep: the bytes go over the connection."""

    def detach(self, peer: Peer) -> None:
        """Nothing was kept."""

    def ready(self, peer: Peer) -> bool:
        return peer.writer is not None and peer.writer.num_queued < MAX_FRAMES

    def begin(self, peer: Peer, job: Job) -> None:
        connection = peer.writer
        if connection is not None and job.num_bytes:
            buffers = [region.buffer for region in self._regions]
            bulk = [
                buffers[region][offset : offset + length]
                for region, offset, length in job.segments[:, (0, 1, 4)].tolist()
            ]
            table = np.ascontiguousarray(job.segments[:, 2:5]).tobytes()
            connection.queue(
                Kind.WRITE, ID.pack(job.transfer_id) + table, bulk, bulk_bytes=job.num_bytes, owner=job
            )
        commit(peer, job)

    def abandon(self, peer: Peer, job: Job) -> None:
        if peer.writer is not None:
            peer.writer.retract(job)

    @property
    def busy(self) -> bool:
        return False

    def work(self) -> list[Peer]:
        return []

    def place(self, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        if len(body) < ID.size or (len(body) - ID.size) % 24:
            raise FrameError("a WRITE has a malformed table")
        table = np.frombuffer(body, dtype=np.int64, offset=ID.size).reshape(-1, 3)
        segments = np.zeros((len(table), 5), dtype=np.int64)
        segments[:, 2:5] = table
        segments[:, 0:2] = table[:, 0:2]
        try:
            # What a peer claims is checked against our own regions: it could be anybody's mistake.
            total = check_segments(segments, sizes := [len(r.buffer) for r in self._regions], sizes)
        except TransferError as error:
            raise FrameError(f"a WRITE is out of bounds: {error.message}") from error
        if total != bulk_bytes:
            raise FrameError(f"a WRITE of {total} bytes brings {bulk_bytes}")
        buffers = [region.buffer for region in self._regions]
        return [buffers[region][offset : offset + length] for region, offset, length in table.tolist()]


class TcpTransport(SocketTransport):
    """See base.Transport."""

    def __init__(self, context: TransportContext) -> None:
        """
        Raises:
            TransferError: nothing can listen on the context's host.
        """
        regions: list[Region] = []
        super().__init__(context, TcpMedium(context.host, regions), regions)
