"""What nixl promises beyond the suite: nothing is left over, nothing comes late, nobody is believed who does
not know the cluster's token."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nixl_cu13")

from diphase.kv_transfer.base import Done, Failed, Fenced, PeerDown, Region, TransportContext
from diphase.kv_transfer.transports import nixl_agent
from diphase.kv_transfer.transports.framing import FrameError
from diphase.kv_transfer.transports.nixl import MAX_EXPECTED, MAX_METADATA, NixlMedium
from diphase.kv_transfer.transports.socket_peer import ID, Peer
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import TransferError

from .test_transport_processes import Child
from .transport_ends import PATIENCE_S, SIZE, End, joined


def medium_of(end: End) -> NixlMedium:
    medium: NixlMedium = end.transport._medium  # type: ignore[attr-defined]
    return medium


def on_thread(end: End, action: Callable[[], Any]) -> Any:
    """Runs it on the transport's thread."""
    found: list[Any] = []
    ran = threading.Event()

    def run() -> None:
        found.append(action())
        ran.set()

    end.transport._thread.post(run)  # type: ignore[attr-defined]
    assert ran.wait(PATIENCE_S)
    return found[0]


@contextmanager
def held(end: End) -> Iterator[None]:
    """Its thread does nothing meanwhile: neither its sockets nor NIXL's are read."""
    holds, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        holds.set()
        go_on.wait(PATIENCE_S)

    end.transport._thread.post(hold)  # type: ignore[attr-defined]
    assert holds.wait(PATIENCE_S)
    try:
        yield
    finally:
        go_on.set()


def rests(*ends: End) -> bool:
    return all(on_thread(end, partial(getattr, medium_of(end), "poll_in_s")) is None for end in ends)


def has_ended(end: End, count: int) -> bool:
    return len(end.terminals()) == count


class TestNothingIsLeft:
    def test_handles_and_agents_are_released_and_nobody_polls_when_idle(self, make: Any) -> None:
        a, b = joined(make, "nixl")
        a.write("b", [(0, 0, 8)])
        a.until(lambda: len(a.of(Done)) == 1, b)
        gc.collect()  # what tests before this one have left
        fds = len(os.listdir("/proc/self/fd"))
        begun = 1
        for _ in range(30):
            for i in range(100):
                a.write("b", [(i * 16, i * 16, 8), (8192 + i * 16, 16384 + i * 16, 8)], b"tag")
                if i % 10 == 0:
                    a.transport.cancel(a.write("b", [(0, SIZE // 2, SIZE // 2)]))
            begun += 110
            a.until(partial(has_ended, a, begun), b)
        assert len(a.of(Done)) >= 3001
        a.until(lambda: rests(a, b), b)
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each).__name__ == "nixl_xfer_handle"]
        assert len(os.listdir("/proc/self/fd")) == fds
        agent, name = medium_of(a)._agent._agent, medium_of(b)._agent.name
        assert agent.check_remote_metadata(name)
        b.transport.close()
        a.until(lambda: bool(a.of(PeerDown)))
        assert not agent.check_remote_metadata(name)

    def test_an_idle_end_rests_also_after_a_transfer_was_cancelled_midway(self, make: Any) -> None:
        a, b = joined(make, "nixl")
        a.write("b", [(0, 0, 8)])
        a.until(lambda: len(a.of(Done)) == 1, b)
        with held(b):
            transfers = [a.write("b", [(0, 0, SIZE)], b"never") for _ in range(3)]
            a.until(lambda: on_thread(a, lambda: len(medium_of(a)._writing)) == 1)
            for transfer in transfers:
                a.transport.cancel(transfer)
            a.until(lambda: len(a.of(Failed)) == 3)
            a.transport.fence("b", PATIENCE_S)
            # What was posted is on its way for as long as the peer does nothing: the fence cannot hold.
            assert on_thread(a, lambda: medium_of(a).poll_in_s) is not None
            a.poll()
            assert a.of(Fenced) == []
        a.until(lambda: a.of(Fenced) == [Fenced("b", True)], b)
        a.until(lambda: rests(a, b), b)
        assert b.tags() == []

    def test_close_ends_the_agent_also_with_transfers_in_flight(self, make: Any) -> None:
        a, b = joined(make, "nixl")
        a.write("b", [(0, 0, 8)], b"first")
        b.until(lambda: b.tags() == [b"first"], a)
        agent = weakref.ref(medium_of(a)._agent._agent.agent)
        with held(b):
            a.write("b", [(0, 0, SIZE)])
            a.until(lambda: on_thread(a, lambda: bool(medium_of(a)._writing)))
            a.transport.close()
            assert agent() is None
        b.until(lambda: bool(b.of(PeerDown)))


class TestFailure:
    def test_when_nixl_fails_both_ends_are_told_and_may_connect_again(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = joined(make, "nixl")
        a.write("b", [(0, 0, 8)], b"first")
        b.until(lambda: b.tags() == [b"first"], a)

        def fails(*args: Any) -> Any:
            raise TransferError("NIXL: the cable is gone")

        with monkeypatch.context() as patch:
            patch.setattr(medium_of(a)._agent, "write", fails)
            transfers = [a.write("b", [(0, 0, 8)], b"lost") for _ in range(3)]
            a.until(lambda: bool(a.of(PeerDown)) and len(a.of(Failed)) == 3, b)
        assert [event.message for event in a.of(PeerDown)] == ["NIXL: the cable is gone"]
        assert [event.transfer_id for event in a.of(Failed)] == transfers
        assert {event.code for event in a.of(Failed)} == {"peer_lost"}
        b.until(lambda: bool(b.of(PeerDown)))
        b.transport.admit("a")
        a.transport.connect(b.transport.endpoint(), 5.0)
        a.write("b", [(0, 0, 8)], b"again")
        b.until(lambda: b.tags() == [b"first", b"again"], a)
        a.until(lambda: rests(a, b), b)


def unread_bytes() -> int:
    """In the sockets of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                (count,) = struct.unpack("i", fcntl.ioctl(int(name), termios.FIONREAD, bytes(4)))
                total += count
    return total


class TestLateBytes:
    def test_what_a_killed_writer_left_on_the_way_is_in_before_it_counts_as_down(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """UCX's tcp writes into memory what it finds in a socket, whoever sent it may be dead."""
        monkeypatch.setenv("UCX_TLS", "tcp")
        size = 64 << 20
        b, far = make("nixl", "b", size=size), Child("nixl", "far", size)
        try:
            import base64

            b.transport.admit("far")
            far.tell(connect=base64.b64encode(b.transport.endpoint()).decode())
            far.tell(write="b", fill=5, times=1)
            b.until(lambda: b.tags() == [b"part 0"])
            medium = medium_of(b)
            agent, take = medium._agent, medium._agent.notifications
            # NIXL is called again when the writer is known to be gone, not before.
            monkeypatch.setattr(agent, "notifications", lambda: {} if medium._senders else take())
            far.tell(write="b", fill=6, times=20)
            b.until(lambda: on_thread(b, lambda: bool(medium._expecting)) and unread_bytes() > 1 << 20)
            far.signal(signal.SIGKILL)
            b.until(lambda: bool(b.of(PeerDown)))
            assert (b.bytes == 6).any()
            b.bytes[:] = 9
            on_thread(b, take)
            assert (b.bytes == 9).all()
            assert rests(b)
        finally:
            far.end()


@pytest.fixture
def mediums() -> Iterator[tuple[NixlMedium, NixlMedium]]:
    """Of a writer and a destination, with the same token and no threads."""
    made = []
    for incarnation in ("writer", "destination"):
        context = TransportContext(
            incarnation=incarnation, wake=lambda: None, clock=MonotonicClock(), token="secret"
        )
        regions: list[Region] = []
        medium = NixlMedium(context, regions)
        region = Region(buffer=memoryview(bytearray(4096)))
        medium.check(region)
        regions.append(region)
        made.append(medium)
    yield made[0], made[1]
    for medium in made:
        medium.close()


class TestHandshake:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"metadata": b"nixlSerDes|Agent" + b"\xff" * 64}, "mac"),
            ({"mac": b""}, "mac"),
            ({"metadata": b"x" * (MAX_METADATA + 1)}, "metadata"),
            ({"agent": "somebody else"}, "agent"),
            ({"addresses": []}, "addresses"),
            ({"addresses": [2**63]}, "addresses"),
            ({"addresses": ["0"]}, "addresses"),
            ({"devices": [-2]}, "devices"),
            ({"devices": [True]}, "devices"),
        ],
    )
    def test_a_welcome_that_is_wrong_is_refused_by_the_name_of_the_field(
        self, mediums: tuple[NixlMedium, NixlMedium], change: dict[str, Any], field: str
    ) -> None:
        writer, destination = mediums
        peer = Peer(incarnation="destination")
        fields = destination.welcome(Peer(incarnation="writer"))
        with pytest.raises(TransferError, match=f"^{field}: "):
            writer.attach(peer, [4096], [], {**fields, **change})
        assert peer.attachment is None
        writer.attach(peer, [4096], [], fields)
        assert peer.attachment is not None

    def test_metadata_signed_with_another_token_is_not_loaded(
        self, mediums: tuple[NixlMedium, NixlMedium], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer, destination = mediums
        fields = destination.welcome(Peer(incarnation="writer"))
        monkeypatch.setattr(writer, "_token", b"another")
        with pytest.raises(TransferError, match="mac: "):
            writer.attach(Peer(incarnation="destination"), [4096], [], fields)
        assert not writer._agent._agent.check_remote_metadata(destination._agent.name)

    @pytest.mark.parametrize("name", ["", "x" * 129])
    def test_an_agent_without_a_proper_name_is_refused(
        self, mediums: tuple[NixlMedium, NixlMedium], name: str
    ) -> None:
        with pytest.raises(TransferError, match="agent: "):
            mediums[1].heard(Peer(incarnation="writer"), {"agent": name})

    def test_two_peers_with_one_agent_are_refused(self, mediums: tuple[NixlMedium, NixlMedium]) -> None:
        destination = mediums[1]
        destination.heard(Peer(incarnation="writer"), {"agent": "one"})
        with pytest.raises(TransferError, match="agent: 'one'"):
            destination.heard(Peer(incarnation="other"), {"agent": "one"})

    def test_a_peer_that_announces_without_end_is_cut_off(
        self, mediums: tuple[NixlMedium, NixlMedium]
    ) -> None:
        peer, targets = Peer(incarnation="writer"), np.array([[0, 0, 8]])
        mediums[1].heard(peer, {"agent": "w"})
        for i in range(1, MAX_EXPECTED + 1):
            mediums[1].expect(peer, i, targets)
        with pytest.raises(FrameError, match="transfers are announced"):
            mediums[1].expect(peer, MAX_EXPECTED + 1, targets)
        with pytest.raises(FrameError, match="announced after"):
            mediums[1].expect(peer, 1, targets)

    def test_another_version_or_backend_is_not_reached(
        self, mediums: tuple[NixlMedium, NixlMedium], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writer, destination = mediums
        endpoint = destination.describe(("127.0.0.1", 1))
        assert writer.reaches(endpoint) is None
        assert "LIBFABRIC" in str(writer.reaches({**endpoint, "backend": "LIBFABRIC"}))
        monkeypatch.setattr(nixl_agent, "version", lambda: "99.0.1")
        assert "install the same version" in str(writer.reaches(endpoint))


class TestTags:
    def test_a_transfer_lands_by_its_own_notification_alone(
        self, mediums: tuple[NixlMedium, NixlMedium], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        destination = mediums[1]
        peers = {name: Peer(incarnation=name) for name in ("one", "other")}
        targets = np.array([[0, 0, 8]])
        for name, peer in peers.items():
            destination.heard(peer, {"agent": f"agent of {name}"})
            destination.expect(peer, 7, targets)
            destination.expect(peer, 0x0700, targets)
        come: dict[str, list[bytes]] = {}
        monkeypatch.setattr(destination._agent, "notifications", lambda: come)

        def landed() -> set[tuple[str, int]]:
            destination.work()
            return {(n, i) for n, p in peers.items() for i in (7, 0x0700) if destination.landed(p, i)}

        come["agent of one"] = [b"", b"\x07", ID.pack(7) + b"\0", ID.pack(7)[1:], ID.pack(8)]
        come["a stranger"] = [ID.pack(7)]
        assert landed() == set()
        come["agent of other"] = [ID.pack(7)]
        assert landed() == {("other", 7)}
        come["agent of one"] = [ID.pack(0x0700)]
        assert landed() == {("other", 7), ("one", 0x0700)}

    def test_a_notification_may_come_before_its_announcement(
        self, mediums: tuple[NixlMedium, NixlMedium], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        destination = mediums[1]
        peer = Peer(incarnation="writer")
        destination.heard(peer, {"agent": "w"})
        destination.expect(peer, 1, np.array([[0, 0, 8]]))
        monkeypatch.setattr(destination._agent, "notifications", lambda: {"w": [ID.pack(3), ID.pack(1)]})
        destination.work()
        destination.expect(peer, 2, np.array([[0, 0, 8]]))
        destination.expect(peer, 3, np.array([[0, 0, 8]]))
        assert [destination.landed(peer, i) for i in (1, 2, 3)] == [True, False, True]


SCRIPT = """
import logging, mmap, os, sys, threading
import numpy as np
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
from diphase.kv_transfer.base import Done, Region, TransportContext
from diphase.kv_transfer.transports.nixl import NixlTransport
from diphase.proto.clock import MonotonicClock
woken = threading.Event()
ends = []
for name in ("a", "b"):
    end = NixlTransport(TransportContext(incarnation=name, wake=woken.set, clock=MonotonicClock()))
    end.register(Region(buffer=memoryview(mmap.mmap(-1, 65536))))
    ends.append(end)
a, b = ends
b.admit("a")
a.connect(b.endpoint(), 5.0)
a.write("b", np.array([[0, 0, 0, 0, 65536]]), b"", 20.0)
while not any(isinstance(event, Done) for event in a.poll()):
    woken.wait(0.05)
assert logging.raiseExceptions and not logging.getLogger("nixl").handlers
a.close()
b.close()
"""


@pytest.mark.parametrize("lanes", ["tcp", "cma,tcp"])
def test_the_chosen_lanes_are_logged_and_nothing_goes_to_standard_output(lanes: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env={**environment, "UCX_TLS": lanes},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("ucx_lanes")]
    assert told, done.stderr
    assert all(lanes.partition(",")[0] in line.partition("lanes=")[2] for line in told)
