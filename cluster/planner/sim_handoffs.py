"""Hand-offs in virtual time: blocks reserved on the decode side, bytes over links, then the sequence joins.

What the protocol of kv_transfer/ comes to: the reservation is asked for when the first chunk of the prompt
begins, waits in order of arrival while the decode side has no room, and layers are pushed while later ones
compute. When a worker is lost nothing moves any more, and blocks come back with the end of the attempt.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ...decode_workers.reservations import ReservationPool
from ...engine.sequence import Sequence
from ...proto.errors import OutOfBlocks
from ...proto.slo import Slo
from .deployment import Deployment
from .events import EventQueue, to_ns
from .sim_request import SimRequest, sequence_of
from .sim_worker import SimWorker
from .topology import Links, Transfer


@dataclass(slots=True, eq=False)
class Handoff:
    request: SimRequest
    source: SimWorker
    target: SimWorker
    sequence: Sequence
    """On the prefill side; its blocks are held until the hand-off is over."""
    layers: int
    """That are pushed one by one."""
    block_ids: list[int] = field(default_factory=list)
    granted: bool = False
    num_bytes: float = 0.0
    body_over: bool = False
    """All layers but the last are there, as far as the links go."""
    computed: bool = False
    transfer: Transfer | None = None
    """The last that began."""
    halted: bool = False
    """One of its workers is gone: nothing moves any more."""


class Handoffs:
    """All of a simulation. `joined` is called when a sequence may decode."""

    def __init__(
        self,
        deployment: Deployment,
        events: EventQueue,
        slo: Slo,
        joined: Callable[[Handoff, Sequence], None],
    ) -> None:
        self._deployment = deployment
        self._events = events
        self._slo = slo
        self._joined = joined
        self._paths = deployment.topology.paths
        self._latency = to_ns(deployment.topology.latency_s)
        self.links = Links(deployment.topology, events)
        self._waiting: defaultdict[SimWorker, deque[Handoff]] = defaultdict(deque)
        self._pools: dict[SimWorker, ReservationPool] = {}
        self._here: dict[int, Handoff] = {}

    def __contains__(self, request: SimRequest) -> bool:
        """Whether its hand-off has begun and is not over."""
        return request.index in self._here

    def begin(self, request: SimRequest, source: SimWorker, target: SimWorker, sequence: Sequence) -> None:
        """The first chunk of the prompt begins."""
        whole = sequence.num_tokens < self._deployment.layerwise_tokens
        handoff = Handoff(request, source, target, sequence, 1 if whole else self._deployment.num_layers)
        self._here[request.index] = handoff
        source.handoffs += 1
        target.handoffs += 1
        self._waiting[target].append(handoff)
        self.give_room(target)

    def computed(self, request: SimRequest) -> None:
        """The prompt's last layer is there."""
        handoff = self._here[request.index]
        handoff.computed = True
        self._finish(handoff)

    def give_room(self, target: SimWorker) -> None:
        """Grants what waits for blocks there, in order."""
        waiting = self._waiting[target]
        if not waiting or not target.alive:
            return
        target.settle()
        pool, tables = self._pool_of(target), target.tables
        while waiting:
            handoff = waiting[0]
            cached = pool.match_prefix(handoff.request.hashes)
            num_blocks = tables.num_blocks_for(handoff.sequence.num_tokens)
            try:
                new = pool.allocate(num_blocks - len(cached))
            except OutOfBlocks:
                pool.release(cached)
                return
            waiting.popleft()
            handoff.block_ids = [*cached, *new]
            handoff.granted = True
            target.reserved_blocks += len(handoff.block_ids)
            handoff.num_bytes = float(len(new) * self._deployment.block_bytes)
            self._push(handoff)

    def halt(self, worker: SimWorker) -> None:
        """The worker is gone. Who was at the other side learns of it when the request is given up."""
        for handoff in self._here.values():
            if worker in (handoff.source, handoff.target):
                handoff.halted = True
                if handoff.transfer is not None:
                    self.links.cancel(handoff.transfer)

    def abort(self, request: SimRequest) -> None:
        """The attempt is over: both sides have their blocks back, the prefill side unless its scheduler still
        has the prompt. Nothing happens where there is no hand-off."""
        handoff = self._here.pop(request.index, None)
        if handoff is None:
            return
        source, target = handoff.source, handoff.target
        handoff.halted = True
        if handoff.transfer is not None:
            self.links.cancel(handoff.transfer)
        source.handoffs -= 1
        target.handoffs -= 1
        if not handoff.granted:
            self._waiting[target].remove(handoff)
        elif target.alive:
            target.settle()
            target.reserved_blocks -= len(handoff.block_ids)
            self._pool_of(target).release(handoff.block_ids)
        if handoff.computed and source.alive:
            assert source.prefill is not None
            source.prefill.release(handoff.sequence)

    def _push(self, handoff: Handoff) -> None:
        """All but the last layer may go while the prompt is computed."""
        if handoff.halted:
            return
        layers = handoff.layers
        self._send(handoff, handoff.num_bytes * (layers - 1) / layers, self._body_over)

    def _body_over(self, handoff: Handoff) -> None:
        handoff.body_over = True
        self._finish(handoff)

    def _finish(self, handoff: Handoff) -> None:
        if handoff.computed and handoff.body_over and not handoff.halted:
            self._send(handoff, handoff.num_bytes / handoff.layers, self._verify)

    def _send(self, handoff: Handoff, num_bytes: float, done: Callable[[Handoff], None]) -> None:
        path = self._paths[handoff.source.index, handoff.target.index]
        handoff.transfer = self.links.send(path, num_bytes, partial(done, handoff))

    def _verify(self, handoff: Handoff) -> None:
        self._events.at(self._events.now + self._latency, self._end, handoff)

    def _end(self, handoff: Handoff) -> None:
        if handoff.halted:
            return
        request, source, target, computed = handoff.request, handoff.source, handoff.target, handoff.sequence
        del self._here[request.index]
        source.handoffs -= 1
        target.handoffs -= 1
        target.reserved_blocks -= len(handoff.block_ids)
        request.verified = self._events.now
        assert source.prefill is not None
        assert target.decode is not None
        source.prefill.release(computed)
        target.settle()
        sequence = sequence_of(request, self._slo, computed.key.attempt, computed.num_generated)
        sequence.block_table = handoff.block_ids
        sequence.num_computed = computed.num_tokens - 1
        target.decode.admit(sequence)
        self._joined(handoff, sequence)
        self.give_room(target)  # its blocks can be shared from now on
        source.start()
        target.start()

    def _pool_of(self, target: SimWorker) -> ReservationPool:
        pool = self._pools.get(target)
        if pool is None:
            decode = target.decode
            assert decode is not None
            pool = self._pools[target] = ReservationPool(target.blocks, lambda: decode.growth_blocks)
        return pool
