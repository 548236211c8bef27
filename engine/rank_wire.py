"""Frames between the ranks of a worker over a Unix socket: a kind, a length, bytes; and once a descriptor. No
torch, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum

from ..proto.errors import DiphaseError, InternalError, WorkerLost, from_wire
from .config import EngineConfig

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"DPRK"
_READY = struct.Struct("<Q")
MOST_BYTES = 1 << 28
"""Of a frame; a step of a million tokens takes 32 MiB."""


class Kind(IntEnum):
    SPEC = 1
    """To a rank, once: what it is."""
    READY = 2
    """From a rank, once: its model is loaded; with the memfd of its pool."""
    STEP = 3
    """To a rank: StepRows."""
    FAILED = 4
    """From a rank, as its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What a rank is told to be."""

    config: EngineConfig
    rank: int
    fingerprint: str
    """Of the model as rank 0 sees it."""
    store_path: str
    """Of the file where the ranks find each other."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RankSpec:
        fields = json.loads(data)
        config = fields.pop("config")
        return cls(config=EngineConfig(**{**config, "cores": tuple(config["cores"])}), **fields)


def send(sock: socket.socket, kind: Kind, payload: bytes, fd: int | None = None) -> None:
    """
    Raises:
        OSError: the other end is gone, or took nothing for the socket's timeout.
    """
    head = _HEADER.pack(_MAGIC, kind, len(payload))
    if fd is None:
        sock.sendall(head + payload)
        return
    sent = socket.send_fds(sock, [head], [fd])
    sock.sendall(head[sent:] + payload)


def receive(sock: socket.socket) -> tuple[Kind, bytes, int | None]:
    """The next frame, and the descriptor that came with it.

    Raises:
        WorkerLost: the other end is gone.
        TimeoutError: nothing came for the socket's timeout.
        InternalError: what came is no frame.
    """
    head, fds, _flags, _address = socket.recv_fds(sock, _HEADER.size, 1, socket.MSG_CMSG_CLOEXEC)
    fd = fds[0] if fds else None
    try:
        head += _exactly(sock, _HEADER.size - len(head))
        magic, number, length = _HEADER.unpack(head)
        if magic != _MAGIC or number not in list(Kind) or length > MOST_BYTES:
            raise InternalError(f"a rank received {head.hex()}, which begins no frame")
        return Kind(number), _exactly(sock, length), fd
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise


def ready_payload(size_bytes: int) -> bytes:
    return _READY.pack(size_bytes)


def ready_size(payload: bytes) -> int:
    """
    Raises:
        InternalError: the payload is no size.
    """
    if len(payload) != _READY.size:
        raise InternalError(f"a rank is ready with {len(payload)} bytes, not {_READY.size}")
    size_bytes: int = _READY.unpack(payload)[0]
    return size_bytes


def failed_payload(error: Exception) -> bytes:
    known = isinstance(error, DiphaseError)
    code = error.code if isinstance(error, DiphaseError) else InternalError.code
    return json.dumps([code, str(error) if known else f"{type(error).__name__}: {error}"]).encode()


def failure(payload: bytes) -> DiphaseError:
    """The error that failed_payload() was made of."""
    code, message = json.loads(payload)
    return from_wire(str(code), str(message))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise WorkerLost("a rank of this worker has closed its connection")
        view = view[count:]
    return bytes(data)
