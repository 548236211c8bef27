"""What sender and receiver share: sessions with peers, the queue of events, deadlines, reports, drain.

A session is a control link and a transport connection with one incarnation of a peer. They live and die
together: when one ends the other is taken down, and only when the transport says PeerDown (nothing of that
process can touch our memory any more) the session is forgotten. Until then the same incarnation cannot open
another.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..proto.errors import Cancelled, DiphaseError, TransferError
from ..proto.handoff_pb2 import HandoffMessage
from ..proto.ids import HandoffKey
from ..proto.kv_layout import UNSHARDED, Sharding
from ..proto.worker_pb2 import Inspect, Inspected
from . import machine as k
from .base import Event as TransportEvent
from .base import Fenced, PeerDown, Transport
from .codecs.codec_choice import LinkEstimate
from .counters import HandoffCounters, PeerCounters
from .handoff_traces import TraceBook
from .link import ControlLink
from .pool import BlockPool
from .pump_timer import PumpTimer
from .side import HandoffSide
from .staging import Credits, Window

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Session:
    """See the module's paragraph."""

    worker_id: str
    incarnation: str
    link: ControlLink
    transport: Transport | None = None
    """None until the link is up."""
    transport_name: str = ""
    counters: PeerCounters = field(default_factory=PeerCounters)
    """Of this transport and peer; counted into from the moment that the transport is chosen."""
    sharding: Sharding = UNSHARDED
    """How the peer's pool is cut."""
    codecs: list[str] = field(default_factory=list)
    """That both ends have, beside raw."""
    estimate: LinkEstimate = field(default_factory=LinkEstimate)
    """Prefill: how quick this link is."""
    backlog_bytes: int = 0
    """Prefill: KV of hand-offs that have room there and are not sent."""
    credits: Credits | None = None
    """Prefill: the window of the peer's staging buffer that it may write to."""
    window: Window | None = None
    """Decode: the window of ours that the peer may write to."""
    closing: bool = False
    fences: deque[tuple[HandoffKey, frozenset[int]]] = field(default_factory=deque)
    """Who asked for the fences that are not answered, in order, and the pieces that were torn then."""


class Handoff(Protocol):
    """One hand-off with what its machine does not know."""

    key: HandoffKey
    session: Session
    machine: Any


H = TypeVar("H", bound=Handoff)
R = TypeVar("R")


class HandoffDriver(ABC, Generic[H, R]):
    """Feeds events to machines and does what they answer; H is one side's hand-off, R what it reports."""

    def __init__(
        self,
        side: HandoffSide,
        *,
        pool: BlockPool,
        events: Callable[[R], None],
    ) -> None:
        """`events` is called on the loop, never from inside a call of the owner other than pump()."""
        self.counters = HandoffCounters()
        self.traces = TraceBook()
        self._config = side.config
        self._layout = side.layout
        self._pool = pool
        self._transports = side.transports
        self._identity = side.identity
        self._clock = side.clock
        self._coders = side.coders
        self._events = events
        self._timing = k.Timing.of(side.config)
        self._timer = PumpTimer(self.pump, side.clock)
        self._handoffs: dict[HandoffKey, H] = {}
        self._sessions: dict[str, Session] = {}
        self._queue: deque[tuple[H, k.Event]] = deque()
        self._running = False
        self._reports: deque[R] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        side.transports.listen(self._timer.wake)

    @abstractmethod
    def _step(self, machine: Any, event: k.Event, now: float) -> tuple[Any, k.Actions]:
        """The pure transition of this side."""

    @abstractmethod
    def _act(self, handoff: H, action: k.Action) -> None:
        """Does one action."""

    @abstractmethod
    def _on_transport(self, name: str, event: TransportEvent) -> None:
        """An event that is neither Fenced nor PeerDown."""

    @abstractmethod
    def _on_work(self, ticket: Any, result: Any) -> None:
        """An answer of the byte worker."""

    @abstractmethod
    def _on_message(self, session: Session, message: HandoffMessage) -> None:
        """A message of a peer."""

    def start(self, broken: Callable[[Exception], None]) -> None:
        """Binds to the running loop: from now on transports wake it and deadlines are kept. `broken` is told
        once when no hand-off can be expected to end any more; the process should."""
        self._timer.start(broken)

    @property
    def in_flight(self) -> int:
        """Hand-offs not over yet: those that wait, that are leased and that are fenced included."""
        return len(self._handoffs)

    def inspect(self, question: Inspect, *, outgoing: bool) -> Inspected:
        """This side's figures, and the events of the request that is asked for."""
        return Inspected(
            id=question.id,
            transfers=self.counters.figures(outgoing=outgoing),
            events=self.traces.events(question.request_id) if question.request_id else [],
        )

    def pump(self) -> None:
        """Handles transport events, the byte worker's answers and deadlines; called by itself once started.

        Raises:
            InternalError: a transport or the byte worker is broken.
        """
        for name, event in self._transports.poll():
            self._take(name, event)
        for ticket, result in self._transports.worker.poll():
            self._on_work(ticket, result)
        self._run()
        self._tick()
        self._deliver()

    async def drain(self) -> None:
        """Returns when nothing is in flight, leases included. Cancelling it changes nothing."""
        await self._idle.wait()

    async def close(self) -> None:
        """Ends every hand-off and link; no event follows. The transports are the caller's to close,
        afterwards."""
        for session in list(self._sessions.values()):
            self._take_down(session, Cancelled("this worker stops"))
        self._run()
        self._reports.clear()
        self._timer.stop()

    def link_messages(self, link: ControlLink, messages: Any) -> None:
        """See link.LinkUser."""
        session = self._session_of(link)
        if session is None or session.closing:
            return
        for message in messages:
            self._on_message(session, message)
        self._run()
        self._deliver()

    def link_down(self, link: ControlLink, error: DiphaseError) -> None:
        """See link.LinkUser."""
        session = self._session_of(link)
        if session is not None:
            self._take_down(session, error)
            self._run()
            self._deliver()

    def _session_of(self, link: ControlLink) -> Session | None:
        for session in self._sessions.values():
            if session.link is link:
                return session
        return None

    def _take_down(self, session: Session, error: DiphaseError) -> None:
        """Ends both planes of a session; its hand-offs fail now and let go of their blocks at PeerDown."""
        if session.closing:
            return
        _log.info(
            "session_down worker=%s incarnation=%s why=%r",
            session.worker_id,
            session.incarnation,
            error.message,
        )
        session.closing = True
        session.fences.clear()
        fault = k.Fault.of(error)
        for handoff in self._of(session):
            self._post(handoff, k.LinkLost(fault))
        session.link.close()
        if session.transport is None:
            self._bury(session, fault)
        else:
            session.transport.disconnect(session.incarnation)

    def _bury(self, session: Session, fault: k.Fault) -> None:
        """Nothing of this session can touch our memory any more."""
        del self._sessions[session.incarnation]
        self._session_over(session)
        session.closing = True
        session.link.close()
        for handoff in self._of(session):
            self._post(handoff, k.PeerGone(fault))

    def _session_over(self, session: Session) -> None:
        """For what a side keeps beside its hand-offs."""

    def _link_moved(self, session: Session) -> None:
        """Bytes get through: no hand-off of this link is without progress."""
        now = self._clock.now()
        for handoff in self._of(session):
            handoff.machine = k.link_moved(handoff.machine, now)

    def _of(self, session: Session) -> list[H]:
        return [handoff for handoff in self._handoffs.values() if handoff.session is session]

    def _take(self, name: str, event: TransportEvent) -> None:
        if isinstance(event, Fenced):
            session = self._sessions.get(event.peer)
            if session is not None and session.fences:
                key, torn = session.fences.popleft()
                if event.ok and session.credits is not None:
                    session.credits.fenced(torn)
                handoff = self._handoffs.get(key)
                if handoff is not None:
                    self._post(handoff, k.FenceEnded(event.ok))
        elif isinstance(event, PeerDown):
            session = self._sessions.get(event.peer)
            if session is not None:
                self._bury(session, k.Fault("peer_lost", event.message))
        else:
            self._on_transport(name, event)

    def _fence(self, handoff: H) -> None:
        session = handoff.session
        if session.closing or session.transport is None:
            return  # PeerGone is on its way and says more than a fence could
        try:
            session.transport.fence(session.incarnation, self._config.progress_timeout_s)
        except TransferError as error:
            self._take_down(session, error)
            return
        torn = session.credits.torn_now() if session.credits is not None else frozenset[int]()
        session.fences.append((handoff.key, torn))
        session.counters.fences += 1

    def _add(self, handoff: H) -> None:
        self._handoffs[handoff.key] = handoff
        self._idle.clear()
        self.traces.note(handoff.key, self._clock.now(), handoff.machine.state)

    def _post(self, handoff: H, event: k.Event) -> None:
        self._queue.append((handoff, event))

    def _run(self) -> None:
        """Until no event is left; actions may post more."""
        if self._running:
            return
        self._running = True
        try:
            while self._queue:
                handoff, event = self._queue.popleft()
                now = self._clock.now()
                before = handoff.machine.state
                handoff.machine, actions = self._step(handoff.machine, event, now)
                self.traces.note(handoff.key, now, event)
                if handoff.machine.state != before:
                    self.traces.note(handoff.key, now, handoff.machine.state)
                for action in actions:
                    self.traces.note(handoff.key, now, action)
                    if isinstance(action, k.Refuse):
                        self.counters.refused[action.reason] += 1
                    else:
                        self._act(handoff, action)
                if handoff.machine.state == "over":
                    self._forget(handoff)
                else:
                    self._timer.arm(handoff.machine.due)
        finally:
            self._running = False

    def _forget(self, handoff: H) -> None:
        if self._handoffs.get(handoff.key) is handoff:
            del self._handoffs[handoff.key]
        if not self._handoffs:
            self._idle.set()

    def _tick(self) -> None:
        now = self._clock.now()
        if not self._timer.take_due(now):
            return
        for handoff in list(self._handoffs.values()):
            if handoff.machine.due <= now:
                self._post(handoff, k.Tick())
            else:
                self._timer.arm(handoff.machine.due)
        self._run()

    def _settle(self) -> None:
        """At the end of a call by the owner: reports wait for the next turn of the loop."""
        self._run()
        if self._reports:
            self._timer.wake()

    def _deliver(self) -> None:
        while self._reports:
            self._events(self._reports.popleft())
