"""Both ends of a wire as an enemy would play them, against a transport with a guarded pool."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from diphase.kv_transfer.base import Done, Event, Notified, PeerDown, Region, TransportContext
from diphase.kv_transfer.registry import load_factory
from diphase.kv_transfer.transports.endpoint import VERSION
from diphase.kv_transfer.transports.framing import HEADER
from diphase.kv_transfer.transports.socket_peer import ID, WRITE_HEAD, Kind
from diphase.proto.clock import MonotonicClock

PATIENCE_S = 20.0
GUARD = 4096
SIZE = 8192


class End:
    """A transport whose pool lies between guard bytes."""

    def __init__(self, name: str, transport: str = "tcp", fd: int | None = None) -> None:
        self.memory = bytearray(b"\xaa" * GUARD + bytes(SIZE) + b"\xaa" * GUARD)
        self.pool = memoryview(self.memory)[GUARD : GUARD + SIZE]
        self.woken = threading.Event()
        context = TransportContext(
            incarnation=name, wake=self.woken.set, clock=MonotonicClock(), token="secret"
        )
        self.transport = load_factory(transport)(context)
        self.transport.register(Region(buffer=self.pool, fd=fd))
        self.fields: dict[str, Any] = json.loads(self.transport.endpoint())
        self.events: list[Event] = []

    def guarded(self) -> bool:
        guard = b"\xaa" * GUARD
        return self.memory[:GUARD] == guard and self.memory[-GUARD:] == guard

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not condition():
            self.woken.wait(0.05)
            self.woken.clear()
            self.events.extend(self.transport.poll())
            assert time.monotonic() < limit, f"waited in vain; so far {self.events[-5:]}"

    def down(self, peer: str) -> str:
        """Why that peer ended."""
        found: list[str] = []

        def ended() -> bool:
            found[:] = [e.message for e in self.events if isinstance(e, PeerDown) and e.peer == peer]
            return bool(found)

        self.until(ended)
        return found[0]

    def goes_on(self, friend: End) -> None:
        """Others write to it as ever, and nothing lies where it should not."""
        assert self.guarded()
        tag = b"%d" % len(self.events)
        transfer = friend.transport.write(
            self.fields["incarnation"], np.array([[0, 0, 0, 0, 8]], dtype=np.int64), tag, 20.0
        )
        self.until(lambda: Notified(friend.fields["incarnation"], tag) in self.events)
        friend.until(lambda: Done(transfer) in friend.events)


def frame(kind: int, body: bytes = b"", bulk: bytes = b"", claimed: int | None = None) -> bytes:
    return HEADER.pack(kind, len(body), len(bulk) if claimed is None else claimed) + body + bulk


def hello(incarnation: str, **more: Any) -> bytes:
    fields = {
        "transport": "tcp",
        "version": VERSION,
        "incarnation": incarnation,
        "token": "secret",
        "lane": 0,
        "lanes": 2,
        "session": "",
        **more,
    }
    return frame(Kind.HELLO, json.dumps({k: v for k, v in fields.items() if v is not None}).encode())


def write(rows: list[tuple[int, int, int]], bulk: bytes = b"", transfer_id: int = 1, lanes: int = 1) -> bytes:
    """A WRITE; rows are region, offset, length at the destination."""
    table = b"".join(struct.pack("<qqq", *row) for row in rows)
    return frame(Kind.WRITE, WRITE_HEAD.pack(transfer_id, lanes) + table, bulk)


def commit(transfer_id: int, tag: bytes = b"") -> bytes:
    return frame(Kind.COMMIT, ID.pack(transfer_id) + tag)


class Stranger:
    """Dials and says whatever it likes."""

    def __init__(self, end: End) -> None:
        self.sock = socket.create_connection((end.fields["host"], end.fields["port"]), timeout=PATIENCE_S)
        self.heard = b""

    def say(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except ConnectionError:
            return  # it has heard enough

    def welcome(self) -> dict[str, Any]:
        """The answer to a HELLO that was taken."""
        kind, body = self.answer()
        assert kind == Kind.WELCOME, body
        fields: dict[str, Any] = json.loads(body)
        return fields

    def answer(self) -> tuple[int, bytes]:
        kind, size, _ = HEADER.unpack(self.sock.recv(HEADER.size, socket.MSG_WAITALL))
        return kind, self.sock.recv(size, socket.MSG_WAITALL)

    def leave(self) -> bytes:
        """Says no more; what was answered until the other end closed."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while data := self.sock.recv(65536):
                self.heard += data
        except OSError:
            pass  # the other end has closed first
        self.sock.close()
        return self.heard


def refusal(answer: bytes) -> str:
    """The reason in a REFUSED frame."""
    found = re.search(rb"(?s)\x11\0\0\0.{12}(.*)", answer)
    assert found is not None, answer
    return found[1].decode()
