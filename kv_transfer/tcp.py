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
from .socket_medium import Targets
from .socket_peer import WRITE_HEAD, Job, Kind, Peer, commit
from .socket_transport import SocketTransport

MAX_FRAMES = 8
"""Frames on their way out of a connection before the next job begins."""


class TcpMedium:
    """See socket_medium.Medium."""

    name = "tcp"
    capabilities = Capabilities(name="tcp", device_memory=False, same_host=False, cancel=CancelKind.FENCE)
    fields: Mapping[str, type] = MappingProxyType({"host": str, "port": int})
    hello_fields: Mapping[str, type] = MappingProxyType({})
    welcome_fields: Mapping[str, type] = MappingProxyType({})
    severs = True
    lanes = 1

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
        if region.host_bytes().readonly:
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

    def hello(self, peer: Peer) -> dict[str, Any]:
        return {}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        """A HELLO says nothing more."""

    def welcome(self, peer: Peer) -> dict[str, Any]:
        return {}

    def offer(self) -> list[int]:
        return []

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        """Nothing to keep: the bytes go over the connection."""

    def detach(self, peer: Peer) -> None:
        """Nothing was kept."""

    def ready(self, peer: Peer) -> bool:
        return peer.writer is not None and peer.writer.num_queued < MAX_FRAMES

    def begin(self, peer: Peer, job: Job) -> None:
        connection = peer.writer
        if connection is not None and job.num_bytes:
            buffers = [region.host_bytes() for region in self._regions]
            bulk = [
                buffers[region][offset : offset + length]
                for region, offset, length in job.segments[:, (0, 1, 4)].tolist()
            ]
            table = np.ascontiguousarray(job.segments[:, 2:5]).tobytes()
            head = WRITE_HEAD.pack(job.transfer_id, job.num_bytes)
            connection.queue(Kind.WRITE, head + table, bulk, bulk_bytes=job.num_bytes, owner=job)
        commit(peer, job)

    def abandon(self, peer: Peer, job: Job) -> None:
        if peer.writer is not None:
            peer.writer.retract(job)

    def quiet(self, peer: Peer) -> bool:
        return True  # what is not sent is blanked

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        raise FrameError("transport tcp brings bulk with a WRITE")

    def place(self, peer: Peer, transfer_id: int, num_bytes: int, targets: Targets) -> Iterable[memoryview]:
        buffers = [region.host_bytes() for region in self._regions]
        return [buffers[region][offset : offset + length] for region, offset, length in targets.tolist()]

    def arrived(self, peer: Peer, transfer_id: int, num_bytes: int) -> None:
        """In place before the COMMIT, which comes on the same connection."""

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return True

    @property
    def poll_in_s(self) -> float | None:
        return None

    def work(self) -> list[Peer]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class TcpTransport(SocketTransport):
    """See base.Transport."""

    def __init__(self, context: TransportContext) -> None:
        """
        Raises:
            TransferError: nothing can listen on the context's host.
        """
        regions: list[Region] = []
        super().__init__(context, TcpMedium(context.host, regions), regions)
