"""How the parts of outgoing hand-offs get into the decode worker's pool: straight into its blocks, or
gathered into one piece of the window that it lends.

Stands between the prefill machine's pushes and the transport's events. Knows where bytes go, never when they
may: that is the machine's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import xxhash

from ..proto.errors import PeerLost, TransferError
from ..proto.handoff_pb2 import Complete, Pushed, Staged
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .arena import Arena
from .base import Done, Failed, Segments
from .base import Event as TransportEvent
from .driver import Session
from .prefill_side import Prefill
from .reshard import reshard_segments
from .side import HandoffSide


@dataclass(slots=True, eq=False, kw_only=True)
class OutgoingPart:
    """A push whose write is not terminal."""

    handoff: Outgoing
    push: k.Push
    queued_at: float
    num_bytes: int
    segments: Segments
    """Straight from blocks to blocks; of a staged part, from piece to piece once it has both."""
    piece: int = 0
    """Number of the piece of the peer's window; 0: none."""
    local_offset: int | None = None
    """Of the piece of our staging buffer that it is gathered into."""
    transfer_id: int | None = None
    """None until it is written."""
    written_at: float = 0.0
    dropped: bool = False
    """Cancelled or forgotten before it was written."""


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
        self._sharding = side.sharding
        self._transports = side.transports
        self._bytes = side.pool_bytes()
        self._clock = side.clock
        self._ended = ended
        self._written: dict[tuple[str, int], OutgoingPart] = {}
        staging = side.transports.staging
        self._staging = memoryview(b"") if staging is None else staging.host_bytes()
        self._local = Arena(0, len(self._staging))
        self._waiting: deque[OutgoingPart] = deque()
        """Staged parts without a piece at both ends, oldest first."""

    def push(self, handoff: Outgoing, push: k.Push) -> None:
        cached = handoff.machine.num_blocks - len(handoff.remote_ids)
        begin, end = push.first_block, push.first_block + push.num_blocks
        part = OutgoingPart(
            handoff=handoff,
            push=push,
            queued_at=self._clock.now(),
            num_bytes=self._bytes.size(push.num_blocks, push.num_layers),
            segments=reshard_segments(
                self._layout,
                self._sharding,
                handoff.session.sharding,
                handoff.block_ids[begin:end],
                handoff.remote_ids[begin - cached : end - cached],
                first_layer=push.first_layer,
                num_layers=push.num_layers,
            ),
        )
        handoff.parts[push.part] = part
        if self._is_staged(part):
            self._waiting.append(part)
            self._stage_waiting()
        elif self._config.digest:
            blocks = handoff.block_ids[begin:end]
            job = partial(self._bytes.digests, blocks, push.first_layer, push.num_layers)
            self._transports.worker.submit(part, job)
        else:
            self._write(part, [])

    def cancel(self, handoff: Outgoing) -> None:
        """Every part ends soon, those that are not written yet at once."""
        for part in list(handoff.parts.values()):
            if part.transfer_id is None:
                part.dropped = True
                self._end(part, k.Fault(k.CANCELLED, "cancelled before it was written"))
            elif handoff.session.transport is not None:
                handoff.session.transport.cancel(part.transfer_id)

    def forget(self, handoff: Outgoing) -> None:
        """Nothing reads the blocks any more; no part of it is reported from now on."""
        for part in handoff.parts.values():
            if part.transfer_id is None:
                part.dropped = True
            elif self._written.pop((handoff.session.transport_name, part.transfer_id), None) is not None:
                self._free_local(part)
        handoff.parts.clear()
        self._stage_waiting()

    def consumed(self, session: Session, piece: int) -> bool:
        """The peer says that a piece of its window is free again; False: it is none that is in use."""
        known = session.credits is not None and session.credits.consumed(piece)
        self._stage_waiting()
        return known

    def fenced(self) -> None:
        """A fence held: there may be room again."""
        self._stage_waiting()

    def on_transport(self, name: str, event: TransportEvent) -> None:
        """Done and Failed of the writes made here; others are left alone."""
        if not isinstance(event, Done | Failed):
            return
        part = self._written.pop((name, event.transfer_id), None)
        if part is None:
            return
        session = part.handoff.session
        session.counters.wire_s += self._clock.now() - part.written_at
        self._free_local(part)
        if part.piece and session.credits is not None:
            (session.credits.done if isinstance(event, Done) else session.credits.torn)(part.piece)
        self._end(part, k.Fault(event.code, event.message) if isinstance(event, Failed) else None)
        self._stage_waiting()

    def on_work(self, part: OutgoingPart, digests: Any) -> None:
        """An answer of the byte worker."""
        if not part.dropped:
            self._write(part, digests)
        if part.transfer_id is None:
            self._undo_staging(part)

    def _is_staged(self, part: OutgoingPart) -> bool:
        session = part.handoff.session
        lent, transport = session.credits, session.transport
        if lent is None or transport is None or not part.num_bytes:
            return False
        if not (lent.fits(part.num_bytes) and self._local.fits(part.num_bytes)):
            return False
        if self._config.staging == "always":
            return True
        short = part.num_bytes < len(part.segments) * transport.capabilities.stage_below_bytes
        return short and lent.flowing

    def _stage_waiting(self) -> None:
        """Gathers the parts that find room at both ends now."""
        for part in list(self._waiting):
            if part.dropped or self._take_pieces(part):
                self._waiting.remove(part)
            if part.local_offset is not None and not part.dropped:
                out = self._staging[part.local_offset : part.local_offset + part.num_bytes]
                begin, push = part.push.first_block, part.push
                blocks = part.handoff.block_ids[begin : begin + push.num_blocks]
                job = partial(self._gather, out, blocks, push.first_layer, push.num_layers)
                self._transports.worker.submit(part, job)

    def _take_pieces(self, part: OutgoingPart) -> bool:
        lent = part.handoff.session.credits
        assert lent is not None
        local = self._local.take(part.num_bytes)
        if local is None:
            return False
        remote = lent.take(part.num_bytes)
        if remote is None:
            self._local.give_back(local)
            return False
        part.local_offset = local
        part.piece, offset = remote
        row = [self._transports.staging_region, local, lent.region, offset, part.num_bytes]
        part.segments = np.array([row], dtype=np.int64)
        return True

    def _gather(self, out: memoryview, blocks: list[int], first_layer: int, num_layers: int) -> list[int]:
        self._bytes.gather(out, blocks, first_layer, num_layers)
        return [xxhash.xxh3_64_intdigest(out)] if self._config.digest else []

    def _write(self, part: OutgoingPart, digests: list[int]) -> None:
        handoff, push, session = part.handoff, part.push, part.handoff.session
        pushed = Pushed(
            part=push.part,
            first_block=push.first_block,
            num_blocks=push.num_blocks,
            first_layer=push.first_layer,
            num_layers=push.num_layers,
            digests=digests,
        )
        if part.piece:
            offset = int(part.segments[0, 3])
            pushed.staged.CopyFrom(Staged(piece=part.piece, offset=offset, length=part.num_bytes))
        try:
            if session.closing or session.transport is None:
                raise PeerLost("the connection is closing")
            part.transfer_id = session.transport.write(
                session.incarnation,
                part.segments,
                wire.part_tag(handoff.ticket, push.part),
                self._config.tail_timeout_s,
            )
        except TransferError as error:
            self._end(part, k.Fault.of(error))
            return
        session.link.send(wire.message(handoff.key, pushed=pushed))
        part.written_at = self._clock.now()
        session.counters.queued_s += part.written_at - part.queued_at
        handoff.num_segments += len(part.segments)
        handoff.num_bytes += part.num_bytes
        self._written[session.transport_name, part.transfer_id] = part

    def _undo_staging(self, part: OutgoingPart) -> None:
        """It was gathered and will not be written: the peer never hears of it."""
        self._free_local(part)
        lent = part.handoff.session.credits
        if part.piece and lent is not None:
            lent.untouched(part.piece)
        self._stage_waiting()

    def _free_local(self, part: OutgoingPart) -> None:
        if part.local_offset is not None:
            self._local.give_back(part.local_offset)
            part.local_offset = None

    def _end(self, part: OutgoingPart, fault: k.Fault | None) -> None:
        if part.handoff.parts.pop(part.push.part, None) is part:
            self._ended(part.handoff, part.push.part, fault)
