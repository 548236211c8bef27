"""The transport contract. A transport knows regions, bytes and peers; never requests, models or roles.

- Every transfer gets exactly one terminal event (Done or Failed), at the latest at its deadline.
- Done: all bytes are visible at the destination. The tag is delivered there at most once, never before the
  bytes.
- Failed: the destination's bytes are undefined; each end keeps its blocks out of use until its own
  `fence(peer)` holds or PeerDown says that nothing of that peer can touch them any more.
- Connections go one way: who writes dials. The other end must have admitted the writer's incarnation before.
- Only `close` blocks. A hung peer is found by the deadline: deadlines are ours, not the library's.

Every implementation is one file plus one line in registry.py and passes tests/conformance/test_transport.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..proto.clock import Clock
from ..proto.errors import TransferError

Segments = NDArray[np.int64]
"""[n, 5]: local region, local offset, remote region, remote offset, length; bytes. The remote ranges of one
write do not overlap."""

MAX_TAG_BYTES = 48
"""Of a tag: it names what was written, whoever reads it has been told the rest on another way."""


class CancelKind(StrEnum):
    """How a cancelled transfer ends: `clean`, nothing can arrive late; `fence`, call fence() before reuse;
    `kill`, only the end of the owning process or thread makes sure."""

    CLEAN = "clean"
    FENCE = "fence"
    KILL = "kill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    name: str
    device_memory: bool
    same_host: bool
    """Whether both ends must be on one host."""
    cancel: CancelKind
    stage_below_bytes: int = 0
    """Mean length of segments below which gathering them into one is quicker; 0: it never is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes that only an accelerator addresses."""

    device: int
    """Index of the CUDA device."""
    pointer: int
    """Address of the first byte on the device."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Memory that transfers may read and write: a KV pool or a staging buffer."""

    buffer: memoryview | None
    """Writable bytes; None for memory of a device."""
    fd: int | None = None
    """A memfd of it, where other processes may map it."""
    device: DeviceMemory | None = None
    """Where it is, if `buffer` is None."""

    def __post_init__(self) -> None:
        """
        Raises:
            TransferError: it is neither memory of the host nor of a device, or both.
        """
        if (self.buffer is None) == (self.device is None):
            raise TransferError("a region has either a buffer of the host or memory of a device")

    @property
    def num_bytes(self) -> int:
        return self.device.num_bytes if self.device is not None else len(self.host_bytes())

    def host_bytes(self) -> memoryview:
        """
        Raises:
            TransferError: it is memory of a device.
        """
        if self.buffer is None:
            device = self.device.device if self.device is not None else None
            raise TransferError(
                f"the region is memory of cuda:{device}, which only transports for device memory can move; "
                "register memory of the host"
            )
        return self.buffer


@dataclass(frozen=True, slots=True)
class Done:
    transfer_id: int


@dataclass(frozen=True, slots=True)
class Failed:
    transfer_id: int
    code: str
    """A code of proto/errors.py."""
    message: str


@dataclass(frozen=True, slots=True)
class Notified:
    peer: str
    """Incarnation of the sender."""
    tag: bytes


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The connections with that incarnation are over and nothing that went over them can touch this process's
    memory any more. Reported once for each connect or admit that was followed by a failure, an end or a
    disconnect. A peer that is merely stopped is not down: it could write when it goes on."""

    peer: str
    message: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """The answer to one fence(peer), in the order of the calls. With `ok`, no transfer of either direction
    that had been cancelled or failed *at its writer* when the fence was asked for can touch this process's
    memory any more. Each end fences for itself, the destination after the writer told it (control link) that
    it has cancelled."""

    peer: str
    ok: bool


Event = Done | Failed | Notified | PeerDown | Fenced


class Transport(Protocol):
    """One for each KV pool. Peers are named by their incarnation. Methods are called from one thread (the
    event loop's); `wake`, given to the constructor, is called from any thread whenever poll() has
    something."""

    capabilities: Capabilities

    def register(self, region: Region) -> int:
        """Makes memory known, before the first connection; returns the region's id, 0 for the first.

        Raises:
            TransferError: it is not of a kind that this transport can move.
        """
        ...

    def endpoint(self) -> bytes:
        """What a peer needs for connect(): version, transport, incarnation, addresses, regions."""
        ...

    def reaches(self, endpoint: bytes) -> str | None:
        """None when a peer with this endpoint can be reached from here, else the reason in a sentence."""
        ...

    def admit(self, peer: str) -> None:
        """Accepts connections of that incarnation from now on, until it is down or disconnected."""
        ...

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        """Starts connecting and returns the peer's incarnation at once; idempotent by incarnation. Writes may
        follow immediately; when the connection fails they fail, and PeerDown is reported.

        Raises:
            TransferError: the endpoint is of another version or transport, or malformed.
        """
        ...

    def write(self, peer: str, segments: Segments, tag: bytes, deadline_s: float) -> int:
        """Copies local bytes into the peer's regions, then delivers `tag` there (b"" delivers none). Writes
        to one peer happen in the order of the calls. Returns the transfer's id; `deadline_s` is seconds from
        now.

        Raises:
            TransferError: the peer is unknown, a segment lies outside a region, two of them overlap at the
                destination, the tag is longer than MAX_TAG_BYTES, or too many transfers are queued.
        """
        ...

    def notify(self, peer: str, tag: bytes) -> None:
        """A small message, ordered after earlier writes to that peer.

        Raises:
            TransferError: the peer is unknown, or the tag is longer than MAX_TAG_BYTES.
        """
        ...

    def poll(self, max_events: int = 64) -> list[Event]:
        """Events so far; never blocks.

        Raises:
            InternalError: the transport's thread has crashed, which is a fault of its own; nothing can be
                expected of it but close().
        """
        ...

    def cancel(self, transfer_id: int) -> None:
        """Ends a transfer early; its terminal event is Failed("cancelled") unless it was Done already."""
        ...

    def fence(self, peer: str, deadline_s: float) -> None:
        """Asks for a Fenced(peer) event, at the latest at its deadline (then with ok=False)."""
        ...

    def disconnect(self, peer: str) -> None:
        """Fails what is in flight to that peer and admits it no longer; PeerDown follows once nothing can
        touch this process's memory any more."""
        ...

    def close(self) -> None:
        """Ends everything: threads, sockets, mappings. Blocks. Idempotent."""
        ...


class LocalPeers(Protocol):
    """The transports of one process that reach each other without leaving it (local.LocalHub)."""

    def identity(self) -> bytes:
        """Names this process and hub; equal exactly where a local transfer is possible."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportContext:
    """What every transport is made with."""

    incarnation: str
    wake: Callable[[], None]
    """Called from any thread whenever poll() has something."""
    clock: Clock
    token: str = ""
    """The cluster token; whoever connects must know it."""
    host: str = "127.0.0.1"
    """Address to listen on and to announce, where there is one."""
    tcp_sockets: int = 1
    """Connections that the tcp transport makes to each peer."""
    hub: LocalPeers | None = None
    """Where transports of this process meet; None: no local transfers."""


TransportFactory = Callable[[TransportContext], Transport]
