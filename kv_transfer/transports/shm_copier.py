"""The threads that copy for shm: the transport's own thread talks to peers meanwhile. Knows no
connections and no memory (shm_slices.py)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...proto.errors import InternalError
from .shm_slices import Slice
from .socket_peer import Job, Peer

THREADS = 2
"""While one waits for the interpreter lock between two calls, the other one copies."""


@dataclass(slots=True, eq=False, kw_only=True)
class Copy:
    """A job in progress."""

    peer: Peer
    job: Job
    slices: Iterator[Slice]
    """Not taken; they hold the arrays, alive as long as somebody may copy between them."""
    left: int
    """Bytes of them."""
    void: bool = False
    """Given up: no further slice of it is copied."""
    in_hand: int = 0
    """Slices that are being copied."""

    @property
    def is_taken(self) -> bool:
        """Whether no slice of it is left to take."""
        return self.void or not self.left

    @property
    def is_ready(self) -> bool:
        """Whether a slice may be taken now; that of a copy that was given up is empty."""
        return not (self.is_taken and self.in_hand)

    def take(self) -> Callable[[], None]:
        """What copies the next slice."""
        if self.is_taken:
            return _nothing
        num_bytes, put = next(self.slices)
        self.left -= num_bytes
        return put


@dataclass(slots=True, eq=False)
class Lane:
    """Copies of one peer. They go one after the other: a later one may write the same bytes."""

    copies: deque[Copy] = field(default_factory=deque)


class Copier:
    """Used from one thread; `stir`, which says that finished() has something, is called from others."""

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir
        self._changed = threading.Condition()
        self._lanes: deque[Lane] = deque()
        """Those with copies; they take turns by the slice."""
        self._finished: deque[Copy] = deque()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._crash: Exception | None = None

    def submit(self, lane: Lane, copy: Copy) -> None:
        """Lanes go side by side, the copies of one lane one after the other."""
        while len(self._threads) < THREADS:
            thread = threading.Thread(target=self._run, name="kv-shm-copies", daemon=True)
            self._threads.append(thread)
            thread.start()
        with self._changed:
            lane.copies.append(copy)
            if len(lane.copies) == 1:
                self._lanes.append(lane)
            self._changed.notify_all()

    @property
    def has_finished(self) -> bool:
        return bool(self._finished) or self._crash is not None

    def finished(self) -> list[Copy]:
        """Copies that are over, void ones too: nothing of them is read or written any more.

        Raises:
            InternalError: a thread has crashed.
        """
        if self._crash is not None:
            raise InternalError(f"a thread that copies for shm crashed: {self._crash!r}")
        copies = []
        while self._finished:
            copies.append(self._finished.popleft())
        return copies

    def close(self) -> None:
        """Ends the threads, after the copies that are not void. Blocks. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                lane, copy, put = taken
                put()
                del taken, put  # with the arrays: a peer's memory is unmapped when its copies are over
                self._end(lane, copy)
        except Exception as error:  # the top of this thread: nobody above it could know
            with self._changed:
                self._crash = self._crash or error
                self._changed.notify_all()
            self._stir()

    def _take(self) -> tuple[Lane, Copy, Callable[[], None]] | None:
        """The next slice; None when there will be no more."""
        with self._changed:
            while self._crash is None:
                for _ in range(len(self._lanes)):
                    lane = self._lanes[0]
                    self._lanes.rotate(-1)
                    copy = lane.copies[0]
                    if copy.is_ready:
                        copy.in_hand += 1
                        try:
                            return lane, copy, copy.take()
                        except Exception as error:  # told before the other thread asks for the next slice
                            self._crash = error
                            raise
                if self._closing and not self._lanes:
                    return None
                self._changed.wait()
            return None

    def _end(self, lane: Lane, copy: Copy) -> None:
        with self._changed:
            copy.in_hand -= 1
            if copy.in_hand or not copy.is_taken:
                return
            lane.copies.popleft()
            copy.slices = iter(())
            if not lane.copies:
                self._lanes.remove(lane)
            self._finished.append(copy)
            self._changed.notify_all()
        self._stir()


def _nothing() -> None:
    """Copies no byte."""
