"""The parent's end of an owner process (nccl_owner.py): starts it, speaks to it, kills it. Knows no peers."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import DiphaseError, InternalError, PeerLost, from_wire
from .framing import Connection, FrameError
from .nccl_owner import ID, OPEN, REGION, UNIQUE_ID_BYTES, Word

_OWNER = "diphase.kv_transfer.transports.nccl_owner"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Named:
    unique_id: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """The other end has joined."""


@dataclass(frozen=True, slots=True)
class Passed:
    transfer_id: int


Told = Named | Opened | Passed


class OwnerProcess:
    """One owner. No method blocks."""

    def __init__(self, communicator: str) -> None:
        """`communicator` is the "module:Class" that the owner makes.

        Raises:
            OSError: no process or socket can be made.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # It outlives neither this thread (PR_SET_PDEATHSIG) nor a parent that closes `ours`.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _OWNER, str(theirs.fileno()), str(os.getpid()), communicator],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints is no output of ours
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours)
        self._told: list[Told] = []
        self._last: DiphaseError | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone, and with it everything that it had posted."""
        return self._process.poll() is not None

    def open(self, rank: int, regions: Sequence[tuple[bytes, int]], unique_id: bytes = b"") -> None:
        """`regions` are handles and sizes. Rank 1 says Named first; both say Opened in the end."""
        body = bytearray(OPEN.pack(rank, len(regions)))
        for handle, num_bytes in regions:
            body += REGION.pack(num_bytes, len(handle)) + handle
        self._say(Word.OPEN, bytes(body + unique_id))

    def move(self, transfer_id: int, runs: NDArray[np.int64]) -> None:
        """Posts `runs`, int64 [n, 3]: region, offset, length."""
        self._say(Word.MOVE, ID.pack(transfer_id) + np.ascontiguousarray(runs).tobytes())

    def close(self) -> None:
        """Asks it to end by itself, which it may be unable to do."""
        if not self._closing:
            self._closing = True
            try:
                self._say(Word.CLOSE)
            except DiphaseError as error:
                _log.debug("owner_gone pid=%d why=%r", self.pid, error.message)

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        if not self.ended:
            self._process.kill()

    def wait(self) -> None:
        """Returns when it has ended. Blocks."""
        self._process.wait()

    def release(self) -> None:
        """Closes the socket, once the process has ended."""
        self.connection.close()

    def read(self) -> list[Told]:
        """What it has said since; an error only when there is nothing else left.

        Raises:
            DiphaseError: it says that the communicator is broken, or has ended (PeerLost: the pair is lost,
                whoever was at fault).
        """
        if self._last is None:
            self._last = self._read()
        told, self._told = self._told, []
        if self._last is not None and not told:
            raise self._last
        return told

    def _read(self) -> DiphaseError | None:
        """What ended it, once something has."""
        try:
            self.connection.read(self)
        except DiphaseError as error:
            return error
        except FrameError as error:
            return InternalError(f"the owner process talks nonsense: {error}")
        except (OSError, EOFError):
            return PeerLost(f"the process that owns the communicator ended (pid {self.pid})")
        return None

    def flush(self) -> None:
        """
        Raises:
            DiphaseError: as read().
        """
        try:
            self.connection.flush()
        except OSError:
            if self._last is None:
                self._last = self._read()  # its last words say why
            raise self._last or PeerLost(f"owner process {self.pid} takes no more") from None

    def place(self, kind: int, body: bytearray, bulk_bytes: int) -> Iterable[memoryview]:
        """See framing.FrameSink."""
        raise FrameError(f"a word of kind {kind} brings bulk")

    def frame(self, kind: int, body: bytearray) -> bool:
        """See framing.FrameSink."""
        if kind == Word.NAMED and len(body) == UNIQUE_ID_BYTES:
            self._told.append(Named(bytes(body)))
        elif kind == Word.OPENED:
            self._told.append(Opened())
        elif kind == Word.PASSED and len(body) == ID.size:
            self._told.append(Passed(*ID.unpack(body)))
        elif kind == Word.BROKEN:
            code, _, message = bytes(body).partition(b"\0")
            raise from_wire(code.decode(errors="replace"), message.decode(errors="replace"))
        else:
            raise FrameError(f"a word of kind {kind} and {len(body)} bytes")
        return True

    def _say(self, word: Word, body: bytes = b"") -> None:
        self.connection.queue(word, body)
        self.flush()
