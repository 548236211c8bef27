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

from ..proto.errors import DiphaseError, PeerLost, TransferError
from ..proto.handoff_pb2 import Complete, Consumed, Pushed, Staged
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .arena import Arena
from .base import Done, Failed, Segments
from .base import Event as TransportEvent
from .byte_worker import Job
from .codecs.codec import RAW, Codec, KvSpec
from .codecs.codec_choice import RECOMPUTE, Choice
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
    """Of KV."""
    piece_bytes: int
    """That a staged part takes at most, at either end."""
    segments: Segments = field(default_factory=lambda: np.empty((0, 5), dtype=np.int64))
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
    codec: Codec | None = None
    """None: bytes go as they are."""
    recompute: bool = False
    """None go: the decode worker computes the prompt."""
    parts: dict[int, OutgoingPart] = field(default_factory=dict)
    first_token: Complete = field(default_factory=Complete)
    began_at: float = 0.0
    unsent_bytes: int = 0
    """KV that is on its way to this link or will be."""
    cached_tokens: int = 0
    """Of the prompt, that did not have to be computed here."""
    num_bytes: int = 0
    num_segments: int = 0


@dataclass(frozen=True, slots=True)
class _Encoded:
    """What encoding a part gave."""

    length: int
    seconds: float
    digests: list[int]


class PartWriter:
    """All parts that leave this process. `ended(handoff, part, fault)` is called once for each that was
    pushed and not forgotten; `fault` None: its bytes are there."""

    def __init__(
        self,
        side: HandoffSide,
        ended: Callable[[Outgoing, int, k.Fault | None], None],
        note: Callable[[Outgoing, Choice], None],
    ) -> None:
        self._config = side.config
        self._layout = side.layout
        self._sharding = side.sharding
        self._transports = side.transports
        self._bytes = side.pool_bytes()
        self._clock = side.clock
        self._ended = ended
        self._note = note
        self._coders = side.coders
        self._written: dict[tuple[str, int], OutgoingPart] = {}
        staging = side.transports.staging
        self._staging = memoryview(b"") if staging is None else staging.host_bytes()
        self._local = Arena(0, len(self._staging))
        self._waiting: deque[OutgoingPart] = deque()
        """Staged parts without a piece at both ends, oldest first."""

    @property
    def staged_bytes(self) -> int:
        """Of our staging buffer that are not free."""
        return self._local.used

    def push(self, handoff: Outgoing, push: k.Push) -> None:
        size = self._bytes.size(push.num_blocks, push.num_layers)
        part = OutgoingPart(
            handoff=handoff,
            push=push,
            queued_at=self._clock.now(),
            num_bytes=size,
            piece_bytes=size if handoff.codec is None else handoff.codec.max_bytes(self._spec(handoff, push)),
        )
        handoff.parts[push.part] = part
        if self._choose_path(part):
            self._waiting.append(part)
            self._stage_waiting()
        elif self._config.digest:
            blocks = handoff.block_ids[push.first_block : push.first_block + push.num_blocks]
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

    def choose(self, handoff: Outgoing) -> bool:
        """Now that it has room there: how its KV gets there soonest; False: not at all, since the decode
        worker would have computed it before."""
        session, recompute = handoff.session, self._config.recompute
        size = self._bytes.size(len(handoff.remote_ids), self._layout.num_layers)
        if not size or not (session.codecs or recompute):
            return True
        cached = (handoff.machine.num_blocks - len(handoff.remote_ids)) * self._layout.block_size
        tokens = handoff.machine.num_tokens - cached
        choice = self._coders.choose(
            size,
            tokens,
            link=session.estimate,
            backlog_bytes=session.backlog_bytes,
            names=session.codecs,
            recompute=recompute,
        )
        if choice.seconds is not None:
            self._note(handoff, choice)
        if choice.codec not in (RAW, RECOMPUTE):
            handoff.codec = self._coders.codec(choice.codec)
        if choice.codec == RECOMPUTE:
            return False
        handoff.unsent_bytes = size
        session.backlog_bytes += size
        return True

    def over(self, handoff: Outgoing) -> None:
        """Nothing more of it will be sent."""
        handoff.session.backlog_bytes -= handoff.unsent_bytes
        handoff.unsent_bytes = 0

    def consumed(self, session: Session, consumed: Consumed) -> bool:
        """The peer says that a piece of its window is free again; False: it is none that is in use."""
        known = session.credits is not None and session.credits.consumed(consumed.piece)
        if known and consumed.codec in self._coders.estimates:
            self._coders.estimates[consumed.codec].decoded(consumed.kv_bytes, consumed.seconds)
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
        now, wire_bytes = self._clock.now(), int(part.segments[:, 4].sum())
        session.counters.wire_s += now - part.written_at
        if isinstance(event, Done):
            session.estimate.done(wire_bytes, now)
            session.counters.wire_bytes += wire_bytes
            sent = min(part.num_bytes, part.handoff.unsent_bytes)
            part.handoff.unsent_bytes -= sent
            session.backlog_bytes -= sent
        else:
            session.estimate.failed(now)
        self._free_local(part)
        if part.piece and session.credits is not None:
            (session.credits.done if isinstance(event, Done) else session.credits.torn)(part.piece)
        self._end(part, k.Fault(event.code, event.message) if isinstance(event, Failed) else None)
        self._stage_waiting()

    def on_work(self, part: OutgoingPart, result: Any) -> None:
        """An answer of the byte worker."""
        if isinstance(result, _Encoded):
            self._shrink(part, result)
        if isinstance(result, DiphaseError):
            self._end(part, k.Fault.of(result))
        elif not part.dropped:
            self._write(part, result.digests if isinstance(result, _Encoded) else result)
        if part.transfer_id is None:
            self._undo_staging(part)

    def _shrink(self, part: OutgoingPart, encoded: _Encoded) -> None:
        """It takes less than it might have."""
        codec, lent = part.handoff.codec, part.handoff.session.credits
        assert codec is not None
        assert lent is not None
        assert part.local_offset is not None
        self._coders.estimates[codec.name].encoded(part.num_bytes, encoded.length, encoded.seconds)
        part.segments[0, 4] = encoded.length
        self._local.shrink(part.local_offset, encoded.length)
        lent.shrink(part.piece, encoded.length)

    def _choose_path(self, part: OutgoingPart) -> bool:
        """True: it is to be staged, and gets its segments with its pieces. False: it goes straight, and has
        them."""
        session = part.handoff.session
        lent, transport = session.credits, session.transport
        if (
            lent is None
            or transport is None
            or not part.num_bytes
            or not (lent.fits(part.piece_bytes) and self._local.fits(part.piece_bytes))
        ):
            part.segments = self._straight(part)
            return False
        if part.handoff.codec is not None or self._config.staging == "always":
            return True
        straight = self._straight(part)
        short = part.num_bytes < len(straight) * transport.capabilities.stage_below_bytes
        if short and lent.flowing and self._local.used + part.piece_bytes <= self._local.size:
            return True
        part.segments = straight
        return False

    def _straight(self, part: OutgoingPart) -> Segments:
        handoff, push = part.handoff, part.push
        cached = handoff.machine.num_blocks - len(handoff.remote_ids)
        begin, end = push.first_block, push.first_block + push.num_blocks
        return reshard_segments(
            self._layout,
            self._sharding,
            handoff.session.sharding,
            handoff.block_ids[begin:end],
            handoff.remote_ids[begin - cached : end - cached],
            first_layer=push.first_layer,
            num_layers=push.num_layers,
        )

    def _stage_waiting(self) -> None:
        """Gathers the parts that find room at both ends now."""
        for part in list(self._waiting):
            if part.dropped or self._take_pieces(part):
                self._waiting.remove(part)
            if part.local_offset is not None and not part.dropped:
                self._transports.worker.submit(part, self._gathering(part))

    def _gathering(self, part: OutgoingPart) -> Job:
        handoff, push = part.handoff, part.push
        assert part.local_offset is not None
        out = self._staging[part.local_offset : part.local_offset + part.piece_bytes]
        blocks = handoff.block_ids[push.first_block : push.first_block + push.num_blocks]
        if handoff.codec is None:
            return partial(self._gather, out, blocks, push.first_layer, push.num_layers)
        return partial(self._encode, handoff.codec, self._spec(handoff, push), out, blocks)

    def _take_pieces(self, part: OutgoingPart) -> bool:
        lent = part.handoff.session.credits
        assert lent is not None
        local = self._local.take(part.piece_bytes)
        if local is None:
            return False
        remote = lent.take(part.piece_bytes)
        if remote is None:
            self._local.give_back(local)
            return False
        part.local_offset = local
        part.piece, offset = remote
        row = [self._transports.staging_region, local, lent.region, offset, part.piece_bytes]
        part.segments = np.array([row], dtype=np.int64)
        return True

    def _gather(self, out: memoryview, blocks: list[int], first_layer: int, num_layers: int) -> list[int]:
        self._bytes.gather(out, blocks, first_layer, num_layers)
        return self._digest(out)

    def _encode(self, codec: Codec, spec: KvSpec, out: memoryview, blocks: list[int]) -> _Encoded:
        began_at = self._clock.now()
        kv = memoryview(bytearray(spec.size_bytes))
        self._bytes.gather(kv, blocks, spec.first_layer, spec.num_layers)
        length = codec.encode(kv, spec, out)
        return _Encoded(length, self._clock.now() - began_at, self._digest(out[:length]))

    def _digest(self, piece: memoryview) -> list[int]:
        return [xxhash.xxh3_64_intdigest(piece)] if self._config.digest else []

    def _spec(self, handoff: Outgoing, push: k.Push) -> KvSpec:
        block_size = self._layout.block_size
        tokens = min(handoff.machine.num_tokens - push.first_block * block_size, push.num_blocks * block_size)
        return self._bytes.spec(tokens, push.first_layer, push.num_layers)

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
            [[_, _, _, offset, length]] = part.segments.tolist()
            codec = "" if handoff.codec is None else handoff.codec.name
            pushed.staged.CopyFrom(Staged(piece=part.piece, offset=offset, length=length, codec=codec))
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
        session.estimate.started(part.written_at)
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
