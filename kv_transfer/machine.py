"""What both state machines of the hand-off share: events, actions, and the form of a transition table.

A machine is a frozen value; `look_up(table, machine, event, now)` looks the cell (state, kind of event) up in
its table and returns the next value and a tuple of actions for the driver. No I/O, no clock, no blocks, no
bytes. Every cell is a handler or a `Refusal` that says why nothing happens there; docs/handoff.md prints the
tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Computed:
    """The KV of the first `num_tokens` tokens is there for these layers."""

    num_tokens: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Seeded:
    """The prompt is computed and the first token sampled."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The owner wants it over."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class RoomFound:
    """Blocks were allocated; the leading `first_block` blocks were in the prefix cache."""

    first_block: int


# From the other side, over the control link:


@dataclass(frozen=True, slots=True)
class PeerReserved:
    """The reservation was asked for again."""


@dataclass(frozen=True, slots=True)
class PeerGranted:
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PeerQueued:
    lease_s: float


@dataclass(frozen=True, slots=True)
class PeerRefused:
    fault: Fault


@dataclass(frozen=True, slots=True)
class PeerProgressed:
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PeerCompleted:
    num_parts: int
    recompute: bool = False
    """No KV comes."""


@dataclass(frozen=True, slots=True)
class PeerVerified:
    pass


@dataclass(frozen=True, slots=True)
class PeerAborted:
    """The prefill side's means: every write of this hand-off is cancelled, and none will start."""

    fault: Fault


# From the transport and the byte worker:


@dataclass(frozen=True, slots=True)
class WriteEnded:
    part: int
    fault: Fault | None


@dataclass(frozen=True, slots=True)
class PartArrived:
    part: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class PartChecked:
    part: int
    intact: bool


@dataclass(frozen=True, slots=True)
class FenceEnded:
    ok: bool


@dataclass(frozen=True, slots=True)
class LinkLost:
    """No more messages come or go; the other process may still live and write."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Nothing of that process can touch this one's memory any more."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


# Actions. Messages to the other side:


@dataclass(frozen=True, slots=True)
class SendProgress:
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SendComplete:
    num_parts: int


@dataclass(frozen=True, slots=True)
class SendGranted:
    pass


@dataclass(frozen=True, slots=True)
class SendQueued:
    pass


@dataclass(frozen=True, slots=True)
class SendVerified:
    pass


@dataclass(frozen=True, slots=True)
class SendAbort:
    fault: Fault


# To the transport and the byte worker:


@dataclass(frozen=True, slots=True)
class Push:
    part: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class CancelWrites:
    pass


@dataclass(frozen=True, slots=True)
class StartFence:
    pass


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The fence did not hold in time: only the end of the connection makes sure."""


@dataclass(frozen=True, slots=True)
class Check:
    part: int


# To the owner and its blocks:


@dataclass(frozen=True, slots=True)
class Release:
    """The hand-off's references to its blocks are given back."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    pass


@dataclass(frozen=True, slots=True)
class Lift:
    pass


@dataclass(frozen=True, slots=True)
class Report:
    """How it ended; None: well."""

    fault: Fault | None


@dataclass(frozen=True, slots=True)
class Refuse:
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


def link_moved(machine: Any, now: float) -> Any:
    """The machine, of either side, when anything of its link has moved: the writes of many hand-offs queue
    there, and the last one is not stuck while the first ones go."""
    return replace(machine, moved_at=now)
