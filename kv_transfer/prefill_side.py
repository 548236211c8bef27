"""The hand-off as the prefill worker sees it: ask for room, push what is computed, let go once verified.

Pure: see machine.py. The machine knows how many blocks and layers there are, never which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from . import machine as k
from .push_plan import advance, pieces


class PrefillState(StrEnum):
    RESERVING = "reserving"
    """Room was asked for; the prompt may be computing."""
    HELD = "held"
    """Decode has no room yet; the KV is kept while the lease lasts."""
    SENDING = "sending"
    """Room is granted; what is computed is pushed."""
    SENT = "sent"
    """Everything is pushed and Complete sent; decode verifies."""
    SETTLING = "settling"
    """The outcome is decided, writes are not terminal yet."""
    FENCING = "fencing"
    """Every write is terminal, some did not end well: the fence says when nobody reads the blocks any
    more."""
    OVER = "over"


S = PrefillState


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One hand-off on the prefill side."""

    num_tokens: int
    block_size: int
    num_layers: int
    layerwise: bool
    """Whether layers are pushed before the others are computed."""
    max_push_runs: int
    """Most layers times blocks in one push."""
    timing: k.Timing
    state: PrefillState = S.RESERVING
    ready: tuple[int, ...] = ()
    """Leading blocks whose KV is there, for each layer."""
    pushed: tuple[int, ...] = ()
    """Leading blocks that are pushed, or that decode had cached."""
    seeded: bool = False
    num_parts: int = 0
    live: frozenset[int] = frozenset()
    """Parts whose write is not terminal."""
    torn: bool = False
    """Some write did not end well: cancelled, or failed."""
    moved_at: float = 0.0
    """When a write ended last, or the first of those that are live began."""
    keepalive_at: float = math.inf
    give_up_at: float = math.inf
    """End of the wait for an answer, of the lease, or of the tail."""

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def computed_tokens(self) -> int:
        """Tokens whose KV is there in every layer; those of a block that is not full do not count."""
        return min(self.num_tokens, min(self.ready) * self.block_size)

    @property
    def due(self) -> float:
        """When a Tick would do something."""
        due = self.give_up_at
        if self.state is S.SENDING:
            due = min(due, self.keepalive_at)
        if self.live and self.state in (S.SENDING, S.SENT):
            due = min(due, self.moved_at + self.timing.progress_timeout_s)
        return due


def start_prefill(
    *,
    num_tokens: int,
    block_size: int,
    num_layers: int,
    layerwise: bool,
    max_push_runs: int,
    timing: k.Timing,
    now: float,
) -> Prefill:
    """A hand-off whose reservation is on its way."""
    return Prefill(
        num_tokens=num_tokens,
        block_size=block_size,
        num_layers=num_layers,
        layerwise=layerwise,
        max_push_runs=max_push_runs,
        timing=timing,
        ready=(0,) * num_layers,
        pushed=(0,) * num_layers,
        give_up_at=now + timing.reserve_timeout_s,
    )


def step_prefill(m: Prefill, event: k.Event, now: float) -> tuple[Prefill, k.Actions]:
    """Pure; see machine.look_up."""
    result: tuple[Prefill, k.Actions] = k.look_up(PREFILL_TABLE, m, event, now)
    return result


Result = tuple[Prefill, tuple[k.Action, ...]]


def _over(m: Prefill) -> Prefill:
    return replace(m, state=S.OVER, live=frozenset(), give_up_at=math.inf)


def _fail(m: Prefill, fault: k.Fault) -> Result:
    """Ends in failure, and says so to both sides."""
    m, said, rest = _stop(m, fault)
    return m, (*said, k.Report(fault), *rest)


def _stop(m: Prefill, fault: k.Fault) -> tuple[Prefill, k.Actions, k.Actions]:
    """Cancels first, so that the Abort tells the truth; the last actions let the blocks go."""
    if m.live:
        m = replace(m, state=S.SETTLING, give_up_at=math.inf)
        return m, (k.CancelWrites(), k.SendAbort(fault)), ()
    m, rest = _settle(m)
    return m, (k.SendAbort(fault),), rest


def _settle(m: Prefill) -> Result:
    """No write is live and the outcome is decided: the blocks go, behind a fence if need be."""
    if m.torn:
        return replace(m, state=S.FENCING, give_up_at=math.inf), (k.StartFence(),)
    return _over(m), (k.Release(),)


def _advance(m: Prefill, event: k.Computed) -> Prefill:
    blocks = m.num_blocks if event.num_tokens >= m.num_tokens else event.num_tokens // m.block_size
    return replace(m, ready=advance(m.ready, blocks, event.first_layer, event.num_layers))


def _push(m: Prefill, now: float) -> tuple[Prefill, list[k.Action]]:
    ready = m.ready if m.layerwise else (min(m.ready),) * m.num_layers
    pushes = [
        k.Push(m.num_parts + i, *piece) for i, piece in enumerate(pieces(ready, m.pushed, m.max_push_runs))
    ]
    m = replace(
        m,
        pushed=tuple(map(max, m.pushed, ready)),
        num_parts=m.num_parts + len(pushes),
        live=m.live | {push.part for push in pushes},
        moved_at=m.moved_at if m.live else now,
    )
    return m, list(pushes)


def _complete(m: Prefill, now: float) -> tuple[Prefill, list[k.Action]]:
    m = replace(m, state=S.SENT, give_up_at=now + m.timing.tail_timeout_s)
    return m, [k.SendComplete(m.num_parts)]


def _keep_computed(m: Prefill, event: k.Computed, now: float) -> Result:
    return _advance(m, event), ()


def _push_computed(m: Prefill, event: k.Computed, now: float) -> Result:
    m, actions = _push(_advance(m, event), now)
    return m, tuple(actions)


def _unready(m: Prefill) -> Result | None:
    if min(m.ready) == m.num_blocks:
        return None
    fault = k.Fault("internal", f"the first token came before {m.num_tokens} tokens of KV were computed")
    return _fail(m, fault)


def _keep_seeded(m: Prefill, event: k.Seeded, now: float) -> Result:
    return _unready(m) or (replace(m, seeded=True), ())


def _complete_seeded(m: Prefill, event: k.Seeded, now: float) -> Result:
    failed = _unready(m)
    if failed:
        return failed
    m, actions = _complete(replace(m, seeded=True), now)
    return m, tuple(actions)


def _end(m: Prefill, event: k.Ended, now: float) -> Result:
    m, said, rest = _stop(m, event.fault)
    return m, (*said, *rest)


def _granted(m: Prefill, event: k.PeerGranted, now: float) -> Result:
    if event.first_block + event.num_blocks != m.num_blocks:
        fault = k.Fault(
            "transfer",
            f"room for {event.num_blocks} blocks from block {event.first_block} on was granted "
            f"for a prompt of {m.num_blocks} blocks",
        )
        return _fail(m, fault)
    m = replace(
        m,
        state=S.SENDING,
        pushed=(event.first_block,) * m.num_layers,
        give_up_at=math.inf,
        keepalive_at=now + m.timing.progress_timeout_s / 4,
    )
    m, actions = _push(m, now)
    if m.seeded:
        m, rest = _complete(m, now)
        return m, (*actions, *rest)
    return m, (k.SendProgress(m.computed_tokens), *actions)


def _queued(m: Prefill, event: k.PeerQueued, now: float) -> Result:
    return replace(m, state=S.HELD, give_up_at=now + min(event.lease_s, m.timing.lease_s)), ()


def _refused(m: Prefill, event: k.PeerRefused, now: float) -> Result:
    return _fail(m, event.fault)


def _verified(m: Prefill, event: k.PeerVerified, now: float) -> Result:
    if m.live:  # the bytes arrived, but our transport has not said so yet
        return replace(m, state=S.SETTLING, give_up_at=math.inf), (k.Report(None),)
    m, rest = _settle(m)
    return m, (k.Report(None), *rest)


def _aborted(m: Prefill, event: k.PeerAborted, now: float) -> Result:
    # Told back at once: the answer means that the writes are cancelled, and the decode side waits for it.
    return _fail(m, event.fault)


def _acknowledge_abort(m: Prefill, event: k.PeerAborted, now: float) -> Result:
    return m, (k.CancelWrites(), k.SendAbort(k.Fault(k.CANCELLED, "nothing is sent any more")))


def _written(m: Prefill, event: k.WriteEnded, now: float) -> Result:
    m = replace(m, live=m.live - {event.part}, moved_at=now)
    if event.fault is not None:
        return _fail(replace(m, torn=True), event.fault)
    return m, ()


def _settled(m: Prefill, event: k.WriteEnded, now: float) -> Result:
    m = replace(m, live=m.live - {event.part}, torn=m.torn or event.fault is not None)
    return (m, ()) if m.live else _settle(m)


def _fenced(m: Prefill, event: k.FenceEnded, now: float) -> Result:
    return (_over(m), (k.Release(),)) if event.ok else (m, (k.Disconnect(),))


def _link_lost(m: Prefill, event: k.LinkLost, now: float) -> Result:
    return _fail(m, event.fault)


def _gone(m: Prefill, event: k.PeerGone, now: float) -> Result:
    return _over(m), (k.Report(event.fault), k.Release())


def _gone_quietly(m: Prefill, event: k.PeerGone, now: float) -> Result:
    return _over(m), (k.Release(),)


def _expire(m: Prefill, what: str) -> Result:
    return _fail(m, k.Fault("deadline_exceeded", what))


def _tick_waiting(m: Prefill, event: k.Tick, now: float) -> Result:
    if now < m.give_up_at:
        return m, ()
    if m.state is S.HELD:
        return _expire(m, "the lease ended without news from the decode worker")
    return _expire(m, f"the decode worker did not answer within {m.timing.reserve_timeout_s:g} s")


def _tick_sending(m: Prefill, event: k.Tick, now: float) -> Result:
    if m.live and now >= m.moved_at + m.timing.progress_timeout_s:
        return _expire(m, f"no write ended within {m.timing.progress_timeout_s:g} s")
    m = replace(m, keepalive_at=now + m.timing.progress_timeout_s / 4)
    return m, (k.SendProgress(m.computed_tokens),)


def _tick_sent(m: Prefill, event: k.Tick, now: float) -> Result:
    if m.live and now >= m.moved_at + m.timing.progress_timeout_s:
        return _expire(m, f"no write ended within {m.timing.progress_timeout_s:g} s")
    if now < m.give_up_at:
        return m, ()
    return _expire(m, f"the decode worker did not verify within {m.timing.tail_timeout_s:g} s")


def _row(**cells: Any) -> dict[type, Any]:
    """A row of the table in the order of its columns."""
    return {kind: cells[kind.__name__] for kind in PREFILL_EVENTS}


PREFILL_EVENTS: tuple[type, ...] = (
    k.Computed,
    k.Seeded,
    k.Ended,
    k.PeerGranted,
    k.PeerQueued,
    k.PeerRefused,
    k.PeerVerified,
    k.PeerAborted,
    k.WriteEnded,
    k.FenceEnded,
    k.LinkLost,
    k.PeerGone,
    k.Tick,
)

_BEFORE_GRANT = {
    "Computed": _keep_computed,
    "Seeded": _keep_seeded,
    "Ended": _end,
    "PeerGranted": _granted,
    "PeerQueued": _queued,
    "PeerRefused": _refused,
    "PeerVerified": k.STRAY,
    "PeerAborted": _aborted,
    "WriteEnded": k.STRAY,
    "FenceEnded": k.STRAY,
    "LinkLost": _link_lost,
    "PeerGone": _gone,
    "Tick": _tick_waiting,
}
_AFTER_GRANT = {
    "Ended": _end,
    "PeerGranted": k.REPEATED,
    "PeerQueued": k.STALE,
    "PeerRefused": k.STALE,
    "PeerAborted": _aborted,
    "WriteEnded": _written,
    "FenceEnded": k.STRAY,
    "LinkLost": _link_lost,
    "PeerGone": _gone,
}
_DECIDED = {
    "Computed": k.IDLE,
    "Seeded": k.IDLE,
    "Ended": k.IDLE,
    "PeerGranted": k.STALE,
    "PeerQueued": k.STALE,
    "PeerRefused": k.STALE,
    "PeerVerified": k.STALE,
    "PeerAborted": _acknowledge_abort,
    "LinkLost": k.IDLE,
    "Tick": k.IDLE,
}

PREFILL_TABLE: k.Table = {
    S.RESERVING: _row(**_BEFORE_GRANT),
    S.HELD: _row(**_BEFORE_GRANT),
    S.SENDING: _row(
        **_AFTER_GRANT,
        Computed=_push_computed,
        Seeded=_complete_seeded,
        PeerVerified=k.STRAY,
        Tick=_tick_sending,
    ),
    S.SENT: _row(
        **_AFTER_GRANT, Computed=k.REPEATED, Seeded=k.REPEATED, PeerVerified=_verified, Tick=_tick_sent
    ),
    S.SETTLING: _row(**_DECIDED, WriteEnded=_settled, FenceEnded=k.STRAY, PeerGone=_gone_quietly),
    S.FENCING: _row(**_DECIDED, WriteEnded=k.STRAY, FenceEnded=_fenced, PeerGone=_gone_quietly),
    S.OVER: _row(**_DECIDED, WriteEnded=k.IDLE, FenceEnded=k.IDLE, PeerGone=k.IDLE),
}
"""Every cell: a handler, or the reason why nothing happens. docs/handoff.md prints it."""
