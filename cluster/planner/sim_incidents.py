"""Workers that crash, drain, come back and change their role while a simulation runs.

What the supervisor's slots and the workers' own drains are to a cluster. Knows who is there, not where
requests go.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...proto.errors import Draining, WorkerLost
from .events import EventQueue, to_ns
from .incidents import Crash, Drain, Incident, RoleChange
from .sim_dispatcher import SimDispatcher
from .sim_handoffs import Handoffs
from .sim_pool import SimPool
from .sim_worker import SimWorker


class SimIncidents:
    """All of a simulation."""

    def __init__(
        self,
        *,
        incidents: Sequence[Incident],
        pool: SimPool,
        dispatcher: SimDispatcher,
        handoffs: Handoffs,
        events: EventQueue,
        hang_after_s: float,
    ) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._handoffs = handoffs
        self._events = events
        self._hang_after_s = hang_after_s
        self._leaving: dict[int, Drain] = {}
        """By place: whoever is there does not come back."""
        for incident in incidents:
            if isinstance(incident, Crash):
                events.at(to_ns(incident.at_s), self._crash, incident)
            elif isinstance(incident, Drain):
                events.at(to_ns(incident.at_s), self._drain, incident)

    def look(self, worker: SimWorker) -> None:
        """Something may have left it: who drains and has nothing any more ends."""
        if worker.draining and worker.alive and worker.idle:
            self._pool.gone(worker)
            self._noticed(worker, self._events.now, drained=True)

    def _crash(self, crash: Crash) -> None:
        worker, now = self._pool.workers[crash.worker], self._events.now
        if not worker.alive:
            return
        self._pool.gone(worker)
        self._handoffs.halt(worker)
        noticed = now + to_ns(crash.noticed_s(self._hang_after_s))
        self._events.at(noticed, self._noticed, worker, now)
        if crash.back_s is not None:
            self._events.at(max(noticed, now + to_ns(crash.back_s)), self._restart, worker)

    def _drain(self, drain: Drain) -> None:
        worker = self._pool.workers[drain.worker]
        if drain.worker in self._leaving:
            return  # it leaves already
        self._leaving[drain.worker] = drain
        if not self._pool.handle(worker).attached:
            self._succeed(worker)
            return
        self._pool.drains(worker)
        self._events.at(self._events.now + to_ns(drain.timeout_s), self._evict, worker)
        self.look(worker)

    def _evict(self, worker: SimWorker) -> None:
        """The drain has taken too long."""
        if worker.alive:
            error = Draining(f"worker {worker.name} stops and did not finish this in time")
            self._dispatcher.evicted(self._pool.handle(worker), error)
            self.look(worker)

    def _noticed(self, worker: SimWorker, since: int, *, drained: bool = False) -> None:
        """The router knows that its process is gone."""
        handle = self._pool.lost(worker, drained=drained)
        error = Draining if drained else WorkerLost
        self._dispatcher.lost(handle, error(f"worker {worker.name} was lost"), since)
        if worker.index in self._leaving:
            self._succeed(worker)

    def _succeed(self, worker: SimWorker) -> None:
        change = self._leaving[worker.index]
        if isinstance(change, RoleChange):
            self._events.at(self._events.now + to_ns(change.start_s), self._replace, change)

    def _replace(self, change: RoleChange) -> None:
        del self._leaving[change.worker]
        self._pool.replace(change.worker, change.successor)
        self._dispatcher.available()

    def _restart(self, worker: SimWorker) -> None:
        if self._pool.workers[worker.index] is worker and worker.index not in self._leaving:
            self._pool.restart(worker.index)
            self._dispatcher.available()
