"""Transfers over TCP: any host, no RDMA. Bytes go from the source pool into the destination pool without a
copy in user space: scatter and gather by sendmsg and recvmsg_into, large transfers striped over the lanes."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...proto.errors import ConfigError, TransferError
from ..base import CancelKind, Capabilities, Region, Segments, TransportContext
from ..config import MAX_TCP_SOCKETS
from .framing import Connection, FrameError
from .regions import cut_segments
from .socket_medium import Targets
from .socket_peer import ID, WRITE_HEAD, Job, Kind, Peer, commit, withdraw
from .socket_transport import SocketTransport

MAX_FRAMES = 8
"""Frames on their way out of a connection before the next job begins."""
MIN_STRIPE = 1024 * 1024
"""Bytes of a connection's part of a transfer."""
STRIPE_ALIGN = 64 * 1024
MAX_STRIPED = 8192
"""Transfers of a peer over several connections that have begun and not ended."""
LOCAL_SNDBUF = 448 * 1024
"""Bytes that a connection within one host may have under way (the kernel takes twice that, its own structures
included). They stay in the processor's caches between the two copies; left to itself, the kernel lets several
MiB be under way, which a link with a delay needs and this one does not. For the same reason there is one
stripe."""
LOST_S = 30.0
"""A connection ends when what was sent over it, or a question whether the peer is there, stays unanswered for
so long. A link that is down for less costs nothing but time."""
RTO_MAX_S = 2.0
"""When the link is back, what was lost is sent again within this time (Linux 6.15 and later; else it may take
as long as the link was down). With less, the kernel's fifteen attempts (tcp_retries2) would end before
LOST_S."""
_TCP_RTO_MAX_MS = 44


@dataclass(slots=True)
class _Stripes:
    """A transfer that comes on several lanes."""

    wanted: int = MAX_TCP_SOCKETS + 1
    """Lanes; more than there can be until the first WRITE says it."""
    whole: int = 0
    """Further lanes whose stripe is in place."""


class TcpMedium:
    """See socket_medium.Medium."""

    name = "tcp"
    capabilities = Capabilities(name="tcp", device_memory=False, same_host=False, cancel=CancelKind.FENCE)
    fields: Mapping[str, type] = MappingProxyType({"host": str, "port": int})
    hello_fields: Mapping[str, type] = MappingProxyType({})
    welcome_fields: Mapping[str, type] = MappingProxyType({})
    severs = True

    def __init__(
        self, host: str, regions: list[Region], num_sockets: int = 1, min_stripe: int | None = None
    ) -> None:
        """`min_stripe`, bytes: what is smaller goes over one connection. None: MIN_STRIPE, and everything
        within one host.

        Raises:
            ConfigError: `host` cannot be resolved.
        """
        self._regions = regions
        self.lanes = num_sockets
        self._min_stripe = min_stripe
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
        if self._within_host(endpoint):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SNDBUF)
        return sock

    def greet(self, sock: socket.socket) -> str | None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(LOST_S / 2))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(LOST_S / 6))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_S * 1000))
        with contextlib.suppress(OSError):  # an older kernel
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, int(RTO_MAX_S * 1000))
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
        """Nothing to keep: the bytes go over the connections."""

    def detach(self, peer: Peer) -> None:
        peer.inbox = None

    def ready(self, peer: Peer) -> bool:
        return all(connection.num_queued < MAX_FRAMES for connection in peer.writers)

    def begin(self, peer: Peer, job: Job) -> None:
        """Every stripe has its COMMIT behind it on its lane: of a stripe that was blanked none is sent."""
        num_stripes = self._num_stripes(peer, job)
        if num_stripes > 1:
            align = STRIPE_ALIGN if self._min_stripe is None else min(STRIPE_ALIGN, self._min_stripe)
            stripes = cut_segments(job.segments, num_stripes, align)
            self._write(peer.writers[0], job, stripes[0], len(stripes))
            commit(peer, job)
            for connection, stripe in zip(peer.writers[1:], stripes[1:], strict=False):
                self._write(connection, job, stripe, len(stripes))
                connection.queue(Kind.COMMIT, ID.pack(job.transfer_id), owner=job)
        else:
            if job.num_bytes:
                self._write(peer.writers[0], job, job.segments, 1)
            commit(peer, job)

    def _num_stripes(self, peer: Peer, job: Job) -> int:
        if self._min_stripe is None and self._within_host(peer.endpoint):
            return 1
        return min(len(peer.writers), job.num_bytes // (self._min_stripe or MIN_STRIPE))

    def _within_host(self, endpoint: dict[str, Any]) -> bool:
        host: str = endpoint["host"]
        return host == self._host

    def _write(self, connection: Connection, job: Job, segments: Segments, num_lanes: int) -> None:
        buffers = [region.host_bytes() for region in self._regions]
        bulk = [
            buffers[region][offset : offset + length]
            for region, offset, length in segments[:, (0, 1, 4)].tolist()
        ]
        body = WRITE_HEAD.pack(job.transfer_id, num_lanes) + segments[:, 2:5].tobytes()
        num_bytes = int(segments[:, 4].sum())
        connection.queue(Kind.WRITE, body, bulk, bulk_bytes=num_bytes, owner=job)

    def abandon(self, peer: Peer, job: Job) -> None:
        for connection in peer.writers:
            connection.retract(job)
        if len(peer.writers) > 1:
            withdraw(peer, job)

    def quiet(self, peer: Peer) -> bool:
        return True  # what is not sent is dropped or blanked

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        raise FrameError("transport tcp brings bulk with a WRITE")

    def place(self, peer: Peer, transfer_id: int, num_lanes: int, targets: Targets) -> Iterable[memoryview]:
        if num_lanes > 1:
            self._stripes(peer, transfer_id).wanted = num_lanes
        buffers = [region.host_bytes() for region in self._regions]
        return [buffers[region][offset : offset + length] for region, offset, length in targets.tolist()]

    def arrived(self, peer: Peer, transfer_id: int) -> None:
        self._stripes(peer, transfer_id).whole += 1

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        if not peer.inbox:
            return True
        stripes = peer.inbox.get(transfer_id)
        if stripes is not None and stripes.whole + 1 < stripes.wanted:  # the first has no other COMMIT
            return False
        for earlier in [other for other in peer.inbox if other <= transfer_id]:
            del peer.inbox[earlier]
        return True

    def _stripes(self, peer: Peer, transfer_id: int) -> _Stripes:
        """
        Raises:
            FrameError: the peer begins more transfers than it may.
        """
        if peer.inbox is None:
            peer.inbox = {}
        if len(peer.inbox) >= MAX_STRIPED and transfer_id not in peer.inbox:
            raise FrameError(f"{MAX_STRIPED} transfers have begun and none has ended")
        stripes: _Stripes = peer.inbox.setdefault(transfer_id, _Stripes())
        return stripes

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
        super().__init__(context, TcpMedium(context.host, regions, context.tcp_sockets), regions)
