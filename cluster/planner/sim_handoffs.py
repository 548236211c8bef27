"""Hand-offs in virtual time: blocks reserved on the decode side, bytes over links, then the sequence joins.

What the protocol of kv_transfer/ comes to when nothing fails: the reservation is asked for when the first
chunk of the prompt begins, waits in order of arrival while the decode side has no room, and layers are pushed
while later ones compute.
"""

from __future__ import annotations

from collections import deque
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
from .topology import Links


@dataclass(slots=True, eq=False)
class Handoff:
    request: SimRequest
    source: SimWorker
    target: SimWorker
    sequence: Sequence
    """On the prefill side; its blocks are held until the hand-off is over."""
    block_ids: list[int] = field(default_factory=list)
    num_bytes: float = 0.0
    body_over: bool = False
    """All layers but the last are there, as far as the links go."""
    computed: bool = False


class Handoffs:
    """All of a simulation. `joined` is called when a sequence may decode."""

    def __init__(
        self,
        deployment: Deployment,
        workers: list[SimWorker],
        events: EventQueue,
        slo: Slo,
        joined: Callable[[Handoff], None],
    ) -> None:
        self._deployment = deployment
        self._events = events
        self._slo = slo
        self._joined = joined
        self._paths = deployment.topology.paths
        self._latency = to_ns(deployment.topology.latency_s)
        self.links = Links(deployment.topology, events)
        self._waiting: dict[int, deque[Handoff]] = {worker.index: deque() for worker in workers}
        self._pools = {
            worker.index: ReservationPool(worker.blocks, _growth_of(worker))
            for worker in workers
            if worker.spec.role == "decode"
        }
        self._here: dict[int, Handoff] = {}
        self.under_way = {worker.index: 0 for worker in workers}

    def begin(self, request: SimRequest, source: SimWorker, target: SimWorker, sequence: Sequence) -> None:
        """The first chunk of the prompt begins."""
        handoff = Handoff(request, source, target, sequence)
        self._here[request.index] = handoff
        self.under_way[target.index] += 1
        self._waiting[target.index].append(handoff)
        self.give_room(target)

    def computed(self, request: SimRequest) -> None:
        """The prompt's last layer is there."""
        handoff = self._here[request.index]
        handoff.computed = True
        self._finish(handoff)

    def give_room(self, target: SimWorker) -> None:
        """Grants what waits for blocks there, in order."""
        waiting = self._waiting[target.index]
        if not waiting:
            return
        target.settle()
        pool, tables = self._pools[target.index], target.tables
        while waiting:
            handoff = waiting[0]
            cached = pool.match_prefix(handoff.request.hashes)
            num_blocks = tables.num_blocks_for(handoff.request.prompt_tokens)
            try:
                new = pool.allocate(num_blocks - len(cached))
            except OutOfBlocks:
                pool.release(cached)
                return
            waiting.popleft()
            handoff.block_ids = [*cached, *new]
            handoff.num_bytes = float(len(new) * self._deployment.block_bytes)
            self._push(handoff)

    def _push(self, handoff: Handoff) -> None:
        """All but the last layer may go while the prompt is computed."""
        layers = self._deployment.num_layers
        body = handoff.num_bytes * (layers - 1) / layers
        path = self._paths[handoff.source.index, handoff.target.index]
        self.links.send(path, body, partial(self._body_over, handoff))

    def _body_over(self, handoff: Handoff) -> None:
        handoff.body_over = True
        self._finish(handoff)

    def _finish(self, handoff: Handoff) -> None:
        if not (handoff.computed and handoff.body_over):
            return
        path = self._paths[handoff.source.index, handoff.target.index]
        tail = handoff.num_bytes / self._deployment.num_layers
        self.links.send(path, tail, partial(self._verify, handoff))

    def _verify(self, handoff: Handoff) -> None:
        self._events.at(self._events.now + self._latency, self._end, handoff)

    def _end(self, handoff: Handoff) -> None:
        request, source, target = handoff.request, handoff.source, handoff.target
        del self._here[request.index]
        self.under_way[target.index] -= 1
        request.verified = self._events.now
        assert source.prefill is not None
        assert target.decode is not None
        source.prefill.release(handoff.sequence)
        target.settle()
        sequence = sequence_of(request, self._slo, generated=1)
        sequence.block_table = handoff.block_ids
        sequence.num_computed = request.prompt_tokens
        target.decode.admit(sequence)
        self._joined(handoff)
        self.give_room(target)  # its blocks can be shared from now on
        source.start()
        target.start()


def _growth_of(worker: SimWorker) -> Callable[[], int]:
    decode = worker.decode
    assert decode is not None
    return lambda: decode.growth_blocks
