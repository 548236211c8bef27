"""NCCL without a GPU: memory is memfds, a communicator a unix socket. Loaded by owner processes, by name."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import struct
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from diphase.kv_transfer.transports.nccl_owner import UNIQUE_ID_BYTES
from diphase.proto.errors import PeerLost, TransferError

HANDLE = struct.Struct("<qq")
"""A process and the number of a memfd there."""


def map_region(handle: bytes, num_bytes: int) -> mmap.mmap:
    """The memfd of another process, by its process and number."""
    pid, number = HANDLE.unpack(handle)
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    except OSError as error:
        raise TransferError(f"the peer's memory cannot be mapped: {error}") from error
    try:
        return mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)


@dataclass(eq=False)
class _Posted:
    runs: Sequence[tuple[int, int, int]]
    done: threading.Event = field(default_factory=threading.Event)


class HostCommunicator:
    """See nccl_owner.Communicator: bytes go over a unix socket, as they are posted."""

    def __init__(self) -> None:
        self._regions: list[memoryview] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._rank = 0
        self._queue: queue.SimpleQueue[_Posted] = queue.SimpleQueue()
        self._error: str | None = None

    def map(self, handle: bytes, num_bytes: int) -> None:
        self._regions.append(memoryview(map_region(handle, num_bytes)))

    def name(self) -> bytes:
        name = b"\0host-communicator-" + uuid.uuid4().hex.encode()
        self._listener.bind(name)
        self._listener.listen(1)
        return name.ljust(UNIQUE_ID_BYTES, b"\1")

    def open(self, unique_id: bytes, rank: int) -> None:
        self._rank = rank
        try:
            if rank == 1:
                self._sock, _ = self._listener.accept()
            else:
                self._sock.connect(unique_id.rstrip(b"\1"))
        except OSError as error:
            raise PeerLost(f"the other end of the communicator failed: {error}") from error
        threading.Thread(target=self._run, daemon=True).start()

    def move(self, runs: Sequence[tuple[int, int, int]]) -> object:
        posted = _Posted(runs)
        self._queue.put(posted)
        return posted

    def passed(self, posted: object) -> bool:
        assert isinstance(posted, _Posted)
        if self._error is not None:
            raise PeerLost(f"the other end of the communicator failed: {self._error}")
        return posted.done.is_set()

    def close(self) -> None:
        self._listener.close()
        self._sock.close()

    def _run(self) -> None:
        while True:
            posted = self._queue.get()
            sends, views = self._rank == 0, [self._regions[r][at : at + n] for r, at, n in posted.runs]
            if not views:
                sends, views = not sends, [memoryview(bytearray(1))]
            try:
                for view in views:
                    self._move(sends, view)
            except OSError as error:
                self._error = str(error)
                return
            posted.done.set()

    def _move(self, sends: bool, view: memoryview) -> None:
        if sends:
            self._sock.sendall(view)
            return
        while view:
            count = self._sock.recv_into(view)
            if count == 0:
                raise ConnectionResetError("it has ended")
            view = view[count:]


class HangsInOpen(HostCommunicator):
    """The library never finds the other end."""

    def open(self, unique_id: bytes, rank: int) -> None:
        signal.pause()


class HangsInClose(HostCommunicator):
    """The library's abort never returns."""

    def close(self) -> None:
        signal.pause()


class BreaksAtTheThird(HostCommunicator):
    """The link between the two fails when the third transfer is posted."""

    def __init__(self) -> None:
        super().__init__()
        self._num_posted = 0

    def move(self, runs: Sequence[tuple[int, int, int]]) -> object:
        self._num_posted += 1
        if self._num_posted == 3:
            raise PeerLost("the other end of the communicator failed: a cable was pulled")
        return super().move(runs)


class CannotStart(HostCommunicator):
    """The library is not usable in the owner."""

    def __init__(self) -> None:
        raise TransferError("there is no library here")
