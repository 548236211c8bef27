"""What the transport cuda_ipc does beside what every transport must (tests/conformance): copies that are on a
stream when they are cancelled, devices that fail, and writers that die with work on their device."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from diphase.kv_transfer.base import DeviceMemory, Done, Failed, Fenced, PeerDown, Region
from diphase.kv_transfer.transports.cuda_device import cuda_device_of
from diphase.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from diphase.kv_transfer.transports.cuda_memory import Handle
from diphase.kv_transfer.transports.peer_process import PeerProcess
from diphase.proto.errors import TransferError

from ...conformance.host_gpu import ROOT, HostDevice
from ...conformance.transport_ends import PATIENCE_S, End

MakeEnd = Callable[[str], tuple[End, HostDevice]]
Dying = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def make() -> Iterator[MakeEnd]:
    ends: list[End] = []

    def make_end(incarnation: str) -> tuple[End, HostDevice]:
        devices: list[HostDevice] = []

        def device_of(region: Region, on_passed: Callable[[], None]) -> HostDevice:
            devices.append(HostDevice(region, on_passed))
            return devices[0]

        ends.append(End("cuda_ipc", incarnation, make=partial(CudaIpcTransport, device_of=device_of)))
        return ends[-1], devices[0]

    yield make_end
    for end in ends:
        end.close()


def joined(make: MakeEnd) -> tuple[End, End, HostDevice]:
    """`a` has written to `b`; the device is a's."""
    (a, device), (b, _) = make("a"), make("b")
    b.transport.admit("a")
    a.transport.connect(b.transport.endpoint(), 5.0)
    a.bytes[:] = 1
    first = a.write("b", [(0, 0, 8)], b"first")
    a.until(lambda: Done(first) in a.events, b)
    return a, b, device


def test_a_fence_waits_for_what_is_on_the_stream(make: MakeEnd) -> None:
    a, b, device = joined(make)
    device.may_run.clear()
    late = [a.write("b", [(0, 100, 50)], b"late") for _ in range(9)]
    for transfer in late:
        a.transport.cancel(transfer)
    a.until(lambda: len(a.of(Failed)) == 9, b)
    b.transport.fence("a", 20.0)
    a.transport.fence("b", 0.01)  # ours does not hold either: the stream reads what we would use anew
    a.until(lambda: a.of(Fenced) == [Fenced("b", False)], b)
    assert b.of(Fenced) == []
    device.may_run.set()
    b.until(lambda: b.of(Fenced) == [Fenced("a", True)], a)
    b.bytes[:] = 9
    after = a.write("b", [(0, 0, 8)], b"after")
    a.until(lambda: Done(after) in a.events, b)
    assert (b.bytes[8:] == 9).all()
    assert b.tags() == [b"first", b"after"]


def test_a_peer_is_down_when_nothing_is_copied_there_any_more(make: MakeEnd) -> None:
    a, b, device = joined(make)
    device.may_run.clear()
    transfer = a.write("b", [(0, 100, 50)], b"cut off")
    a.transport.disconnect("b")
    a.until(lambda: [event.transfer_id for event in a.of(Failed)] == [transfer], b)
    assert a.of(PeerDown) == b.of(PeerDown) == []
    device.may_run.set()
    a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"], b)
    b.until(lambda: [event.peer for event in b.of(PeerDown)] == ["a"], a)


def test_tags_keep_their_order_though_some_have_nothing_to_copy(make: MakeEnd) -> None:
    a, b, device = joined(make)
    device.may_run.clear()
    a.write("b", [(0, 100, 50)], b"bytes")
    a.write("b", [], b"none")
    a.transport.notify("b", b"notice")
    device.may_run.set()
    b.until(lambda: len(b.tags()) == 4, a)
    assert b.tags() == [b"first", b"bytes", b"none", b"notice"]


@pytest.mark.parametrize("when", ["it begins", "it runs"])
def test_a_device_that_fails_takes_the_connection_with_it(make: MakeEnd, when: str) -> None:
    a, b, device = joined(make)
    device.may_run.clear()
    device.is_broken = when == "it begins"
    transfer = a.write("b", [(0, 100, 50)], b"broken")
    if when == "it runs":
        a.until(lambda: bool(a.transport._medium._writing), b)  # type: ignore[attr-defined]
        device.is_broken = True
    device.may_run.set()
    a.until(lambda: [event.peer for event in a.of(PeerDown)] == ["b"], b)
    assert [(event.transfer_id, event.code) for event in a.of(Failed)] == [(transfer, "peer_lost")]
    assert "fallen off the bus" in a.of(PeerDown)[0].message
    b.until(lambda: bool(b.of(PeerDown)), a)
    assert b.tags() == [b"first"]


def test_a_peer_whose_end_cannot_be_watched_is_not_reached(make: MakeEnd) -> None:
    a, b, _ = joined(make)
    fields = json.loads(b.transport.endpoint())
    elsewhere = json.dumps({**fields, "pids": fields["pids"] + 1}).encode()
    assert a.transport.reaches(b.transport.endpoint()) is None
    assert "another PID namespace" in str(a.transport.reaches(elsewhere))


# A process whose first thread has ended, with another that goes on: what a dying process is for a moment.
DYING = """
import ctypes, sys, threading, time
{begin}
def go_on():
    sys.stdin.readline()
    {then}
    time.sleep(600)
threading.Thread(target=go_on).start()
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.fixture
def dying() -> Iterator[Dying]:
    started: list[subprocess.Popen[str]] = []

    def start(begin: str = "", then: str = "pass") -> subprocess.Popen[str]:
        script = DYING.format(begin=begin, then=then)
        started.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", script],
                env={"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_a_process_is_dying_until_its_last_thread_has_ended(
    dying: Dying,
) -> None:
    process = dying()
    watched = PeerProcess(process.pid)
    until(lambda: watched.is_dying)
    process.kill()
    until(lambda: not watched.is_dying)
    process.wait()
    assert not watched.is_dying
    watched.close()
    with pytest.raises(TransferError, match=f"pid: there is no process {process.pid}"):
        PeerProcess(process.pid)


def test_a_process_that_lives_is_not_dying() -> None:
    assert not PeerProcess(os.getpid()).is_dying


def test_a_writer_that_is_dying_is_down_when_it_is_dead(make: MakeEnd, dying: Dying) -> None:
    b, _ = make("b")
    b.transport.admit("far")
    endpoint = base64.b64encode(b.transport.endpoint()).decode()
    begin = f"""
import base64
from tests.conformance.transport_ends import End
end = End("cuda_ipc", "far")
end.transport.connect(base64.b64decode("{endpoint}"), 5.0)
done = end.write("b", [(0, 0, 8)], b"hello")
end.until(lambda: bool(end.terminals()))
"""
    far = dying(begin, "end.transport.close()")
    until(lambda: PeerProcess(far.pid).is_dying)
    assert far.stdin is not None
    far.stdin.write("\n")  # now its socket is closed, and its process is not gone
    far.stdin.flush()
    until(lambda: bool(b.transport._medium._dying))  # type: ignore[attr-defined]
    b.poll()
    assert b.tags() == [b"hello"]
    assert b.of(PeerDown) == []
    far.kill()
    b.until(lambda: [event.peer for event in b.of(PeerDown)] == ["far"])


def test_memory_of_the_host_is_refused() -> None:
    with pytest.raises(TransferError, match="memory of the host"):
        cuda_device_of(Region(buffer=memoryview(bytearray(8))), lambda: None)


def test_a_gpu_that_is_not_there_is_refused_in_a_sentence() -> None:
    runtime = pytest.importorskip("cupy", reason="CuPy is not installed (extra `cuda`)").cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError:
        count = 0
    region = Region(buffer=None, device=DeviceMemory(device=count, pointer=1 << 40, num_bytes=8))
    with pytest.raises(TransferError, match=r"no CUDA device is|there is no device cuda:"):
        cuda_device_of(region, lambda: None)


def test_a_handle_survives_the_wire_and_nothing_else_is_taken_for_one() -> None:
    handle = Handle(bytes(range(16)), bytes(range(64)), 2**40)
    assert Handle.unpack(handle.pack()) == handle
    with pytest.raises(TransferError, match="87 bytes, not 88"):
        Handle.unpack(handle.pack()[1:])
