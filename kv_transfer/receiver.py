"""The decode side of hand-offs: gives room, verifies what arrives, passes it on (decode_side.py is its
machine).

Runs on the event loop only. It is the LinkAcceptor of the worker: grpc_link.py or memory_link.py bring it the
links that prefill workers dial.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from ..proto.errors import (
    DiphaseError,
    Draining,
    OutOfBlocks,
    Overloaded,
    PeerLost,
    TransferError,
)
from ..proto.handoff_pb2 import (
    Granted,
    HandoffMessage,
    PeerHello,
    Pushed,
    Queued,
    Refused,
    Reserve,
    StagingWindow,
    Verified,
)
from ..proto.ids import HandoffKey
from . import machine as k
from . import wire
from .admission import NewestAttempts, check_reservation
from .base import Event as TransportEvent
from .base import Notified
from .config import MIB
from .decode_side import Decode, start_decode, step_decode
from .driver import HandoffDriver, Session
from .events import Ready, ReceiveFailed, ReceiverEvent
from .incoming_parts import Incoming, PartReader
from .link import ControlLink, check_hello, sharding_of
from .pool import BlockPool
from .side import HandoffSide
from .staging import Lender

_log = logging.getLogger(__name__)


__all__ = ["HandoffReceiver", "Ready", "ReceiveFailed", "ReceiverEvent"]


class HandoffReceiver(HandoffDriver[Incoming, ReceiverEvent]):
    """All hand-offs that come to this process. `events` is called on the loop, never from inside a call of
    the owner other than pump()."""

    def __init__(
        self,
        side: HandoffSide,
        *,
        pool: BlockPool,
        events: Callable[[ReceiverEvent], None],
    ) -> None:
        super().__init__(side, pool=pool, events=events)
        self._waiting: OrderedDict[HandoffKey, Incoming] = OrderedDict()
        self._attempts = NewestAttempts()
        self._parts = PartReader(side, self.counters, self._post)
        self._draining = False
        staging = side.transports.staging
        self._lender = Lender(
            side.transports.staging_region,
            0 if staging is None else staging.num_bytes,
            side.config.staging_window_mib * MIB,
        )

    def room_freed(self) -> None:
        """Blocks were released: waiting reservations are granted in order of arrival. Cheap when none
        waits."""
        if self._waiting:
            self._give_room()
            self._settle()

    def abort(self, key: HandoffKey, error: DiphaseError) -> None:
        """Ends a hand-off in whatever state; unknown keys are fine. No event follows."""
        handoff = self._handoffs.get(key)
        if handoff is not None:
            self._post(handoff, k.Ended(k.Fault.of(error)))
            self._settle()

    def abort_all(self, error: DiphaseError) -> None:
        """Ends every hand-off; the prefill sides are told `error`. No event follows."""
        for handoff in self._handoffs.values():
            self._post(handoff, k.Ended(k.Fault.of(error)))
        self._settle()

    @property
    def reserved_blocks(self) -> int:
        """Blocks granted to hand-offs that are not Ready, cached ones included, quarantined ones not."""
        return sum(
            len(handoff.block_ids) + len(handoff.cached_ids)
            for handoff in self._handoffs.values()
            if handoff.quarantined_at is None
        )

    def staging_bytes(self) -> dict[str, int]:
        """Of windows that are lent now: one for each session that got one."""
        return {"lent": self._lender.lent_bytes}

    def refuse_new(self) -> None:
        """Draining: reservations that come from now on are refused; those in flight go on."""
        self._draining = True

    async def drain(self) -> None:
        """refuse_new(), then returns when nothing is in flight, quarantine included."""
        self.refuse_new()
        await super().drain()

    # Sessions.

    def accept(self, link: ControlLink, hello: PeerHello) -> PeerHello:
        """See link.LinkAcceptor."""
        check_hello(self._identity, hello)
        known = self._sessions.get(hello.incarnation)
        if known is not None:
            self._take_down(known, PeerLost(f"worker {hello.worker_id} dialled again"))
            self._run()
            raise PeerLost("the last connection to this worker still closes; try again")
        for old in list(self._sessions.values()):
            if old.worker_id == hello.worker_id:
                self._take_down(old, PeerLost(f"worker {hello.worker_id} was restarted"))
        sharding = sharding_of(hello, self._layout)
        name = self._transports.choose(hello.endpoints, self._config.transport)
        transport = self._transports[name]
        transport.admit(hello.incarnation)
        self._sessions[hello.incarnation] = session = Session(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            link=link,
            transport=transport,
            transport_name=name,
            counters=self.counters.peer(name, hello.worker_id),
            sharding=sharding,
            window=self._lender.lend(),
        )
        self._run()
        staged = "no" if session.window is None else "yes"
        _log.info("session_up worker=%s transport=%s staging=%s", hello.worker_id, name, staged)
        session.codecs = self._coders.shared(hello.codecs)
        answer = self._identity.hello({name: transport.endpoint()}, name, session.codecs)
        if session.window is not None:
            window = session.window
            lent = StagingWindow(region=window.region, offset=window.offset, size=window.size)
            answer.staging.CopyFrom(lent)
        return answer

    # Driver.

    def pump(self) -> None:
        """Handles transport events, the byte worker's answers and deadlines, and gives room; called by
        itself once started."""
        self._give_room()
        super().pump()

    def _post(self, handoff: Incoming, event: k.Event) -> None:
        if handoff.copying and isinstance(event, k.FenceEnded | k.PeerGone):
            handoff.held.append(event)
        else:
            super()._post(handoff, event)

    def _session_over(self, session: Session) -> None:
        self._take_window_back(session)

    def _take_window_back(self, session: Session) -> None:
        """When nobody can write there any more and no copy reads there: the next peer would change what is
        being copied, behind the back of its digest."""
        is_over = self._sessions.get(session.incarnation) is not session
        if is_over and session.window is not None and not any(each.copying for each in self._of(session)):
            self._lender.take_back(session.window)
            session.window = None

    def _step(self, machine: Decode, event: k.Event, now: float) -> tuple[Decode, k.Actions]:
        return step_decode(machine, event, now)

    def _on_message(self, session: Session, message: HandoffMessage) -> None:
        key = wire.key_of(message.id)
        event = wire.decode_event(message)
        handoff = self._handoffs.get(key)
        if message.HasField("pushed"):
            self._on_pushed(session, handoff, message.pushed)
        elif event is None:
            self.counters.refused["malformed"] += 1
        elif handoff is not None and handoff.session is session:
            if isinstance(event, k.PeerCompleted) and not handoff.completed_at:
                handoff.complete, handoff.completed_at = message.complete, self._clock.now()
            self._post(handoff, event)
        elif isinstance(event, k.PeerReserved):
            self._reserve(session, key, message.reserve)
        elif isinstance(event, k.PeerCompleted) and self._attempts.was_ready(key):
            session.link.send(wire.message(key, verified=Verified()))
        elif not isinstance(event, k.PeerAborted):  # which is the answer to ours, when nothing is left to end
            self.counters.refused["stale"] += 1

    def _reserve(self, session: Session, key: HandoffKey, reserve: Reserve) -> None:
        try:
            self._admit(key, reserve)
        except DiphaseError as error:
            self.counters.refused["reservation"] += 1
            _log.info("reservation_refused request_id=%s attempt=%d why=%r", *key, error.message)
            refused = Refused(error=wire.wire_error(k.Fault.of(error)))
            session.link.send(wire.message(key, refused=refused))
            return
        now = self._clock.now()
        handoff = Incoming(
            key=key,
            session=session,
            machine=start_decode(
                num_blocks=self._layout.num_blocks_for(reserve.num_tokens),
                num_layers=self._layout.num_layers,
                timing=self._timing,
                now=now,
            ),
            reserve=reserve,
            reserved_at=now,
            ticket=self._parts.new_ticket(),
        )
        self._add(handoff)
        self._parts.add(handoff)
        self._waiting[key] = handoff
        self._give_room()
        if key in self._waiting:
            self._post(handoff, k.Tick())  # says Queued

    def _admit(self, key: HandoffKey, reserve: Reserve) -> None:
        """
        Raises:
            DiphaseError: this reservation cannot be taken; the error goes to the prefill side.
        """
        if self._draining:
            raise Draining(f"worker {self._identity.worker_id} is draining")
        check_reservation(reserve, self._layout, self._pool.num_blocks)
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} hand-offs wait for KV blocks already")
        overtaken = self._attempts.begin(key)
        if overtaken in self._handoffs:
            self._post(
                self._handoffs[overtaken], k.Ended(k.Fault(k.CANCELLED, f"attempt {key.attempt} has begun"))
            )

    def _give_room(self) -> None:
        self._run()  # what is to end frees its place in the queue first
        while self._waiting:
            key, handoff = next(iter(self._waiting.items()))
            if not self._allocate(handoff):
                return
            del self._waiting[key]
            self._post(handoff, k.RoomFound(len(handoff.cached_ids)))
            self._run()

    def _allocate(self, handoff: Incoming) -> bool:
        cached = self._pool.match_prefix(handoff.reserve.block_hashes)
        try:
            allocated = self._pool.allocate(handoff.machine.num_blocks - len(cached))
        except OutOfBlocks:
            self._pool.release(cached)
            return False
        handoff.cached_ids, handoff.block_ids = cached, allocated
        handoff.granted_at = self._clock.now()
        return True

    def _on_pushed(self, session: Session, handoff: Incoming | None, pushed: Pushed) -> None:
        if handoff is None or handoff.session is not session:
            self.counters.refused["stale"] += 1
            self._parts.decline(session, pushed)
            return
        try:
            self._parts.on_pushed(handoff, pushed)
        except TransferError as error:
            self._take_down(session, error)

    def _on_transport(self, name: str, event: TransportEvent) -> None:
        if isinstance(event, Notified):
            self._parts.on_notice(event)
            if event.peer in self._sessions:
                self._link_moved(self._sessions[event.peer])

    def _on_work(self, ticket: Any, result: Any) -> None:
        self._parts.on_work(ticket, result)

    def _act(self, handoff: Incoming, action: k.Action) -> None:
        link = handoff.session.link
        match action:
            case k.SendGranted():
                granted = Granted(
                    first_block=len(handoff.cached_ids),
                    block_ids=handoff.block_ids,
                    ticket=handoff.ticket,
                    deadline_s=self._config.progress_timeout_s,
                )
                link.send(wire.message(handoff.key, granted=granted))
            case k.SendQueued():
                link.send(wire.message(handoff.key, queued=Queued(lease_s=self._config.lease_s)))
            case k.SendVerified():
                link.send(wire.message(handoff.key, verified=Verified()))
            case k.SendAbort(fault):
                link.send(wire.abort(handoff.key, fault))
                self._judge_silence(handoff)
            case k.Check(part):
                self._parts.check(handoff, part)
            case k.StartFence():
                self._fence(handoff)
            case k.Quarantine():
                self._quarantine(handoff)
            case k.Lift():
                self._pool.lift(handoff.block_ids)
                handoff.block_ids = []
            case k.Release():
                self._pool.release(handoff.cached_ids + handoff.block_ids)
                handoff.cached_ids, handoff.block_ids = [], []
            case k.Report(fault):
                self._report(handoff, fault)

    def _quarantine(self, handoff: Incoming) -> None:
        """Only destinations: what was cached is never written to, and others may use it."""
        self._pool.release(handoff.cached_ids)
        handoff.cached_ids = []
        self._pool.quarantine(handoff.block_ids)
        handoff.quarantined_at = self._clock.now()
        handoff.session.counters.quarantined_blocks += len(handoff.block_ids)

    def _judge_silence(self, handoff: Incoming) -> None:
        """An Abort left (again). A peer that has not said for so long that it cancelled may be stopped, and
        would keep our blocks for as long: with a transport that can, the end of the connection frees them."""
        asked_at, patience_s = handoff.quarantined_at, self._config.progress_timeout_s
        if asked_at is not None and self._clock.now() >= asked_at + patience_s:
            session = handoff.session
            why = f"worker {session.worker_id} did not answer an Abort for {patience_s:g} s"
            self._take_down(session, PeerLost(why))

    def _forget(self, handoff: Incoming) -> None:
        self._waiting.pop(handoff.key, None)
        self._parts.forget(handoff)
        super()._forget(handoff)
        self._take_window_back(handoff.session)

    def _report(self, handoff: Incoming, fault: k.Fault | None) -> None:
        counters = handoff.session.counters
        if fault is not None:
            counters.failures[fault.code] += 1
            self._reports.append(
                ReceiveFailed(key=handoff.key, submit=handoff.reserve.submit, error=fault.error())
            )
            return
        self._attempts.ready(handoff.key)
        counters.transfers += 1
        counters.num_bytes += handoff.num_bytes
        counters.num_segments += handoff.num_segments
        complete = handoff.complete
        cached_tokens = len(handoff.cached_ids) * self._layout.block_size
        self._reports.append(
            Ready(
                key=handoff.key,
                submit=handoff.reserve.submit,
                block_ids=handoff.cached_ids + handoff.block_ids,
                num_tokens=cached_tokens if complete.recompute else handoff.reserve.num_tokens,
                cached_tokens=cached_tokens,
                token_id=complete.token_id,
                logprobs=complete.logprobs if complete.HasField("logprobs") else None,
                token_at=complete.token_at,
                reserved_at=handoff.reserved_at,
                granted_at=handoff.granted_at,
                completed_at=handoff.completed_at,
                verified_at=self._clock.now(),
                num_bytes=handoff.num_bytes,
                num_segments=handoff.num_segments,
            )
        )
