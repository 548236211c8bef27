"""What the transport nccl does beside what every transport must (tests/conformance): owner processes that
hang, fail and die. The owners are real, the communicator in them is one over a socket."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import Done, Failed, Fenced, PeerDown
from diphase.kv_transfer.transports.nccl import NcclTransport
from diphase.kv_transfer.transports.nccl_communicator import from_nccl
from diphase.kv_transfer.transports.nccl_owner import UNIQUE_ID_BYTES, Word
from diphase.kv_transfer.transports.nccl_process import Named, OwnerProcess
from diphase.proto.errors import DiphaseError, InternalError, PeerLost, TransferError

from ...conformance.host_gpu import HOST_COMMUNICATOR, ROOT, HostDevice
from ...conformance.transport_ends import PATIENCE_S, End

MODULE = HOST_COMMUNICATOR.partition(":")[0]
MakeEnd = Callable[..., End]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEnd]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ends: list[End] = []

    def make_end(incarnation: str, communicator: str = "HostCommunicator", **more: Any) -> End:
        factory = partial(
            NcclTransport, device_of=HostDevice, communicator=f"{MODULE}:{communicator}", **more
        )
        ends.append(End("nccl", incarnation, size=1 << 22, make=factory))
        return ends[-1]

    yield make_end
    for end in ends:
        end.close()
    assert not [pid for end in ends for pid in owners(end)]


def owners(end: End) -> list[int]:
    """Its owner processes that have not ended."""
    return [owner.pid for owner in end.transport._medium._owners]  # type: ignore[attr-defined]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def join(a: End, b: End) -> None:
    b.transport.admit(a.name)
    a.transport.connect(b.transport.endpoint(), 10.0)


def joined(
    make: MakeEnd, a_has: str = "HostCommunicator", b_has: str = "HostCommunicator"
) -> tuple[End, End]:
    """`a` has written to `b`."""
    a, b = make("a", a_has), make("b", b_has)
    join(a, b)
    a.bytes[:] = 1
    first = a.write("b", [(0, 0, 8)], b"first")
    a.until(lambda: Done(first) in a.events, b)
    b.until(lambda: b.tags() == [b"first"])
    return a, b


def until_both_are_down(a: End, b: End) -> None:
    a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"], b)
    b.until(lambda: [event.peer for event in b.of(PeerDown)] == ["a"], a)
    a.until(lambda: owners(a) == owners(b) == [], b)


def reasons(*ends: End) -> str:
    """Whoever sees it first hangs up on the other, who knows no more."""
    return "; ".join(event.message for end in ends for event in end.of(PeerDown))


class TestOwnersThatHang:
    @pytest.mark.parametrize("who", ["a", "b"])
    def test_in_opening_are_killed_when_the_time_is_over(self, make: MakeEnd, who: str) -> None:
        a, b = (
            make(name, "HangsInOpen" if name == who else "HostCommunicator", open_timeout_s=0.5)
            for name in ("a", "b")
        )
        join(a, b)
        transfer = a.write("b", [(0, 0, 8)], b"never")
        a.until(lambda: bool(a.of(Failed)), b)
        until_both_are_down(a, b)
        assert [(event.transfer_id, event.code) for event in a.of(Failed)] == [(transfer, "peer_lost")]
        assert "the communicator was not made in time" in reasons(a, b)
        assert b.tags() == []

    @pytest.mark.parametrize("who", ["a", "b"])
    def test_in_their_end_are_killed_after_a_grace(self, make: MakeEnd, who: str) -> None:
        a, b = joined(make, **{f"{who}_has": "HangsInClose"})
        pids = owners(a) + owners(b)
        assert len(pids) == 2
        a.transport.disconnect("b")
        until_both_are_down(a, b)
        assert not any(is_there(pid) for pid in pids)

    def test_do_not_hold_up_close(self, make: MakeEnd) -> None:
        a, _ = joined(make, "HangsInClose", "HangsInClose")
        (pid,) = owners(a)
        a.transport.close()
        assert not is_there(pid)

    @pytest.mark.parametrize("size", [8, 1 << 22])  # it leaves the writer, or it cannot
    def test_at_the_destination_keep_the_fence_from_holding_until_they_go_on(
        self, make: MakeEnd, size: int
    ) -> None:
        a, b = joined(make)
        (pid,) = owners(b)
        os.kill(pid, signal.SIGSTOP)
        a.bytes[:] = 2
        late = a.write("b", [(0, 0, size)], b"late")
        if size == 8:
            to_b = a.transport._peers._peers["b"]  # type: ignore[attr-defined]
            a.until(lambda: late in to_b.unacknowledged and not to_b.attachment.posted, b)
        a.transport.cancel(late)  # which its owner has by now: it is sent all the same
        a.until(lambda: [event.transfer_id for event in a.of(Failed)] == [late], b)
        b.transport.fence("a", 20.0)
        a.transport.fence("b", 0.1)
        a.until(lambda: a.of(Fenced) == [Fenced("b", False)], b)
        assert b.of(Fenced) == []
        os.kill(pid, signal.SIGCONT)
        b.until(lambda: b.of(Fenced) == [Fenced("a", True)], a)
        b.bytes[:] = 9  # ours again: nothing arrives any more
        after = a.write("b", [(0, 0, 8)], b"after")
        a.until(lambda: Done(after) in a.events, b)
        assert (b.bytes[:8] == 2).all()
        assert (b.bytes[8:] == 9).all()

    def test_are_killed_when_their_peer_is_dropped(self, make: MakeEnd) -> None:
        a, b = joined(make)
        (pid,) = owners(b)
        os.kill(pid, signal.SIGSTOP)
        b.transport.disconnect("a")
        until_both_are_down(a, b)
        assert not is_there(pid)


class TestOwnersThatEnd:
    @pytest.mark.parametrize("who", ["a", "b"])
    def test_killed_they_take_the_connection_with_them_and_it_can_be_made_anew(
        self, make: MakeEnd, who: str
    ) -> None:
        a, b = joined(make)
        (pid,) = owners(a if who == "a" else b)
        os.kill(pid, signal.SIGKILL)
        until_both_are_down(a, b)
        killed = a if who == "a" else b
        assert re.search(
            rf"peer_lost: the process that owns .* ended \(pid {pid}\)", killed.of(PeerDown)[0].message
        )
        join(a, b)
        again = a.write("b", [(0, 100, 8)], b"again")
        a.until(lambda: Done(again) in a.events, b)
        b.until(lambda: b.tags() == [b"first", b"again"])

    @pytest.mark.parametrize("who", ["a", "b"])
    def test_an_error_of_the_library_fails_what_is_under_way_and_says_why(
        self, make: MakeEnd, who: str
    ) -> None:
        a, b = joined(make, **{f"{who}_has": "BreaksAtTheThird"})
        second = a.write("b", [(0, 0, 8)], b"second")
        a.until(lambda: Done(second) in a.events, b)
        third = [a.write("b", [(0, 0, 1 << 22)], b"third") for _ in range(6)]
        a.until(lambda: len(a.of(Failed)) == 6, b)
        assert sorted(event.transfer_id for event in a.of(Failed)) == third
        assert {event.code for event in a.of(Failed)} == {"peer_lost"}
        until_both_are_down(a, b)
        assert re.search("failed: (a cable was pulled|it has ended)", reasons(a, b))
        assert b.tags() == [b"first", b"second"]

    @pytest.mark.parametrize("who", ["a", "b"])
    def test_one_that_cannot_start_says_why(self, make: MakeEnd, who: str) -> None:
        a, b = (make(name, "CannotStart" if name == who else "HostCommunicator") for name in ("a", "b"))
        join(a, b)
        until_both_are_down(a, b)
        assert "transfer: there is no library here" in reasons(a, b)

    def test_they_die_with_the_process_that_started_them(self, make: MakeEnd) -> None:
        script = (
            "import time\n"
            "from diphase.kv_transfer.transports.nccl_process import OwnerProcess\n"
            f"owner = OwnerProcess({MODULE + ':HangsInOpen'!r})\n"
            "owner.open(1, [])\n"
            "while not owner.read():\n"
            "    time.sleep(0.001)\n"
            "print(owner.pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert is_there(pid)
            watch = os.pidfd_open(pid)
            parent.kill()
        assert select.select([watch], [], [], PATIENCE_S)[0] == [watch]
        os.close(watch)


def ask(owner: OwnerProcess) -> list[Any]:
    """What it says next."""
    limit = time.monotonic() + PATIENCE_S
    while time.monotonic() < limit:
        if told := owner.read():
            return told
        select.select([owner.connection.sock], [], [], 0.1)
    raise AssertionError("it says nothing")


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnerProcess]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    owner = OwnerProcess(HOST_COMMUNICATOR)
    yield owner
    owner.kill()
    owner.wait()
    owner.release()


class TestTheOwnersProtocol:
    def test_rank_one_names_the_communicator_before_it_waits(self, owner: OwnerProcess) -> None:
        owner.open(1, [])
        (named,) = ask(owner)
        assert isinstance(named, Named)
        assert len(named.unique_id) == UNIQUE_ID_BYTES

    @pytest.mark.parametrize(
        ("word", "body", "why"),
        [
            (99, b"", "a word of kind 99"),
            (Word.OPEN, b"\1", "OPEN is cut short"),
            (Word.OPEN, b"\0\1\0\0\0", "OPEN is cut short"),
            (Word.MOVE, bytes(31), "runs of 31 bytes"),
        ],
    )
    def test_nonsense_is_answered_with_an_error(
        self, owner: OwnerProcess, word: int, body: bytes, why: str
    ) -> None:
        owner.connection.queue(word, body)
        owner.flush()
        with pytest.raises(InternalError, match=why):
            ask(owner)

    def test_memory_that_cannot_be_mapped_is_said(self, owner: OwnerProcess) -> None:
        owner.open(0, [(np.array([2**22 + 1, 0], dtype=np.int64).tobytes(), 8)], bytes(128))
        with pytest.raises(TransferError, match="cannot be mapped"):
            ask(owner)

    def test_asked_to_end_it_ends(self, owner: OwnerProcess) -> None:
        owner.close()
        owner.wait()
        assert owner.ended
        with pytest.raises(PeerLost, match=rf"ended \(pid {owner.pid}\)"):
            ask(owner)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (1, TransferError, "NCCL_DEBUG"),
        (2, TransferError, "NCCL_DEBUG"),
        (3, InternalError, "wrongly"),
        (4, InternalError, "wrongly"),
        (5, TransferError, "two different GPUs"),
        (6, PeerLost, "the other end"),
    ],
)
def test_the_library_s_errors_become_ours(status: int, kind: type[DiphaseError], says: str) -> None:
    error = from_nccl(status, "what it says")
    assert type(error) is kind
    assert says in error.message
    assert "what it says" in error.message


def test_one_gpu_is_not_taken_twice(make: MakeEnd) -> None:
    a, b = make("a"), make("b")
    assert a.transport.reaches(b.transport.endpoint()) is None
    assert "on one GPU" in str(a.transport.reaches(a.transport.endpoint()))


def test_the_real_library_makes_unique_ids_without_a_gpu() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed (extra `cuda`)")
    from diphase.kv_transfer.transports.nccl_communicator import CupyCommunicator

    first, second = CupyCommunicator().name(), CupyCommunicator().name()
    assert len(first) == len(second) == UNIQUE_ID_BYTES
    assert first != second


def test_the_real_library_in_a_real_owner_makes_a_unique_id() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed (extra `cuda`)")
    owner = OwnerProcess("diphase.kv_transfer.transports.nccl_communicator:CupyCommunicator")
    try:
        owner.open(1, [])
        (named,) = ask(owner)
        assert isinstance(named, Named)
        assert len(named.unique_id) == UNIQUE_ID_BYTES
    finally:
        owner.kill()
        owner.wait()
        owner.release()
