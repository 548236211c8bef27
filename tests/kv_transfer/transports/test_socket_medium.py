"""What a medium may say beside moving bytes: that they have not landed yet, that it is not quiet yet, and
what goes with the handshake."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import Event, Failed, Fenced, Notified, PeerDown, Region, TransportContext
from diphase.kv_transfer.transports.socket_medium import Targets
from diphase.kv_transfer.transports.socket_peer import Job, Peer, announce, commit
from diphase.kv_transfer.transports.socket_transport import SocketTransport
from diphase.kv_transfer.transports.tcp import TcpMedium
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import TransferError

PATIENCE_S = 20.0


@dataclass
class Library:
    """What a transfer library would do out of sight; the test says when."""

    expected: list[tuple[str, int, list[list[int]]]] = field(default_factory=list)
    landed: set[int] = field(default_factory=set)
    quiet: bool = True
    changed: bool = False
    polls: int = 0
    key: Any = b"\x00key\xff"


class LibraryMedium(TcpMedium):
    """Moves nothing itself: announces, waits, and asks the library."""

    name = "library"
    hello_fields: Mapping[str, type] = {"key": bytes}
    welcome_fields: Mapping[str, type] = {"key": bytes, "handles": list}
    severs = False

    def __init__(self, regions: list[Region], library: Library) -> None:
        super().__init__("127.0.0.1", regions)
        self.library = library
        self.waits: dict[str, Peer] = {}

    def hello(self, peer: Peer) -> dict[str, Any]:
        return {"key": self.library.key}

    def heard(self, peer: Peer, fields: Mapping[str, Any]) -> None:
        if fields["key"] != b"\x00key\xff":
            raise TransferError(f"key: {fields['key']!r} opens nothing")
        self.waits[peer.incarnation] = peer

    def welcome(self, peer: Peer) -> dict[str, Any]:
        return {"key": b"answer", "handles": [1, 2]}

    def attach(self, peer: Peer, sizes: list[int], fds: list[int], fields: Mapping[str, Any]) -> None:
        assert (fields["key"], fields["handles"]) == (b"answer", [1, 2])
        self.waits[peer.incarnation] = peer

    def begin(self, peer: Peer, job: Job) -> None:
        if job.num_bytes:
            announce(peer, job)
        commit(peer, job)

    def quiet(self, peer: Peer) -> bool:
        return self.library.quiet

    def expect(self, peer: Peer, transfer_id: int, targets: Targets) -> None:
        self.library.expected.append((peer.incarnation, transfer_id, targets.tolist()))

    def landed(self, peer: Peer, transfer_id: int) -> bool:
        return transfer_id in self.library.landed

    @property
    def poll_in_s(self) -> float | None:
        return 0.001

    def work(self) -> list[Peer]:
        self.library.polls += 1
        return list(self.waits.values())


class End:
    def __init__(self, name: str) -> None:
        self.library = Library()
        self.woken = threading.Event()
        context = TransportContext(incarnation=name, wake=self.woken.set, clock=MonotonicClock())
        regions: list[Region] = []
        self.transport = SocketTransport(context, LibraryMedium(regions, self.library), regions)
        self.transport.register(Region(buffer=memoryview(bytearray(1000))))
        self.events: list[Event] = []

    def write(self, tag: bytes, s: float = 30.0) -> int:
        segments = np.array([[0, 0, 0, 100, 10], [0, 10, 0, 0, 5]], dtype=np.int64)
        return self.transport.write("b", segments, tag, s)

    def until(self, condition: Callable[[], bool], *others: End) -> None:
        limit = time.monotonic() + PATIENCE_S
        while True:
            self.woken.clear()
            for end in (self, *others):
                end.events.extend(end.transport.poll())
            if condition():
                return
            assert time.monotonic() < limit, f"waited in vain; so far {self.events}"
            self.woken.wait(0.01)

    def has_polled(self) -> None:
        """Its thread went round twice: whatever could have happened by now has."""
        seen = self.library.polls
        self.until(lambda: self.library.polls >= seen + 3)


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    a, b = End("a"), End("b")
    b.transport.admit("a")
    yield a, b
    for end in (a, b):
        end.library.quiet = True
        end.transport.close()


def joined(ends: tuple[End, End]) -> tuple[End, End]:
    a, b = ends
    a.transport.connect(b.transport.endpoint(), 5.0)
    return a, b


def test_a_commit_waits_in_order_until_its_bytes_have_landed(ends: tuple[End, End]) -> None:
    a, b = joined(ends)
    first, second = a.write(b"first"), a.write(b"second")
    a.transport.notify("b", b"notice")
    b.until(lambda: len(b.library.expected) == 2, a)
    assert b.library.expected == [
        ("a", first, [[0, 100, 10], [0, 0, 5]]),
        ("a", second, [[0, 100, 10], [0, 0, 5]]),
    ]
    b.library.landed.add(second)
    b.has_polled()
    assert a.events == b.events == []
    b.library.landed.add(first)
    b.until(lambda: len(b.events) == 3, a)
    assert b.events == [Notified("a", tag) for tag in (b"first", b"second", b"notice")]
    a.until(lambda: len(a.events) == 2)


def test_fences_of_both_ends_wait_until_the_writer_is_quiet(ends: tuple[End, End]) -> None:
    a, b = joined(ends)
    transfer = a.write(b"lost")
    b.until(lambda: len(b.library.expected) == 1, a)
    a.library.quiet = False
    a.transport.cancel(transfer)
    a.transport.fence("b", 30.0)
    b.transport.fence("a", 30.0)
    a.until(lambda: bool(a.events), b)
    a.has_polled()
    b.has_polled()
    assert [type(event) for event in a.events] == [Failed]
    assert b.events == []
    a.library.quiet = True
    a.until(lambda: Fenced("b", True) in a.events, b)
    b.until(lambda: b.events == [Fenced("a", True)], a)


def test_a_fence_that_outlives_its_deadline_does_not_hold(ends: tuple[End, End]) -> None:
    a, b = joined(ends)
    a.write(b"x")
    b.until(lambda: len(b.library.expected) == 1, a)
    a.library.quiet = False
    a.transport.fence("b", 0.02)
    b.transport.fence("a", 0.02)
    a.until(lambda: a.events == [Fenced("b", False)], b)
    b.until(lambda: b.events == [Fenced("a", False)], a)


@pytest.mark.parametrize("who", ["writer", "destination"])
def test_nobody_is_told_that_a_peer_is_down_before_the_writer_is_quiet(
    ends: tuple[End, End], who: str
) -> None:
    a, b = joined(ends)
    a.write(b"x")
    b.until(lambda: len(b.library.expected) == 1, a)
    a.library.quiet = False
    if who == "writer":
        a.transport.disconnect("b")
    else:
        b.transport.disconnect("a")
    a.until(lambda: bool(a.events), b)
    a.has_polled()
    b.has_polled()
    assert [type(event) for event in a.events] == [Failed]
    assert b.events == []
    a.library.quiet = True
    a.until(lambda: len(a.events) == 2, b)
    assert isinstance(a.events[1], PeerDown)
    b.until(lambda: [type(event) for event in b.events] == [PeerDown])


def test_a_handshake_that_the_medium_has_no_use_for_is_refused_by_name(ends: tuple[End, End]) -> None:
    a, b = ends
    a.library.key = b"other"
    joined(ends)
    a.until(lambda: bool(a.events), b)
    assert isinstance(a.events[0], PeerDown)
    assert "key: b'other' opens nothing" in a.events[0].message


@pytest.mark.parametrize(
    ("key", "why"), [("no base64!", "key .* is no base64"), (7, "key .* is int, not bytes")]
)
def test_a_field_of_a_wrong_type_is_refused_by_name(ends: tuple[End, End], key: Any, why: str) -> None:
    a, b = ends
    a.library.key = key
    joined(ends)
    a.until(lambda: bool(a.events), b)
    assert isinstance(a.events[0], PeerDown)
    assert re.search(why, a.events[0].message)
