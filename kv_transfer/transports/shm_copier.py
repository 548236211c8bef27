"""The thread that copies for shm: the transport's own thread talks to peers meanwhile. Knows arrays and
segments; no peers, no connections."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import InternalError
from .socket_peer import Job, Peer

SLICE_BYTES = 4 * 1024 * 1024
"""Copied before other peers get their turn, and before a copy that was given up ends."""


@dataclass(slots=True, eq=False, kw_only=True)
class Copy:
    """A job in progress."""

    peer: Peer
    job: Job
    sources: list[NDArray[np.uint8]]
    targets: list[NDArray[np.uint8]]
    """The regions, ours and the peer's; alive as long as somebody may copy between them."""
    segments: list[list[int]]
    void: bool = False
    """Given up: no further slice of it is copied."""
    next_segment: int = 0
    offset: int = 0
    """Bytes of that segment that are done."""

    def advance(self, num_bytes: int) -> bool:
        """Copies about so many bytes; True when none are left. numpy lets go of the interpreter lock."""
        left, i, done = num_bytes, self.next_segment, self.offset
        sources, targets, segments = self.sources, self.targets, self.segments
        while i < len(segments) and left > 0:
            region, begin, target, target_begin, length = segments[i]
            if done or length > left:
                begin, target_begin, length = begin + done, target_begin + done, min(length - done, left)
                done += length
            targets[target][target_begin : target_begin + length] = sources[region][begin : begin + length]
            left -= length
            if done in (0, segments[i][4]):
                i, done = i + 1, 0
        self.next_segment, self.offset = i, done
        return i == len(segments)


Lane = deque[Copy]
"""Copies of one peer, in order."""


class Copier:
    """Used from one thread; `stir`, which says that finished() has something, is called from its own."""

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir
        self._turns: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        """A lane stands here once for each of its copies, so that lanes take turns by the slice."""
        self._finished: deque[Copy] = deque()
        self._thread: threading.Thread | None = None
        self._crash: Exception | None = None

    def submit(self, lane: Lane, copy: Copy) -> None:
        """Lanes go side by side, the copies of one lane one after the other."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-shm-copies", daemon=True)
            self._thread.start()
        lane.append(copy)
        self._turns.put(lane)

    @property
    def has_finished(self) -> bool:
        return bool(self._finished) or self._crash is not None

    def finished(self) -> list[Copy]:
        """Copies that are over, void ones too: nothing of them is read or written any more.

        Raises:
            InternalError: the thread has crashed.
        """
        if self._crash is not None:
            raise InternalError(f"the thread that copies for shm crashed: {self._crash!r}")
        copies = []
        while self._finished:
            copies.append(self._finished.popleft())
        return copies

    def close(self) -> None:
        """Ends the thread, after the copies that are not void. Blocks. Idempotent."""
        if self._thread is not None:
            self._turns.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        closing = False
        try:
            while not (closing and self._turns.empty()):
                lane = self._turns.get()
                if lane is None:
                    closing = True
                elif lane[0].void or lane[0].advance(SLICE_BYTES):
                    self._finished.append(lane.popleft())
                    self._stir()
                else:
                    self._turns.put(lane)
        except Exception as error:  # the top of this thread: nobody above it could know
            self._crash = error
            self._stir()
