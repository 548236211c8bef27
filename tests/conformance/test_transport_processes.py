"""What the transports between processes promise when the other one dies, stops, or is a stranger."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from diphase.kv_transfer.base import (
    Done,
    Failed,
    Fenced,
    PeerDown,
)
from diphase.kv_transfer.transports.framing import HEADER
from diphase.kv_transfer.transports.socket_medium import Medium
from diphase.kv_transfer.transports.socket_peer import Kind
from diphase.proto.errors import InternalError, TransferError

from .host_gpu import ROOT
from .transport_ends import OVER_SOCKETS, PATIENCE_S, SIZE, joined


class Child:
    """A transport in a process of its own (transport_child.py)."""

    def __init__(self, name: str, incarnation: str, size: int = SIZE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.conformance.transport_child", name, incarnation, str(size)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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
        if name.startswith("tcp"):  # who reads the socket can close it: then nothing comes any more
            assert b.of(Fenced) == [Fenced("far", True)]
        elif name == "nccl":  # who receives can end that, but not at once: its owner process has to end
            assert b.of(Fenced) == [Fenced("far", False)]
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
            if "port" in fields
            else (socket.AF_UNIX, "\0" + fields.get("path", ""))
        )
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n" * 4,
            b"\1" + b"\0" * 15,
            b"\3\0\0\0\xff\xff\xff\xff" + b"\0" * 8,
            hello_frame(b"[" * 60_000),
            hello_frame(
                b'{"transport": "%s", "version": 2, "incarnation": "x", "token": "\\ud800"}'
                % name.split(maxsplit=1)[0].encode()
            ),
            hello_frame(
                b'{"transport": "%s", "version": 2, "incarnation": "\\ud800", "token": ""}'
                % name.split(maxsplit=1)[0].encode()
            ),
        ):
            with socket.socket(kind, socket.SOCK_STREAM) as stranger:
                stranger.settimeout(PATIENCE_S)
                stranger.connect(address)
                stranger.sendall(noise)
                while stranger_reads(stranger):
                    pass
        a.write("b", [(0, 0, 8)], b"still here")
        b.until(lambda: b.tags() == [b"still here"], a)

    def test_connected_and_idle_its_thread_sleeps(self, make: Any, name: str) -> None:
        a, b = joined(make, name)
        a.write("b", [(0, 0, SIZE)], b"all")
        b.until(lambda: b.tags() == [b"all"], a)
        media: list[Medium] = [end.transport._medium for end in (a, b)]  # type: ignore[attr-defined]
        a.until(lambda: all(medium.poll_in_s is None for medium in media), b)

    def test_a_crash_of_its_thread_is_told_to_who_polls(self, make: Any, name: str) -> None:
        """Else its owner waits for events that nobody makes."""
        a, b = joined(make, name)
        a.write("b", [(0, 0, 8)], b"connected")
        b.until(lambda: b.tags() == [b"connected"], a)

        def crash() -> None:
            raise RuntimeError("a mistake of its own")

        a.transport._thread.post(crash)  # type: ignore[attr-defined]
        with pytest.raises(
            InternalError, match=f"transport {name.split(maxsplit=1)[0]} crashed: .*a mistake of its own"
        ):
            a.until(lambda: False)
        b.until(lambda: bool(b.of(PeerDown)))


def hello_frame(body: bytes) -> bytes:
    return HEADER.pack(Kind.HELLO, len(body), 0) + body


def stranger_reads(sock: Any) -> bytes:
    try:
        data: bytes = sock.recv(4096)
    except ConnectionError:
        return b""
    return data
