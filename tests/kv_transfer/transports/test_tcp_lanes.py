"""A writer over two lanes whose destination, played here, reads one of them ahead of the other."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import numpy as np
from diphase.kv_transfer.base import Event, Failed, Region, TransportContext
from diphase.kv_transfer.transports.endpoint import VERSION
from diphase.kv_transfer.transports.framing import HEADER
from diphase.kv_transfer.transports.socket_peer import ID, WRITE_HEAD, Kind
from diphase.kv_transfer.transports.socket_transport import SocketTransport
from diphase.kv_transfer.transports.tcp import MIN_STRIPE, TcpMedium
from diphase.proto.clock import MonotonicClock

SIZE = 32 << 20
"""Half of it is more than a socket takes whose other end does not read."""
PATIENCE_S = 20.0


def take(sock: socket.socket) -> tuple[int, bytes, bytes]:
    """Kind, body and bulk of the next frame."""
    kind, body_bytes, bulk_bytes = HEADER.unpack(exactly(sock, HEADER.size))
    return kind, exactly(sock, body_bytes), exactly(sock, bulk_bytes)


def exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = sock.recv(min(count - len(data), 1 << 20))
        assert more, "the writer has closed"
        data += more
    return bytes(data)


def send(sock: socket.socket, kind: int, body: bytes) -> None:
    sock.sendall(HEADER.pack(kind, len(body), 0) + body)


def welcome(listener: socket.socket, **more: Any) -> tuple[socket.socket, dict[str, Any]]:
    """Takes a lane in; its connection and what its HELLO said."""
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE_S)
    kind, body, _ = take(sock)
    assert kind == Kind.HELLO
    answer = {"transport": "tcp", "version": VERSION, "incarnation": "far", **more}
    send(sock, Kind.WELCOME, json.dumps(answer).encode())
    hello: dict[str, Any] = json.loads(body)
    return sock, hello


def test_a_commit_that_went_ahead_of_a_cancelled_stripe_is_withdrawn_and_the_stripe_never_committed() -> None:
    woken = threading.Event()
    context = TransportContext(incarnation="a", wake=woken.set, clock=MonotonicClock())
    regions: list[Region] = []
    writer = SocketTransport(context, TcpMedium("127.0.0.1", regions, 2, min_stripe=MIN_STRIPE), regions)
    writer.register(Region(buffer=memoryview(bytearray(b"\x07" * SIZE))))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        endpoint = {"transport": "tcp", "version": VERSION, "incarnation": "far", "regions": [SIZE]}
        writer.connect(json.dumps({**endpoint, "host": host, "port": port}).encode(), PATIENCE_S)
        listener.settimeout(PATIENCE_S)
        first, hello = welcome(listener, regions=[SIZE], session="key")
        assert (hello["lane"], hello["lanes"], hello["session"]) == (0, 2, "")
        second, hello = welcome(listener)
        assert (hello["lane"], hello["session"]) == (1, "key")
        with first, second:
            transfer = writer.write("far", np.array([[0, 0, 0, 0, SIZE]], dtype=np.int64), b"tag", 60.0)
            kind, body, bulk = take(first)
            assert (kind, WRITE_HEAD.unpack_from(body), len(bulk)) == (Kind.WRITE, (transfer, 2), SIZE // 2)
            assert take(first)[:2] == (Kind.COMMIT, ID.pack(transfer) + b"tag")
            writer.cancel(transfer)
            send(first, Kind.FENCE, ID.pack(5))
            assert take(first)[:2] == (Kind.CANCEL, ID.pack(transfer))
            assert take(first)[:2] == (Kind.FENCED, ID.pack(5))
            kind, _, bulk = take(second)
            assert kind == Kind.WRITE
            assert bulk.endswith(bytes(1 << 20)), "what was not sent is blanked"
            assert take(second)[:2] == (Kind.FENCED, ID.pack(5))
            events: list[Event] = []
            while not events:
                assert woken.wait(PATIENCE_S)
                woken.clear()
                events.extend(writer.poll())
            assert events == [Failed(transfer, "cancelled", "the transfer was cancelled")]
    writer.close()
