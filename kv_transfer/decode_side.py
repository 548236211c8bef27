"""The hand-off as the decode worker sees it: give room, verify every part, let nothing touch a block too
late.

Pure: see machine.py. A granted block leaves in one of two ways: to the taker once all is verified, or through
quarantine until the prefill side has said that it cancelled *and* the fence holds, or is provably gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from . import machine as k


class DecodeState(StrEnum):
    WAITING = "waiting"
    """No room yet."""
    RESERVED = "reserved"
    """Blocks are granted, nothing came."""
    FILLING = "filling"
    """The prompt computes or bytes arrive."""
    VERIFYING = "verifying"
    """Complete came; parts are on their way or in the byte worker."""
    QUARANTINED = "quarantined"
    """It failed; the prefill side has not said that it cancelled."""
    FENCING = "fencing"
    """It has; the fence says when nothing can arrive any more."""
    OVER = "over"


S = DecodeState


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """One hand-off on the decode side."""

    num_blocks: int
    num_layers: int
    timing: k.Timing
    state: DecodeState = S.WAITING
    first_block: int = 0
    """The blocks before it were cached and are not sent."""
    arrived: frozenset[int] = frozenset()
    checked: frozenset[int] = frozenset()
    covered: tuple[int, ...] = ()
    """For each layer the set of blocks that parts name, as the bits of an int."""
    num_parts: int | None = None
    recompute: bool = False
    """The taker computes the prompt itself: nothing has to be there."""
    moved_at: float = 0.0
    """When something was computed or arrived last."""
    completed_at: float = math.inf
    send_at: float = math.inf
    """When Queued, or an unanswered Abort, is sent again."""
    fault: k.Fault | None = None

    @property
    def due(self) -> float:
        """When a Tick would do something."""
        if self.state in (S.RESERVED, S.FILLING, S.VERIFYING):
            progress = self.moved_at + self.timing.progress_timeout_s
            return min(progress, self.completed_at + self.timing.tail_timeout_s)
        return self.send_at


def start_decode(*, num_blocks: int, num_layers: int, timing: k.Timing, now: float) -> Decode:
    """A reservation that has no room yet; RoomFound or a Tick (which sends Queued) follows at once."""
    return Decode(num_blocks=num_blocks, num_layers=num_layers, timing=timing, send_at=now)


def step_decode(m: Decode, event: k.Event, now: float) -> tuple[Decode, k.Actions]:
    """Pure; see machine.look_up."""
    result: tuple[Decode, k.Actions] = k.look_up(DECODE_TABLE, m, event, now)
    return result


Result = tuple[Decode, tuple[k.Action, ...]]


def _over(m: Decode) -> Decode:
    return replace(m, state=S.OVER, send_at=math.inf)


def _report(fault: k.Fault) -> tuple[k.Action, ...]:
    return () if fault.code == k.CANCELLED else (k.Report(fault),)


def _quarantine(m: Decode, fault: k.Fault, now: float) -> Result:
    """The writes may still run: keep the blocks, and ask for them to be cancelled until someone says so."""
    send_at = now + m.timing.progress_timeout_s / 2
    m = replace(m, state=S.QUARANTINED, send_at=send_at, fault=fault)
    return m, (k.Quarantine(), k.SendAbort(fault))


def _fail(m: Decode, fault: k.Fault, now: float) -> Result:
    m, actions = _quarantine(m, fault, now)
    return m, (*actions, k.Report(fault))


def _room_found(m: Decode, event: k.RoomFound, now: float) -> Result:
    blocks = (1 << event.first_block) - 1
    m = replace(
        m,
        state=S.RESERVED,
        first_block=event.first_block,
        covered=(blocks,) * m.num_layers,
        moved_at=now,
        send_at=math.inf,
    )
    return m, (k.SendGranted(),)


def _queue_again(m: Decode, event: k.PeerReserved, now: float) -> Result:
    return m, (k.SendQueued(),)


def _grant_again(m: Decode, event: k.PeerReserved, now: float) -> Result:
    return m, (k.SendGranted(),)


def _abort_again(m: Decode, event: k.PeerReserved, now: float) -> Result:
    return m, (k.SendAbort(m.fault or k.Fault(k.CANCELLED, "this hand-off is over")),)


def _progressed(m: Decode, event: k.PeerProgressed, now: float) -> Result:
    return replace(m, state=S.FILLING, moved_at=now), ()


def _completed(m: Decode, event: k.PeerCompleted, now: float) -> Result:
    stray = [part for part in m.arrived if part >= event.num_parts]
    if stray:
        return _fail(m, k.Fault("transfer", f"part {stray[0]} of {event.num_parts} parts arrived"), now)
    return _finish(
        replace(
            m,
            state=S.VERIFYING,
            num_parts=event.num_parts,
            recompute=event.recompute,
            moved_at=now,
            completed_at=now,
        ),
        now,
    )


def _arrived(m: Decode, event: k.PartArrived, now: float) -> Result:
    if event.part in m.arrived:
        return m, (k.Refuse(k.REPEATED.reason),)
    wrong = _wrong_range(m, event)
    if wrong:
        return _fail(m, k.Fault("transfer", f"part {event.part} {wrong}"), now)
    blocks = ((1 << event.num_blocks) - 1) << event.first_block
    layers = range(event.first_layer, event.first_layer + event.num_layers)
    if any(m.covered[layer] & blocks for layer in layers):
        return _fail(
            m, k.Fault("transfer", f"part {event.part} names bytes that another part has named"), now
        )
    m = replace(
        m,
        state=S.FILLING if m.state is S.RESERVED else m.state,
        arrived=m.arrived | {event.part},
        covered=tuple(have | blocks if layer in layers else have for layer, have in enumerate(m.covered)),
        moved_at=now,
    )
    return m, (k.Check(event.part),)


def _wrong_range(m: Decode, event: k.PartArrived) -> str | None:
    if m.num_parts is not None and not 0 <= event.part < m.num_parts:
        return f"is not one of {m.num_parts}"
    if event.num_blocks < 1 or not m.first_block <= event.first_block <= m.num_blocks - event.num_blocks:
        return f"names blocks outside of {m.first_block} to {m.num_blocks - 1}"
    if event.num_layers < 1 or not 0 <= event.first_layer <= m.num_layers - event.num_layers:
        return f"names layers outside of 0 to {m.num_layers - 1}"
    return None


def _checked(m: Decode, event: k.PartChecked, now: float) -> Result:
    if event.part not in m.arrived:
        return m, (k.Refuse(k.REPEATED.reason),)
    if not event.intact:
        return _fail(m, k.Fault("digest_mismatch", f"the bytes of part {event.part} are not those sent"), now)
    return _finish(replace(m, checked=m.checked | {event.part}), now)


def _finish(m: Decode, now: float) -> Result:
    """To the taker, if Complete came and every part is there and intact."""
    if m.num_parts is None or len(m.checked) < m.num_parts:
        return m, ()
    if not m.recompute and any(blocks != (1 << m.num_blocks) - 1 for blocks in m.covered):
        return _fail(m, k.Fault("transfer", f"{m.num_parts} parts do not cover the prompt"), now)
    return _over(m), (k.SendVerified(), k.Report(None))


def _end_waiting(m: Decode, event: k.Ended, now: float) -> Result:
    return _over(m), (k.SendAbort(event.fault),)


def _end(m: Decode, event: k.Ended, now: float) -> Result:
    return _quarantine(m, event.fault, now)


def _aborted_waiting(m: Decode, event: k.PeerAborted, now: float) -> Result:
    return _over(m), _report(event.fault)


def _aborted(m: Decode, event: k.PeerAborted, now: float) -> Result:
    m = replace(m, state=S.FENCING, fault=event.fault)
    return m, (k.Quarantine(), k.StartFence(), *_report(event.fault))


def _acknowledged(m: Decode, event: k.PeerAborted, now: float) -> Result:
    return replace(m, state=S.FENCING, send_at=math.inf), (k.StartFence(),)


def _fenced(m: Decode, event: k.FenceEnded, now: float) -> Result:
    return (_over(m), (k.Lift(),)) if event.ok else (m, (k.StartFence(),))


def _lost_waiting(m: Decode, event: k.LinkLost | k.PeerGone, now: float) -> Result:
    return _over(m), (k.Report(event.fault),)


def _lost(m: Decode, event: k.LinkLost, now: float) -> Result:
    return _fail(m, event.fault, now)


def _gone(m: Decode, event: k.PeerGone, now: float) -> Result:
    return _over(m), (k.Report(event.fault), k.Release())


def _lift(m: Decode, event: k.PeerGone, now: float) -> Result:
    return _over(m), (k.Lift(),)


def _tick_waiting(m: Decode, event: k.Tick, now: float) -> Result:
    return replace(m, send_at=now + m.timing.lease_s / 3), (k.SendQueued(),)


def _tick_granted(m: Decode, event: k.Tick, now: float) -> Result:
    if now < m.due:
        return m, ()
    if now >= m.completed_at + m.timing.tail_timeout_s:
        what = f"not everything arrived within {m.timing.tail_timeout_s:g} s of the last layer"
    else:
        what = f"nothing was computed or arrived for {m.timing.progress_timeout_s:g} s"
    return _fail(m, k.Fault("deadline_exceeded", what), now)


def _tick_quarantined(m: Decode, event: k.Tick, now: float) -> Result:
    m = replace(m, send_at=now + m.timing.progress_timeout_s / 2)
    return m, (k.SendAbort(m.fault or k.Fault(k.CANCELLED, "this hand-off is over")),)


DECODE_EVENTS: tuple[type, ...] = (
    k.RoomFound,
    k.PeerReserved,
    k.PeerProgressed,
    k.PeerCompleted,
    k.PeerAborted,
    k.PartArrived,
    k.PartChecked,
    k.Ended,
    k.FenceEnded,
    k.LinkLost,
    k.PeerGone,
    k.Tick,
)


def _row(**cells: Any) -> dict[type, Any]:
    """A row of the table in the order of its columns."""
    return {kind: cells[kind.__name__] for kind in DECODE_EVENTS}


_GRANTED = {
    "RoomFound": k.STRAY,
    "PeerReserved": _grant_again,
    "PeerAborted": _aborted,
    "PartArrived": _arrived,
    "PartChecked": _checked,
    "Ended": _end,
    "FenceEnded": k.STRAY,
    "LinkLost": _lost,
    "PeerGone": _gone,
    "Tick": _tick_granted,
}
_FAILED = {
    "RoomFound": k.STRAY,
    "PeerReserved": _abort_again,
    "PeerProgressed": k.STALE,
    "PeerCompleted": k.STALE,
    "PartArrived": k.STALE,
    "PartChecked": k.IDLE,
    "Ended": k.IDLE,
}

DECODE_TABLE: k.Table = {
    S.WAITING: _row(
        RoomFound=_room_found,
        PeerReserved=_queue_again,
        PeerProgressed=k.IDLE,
        PeerCompleted=k.STRAY,
        PeerAborted=_aborted_waiting,
        PartArrived=k.STRAY,
        PartChecked=k.STRAY,
        Ended=_end_waiting,
        FenceEnded=k.STRAY,
        LinkLost=_lost_waiting,
        PeerGone=_lost_waiting,
        Tick=_tick_waiting,
    ),
    S.RESERVED: _row(**_GRANTED, PeerProgressed=_progressed, PeerCompleted=_completed),
    S.FILLING: _row(**_GRANTED, PeerProgressed=_progressed, PeerCompleted=_completed),
    S.VERIFYING: _row(**_GRANTED, PeerProgressed=k.IDLE, PeerCompleted=k.REPEATED),
    S.QUARANTINED: _row(
        **_FAILED,
        PeerAborted=_acknowledged,
        FenceEnded=k.STRAY,
        LinkLost=k.IDLE,
        PeerGone=_lift,
        Tick=_tick_quarantined,
    ),
    S.FENCING: _row(
        **_FAILED, PeerAborted=k.REPEATED, FenceEnded=_fenced, LinkLost=k.IDLE, PeerGone=_lift, Tick=k.IDLE
    ),
    S.OVER: _row(
        **_FAILED, PeerAborted=k.IDLE, FenceEnded=k.IDLE, LinkLost=k.IDLE, PeerGone=k.IDLE, Tick=k.IDLE
    ),
}
"""Every cell: a handler, or the reason why nothing happens. docs/handoff.md prints it."""
