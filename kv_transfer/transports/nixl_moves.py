"""Jobs on their way through NIXL to one peer: posted a slice at a time, ended in the order in which they
began. Knows agents and addresses; no connections."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from .nixl_agent import NixlAgent
from .nixl_slices import Bases, Slice, cut, describe, overlap, spans
from .socket_peer import ID, Job

SLICE_BYTES = 32 * 1024 * 1024
"""Posted at a time: over some lanes the bytes are copied before the post returns, and nothing else happens on
this thread meanwhile. Copies of this size push Python out of the caches; more and shorter ones cost more."""
SLICE_ROWS = 2048
MAX_SLICES = 8
"""In flight to a peer."""


@dataclass(slots=True, eq=False)
class Move:
    """A job in progress."""

    job: Job
    slices: deque[Slice]
    """Not posted."""
    spans: list[NDArray[np.int64]]
    """What it writes."""
    behind: list[Move] = field(default_factory=list)
    """Those that must be over before."""
    void: bool = False
    """Failed or cancelled: it ends without a notification and a COMMIT."""
    handles: list[Any] = field(default_factory=list)
    """In flight."""

    @property
    def over(self) -> bool:
        return not self.slices and not self.handles

    def meets(self, other: Move) -> bool:
        """Whether both write the same byte."""
        return any(overlap(one, two) for one in self.spans for two in other.spans)


class Moves:
    """What is on its way to the agent `name`."""

    def __init__(self, agent: NixlAgent, name: str, here: Bases, there: Bases) -> None:
        self.name = name
        self.failure: str | None = None
        """Why nothing goes any more."""
        self.told = False
        """Whether the lanes that UCX has chosen were logged."""
        self._agent = agent
        self._here = here
        self._there = there
        self._queue: deque[Move] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, job: Job) -> None:
        whole = describe(job.segments, self._here, self._there, SLICE_BYTES)
        parts = [part for each in whole for part in cut(each, SLICE_BYTES, SLICE_ROWS)]
        move = Move(job, deque(parts), [spans(each.remote) for each in whole])
        # Lanes overtake each other: what writes the same bytes goes after.
        move.behind = [other for other in self._queue if move.meets(other)]
        self._queue.append(move)

    def abandon(self, job: Job) -> bool:
        """Posts nothing more of a job; returns whether it had not ended yet."""
        for move in self._queue:
            if move.job is job:
                move.void = True
                move.slices.clear()
                return True
        return False

    @property
    def settled(self) -> bool:
        """Whether nothing of an abandoned job is in flight."""
        return not any(move.void for move in self._queue)

    def work(self) -> tuple[list[Move], bool]:
        """Looks what has arrived and posts more. Returns the moves that ended, in order, and whether anything
        went on."""
        moving = False
        for move in self._queue:
            moving = self._look(move) or moving
        ended = []
        while self._queue and self._queue[0].over:
            move = self._queue.popleft()
            if move.job.num_bytes and not move.void:
                move.void = not self._notify(move.job)
            ended.append(move)
        if ended:  # whose COMMITs need not wait for the next post
            return ended, True
        return ended, self._post() or moving

    def _look(self, move: Move) -> bool:
        before = len(move.handles)
        for handle in list(move.handles):
            try:
                if self._agent.done(handle):
                    move.handles.remove(handle)
            except TransferError as error:
                move.handles.remove(handle)
                self._fail(error)
        return len(move.handles) < before

    def _post(self) -> bool:
        """Slices up to SLICE_BYTES together, so that what has arrived is looked at between them."""
        posted = 0
        room = MAX_SLICES - sum(len(move.handles) for move in self._queue)
        for move in self._queue:
            if any(not other.over for other in move.behind):
                break
            move.behind.clear()
            while move.slices and room and posted < SLICE_BYTES:
                part = move.slices.popleft()
                try:
                    move.handles.append(self._agent.write(part.kinds, part.local, part.remote, self.name))
                except TransferError as error:
                    self._fail(error)
                room -= 1
                posted += part.num_bytes
            if not room or posted >= SLICE_BYTES:
                break
        return posted > 0

    def _notify(self, job: Job) -> bool:
        try:
            self._agent.notify(self.name, ID.pack(job.transfer_id))
        except TransferError as error:
            self._fail(error)
        return self.failure is None

    def _fail(self, error: TransferError) -> None:
        """One has failed: the connection is worthless, NIXL makes no other."""
        self.failure = self.failure or error.message
        for move in self._queue:
            move.void = True
            move.slices.clear()
