"""What both state machines of the hand-off share: events, actions, and the form of a transition table.

A machine is a frozen value; `look_up(table, machine, event, now)` looks the cell (state, kind of event) up in
its table and returns the next value and a tuple of actions for the driver. No I/O, no clock, no blocks, no
bytes. Every cell is a handler or a `Refusal` that says why nothing happens there; docs/handoff.md prints the
tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..proto.errors import DiphaseError, from_wire
from .config import KvTransferConfig


class Fault(NamedTuple):
    """An error as data: a code of proto/errors.py and a sentence."""

    code: str
    message: str

    @classmethod
    def of(cls, error: DiphaseError) -> Fault:
        return cls(error.code, error.message)

    def error(self) -> DiphaseError:
        return from_wire(self.code, self.message)


CANCELLED = "cancelled"
"""Code of an end that is nobody's failure: the client went away, or the first token ended the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The deadlines of KvTransferConfig, seconds."""

    reserve_timeout_s: float
    lease_s: float
    progress_timeout_s: float
    tail_timeout_s: float

    @classmethod
    def of(cls, config: KvTransferConfig) -> Timing:
        return cls(
            reserve_timeout_s=config.reserve_timeout_s,
            lease_s=config.lease_s,
            progress_timeout_s=config.progress_timeout_s,
            tail_timeout_s=config.tail_timeout_s,
        )


# Events. From the owner of this side:


class Computed(NamedTuple):
    """The KV of the first `num_tokens` tokens is there for these layers."""

    num_tokens: int
    first_layer: int
    num_layers: int


class Seeded(NamedTuple):
    """The prompt is computed and the first token sampled."""


class Ended(NamedTuple):
    """The owner wants it over."""

    fault: Fault


class RoomFound(NamedTuple):
    """Blocks were allocated; the leading `first_block` blocks were in the prefix cache."""

    first_block: int


# From the other side, over the control link:


class PeerReserved(NamedTuple):
    """The reservation was asked for again."""


class PeerGranted(NamedTuple):
    first_block: int
    num_blocks: int


class PeerQueued(NamedTuple):
    lease_s: float


class PeerRefused(NamedTuple):
    fault: Fault


class PeerProgressed(NamedTuple):
    num_tokens: int


class PeerCompleted(NamedTuple):
    num_parts: int


class PeerVerified(NamedTuple):
    pass


class PeerAborted(NamedTuple):
    """The prefill side's means: every write of this hand-off is cancelled, and none will start."""

    fault: Fault


# From the transport and the digest worker:


class WriteEnded(NamedTuple):
    part: int
    fault: Fault | None


class PartArrived(NamedTuple):
    part: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


class PartChecked(NamedTuple):
    part: int
    intact: bool


class FenceEnded(NamedTuple):
    ok: bool


class LinkLost(NamedTuple):
    """No more messages come or go; the other process may still live and write."""

    fault: Fault


class PeerGone(NamedTuple):
    """Nothing of that process can touch this one's memory any more."""

    fault: Fault


class Tick(NamedTuple):
    """Time has passed."""


# Actions. Messages to the other side:


class SendProgress(NamedTuple):
    num_tokens: int


class SendComplete(NamedTuple):
    num_parts: int


class SendGranted(NamedTuple):
    pass


class SendQueued(NamedTuple):
    pass


class SendVerified(NamedTuple):
    pass


class SendAbort(NamedTuple):
    fault: Fault


# To the transport and the digest worker:


class Push(NamedTuple):
    part: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


class CancelWrites(NamedTuple):
    pass


class StartFence(NamedTuple):
    pass


class Disconnect(NamedTuple):
    """The fence did not hold in time: only the end of the connection makes sure."""


class Check(NamedTuple):
    part: int


# To the owner and its blocks:


class Release(NamedTuple):
    """The hand-off's references to its blocks are given back."""


class Quarantine(NamedTuple):
    pass


class Lift(NamedTuple):
    pass


class Report(NamedTuple):
    """How it ended; None: well."""

    fault: Fault | None


class Refuse(NamedTuple):
    """Nothing happens, and it is counted."""

    reason: str


class Refusal(NamedTuple):
    """A cell of a table in which nothing happens. `counted` is False where that is the usual course of
    things."""

    reason: str
    counted: bool = True


Event = (
    Computed
    | Seeded
    | Ended
    | RoomFound
    | PeerReserved
    | PeerGranted
    | PeerQueued
    | PeerRefused
    | PeerProgressed
    | PeerCompleted
    | PeerVerified
    | PeerAborted
    | WriteEnded
    | PartArrived
    | PartChecked
    | FenceEnded
    | LinkLost
    | PeerGone
    | Tick
)
Action = (
    SendProgress
    | SendComplete
    | SendGranted
    | SendQueued
    | SendVerified
    | SendAbort
    | Push
    | CancelWrites
    | StartFence
    | Disconnect
    | Check
    | Release
    | Quarantine
    | Lift
    | Report
    | Refuse
)
Actions = tuple[Action, ...]
Cell = Callable[[Any, Any, float], tuple[Any, Actions]] | Refusal
Table = Mapping[Any, Mapping[type, Cell]]
"""State -> kind of event -> cell."""

STALE = Refusal("stale")
STRAY = Refusal("stray")
REPEATED = Refusal("repeated")
IDLE = Refusal("idle", counted=False)


def look_up(table: Table, machine: Any, event: Event, now: float) -> tuple[Any, Actions]:
    """The next machine and what is to be done, in this order. Pure."""
    cell = table[machine.state][type(event)]
    if isinstance(cell, Refusal):
        return machine, (Refuse(cell.reason),) if cell.counted else ()
    return cell(machine, event, now)
