"""What becomes of the parts that arrive at a decode worker: a tag and its Pushed are joined, then the
bytes are verified.

Stands between the transport's notices and the decode machine. Knows tickets and bytes, never what a
hand-off may do.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import xxhash

from ..proto.errors import DiphaseError, TransferError
from ..proto.handoff_pb2 import Complete, Consumed, HandoffMessage, Pushed, Reserve
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .base import Notified
from .counters import HandoffCounters
from .decode_side import Decode
from .driver import Session
from .side import HandoffSide

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Incoming:
    """A hand-off of the decode side, with what its machine does not know."""

    key: HandoffKey
    session: Session
    machine: Decode
    reserve: Reserve
    reserved_at: float
    ticket: int
    cached_ids: list[int] = field(default_factory=list)
    """Found in the prefix cache: never written to."""
    block_ids: list[int] = field(default_factory=list)
    """Allocated: the destinations."""
    complete: Complete = field(default_factory=Complete)
    granted_at: float = 0.0
    completed_at: float = 0.0
    quarantined_at: float | None = None
    """Since when the blocks are out of use."""
    tagged: set[int] = field(default_factory=set)
    """Parts whose tag came."""
    pushed: dict[int, Pushed] = field(default_factory=dict)
    """Parts that the prefill side has described; the first word counts."""
    copying: int = 0
    """Staged parts that the byte worker is copying into the blocks."""
    held: list[k.Event] = field(default_factory=list)
    """What must not be heard of before they are copied: it would free the blocks."""
    num_bytes: int = 0
    num_segments: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """What the byte worker was asked."""

    handoff: Incoming
    part: int
    arrived_at: float
    staged: bool


class PartReader:
    """All parts that come to this process. `post(handoff, event)` takes PartArrived and PartChecked."""

    def __init__(
        self,
        side: HandoffSide,
        counters: HandoffCounters,
        post: Callable[[Incoming, k.Event], None],
    ) -> None:
        self._config = side.config
        self._transports = side.transports
        self._bytes = side.pool_bytes()
        self._coders = side.coders
        staging = side.transports.staging
        self._staging = memoryview(b"") if staging is None else staging.host_bytes()
        self._clock = side.clock
        self._counters = counters
        self._post = post
        self._tickets = itertools.count(1)
        self._by_ticket: dict[int, Incoming] = {}

    def new_ticket(self) -> int:
        return next(self._tickets)

    def add(self, handoff: Incoming) -> None:
        self._by_ticket[handoff.ticket] = handoff

    def forget(self, handoff: Incoming) -> None:
        """It is over: its writer may have every piece back that was not read."""
        self._by_ticket.pop(handoff.ticket, None)
        for pushed in handoff.pushed.values():
            self.decline(handoff.session, pushed)
        handoff.pushed.clear()

    def decline(self, session: Session, pushed: Pushed) -> None:
        """These bytes are read by nobody (any more)."""
        if pushed.HasField("staged"):
            session.link.send(HandoffMessage(consumed=Consumed(piece=pushed.staged.piece)))

    def on_notice(self, event: Notified) -> None:
        """The bytes of a part are there."""
        tag = wire.read_tag(event.tag)
        if tag is None:
            self._counters.refused["malformed"] += 1
            return
        ticket, part = tag
        handoff = self._by_ticket.get(ticket)
        if handoff is None or event.peer != handoff.session.incarnation:
            self._counters.refused["stale"] += 1
            return
        handoff.tagged.add(part)
        self._join(handoff, part)

    def on_pushed(self, handoff: Incoming, pushed: Pushed) -> None:
        """The prefill side says what a part is.

        Raises:
            TransferError: it names bytes that are not its own.
        """
        self._check_piece(handoff.session, pushed)
        if pushed.part in handoff.pushed:
            self._counters.refused["repeated"] += 1
            return
        handoff.pushed[pushed.part] = pushed
        self._join(handoff, pushed.part)

    def check(self, handoff: Incoming, part: int) -> None:
        """Verifies an arrived part and puts it into its blocks, off the event loop."""
        pushed = handoff.pushed[part]
        begin = pushed.first_block - len(handoff.cached_ids)
        blocks = handoff.block_ids[begin : begin + pushed.num_blocks]
        size = self._bytes.size(pushed.num_blocks, pushed.num_layers)
        staged = pushed.HasField("staged")
        handoff.num_segments += 1 if staged else len(blocks)
        handoff.num_bytes += size
        ticket = _Check(handoff=handoff, part=part, arrived_at=self._clock.now(), staged=staged)
        if staged:
            handoff.copying += 1
            tokens = min(
                handoff.reserve.num_tokens - pushed.first_block * self._bytes.layout.block_size,
                pushed.num_blocks * self._bytes.layout.block_size,
            )
            job = partial(self._take_piece, pushed, blocks, tokens)
            self._transports.worker.submit(ticket, job)
        elif self._config.digest:
            self._transports.worker.submit(ticket, partial(self._compare, pushed, blocks))
        else:
            self._post(handoff, k.PartChecked(part, True))

    def on_work(self, check: _Check, result: Any) -> None:
        """An answer of the byte worker: whether the part is intact, and for a coded one how long it took."""
        handoff = check.handoff
        handoff.session.counters.verify_s += self._clock.now() - check.arrived_at
        if isinstance(result, DiphaseError):
            _log.warning("part_unreadable request_id=%s why=%r", handoff.key.request_id, result.message)
            intact, consumed = False, None
        else:
            intact, consumed = result if check.staged else (result, None)
        if not intact:
            self._counters.digest_mismatches += 1
        pushed = handoff.pushed.pop(check.part, None)
        if check.staged:
            handoff.copying -= 1
            if pushed is not None:  # else the writer has it back already
                consumed = consumed or Consumed(piece=pushed.staged.piece)
                handoff.session.link.send(HandoffMessage(consumed=consumed))
        self._post(handoff, k.PartChecked(check.part, intact))
        if not handoff.copying:
            held, handoff.held = handoff.held, []
            for event in held:
                self._post(handoff, event)

    def _compare(self, pushed: Pushed, blocks: list[int]) -> bool:
        digests = self._bytes.digests(blocks, pushed.first_layer, pushed.num_layers)
        return digests == list(pushed.digests)

    def _take_piece(self, pushed: Pushed, blocks: list[int], num_tokens: int) -> tuple[bool, Consumed | None]:
        staged = pushed.staged
        data = self._staging[staged.offset : staged.offset + staged.length]
        if self._config.digest and [xxhash.xxh3_64_intdigest(data)] != list(pushed.digests):
            return False, None
        if not staged.codec:
            if len(data) != self._bytes.size(pushed.num_blocks, pushed.num_layers):
                return False, None
            self._bytes.scatter(data, blocks, pushed.first_layer, pushed.num_layers)
            return True, None
        began_at = self._clock.now()
        spec = self._bytes.spec(num_tokens, pushed.first_layer, pushed.num_layers)
        kv = memoryview(bytearray(spec.size_bytes))
        self._coders.codec(staged.codec).decode(data, spec, kv)
        self._bytes.scatter(kv, blocks, pushed.first_layer, pushed.num_layers)
        seconds = self._clock.now() - began_at
        return True, Consumed(
            piece=staged.piece, codec=staged.codec, kv_bytes=spec.size_bytes, seconds=seconds
        )

    def _check_piece(self, session: Session, pushed: Pushed) -> None:
        if not pushed.HasField("staged"):
            return
        staged, window = pushed.staged, session.window
        if staged.codec and staged.codec not in session.codecs:
            raise TransferError(
                f"Pushed.staged.codec is {staged.codec!r}; agreed were {', '.join(session.codecs) or 'none'}"
            )
        begin = 0 if window is None else window.offset
        end = 0 if window is None else window.offset + window.size
        if not begin <= staged.offset <= end - staged.length:
            raise TransferError(
                f"Pushed.staged names {staged.length} bytes at {staged.offset}, outside of the window "
                f"{begin} to {end} that was lent"
            )

    def _join(self, handoff: Incoming, part: int) -> None:
        if part in handoff.tagged and part in handoff.pushed:
            self._post(handoff, wire.part_event(handoff.pushed[part]))
