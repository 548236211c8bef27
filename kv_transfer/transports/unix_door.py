"""The listener of transports that stay on one machine: a unix socket that only this user's processes, on this
kernel and in this network namespace, can connect to. Moves no bytes."""

from __future__ import annotations

import os
import socket
import struct
import sys
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...proto.errors import TransferError

_CREDENTIALS = struct.Struct("3i")


class UnixDoor:
    """The part of socket_medium.Medium that is about addresses."""

    fields: Mapping[str, type] = MappingProxyType({"path": str, "host": str, "uid": int})

    def __init__(self, transport: str) -> None:
        """
        Raises:
            TransferError: this is not Linux.
        """
        if sys.platform != "linux":
            raise TransferError(f"transport {transport} needs Linux (memfd and abstract sockets)")
        self._host = _host()

    def describe(self, address: Any) -> dict[str, Any]:
        return {"path": address[1:].decode(), "host": self._host, "uid": os.getuid()}

    def reaches(self, endpoint: dict[str, Any]) -> str | None:
        if endpoint["host"] != self._host:
            return "the peer is on another host or in another network namespace"
        if endpoint["uid"] != os.getuid():
            return f"the peer runs as user {endpoint['uid']}, this worker as {os.getuid()}"
        return None

    def listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0diphase-{uuid.uuid4().hex}")
        listener.listen(128)
        listener.setblocking(False)
        return listener

    def dial(self, endpoint: dict[str, Any]) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(f"\0{endpoint['path']}")
        except OSError:
            sock.close()
            raise
        return sock

    def greet(self, sock: socket.socket) -> str | None:
        # An abstract socket has no permissions: any user of the host could connect.
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        return None if uid == os.getuid() else f"user {uid} may not connect"


def _host() -> str:
    """Names this machine's kernel and network namespace: where abstract unix sockets reach."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
