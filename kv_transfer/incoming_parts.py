"""What becomes of the parts that arrive at a decode worker: a tag and its Pushed are joined, then the
bytes are verified.

Stands between the transport's notices and the decode machine. Knows tickets and bytes, never what a
hand-off may do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..proto.handoff_pb2 import Complete, Pushed, Reserve
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .base import Notified
from .counters import HandoffCounters
from .decode_side import Decode
from .digest import digest_runs
from .driver import Session
from .segments import block_runs
from .side import HandoffSide


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
    quarantined: bool = False
    tagged: set[int] = field(default_factory=set)
    """Parts whose tag came."""
    pushed: dict[int, Pushed] = field(default_factory=dict)
    """Parts that the prefill side has described; the first word counts."""
    num_bytes: int = 0
    num_segments: int = 0


class PartReader:
    """All parts that come to this process. `post(handoff, event)` takes PartArrived and PartChecked."""

    def __init__(
        self,
        side: HandoffSide,
        counters: HandoffCounters,
        post: Callable[[Incoming, k.Event], None],
    ) -> None:
        self._config = side.config
        self._layout = side.layout
        self._transports = side.transports
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
        self._by_ticket.pop(handoff.ticket, None)

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
        """The prefill side says what a part is."""
        handoff.pushed.setdefault(pushed.part, pushed)
        self._join(handoff, pushed.part)

    def check(self, handoff: Incoming, part: int) -> None:
        """Verifies an arrived part, off the event loop."""
        pushed = handoff.pushed[part]
        begin = pushed.first_block - len(handoff.cached_ids)
        blocks = handoff.block_ids[begin : begin + pushed.num_blocks]
        runs = block_runs(self._layout, blocks, first_layer=pushed.first_layer, num_layers=pushed.num_layers)
        handoff.num_segments += len(runs)
        handoff.num_bytes += int(runs[:, 1].sum())
        if self._config.digest:
            ticket = (handoff, part, self._clock.now())
            self._transports.worker.submit(ticket, lambda: digest_runs(self._transports.buffer, runs))
        else:
            self._post(handoff, k.PartChecked(part, True))

    def on_work(self, ticket: tuple[Incoming, int, float], digests: Any) -> None:
        """An answer of the byte worker."""
        handoff, part, began_at = ticket
        handoff.session.counters.verify_s += self._clock.now() - began_at
        intact = digests == list(handoff.pushed[part].digests)
        if not intact:
            self._counters.digest_mismatches += 1
        self._post(handoff, k.PartChecked(part, intact))

    def _join(self, handoff: Incoming, part: int) -> None:
        if part in handoff.tagged and part in handoff.pushed:
            self._post(handoff, wire.part_event(handoff.pushed[part]))
