"""The process that owns one communicator: it maps the pool, joins the other end and posts what its parent
says, in that order. Whatever can hang in the library hangs here, where a signal ends it. Knows no peers, no
tags and no deadlines; those are its parent's (nccl_process.py).

Run as `python -m diphase.kv_transfer.transports.nccl_owner FD PARENT_PID MODULE:CLASS`; FD is a stream
socket to the parent. The frames are those of framing.py; nothing that comes is unpickled or evaluated.
"""

from __future__ import annotations

import importlib
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NoReturn, Protocol

from ...proto.errors import DiphaseError, InternalError
from ...proto.parent_death import end_with
from .framing import Connection, FrameError

UNIQUE_ID_BYTES = 128
ID = struct.Struct("<Q")
OPEN = struct.Struct("<BI")
"""Rank, number of regions."""
REGION = struct.Struct("<QI")
"""Bytes of the region, bytes of its handle, which follows."""
RUN = struct.Struct("<qqq")
"""Region, offset, length."""
POLL_S = 50e-6
"""How often what was posted is looked at; the only sign of its end is on the device."""


class Word(IntEnum):
    """Frames: the first three go to the owner, the others to the parent."""

    OPEN = 1
    """Rank, regions, and the unique id; rank 1 gets none, makes one and says it."""
    MOVE = 2
    """Transfer id and runs: rank 0 sends them, rank 1 receives them."""
    CLOSE = 3
    NAMED = 16
    """The unique id."""
    OPENED = 17
    PASSED = 18
    """Transfer id: its bytes have left (rank 0) or are there (rank 1)."""
    BROKEN = 19
    """A code of proto/errors.py, a zero byte, a sentence. The communicator is of no use any more."""


class Communicator(Protocol):
    """A pair of processes, one of which sends. Errors are those of proto/errors.py."""

    def map(self, handle: bytes, num_bytes: int) -> None:
        """Makes the next region of the parent addressable."""
        ...

    def name(self) -> bytes:
        """A new unique id, UNIQUE_ID_BYTES long."""
        ...

    def open(self, unique_id: bytes, rank: int) -> None:
        """Joins the other end. Blocks until it is there."""
        ...

    def move(self, runs: Sequence[tuple[int, int, int]]) -> object:
        """Posts (region, offset, length) in order; the other end posts as many of the same lengths. Returns
        what passed() takes."""
        ...

    def passed(self, posted: object) -> bool:
        """Whether all of it has moved."""
        ...

    def close(self) -> None:
        """Ends what is posted. May hang."""
        ...


class Owner:
    """Serves one parent until it says CLOSE or is gone."""

    def __init__(self, sock: socket.socket, communicator: Communicator) -> None:
        self._connection = Connection(sock)
        self._communicator = communicator
        self._posted: deque[tuple[int, object]] = deque()
        self._over = False

    def run(self) -> None:
        """Until CLOSE, an error or the parent's end."""
        try:
            while not self._over:
                self._wait()
                self._connection.read(self)
                self._report()
        except EOFError:
            return  # the parent has closed its end
        except DiphaseError as error:
            self._say_broken(error)
        except FrameError as error:
            self._say_broken(InternalError(f"the owner was told nonsense: {error}"))
        finally:
            self._communicator.close()

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        """See framing.FrameSink."""
        raise FrameError(f"a word of kind {kind} brings bulk")

    def frame(self, kind: int, body: bytearray) -> bool:
        """See framing.FrameSink."""
        if kind == Word.OPEN:
            self._open(bytes(body))
        elif kind == Word.MOVE:
            if len(body) < ID.size or (len(body) - ID.size) % RUN.size:
                raise FrameError(f"runs of {len(body)} bytes")
            runs = list(RUN.iter_unpack(memoryview(body)[ID.size :]))
            self._posted.append((ID.unpack_from(body)[0], self._communicator.move(runs)))
        elif kind == Word.CLOSE:
            self._over = True
        else:
            raise FrameError(f"a word of kind {kind}")
        return not self._over

    def _open(self, body: bytes) -> None:
        try:
            rank, num_regions = OPEN.unpack_from(body)
            offset, regions = OPEN.size, []
            for _ in range(num_regions):
                num_bytes, handle_bytes = REGION.unpack_from(body, offset)
                offset += REGION.size + handle_bytes
                regions.append((body[offset - handle_bytes : offset], num_bytes))
        except struct.error as error:
            raise FrameError(f"OPEN is cut short: {error}") from error
        unique_id = body[offset:]
        if rank == 1:  # first of all: the other end waits for it
            unique_id = self._communicator.name()
            self._say(Word.NAMED, unique_id)
        for handle, num_bytes in regions:
            self._communicator.map(handle, num_bytes)
        self._communicator.open(unique_id, rank)
        self._say(Word.OPENED)

    def _report(self) -> None:
        while self._posted and self._communicator.passed(self._posted[0][1]):
            self._say(Word.PASSED, ID.pack(self._posted.popleft()[0]))

    def _say(self, word: Word, body: bytes = b"") -> None:
        self._connection.queue(word, body)
        self._connection.flush()

    def _say_broken(self, error: DiphaseError) -> None:
        try:
            self._say(Word.BROKEN, error.code.encode() + b"\0" + error.message.encode())
        except OSError:
            return  # the parent is gone, and with it who would want to know

    def _wait(self) -> None:
        sock = self._connection.sock
        unsent = [] if self._connection.idle else [sock]
        select.select([sock], unsent, [], POLL_S if self._posted else None)
        self._connection.flush()


def load(name: str) -> Any:
    """The class that "module:Class" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(fd: str, parent: str, factory: str) -> NoReturn:
    end_with(int(parent))
    with socket.socket(fileno=int(fd)) as sock:
        owner_of = load(factory)
        try:
            communicator = owner_of()
        except DiphaseError as error:
            connection = Connection(sock)
            connection.queue(Word.BROKEN, error.code.encode() + b"\0" + error.message.encode())
            connection.flush()
            sys.exit(1)
        Owner(sock, communicator).run()
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
