"""What must hold of one step of a machine: docs/handoff.md, its states and its deadlines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from diphase.kv_transfer import machine as k

from .handoff_parts import FAILED, NOW_S, TIMING, Seat, Violation

DECIDED = ("settling", "quarantined", "fencing", "over")
GRANTED = ("reserved", "filling", "verifying")
NEWS: dict[type, tuple[str, ...]] = {
    k.RoomFound: ("reserved",),
    k.WriteEnded: ("sending", "sent"),
    k.PeerProgressed: ("filling",),
    k.PeerCompleted: ("verifying",),
    k.PartArrived: ("filling", "verifying"),
}
"""Events that give a machine which is then in one of these states a whole progress_timeout_s."""


def check_step(before: Seat, event: k.Event, after: Seat, actions: k.Actions) -> None:
    """Raises Violation unless the step is one that the page allows."""
    for what in (
        *wrong_once_decided(before, event, actions),
        *wrong_deadlines(event, after, actions),
        *wrong_writes(before, event, after, actions),
        *wrong_answers(before, event, after, actions),
    ):
        raise Violation(what)


def has(actions: k.Actions, kind: Any) -> bool:
    return any(isinstance(action, kind) for action in actions)


def wrong_once_decided(before: Seat, event: k.Event, actions: k.Actions) -> Iterator[str]:
    """The outcome is decided once."""
    if before.state in DECIDED and has(actions, k.Report):
        yield f"4: a report from {before.state}"
    if before.state in DECIDED and has(actions, k.Push | k.SendComplete | k.SendProgress | k.Check):
        yield f"4: {before.state}, and it goes on"
    if before.state == "sent" and has(actions, k.SendComplete):
        yield "4: Complete is said again, and the tail begins anew"
    quiet = (k.Refuse, k.SendAbort, k.CancelWrites)
    if before.state == "over" and not all(isinstance(action, quiet) for action in actions):
        yield "4: over, and it acts"
    asked = isinstance(event, k.PeerAborted | k.PeerReserved)
    again = before.state == "quarantined" and event == k.Tick()
    if before.state in DECIDED and not asked and not again and has(actions, k.SendAbort):
        yield f"4: an Abort that nobody waits for, from {before.state}"
    if before.state == "fencing" and k.StartFence() in actions and event != k.FenceEnded(False):
        yield "4: a second fence for the same writes"


def wrong_deadlines(event: k.Event, after: Seat, actions: k.Actions) -> Iterator[str]:
    new = after.machine
    if after.state in ("settling", "fencing", "over") and after.due < math.inf:
        yield f"4: what is {after.state} wants a Tick"
    if after.state in GRANTED and after.due > TIMING.progress_timeout_s:
        yield "4: decode waits for too long"
    if after.state == "verifying" and new.completed_at == math.inf:
        yield "4: the tail has no end"
    refused = has(actions, k.Refuse)
    if after.state in NEWS.get(type(event), ()) and not refused and new.moved_at != NOW_S:
        yield f"4: {type(event).__name__} gives no new time"


def wrong_writes(before: Seat, event: k.Event, after: Seat, actions: k.Actions) -> Iterator[str]:
    old, new = before.machine, after.machine
    if k.Disconnect() in actions and event != k.FenceEnded(False):
        yield "4: a connection is taken down though its fence holds"
    if after.state not in ("sending", "sent"):
        return
    begun = before.state not in ("sending", "sent")
    if begun and isinstance(event, k.PeerGranted) and event.first_block + event.num_blocks != new.num_blocks:
        yield "3: blocks are pushed for which there is no room"
    if not new.live:
        return
    if not old.live and new.moved_at != NOW_S:
        yield "4: a write does not get its whole time"
    if old.live and isinstance(event, k.Computed | k.Seeded) and new.moved_at > old.moved_at:
        yield "4: a push puts the deadline of the writes before it off"
    if after.due > new.moved_at + TIMING.progress_timeout_s - NOW_S:
        yield "4: a write is waited for too long"


def wrong_answers(before: Seat, event: k.Event, after: Seat, actions: k.Actions) -> Iterator[str]:
    if isinstance(event, k.PartArrived):
        again = event.part in before.machine.arrived
        if again and after is not before:
            yield "3: a repeated part does something"
    if isinstance(event, k.PeerAborted) and event.fault.code != k.CANCELLED:
        waited = before.state in ("waiting", *GRANTED)
        if waited and k.Report(FAILED) not in actions:
            yield "4: decode keeps a failure to itself"
