"""The prefill side of hand-offs: drives one machine (prefill_side.py) a hand-off. Runs on the event loop
only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..proto.errors import DiphaseError, PeerLost, TransferError
from ..proto.handoff_pb2 import Complete, HandoffMessage, PeerHello, Progress, Reserve
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.worker_pb2 import PeerAddress, Submit
from . import machine as k
from . import wire
from .base import Event as TransportEvent
from .codecs.codec_choice import Choice
from .driver import HandoffDriver, Session
from .events import SenderEvent, SendFailed, Sent
from .link import ControlLink, Dialer, check_hello, sharding_of
from .outgoing_parts import Outgoing, OutgoingPart, PartWriter
from .pool import BlockPool
from .prefill_side import Prefill, PrefillState, start_prefill, step_prefill
from .push_plan import push_stops
from .side import HandoffSide
from .staging import Credits, Window

_log = logging.getLogger(__name__)


PROBE_BYTES = 1024 * 1024
"""Of a push over a link that was not measured yet."""

__all__ = ["HandoffSender", "SendFailed", "SenderEvent", "Sent"]


class HandoffSender(HandoffDriver[Outgoing, SenderEvent]):
    """All hand-offs that leave this process.

    References to blocks are the sender's own: it takes one to each block that computed() names and gives it
    back when no transfer can read the block any more, whatever the owner does with its own. `events` is
    called on the loop, never from inside a call of the owner other than pump().
    """

    def __init__(
        self,
        side: HandoffSide,
        *,
        pool: BlockPool,
        dialer: Dialer,
        events: Callable[[SenderEvent], None],
    ) -> None:
        super().__init__(side, pool=pool, events=events)
        self._dialer = dialer
        self._parts = PartWriter(side, self._part_ended, self._chosen)

    def begin(
        self,
        key: HandoffKey,
        peer: PeerAddress,
        submit: Submit,
        num_tokens: int,
        block_hashes: Sequence[bytes] = (),
        *,
        cached_tokens: int = 0,
    ) -> None:
        """Asks the decode worker `peer` for room; call when the first chunk of the prompt is scheduled.

        `num_tokens` tokens of KV will be sent (prompt and earlier attempts' tokens), of which `cached_tokens`
        need not be computed here; `block_hashes` are those of their full blocks, so that what the decode side
        has cached is not sent. `submit` is passed on unchanged: the caller brings its elapsed_s up to date.
        Dials the peer if there is no link yet. Failures come as events.

        Raises:
            ValueError: the key is in flight already, or there are no tokens.
        """
        if key in self._handoffs:
            raise ValueError(f"hand-off {key} is in flight already")
        if num_tokens < 1:
            raise ValueError(f"hand-off {key} has {num_tokens} tokens to send")
        session = self._sessions.get(peer.incarnation) or self._dial(peer)
        handoff = Outgoing(
            key=key,
            session=session,
            machine=start_prefill(
                num_tokens=num_tokens,
                block_size=self._layout.block_size,
                num_layers=self._layout.num_layers,
                layerwise=num_tokens >= self._config.layerwise_tokens,
                max_push_runs=max(1, self._push_bytes(session) // self._layout.layer_bytes),
                timing=self._timing,
                now=self._clock.now(),
            ),
            began_at=self._clock.now(),
            cached_tokens=cached_tokens,
        )
        self._add(handoff)
        self._timer.arm(handoff.machine.due)
        if session.closing:
            self._post(
                handoff, k.PeerGone(k.Fault("peer_lost", "the last connection to this worker still closes"))
            )
        else:
            reserve = Reserve(submit=submit, num_tokens=num_tokens, block_hashes=block_hashes)
            session.link.send(wire.message(key, reserve=reserve))
        self._settle()

    def push_stops(self, key: HandoffKey, *, last: bool) -> tuple[int, ...]:
        """After how many layers of a step computed() should be called; (layout.num_layers,): once, at its
        end. `last`: the step completes the prompt."""
        handoff = self._handoffs.get(key)
        if handoff is None or not handoff.machine.layerwise:
            return (self._layout.num_layers,)
        layers_per_push = min(self._config.layers_per_push, self._layout.num_layers)
        return push_stops(self._layout.num_layers, layers_per_push, last=last)

    def computed(
        self,
        key: HandoffKey,
        block_ids: Sequence[int],
        num_tokens: int,
        first_layer: int = 0,
        num_layers: int | None = None,
    ) -> None:
        """The KV of the first `num_tokens` tokens is in `block_ids` (all of the sequence's, in order) for
        these layers; None: all from first_layer on.

        Takes a reference to each block that it was not told of before. Nothing happens for a hand-off that is
        over.
        """
        handoff = self._handoffs.get(key)
        if handoff is None or handoff.machine.state in (PrefillState.SETTLING, PrefillState.FENCING):
            return
        needed = min(self._layout.num_blocks_for(num_tokens), handoff.machine.num_blocks)
        new = block_ids[len(handoff.block_ids) : needed]
        self._pool.acquire(new)
        handoff.block_ids.extend(new)
        count = self._layout.num_layers - first_layer if num_layers is None else num_layers
        self._post(handoff, k.Computed(num_tokens, first_layer, count))
        self._settle()

    def seeded(
        self, key: HandoffKey, token_id: int, token_at: float, logprobs: TokenLogprobs | None = None
    ) -> None:
        """The prompt is computed and its first token sampled: what is left is pushed and decode may run it.

        The caller may give its own references to the blocks back at once. Nothing happens for a hand-off that
        is over.
        """
        handoff = self._handoffs.get(key)
        if handoff is None:
            return
        computed = handoff.machine.num_tokens - handoff.cached_tokens
        self._coders.prefill.add(computed, self._clock.now() - handoff.began_at)
        handoff.first_token = Complete(token_id=token_id, token_at=token_at, logprobs=logprobs)
        self._post(handoff, k.Seeded())
        self._settle()

    def finish(self, key: HandoffKey) -> None:
        """The first token ended the request: the reservation is given back and no KV moves. No event
        follows."""
        self._end(key, k.Fault(k.CANCELLED, "the first token ended the request"))

    def abort(self, key: HandoffKey, error: DiphaseError) -> None:
        """Ends a hand-off in whatever state; unknown keys are fine. No event follows."""
        self._end(key, k.Fault.of(error))

    def staging_bytes(self) -> dict[str, int]:
        """In use now: pieces of our own buffer, and of windows that decode workers lend."""
        lent = (session.credits for session in self._sessions.values())
        return {
            "gathered": self._parts.staged_bytes,
            "at_peers": sum(window.used for window in lent if window is not None),
        }

    async def close(self) -> None:
        """Ends every hand-off and link; no event follows. The transports are the caller's to close,
        afterwards."""
        await super().close()
        await self._dialer.close()

    def _end(self, key: HandoffKey, fault: k.Fault) -> None:
        handoff = self._handoffs.get(key)
        if handoff is not None:
            self._post(handoff, k.Ended(fault))
            self._settle()

    def _push_bytes(self, session: Session) -> int:
        """Most bytes of one push: a part must not take as long as what counts as no progress."""
        known = session.estimate.bytes_per_s(self._clock.now())
        most = PROBE_BYTES if known is None else int(known * self._config.progress_timeout_s / 4)
        return min(self._config.max_push_bytes, most)

    # Sessions.

    def _dial(self, peer: PeerAddress) -> Session:
        for old in list(self._sessions.values()):
            if old.worker_id == peer.worker_id:
                self._take_down(old, PeerLost(f"worker {peer.worker_id} was restarted"))
        hello = self._identity.hello(self._transports.endpoints(), codecs=self._coders.names)
        link = self._dialer.dial(peer.address, hello, self, self._config.reserve_timeout_s)
        session = Session(worker_id=peer.worker_id, incarnation=peer.incarnation, link=link)
        self._sessions[peer.incarnation] = session
        return session

    def link_up(self, link: ControlLink, hello: PeerHello) -> None:
        """See link.LinkCaller."""
        session = self._session_of(link)
        if session is None:
            raise PeerLost("this link is not wanted any more")
        check_hello(self._identity, hello)
        if hello.incarnation != session.incarnation:
            raise PeerLost(
                f"worker {session.worker_id} was restarted: incarnation {hello.incarnation} answers, "
                f"{session.incarnation} was meant"
            )
        if hello.transport not in self._transports.names or hello.transport not in hello.endpoints:
            raise TransferError(
                f"worker {session.worker_id} chose transport {hello.transport!r}, "
                f"which is not one of {self._transports.names}"
            )
        sharding = sharding_of(hello, self._layout)
        transport = self._transports[hello.transport]
        peer = transport.connect(hello.endpoints[hello.transport], self._config.reserve_timeout_s)
        if peer != session.incarnation:
            transport.disconnect(peer)
            raise TransferError(f"the endpoint of worker {session.worker_id} is that of {peer}")
        session.transport, session.transport_name = transport, hello.transport
        session.sharding = sharding
        if hello.HasField("staging") and self._transports.staging is not None:
            lent = hello.staging
            session.credits = Credits(Window(lent.region, lent.offset, lent.size))
            session.codecs = self._coders.shared(hello.codecs)
        session.counters = self.counters.peer(hello.transport, session.worker_id)
        _log.info("session_up worker=%s transport=%s", session.worker_id, hello.transport)

    # Driver.

    def _step(self, machine: Prefill, event: k.Event, now: float) -> tuple[Prefill, k.Actions]:
        return step_prefill(machine, event, now)

    def _on_message(self, session: Session, message: HandoffMessage) -> None:
        if message.HasField("consumed"):
            if not self._parts.consumed(session, message.consumed):
                self.counters.refused["stale"] += 1
            return
        key = wire.key_of(message.id)
        event = wire.prefill_event(message)
        handoff = self._handoffs.get(key)
        if event is None:
            self.counters.refused["malformed"] += 1
        elif handoff is not None and handoff.session is session:
            if isinstance(event, k.PeerGranted) and not handoff.remote_ids:
                handoff.remote_ids = list(message.granted.block_ids)
                handoff.ticket = message.granted.ticket
                if not self._parts.choose(handoff):
                    # As if everything were cached there: nothing is pushed.
                    handoff.recompute = True
                    event = k.PeerGranted(handoff.machine.num_blocks, 0)
            self._post(handoff, event)
        elif isinstance(event, k.PeerAborted | k.PeerGranted):
            # Decode waits to hear that nothing of this hand-off is written any more, and nothing is.
            session.link.send(wire.abort(key, k.Fault(k.CANCELLED, "nothing is sent any more")))
        else:
            self.counters.refused["stale"] += 1

    def _on_transport(self, name: str, event: TransportEvent) -> None:
        self._parts.on_transport(name, event)

    def _on_work(self, ticket: OutgoingPart, result: Any) -> None:
        self._parts.on_work(ticket, result)

    def _part_ended(self, handoff: Outgoing, part: int, fault: k.Fault | None) -> None:
        if fault is None:
            self._link_moved(handoff.session)
        self._post(handoff, k.WriteEnded(part, fault))

    def _chosen(self, handoff: Outgoing, choice: Choice) -> None:
        self.traces.note(handoff.key, self._clock.now(), choice)

    def _act(self, handoff: Outgoing, action: k.Action) -> None:
        link = handoff.session.link
        match action:
            case k.Push():
                self._parts.push(handoff, action)
            case k.CancelWrites():
                self._parts.cancel(handoff)
            case k.SendProgress(num_tokens):
                link.send(wire.message(handoff.key, progress=Progress(computed_tokens=num_tokens)))
            case k.SendComplete(num_parts):
                handoff.first_token.num_parts = num_parts
                handoff.first_token.recompute = handoff.recompute
                link.send(wire.message(handoff.key, complete=handoff.first_token))
            case k.SendAbort(fault):
                link.send(wire.abort(handoff.key, fault))
            case k.StartFence():
                self._fence(handoff)
            case k.Disconnect():
                self._take_down(handoff.session, PeerLost("a fence did not hold in time"))
            case k.Release():
                self._release(handoff)
            case k.Report(fault):
                self._report(handoff, fault)

    def _forget(self, handoff: Outgoing) -> None:
        self._parts.over(handoff)
        super()._forget(handoff)

    def _release(self, handoff: Outgoing) -> None:
        self._parts.forget(handoff)
        self._pool.release(handoff.block_ids)
        handoff.block_ids = []

    def _report(self, handoff: Outgoing, fault: k.Fault | None) -> None:
        session = handoff.session
        counters = session.counters
        if fault is not None:
            if session.transport is None:
                counters = self.counters.peer("", session.worker_id)
            counters.failures[fault.code] += 1
            self._reports.append(SendFailed(key=handoff.key, error=fault.error()))
            return
        counters.transfers += 1
        counters.num_bytes += handoff.num_bytes
        counters.num_segments += handoff.num_segments
        self._reports.append(Sent(key=handoff.key))
