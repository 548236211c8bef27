"""What the thread of a socket transport knows of a peer, and the frames between the two."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ..base import Segments
from .framing import Connection

ID = struct.Struct("<Q")
WRITE_HEAD = struct.Struct("<QQ")
"""Transfer id and on how many lanes its bytes come."""


class Kind(IntEnum):
    """Frames. The first six go from writer to destination, the others back."""

    HELLO = 1
    WRITE = 2
    """WRITE_HEAD and table of destinations; the bulk is the data, or this lane's stripe of it. Without bulk
    the data comes another way."""
    COMMIT = 3
    """Transfer id and tag: the bytes precede this on the lane, or come another way. Id 0 wants no
    acknowledgement. On further lanes without a tag: the stripe is whole."""
    FENCED = 4
    """Number of the fence, on every lane."""
    CANCEL = 5
    """Transfer id: if its COMMIT came, it waits in vain."""
    WELCOME = 16
    REFUSED = 17
    """Why, in UTF-8."""
    ACK = 18
    """Transfer ids."""
    FENCE = 19
    """Number of the fence."""


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One write, or one notice (id 0)."""

    transfer_id: int
    peer: str
    segments: Segments
    """Coalesced: none is empty, none continues the one before."""
    num_bytes: int
    tag: bytes
    deadline: float


@dataclass(slots=True, eq=False, kw_only=True)
class Fence:
    """Asked by us and not answered."""

    number: int
    missing: set[int]
    """Lanes on which the peer has not answered."""


@dataclass(slots=True, eq=False, kw_only=True)
class Peer:
    """One incarnation."""

    incarnation: str
    admitted: bool = False
    endpoint: dict[str, Any] = field(default_factory=dict)
    """Where it was dialled."""
    writers: list[Connection] = field(default_factory=list)
    """Connections that we dialled, by lane."""
    joined: int = 0
    """Of them, how many the peer has welcomed."""
    session: str = ""
    """What our further lanes must know: from the WELCOME of the first."""
    readers: dict[int, Connection] = field(default_factory=dict)
    """Connections that it dialled, by lane."""
    reader_lanes: int = 0
    """How many it has announced."""
    reader_session: str = ""
    """What its further lanes must know."""
    is_answered: bool = False
    """Whether it was told WELCOME."""
    waiting: deque[Job] = field(default_factory=deque)
    """Not begun."""
    unacknowledged: dict[int, Job] = field(default_factory=dict)
    """Begun, not terminal."""
    commits: deque[tuple[int, bytes]] = field(default_factory=deque)
    """Transfer id and tag of COMMITs that came before their bytes, or that nobody has room for."""
    fences: deque[Fence] = field(default_factory=deque)
    """Ours."""
    questions: deque[int] = field(default_factory=deque)
    """Its fences that we have not answered."""
    failure: str | None = None
    """Why the medium can do no more for it: work() has returned it, and it is dropped for that."""
    down: str | None = None
    """Why it is being dropped, once it is."""
    attachment: Any = None
    """What the medium keeps for writing to it."""
    inbox: Any = None
    """What the medium keeps of what comes from it."""

    @property
    def writer(self) -> Connection | None:
        """The connection with the commits of what we write."""
        return self.writers[0] if self.writers else None

    @property
    def reader(self) -> Connection | None:
        """The connection with the commits of what it writes."""
        return self.readers.get(0)


def commit(peer: Peer, job: Job) -> None:
    """Tells the other end that a job's bytes are there, or precede this, or will be where landed() looks."""
    if peer.writers:
        peer.writers[0].queue(Kind.COMMIT, ID.pack(job.transfer_id) + job.tag, owner=job)


def withdraw(peer: Peer, job: Job) -> None:
    """Takes the COMMIT of a job back whose bytes will never all land; else those behind it would wait for
    ever. Where it may have been sent: else retract() is enough."""
    if peer.writers:
        peer.writers[0].queue(Kind.CANCEL, ID.pack(job.transfer_id))


def announce(peer: Peer, job: Job) -> None:
    """Tells the other end that a job has begun whose bytes come another way than over the connections."""
    if peer.writers:
        head = WRITE_HEAD.pack(job.transfer_id, 1)
        peer.writers[0].queue(Kind.WRITE, head + job.segments[:, 2:5].tobytes(), owner=job)
