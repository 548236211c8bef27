"""What every transport promises (kv_transfer/base.py), asked of each of them."""

from __future__ import annotations

import base64
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import (
    Done,
    Event,
    Failed,
    Fenced,
    Notified,
    PeerDown,
    Region,
    Segments,
    Transport,
    TransportContext,
)
from diphase.kv_transfer.local import LocalHub
from diphase.kv_transfer.registry import load_factory
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import TransferError

NAMES = ["local", "shm", "tcp"]
OVER_SOCKETS = ["shm", "tcp"]
PATIENCE_S = 20.0
SIZE = 1 << 20


class End:
    """One transport with one region, in this process."""

    def __init__(
        self, name: str, incarnation: str, hub: LocalHub, size: int = SIZE, token: str = "", **more: Any
    ) -> None:
        self.name = incarnation
        self.woken = threading.Event()
        self.fd = os.memfd_create(incarnation)
        os.ftruncate(self.fd, size)
        self.buffer = memoryview(mmap.mmap(self.fd, size))
        self.bytes = np.frombuffer(self.buffer, dtype=np.uint8)
        context = TransportContext(
            incarnation=incarnation, wake=self.woken.set, clock=MonotonicClock(), token=token, hub=hub
        )
        self.transport: Transport = load_factory(name)(context)
        self.transport.register(Region(buffer=self.buffer, fd=self.fd))
        self.events: list[Event] = []

    def poll(self) -> None:
        while events := self.transport.poll():
            self.events.extend(events)

    def until(self, condition: Callable[[], bool], *others: End) -> None:
        """Polls until it holds."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            self.woken.clear()
            self.poll()
            for other in others:
                other.poll()
            if condition():
                return
            assert time.monotonic() < limit, f"waited in vain; so far {self.events[-5:]}"
            self.woken.wait(0.05)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def terminals(self) -> list[Any]:
        return self.of(Done) + self.of(Failed)

    def tags(self) -> list[bytes]:
        return [event.tag for event in self.of(Notified)]

    def write(
        self, peer: str, segments: list[tuple[int, int, int]], tag: bytes = b"", s: float = 10.0
    ) -> int:
        return self.transport.write(peer, table(segments), tag, s)

    def close(self) -> None:
        self.transport.close()
        os.close(self.fd)


def table(segments: list[tuple[int, int, int]]) -> Segments:
    """(local offset, remote offset, length) in region 0 of both ends."""
    return np.array([[0, a, 0, b, n] for a, b, n in segments], dtype=np.int64).reshape(-1, 5)


@pytest.fixture
def make() -> Iterator[Callable[..., End]]:
    ends: list[End] = []
    hub = LocalHub()

    def make_end(name: str, incarnation: str, **more: Any) -> End:
        ends.append(End(name, incarnation, hub, **more))
        return ends[-1]

    yield make_end
    for end in ends:
        end.close()


def joined(make: Callable[..., End], name: str, **more: Any) -> tuple[End, End]:
    """`a` may write to `b`."""
    a, b = make(name, "a", **more), make(name, "b", **more)
    b.transport.admit("a")
    assert a.transport.connect(b.transport.endpoint(), 5.0) == "b"
    return a, b


@pytest.mark.parametrize("name", NAMES)
class TestWrites:
    def test_done_means_that_the_bytes_are_there_and_the_tag_follows_them(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.bytes[:1000] = np.arange(1000) % 251
        transfer = a.write("b", [(0, 5000, 600), (600, 100, 400)], b"tag")
        b.until(lambda: b.tags() == [b"tag"], a)
        np.testing.assert_array_equal(b.bytes[5000:5600], a.bytes[:600])
        np.testing.assert_array_equal(b.bytes[100:500], a.bytes[600:1000])
        a.until(lambda: a.terminals() == [Done(transfer)])
        assert not b.bytes[:100].any()
        assert b.of(Notified) == [Notified("a", b"tag")]

    def test_writes_and_notices_to_a_peer_arrive_in_the_order_of_the_calls(
        self, make: Any, name: str
    ) -> None:
        a, b = joined(make, name)
        wanted = []
        for i in range(60):
            if i % 3 == 2:
                a.transport.notify("b", b"n%d" % i)
            else:
                a.write("b", [(0, 0, 1 << (i % 20))], b"w%d" % i)
            wanted.append((b"n%d" if i % 3 == 2 else b"w%d") % i)
        b.until(lambda: len(b.tags()) == 60, a)
        assert b.tags() == wanted

    def test_nothing_to_copy_is_done_too(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        first = a.write("b", [], b"none")
        second = a.write("b", [(0, 0, 0), (SIZE, SIZE, 0)], b"zero bytes")
        a.until(lambda: len(a.terminals()) == 2, b)
        assert a.terminals() == [Done(first), Done(second)]
        b.until(lambda: b.tags() == [b"none", b"zero bytes"])

    def test_an_empty_tag_is_not_delivered(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)])
        a.transport.notify("b", b"end")
        b.until(lambda: b"end" in b.tags(), a)
        assert b.tags() == [b"end"]

    def test_ten_thousand_segments_land_where_they_belong(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        rng = np.random.default_rng(1)
        a.bytes[:] = rng.integers(0, 256, SIZE, dtype=np.uint8)
        sources, targets = rng.permutation(10_000) * 100, rng.permutation(10_000) * 100
        a.write("b", [(int(s), int(t), 99) for s, t in zip(sources, targets, strict=True)], b"all")
        b.until(lambda: b.tags() == [b"all"], a)
        wanted = np.zeros(SIZE, dtype=np.uint8)
        for source, target in zip(sources, targets, strict=True):
            wanted[target : target + 99] = a.bytes[source : source + 99]
        np.testing.assert_array_equal(b.bytes, wanted)

    def test_both_directions_at_once(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.transport.admit("b")
        b.transport.connect(a.transport.endpoint(), 5.0)
        half = SIZE // 2
        a.bytes[:half], b.bytes[:half] = 3, 4
        for i in range(40):
            a.write("b", [(0, half, half)], b"from a %d" % i)
            b.write("a", [(0, half, half)], b"from b %d" % i)
        a.until(lambda: len(a.tags()) == 40 and len(a.terminals()) == 40, b)
        b.until(lambda: len(b.tags()) == 40 and len(b.terminals()) == 40, a)
        assert (a.bytes[half:] == 4).all()
        assert (b.bytes[half:] == 3).all()

    def test_every_transfer_ends_exactly_once_however_it_is_cancelled(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        rng = np.random.default_rng(2)
        transfers = []
        for i in range(300):
            transfers.append(a.write("b", [(0, 0, int(rng.integers(0, 20_000)))], b"%d" % i))
            if rng.random() < 0.5:
                a.transport.cancel(int(rng.choice(transfers)))
            a.poll()
        a.until(lambda: len(a.terminals()) >= 300, b)
        assert sorted(event.transfer_id for event in a.terminals()) == transfers
        assert {event.code for event in a.of(Failed)} <= {"cancelled"}
        b.until(lambda: len(b.tags()) >= len(a.of(Done)))
        assert len(set(b.tags())) == len(b.tags())

    def test_who_does_not_poll_holds_the_writer_up_and_loses_nothing(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        accepted = 0
        limit = time.monotonic() + PATIENCE_S
        while accepted < 20_000 and time.monotonic() < limit:
            try:
                a.write("b", [(0, 0, 8)], b"%d" % accepted, s=60.0)
                accepted += 1
            except TransferError:
                a.woken.clear()
                a.poll()
                if len(a.of(Done)) >= 4096:
                    break
                a.woken.wait(0.05)
        assert accepted < 20_000
        b.until(lambda: len(b.tags()) >= accepted, a)
        assert b.tags() == [b"%d" % i for i in range(accepted)]
        a.until(lambda: len(a.of(Done)) == accepted)


@pytest.mark.parametrize("name", NAMES)
class TestRefusals:
    @pytest.mark.parametrize(
        "segment",
        [
            (0, 0, SIZE + 1),
            (SIZE, 0, 1),
            (0, SIZE - 5, 6),
            (-1, 0, 1),
            (0, -1, 1),
            (0, 0, -1),
            (2**63 - 1, 0, 1),
            (0, 2**63 - 8, 16),
        ],
    )
    def test_a_segment_out_of_bounds_is_refused(self, make: Any, name: str, segment: Any) -> None:
        a, b = joined(make, name)
        with pytest.raises(TransferError, match="segment"):
            a.write("b", [(0, 0, 1), segment])
        a.write("b", [(0, 0, 1)], b"still works")
        b.until(lambda: b.tags() == [b"still works"], a)

    def test_an_unknown_region_or_a_wrong_table_is_refused(self, make: Any, name: str) -> None:
        a, _ = joined(make, name)
        bad: Any
        for bad in (
            np.array([[1, 0, 0, 0, 1]]),
            np.array([[0, 0, 1, 0, 1]]),
            np.array([[0, 0, -1, 0, 1]]),
            np.zeros((1, 4), dtype=np.int64),
            np.zeros((1, 5), dtype=np.int32),
        ):
            with pytest.raises(TransferError, match="segment"):
                a.transport.write("b", bad, b"", 1.0)

    def test_an_unknown_peer_is_refused(self, make: Any, name: str) -> None:
        a, _ = joined(make, name)
        with pytest.raises(TransferError, match="no peer c"):
            a.write("c", [(0, 0, 1)])
        with pytest.raises(TransferError, match="no peer c"):
            a.transport.notify("c", b"x")

    @pytest.mark.parametrize("change", ["cut", "version", "transport", "field", "list", "empty"])
    def test_a_malformed_or_foreign_endpoint_is_refused(self, make: Any, name: str, change: str) -> None:
        a, b = make(name, "a"), make(name, "b")
        endpoint = b.transport.endpoint()
        fields = json.loads(endpoint)
        bad = {
            "cut": endpoint[:-3],
            "version": json.dumps({**fields, "version": 99}).encode(),
            "transport": json.dumps({**fields, "transport": "pigeon"}).encode(),
            "field": json.dumps({k: v for k, v in fields.items() if k != "incarnation"}).encode(),
            "list": b"[1]",
            "empty": b"",
        }[change]
        with pytest.raises(TransferError):
            a.transport.connect(bad, 1.0)
        assert a.transport.reaches(bad)
        assert a.transport.reaches(endpoint) is None

    def test_a_peer_that_does_not_admit_us_is_down(self, make: Any, name: str) -> None:
        a, b = make(name, "a"), make(name, "b")
        a.transport.connect(b.transport.endpoint(), 5.0)
        transfer = a.write("b", [(0, 0, 10)], b"unwelcome")
        a.until(lambda: bool(a.of(PeerDown)) and bool(a.of(Failed)), b)
        assert [(f.transfer_id, f.code) for f in a.of(Failed)] == [(transfer, "peer_lost")]
        assert b.events == []


@pytest.mark.parametrize("name", NAMES)
class TestEnds:
    def test_connect_twice_is_connect_once(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        assert a.transport.connect(b.transport.endpoint(), 5.0) == "b"
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        assert a.of(PeerDown) == b.of(PeerDown) == []

    @pytest.mark.parametrize("who", ["writer", "destination"])
    def test_after_disconnect_both_ends_are_told_once(self, make: Any, name: str, who: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        (a if who == "writer" else b).transport.disconnect("b" if who == "writer" else "a")
        a.until(lambda: bool(a.of(PeerDown)), b)
        b.until(lambda: bool(b.of(PeerDown)), a)
        assert [event.peer for event in a.of(PeerDown)] == ["b"]
        assert [event.peer for event in b.of(PeerDown)] == ["a"]
        with pytest.raises(TransferError, match="no peer b"):
            a.write("b", [(0, 0, 1)])

    def test_close_fails_what_is_in_flight_and_tells_the_peer(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        b.transport.close()
        a.until(lambda: bool(a.of(PeerDown)))
        b.transport.close()

    def test_a_new_incarnation_takes_the_place_of_the_old(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        b.transport.close()
        a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"])
        again = make(name, "b2")
        again.transport.admit("a")
        assert a.transport.connect(again.transport.endpoint(), 5.0) == "b2"
        a.bytes[:10] = 7
        a.write("b2", [(0, 0, 10)], b"hello")
        again.until(lambda: again.tags() == [b"hello"], a)
        assert (again.bytes[:10] == 7).all()
        assert not b.bytes.any()

    def test_fences_are_answered_in_order_also_by_nobody(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, 10)], b"x")
        b.until(lambda: b.tags() == [b"x"], a)
        b.transport.fence("a", 5.0)
        b.transport.fence("stranger", 5.0)
        a.transport.fence("b", 5.0)
        b.until(lambda: len(b.of(Fenced)) == 2, a)
        a.until(lambda: a.of(Fenced) == [Fenced("b", True)], b)
        assert set(b.of(Fenced)) == {Fenced("a", True), Fenced("stranger", True)}

    def test_after_cancel_and_fence_nothing_is_written_late(self, make: Any, name: str) -> None:
        size = 24 << 20
        a, b = joined(make, name, size=size)
        marker = size - 8
        a.write("b", [(marker, marker, 8)], b"warm")
        b.until(lambda: b.tags() == [b"warm"], a)
        a.bytes[:marker] = 1
        transfers = [a.write("b", [(0, 0, marker)], b"late") for _ in range(3)]
        for transfer in transfers:
            a.transport.cancel(transfer)
        a.until(lambda: len(a.terminals()) == 4)
        a.transport.fence("b", 5.0)
        b.transport.fence("a", 5.0)
        a.until(lambda: a.of(Fenced) == [Fenced("b", True)], b)
        b.until(lambda: b.of(Fenced) == [Fenced("a", True)], a)
        before = b.bytes[:marker].copy()
        a.bytes[:marker] = 2
        a.write("b", [(marker, marker, 8)], b"end")
        b.until(lambda: b"end" in b.tags(), a)
        np.testing.assert_array_equal(b.bytes[:marker], before)
        cancelled = {event.transfer_id for event in a.of(Failed)}
        assert b.tags().count(b"late") <= len(transfers) - len(cancelled) + len(
            cancelled & set(transfers[:1])
        )


class Child:
    """A transport in a process of its own (transport_child.py)."""

    def __init__(self, name: str, incarnation: str, size: int = SIZE) -> None:
        script = Path(__file__).with_name("transport_child.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), name, incarnation, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoint = base64.b64decode(self.read()["endpoint"])

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline())
        return line

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        while "ok" not in self.read():
            pass

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGSTOP:  # it runs on until the last of its threads has stopped
            os.waitpid(self.process.pid, os.WUNTRACED)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def make_child(*args: Any) -> Child:
        children.append(Child(*args))
        return children[-1]

    yield make_child
    for each in children:
        each.end()


@pytest.mark.parametrize("name", OVER_SOCKETS)
class TestOtherProcess:
    def test_bytes_reach_it_and_its_death_is_noticed(self, make: Any, child: Any, name: str) -> None:
        a, far = make(name, "a"), child(name, "far")
        far.tell(admit="a")
        a.transport.connect(far.endpoint, 5.0)
        transfer = a.write("far", [(0, 0, SIZE)], b"hello")
        assert far.read() == {"notified": "hello"}
        a.until(lambda: a.terminals() == [Done(transfer)])
        far.signal(signal.SIGKILL)
        a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["far"])
        with pytest.raises(TransferError):
            a.write("far", [(0, 0, 1)])

    def test_transfers_to_a_killed_process_fail(self, make: Any, child: Any, name: str) -> None:
        a, far = make(name, "a"), child(name, "far")
        far.tell(admit="a")
        a.transport.connect(far.endpoint, 5.0)
        a.write("far", [(0, 0, SIZE)], b"hello")
        a.until(lambda: len(a.of(Done)) == 1)
        far.signal(signal.SIGSTOP)
        transfers = [a.write("far", [(0, 0, SIZE)], b"lost", s=60.0) for _ in range(20)]
        far.signal(signal.SIGKILL)
        a.until(lambda: len(a.terminals()) == 21)
        assert sorted(event.transfer_id for event in a.of(Failed)) == transfers
        assert {event.code for event in a.of(Failed)} == {"peer_lost"}

    def test_transfers_to_a_stopped_process_end_at_their_deadline(
        self, make: Any, child: Any, name: str
    ) -> None:
        a, far = make(name, "a"), child(name, "far")
        far.tell(admit="a")
        a.transport.connect(far.endpoint, 5.0)
        a.write("far", [(0, 0, 8)], b"hello")
        a.until(lambda: len(a.of(Done)) == 1)
        far.signal(signal.SIGSTOP)
        transfers = [a.write("far", [(0, 0, SIZE)], b"late", s=0.2) for _ in range(20)]
        a.until(lambda: len(a.terminals()) == 21)
        assert sorted(event.transfer_id for event in a.of(Failed)) == transfers
        assert {event.code for event in a.of(Failed)} == {"deadline_exceeded"}
        far.signal(signal.SIGCONT)
        after = a.write("far", [(0, 0, 8)], b"after")
        a.until(lambda: Done(after) in a.events)

    def test_a_stopped_writer_cannot_write_once_the_fence_holds_or_it_is_down(
        self, make: Any, child: Any, name: str
    ) -> None:
        size = 32 << 20
        b, far = make(name, "b", size=size), child(name, "far", size)
        b.transport.admit("far")
        far.tell(connect=base64.b64encode(b.transport.endpoint()).decode())
        far.tell(write="b", fill=5, times=50)
        b.until(lambda: bool(b.tags()))
        far.signal(signal.SIGSTOP)
        b.transport.fence("far", 0.2)
        b.until(lambda: bool(b.of(Fenced)))
        if name == "tcp":  # who reads the socket can close it: then nothing comes any more
            assert b.of(Fenced) == [Fenced("far", True)]
        else:  # who maps our memory could go on: only its end makes sure
            assert b.of(Fenced) == [Fenced("far", False)]
            assert b.of(PeerDown) == []
            far.signal(signal.SIGKILL)
        b.until(lambda: [event.peer for event in b.of(PeerDown)] == ["far"])
        b.bytes[:] = 9
        far.signal(signal.SIGCONT)
        far.end()
        assert (b.bytes == 9).all()

    def test_a_wrong_token_is_turned_away(self, make: Any, name: str) -> None:
        a, b = make(name, "a", token="right"), make(name, "b", token="wrong")
        b.transport.admit("a")
        a.transport.connect(b.transport.endpoint(), 5.0)
        a.until(lambda: bool(a.of(PeerDown)))
        assert "wrong cluster token" in a.of(PeerDown)[0].message

    def test_a_peer_that_is_not_there_is_down(self, make: Any, name: str) -> None:
        a, b = make(name, "a"), make(name, "b")
        endpoint = b.transport.endpoint()
        b.transport.close()
        a.transport.connect(endpoint, 1.0)
        transfer = a.write("b", [(0, 0, 8)])
        a.until(lambda: bool(a.of(PeerDown)) and bool(a.of(Failed)))
        assert [event.transfer_id for event in a.of(Failed)] == [transfer]

    def test_noise_on_the_listener_disturbs_nobody(self, make: Any, name: str) -> None:
        import socket

        a, b = joined(make, name)
        fields = json.loads(b.transport.endpoint())
        kind, address = (
            (socket.AF_INET, (fields.get("host"), fields.get("port")))
            if name == "tcp"
            else (socket.AF_UNIX, "\0" + fields.get("path", ""))
        )
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n" * 4,
            b"\1" + b"\0" * 15,
            b"\3\0\0\0\xff\xff\xff\xff" + b"\0" * 8,
        ):
            with socket.socket(kind, socket.SOCK_STREAM) as stranger:
                stranger.settimeout(PATIENCE_S)
                stranger.connect(address)
                stranger.sendall(noise)
                while stranger_reads(stranger):
                    pass
        a.write("b", [(0, 0, 8)], b"still here")
        b.until(lambda: b.tags() == [b"still here"], a)


def stranger_reads(sock: Any) -> bytes:
    try:
        data: bytes = sock.recv(4096)
    except ConnectionError:
        return b""
    return data
