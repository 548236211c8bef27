"""How the parts of outgoing hand-offs get into the decode worker's pool: digest, then one write of the
transport.

Stands between the prefill machine's pushes and the transport's events. Knows where blocks go, never when
they may: that is the machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..proto.errors import PeerLost, TransferError
from ..proto.handoff_pb2 import Complete, Pushed
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .base import Done, Failed
from .base import Event as TransportEvent
from .digest import digest_runs
from .driver import Session
from .prefill_side import Prefill
from .segments import block_runs, block_segments
from .side import HandoffSide


@dataclass(slots=True, eq=False, kw_only=True)
class OutgoingPart:
    """A push whose write is not terminal."""

    handoff: Outgoing
    push: k.Push
    queued_at: float
    transfer_id: int | None = None
    """None until it is written."""
    written_at: float = 0.0


@dataclass(slots=True, eq=False, kw_only=True)
class Outgoing:
    """A hand-off of the prefill side, with what its machine does not know."""

    key: HandoffKey
    session: Session
    machine: Prefill
    block_ids: list[int] = field(default_factory=list)
    """Of the sequence, in order; one reference to each is held."""
    remote_ids: list[int] = field(default_factory=list)
    """Where the same blocks go; those that decode has cached are missing at the front."""
    ticket: int = 0
    """Names the reservation in tags."""
    parts: dict[int, OutgoingPart] = field(default_factory=dict)
    first_token: Complete = field(default_factory=Complete)
    num_bytes: int = 0
    num_segments: int = 0


class PartWriter:
    """All parts that leave this process. `ended(handoff, part, fault)` is called once for each that was
    pushed and not forgotten; `fault` None: its bytes are there."""

    def __init__(
        self,
        side: HandoffSide,
        ended: Callable[[Outgoing, int, k.Fault | None], None],
    ) -> None:
        self._config = side.config
        self._layout = side.layout
        self._transports = side.transports
        self._clock = side.clock
        self._ended = ended
        self._written: dict[tuple[str, int], OutgoingPart] = {}

    def push(self, handoff: Outgoing, push: k.Push) -> None:
        part = OutgoingPart(handoff=handoff, push=push, queued_at=self._clock.now())
        handoff.parts[push.part] = part
        if not self._config.digest:
            self._write(part, [])
            return
        blocks = handoff.block_ids[push.first_block : push.first_block + push.num_blocks]
        runs = block_runs(self._layout, blocks, first_layer=push.first_layer, num_layers=push.num_layers)
        self._transports.worker.submit(part, lambda: digest_runs(self._transports.buffer, runs))

    def cancel(self, handoff: Outgoing) -> None:
        """Every part ends soon, those that are not written yet at once."""
        for part in list(handoff.parts.values()):
            if part.transfer_id is None:
                self._end(part, k.Fault(k.CANCELLED, "cancelled before it was written"))
            elif handoff.session.transport is not None:
                handoff.session.transport.cancel(part.transfer_id)

    def forget(self, handoff: Outgoing) -> None:
        """Nothing reads the blocks any more; no part of it is reported from now on."""
        for part in handoff.parts.values():
            if part.transfer_id is not None:
                self._written.pop((handoff.session.transport_name, part.transfer_id), None)
        handoff.parts.clear()

    def on_transport(self, name: str, event: TransportEvent) -> None:
        """Done and Failed of the writes made here; others are left alone."""
        if not isinstance(event, Done | Failed):
            return
        part = self._written.pop((name, event.transfer_id), None)
        if part is None:
            return
        peer = part.handoff.session.counters
        peer.wire_s += self._clock.now() - part.written_at
        self._end(part, k.Fault(event.code, event.message) if isinstance(event, Failed) else None)

    def on_work(self, part: OutgoingPart, result: Any) -> None:
        """An answer of the byte worker."""
        if part.handoff.parts.get(part.push.part) is part:  # else it was cancelled meanwhile
            self._write(part, result)

    def _write(self, part: OutgoingPart, digests: list[int]) -> None:
        handoff, push = part.handoff, part.push
        session = handoff.session
        cached = handoff.machine.num_blocks - len(handoff.remote_ids)
        begin, end = push.first_block, push.first_block + push.num_blocks
        segments = block_segments(
            self._layout,
            handoff.block_ids[begin:end],
            handoff.remote_ids[begin - cached : end - cached],
            first_layer=push.first_layer,
            num_layers=push.num_layers,
            local_region=0,
            remote_region=0,
        )
        pushed = Pushed(
            part=push.part,
            first_block=push.first_block,
            num_blocks=push.num_blocks,
            first_layer=push.first_layer,
            num_layers=push.num_layers,
            digests=digests,
        )
        try:
            if session.closing or session.transport is None:
                raise PeerLost("the connection is closing")
            part.transfer_id = session.transport.write(
                session.incarnation,
                segments,
                wire.part_tag(handoff.ticket, push.part),
                self._config.tail_timeout_s,
            )
        except TransferError as error:
            self._end(part, k.Fault.of(error))
            return
        session.link.send(wire.message(handoff.key, pushed=pushed))
        part.written_at = self._clock.now()
        session.counters.queued_s += part.written_at - part.queued_at
        handoff.num_segments += len(segments)
        handoff.num_bytes += int(segments[:, 4].sum())
        self._written[session.transport_name, part.transfer_id] = part

    def _end(self, part: OutgoingPart, fault: k.Fault | None) -> None:
        if part.handoff.parts.pop(part.push.part, None) is part:
            self._ended(part.handoff, part.push.part, fault)
