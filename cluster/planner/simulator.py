"""Serves a workload in virtual time with the router's policy and admission and the workers' schedulers.

Deterministic: the same deployment, configuration, requests and incidents give the same records.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ...engine.requests import NOT_FINISHED, Outcome
from ...engine.sequence import Sequence
from ...proto.errors import DiphaseError, Draining, PromptTooLong
from ...proto.slo import Slo
from .closed_loop import ClosedLoop, Sent
from .deployment import Deployment, SimulationConfig
from .events import EventQueue
from .incidents import Incident, check_incidents
from .records import SimResult
from .sim_dispatcher import SimDispatcher
from .sim_handoffs import Handoff, Handoffs
from .sim_incidents import SimIncidents
from .sim_pool import SimPool
from .sim_request import SimRequest
from .sim_worker import SimWorker


class Simulation:
    """One run: tells each part what the workers' steps came to."""

    def __init__(
        self,
        deployment: Deployment,
        config: SimulationConfig,
        requests: Seq[SimRequest] | ClosedLoop,
        incidents: Seq[Incident] = (),
    ) -> None:
        """
        Raises:
            ConfigError: an incident names a worker that is not there, or a link is missing.
        """
        check_incidents(incidents, deployment)
        self._deployment = deployment
        self._clients = requests if isinstance(requests, ClosedLoop) else None
        self.requests = [] if isinstance(requests, ClosedLoop) else list(requests)
        self._slo = Slo(ttft_ms=config.ttft_ms, tpot_ms=config.tpot_ms)
        self._most_missed = config.most_missed
        self._late = self._slow = 0
        self._events = EventQueue()
        self._pool = SimPool(
            deployment,
            config,
            self._events,
            shares=any(request.hashes for request in self.requests),
            on_start=self._on_start,
            on_done=self._on_done,
            on_outgrown=self._on_outgrown,
        )
        self._handoffs = Handoffs(deployment, self._events, self._slo, self._on_joined)
        self._dispatcher = SimDispatcher(
            config=config,
            pool=self._pool,
            handoffs=self._handoffs,
            events=self._events,
            slo=self._slo,
            left=self._look,
            ended=self._on_ended,
        )
        self._incidents = SimIncidents(
            incidents=incidents,
            pool=self._pool,
            dispatcher=self._dispatcher,
            handoffs=self._handoffs,
            events=self._events,
            hang_after_s=config.router.hang_after_s,
        )

    @property
    def workers(self) -> Seq[SimWorker]:
        """Every process that ran, those of the deployment first and in its order."""
        return self._pool.processes

    def run(self) -> SimResult:
        """To the end of the last request, or as soon as too many have missed."""
        for request in self.requests:
            self._events.at(request.arrival, self._dispatcher.accept, request)
        if self._clients:
            self._send(self._clients.first())
        self._events.run()
        return SimResult.of(self._deployment, self.requests, self.workers, self._dispatcher.ended_at)

    def _on_start(self, worker: SimWorker, sequences: Seq[Sequence]) -> None:
        unscheduled = worker.unscheduled
        if not unscheduled:
            return
        now = self._events.now
        for sequence in sequences:
            index = int(sequence.key.request_id)
            if index not in unscheduled or self._dispatcher.open[index].sequence is not sequence:
                continue
            unscheduled.remove(index)
            request = self.requests[index]
            if request.prefill_worker != worker.index:
                request.joined = now
                continue
            if request.scheduled < 0:
                request.scheduled = now
                request.cached_tokens = sequence.num_cached
            if worker.prefill is not None and sequence.num_generated + 1 < request.output_tokens:
                self._begin_handoff(request, worker, sequence)

    def _begin_handoff(self, request: SimRequest, source: SimWorker, sequence: Sequence) -> None:
        """Unless the first token ends the request in any case, or the decode worker refuses."""
        if sequence.num_tokens + 1 >= source.context_length:
            return
        target = self._dispatcher.open[request.index].hosts[-1]
        error: DiphaseError | None = None
        if target.alive and target.draining:
            error = Draining("the decode worker is draining")
        elif target.alive and sequence.num_tokens >= target.context_length:
            error = PromptTooLong(f"{sequence.num_tokens} tokens leave no room on the decode worker")
        if error is None:
            self._handoffs.begin(request, source, target, sequence)
        else:
            now, attempt = self._events.now, sequence.key.attempt
            self._events.at(now, self._dispatcher.refused, request, attempt, error)

    def _on_outgrown(self, worker: SimWorker, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            self._dispatcher.outgrown(self.requests[int(sequence.key.request_id)])
        if worker.spec.role == "decode":
            self._handoffs.give_room(worker)
        self._look(worker)

    def _on_done(self, worker: SimWorker, outcomes: Seq[Outcome]) -> None:
        for outcome in outcomes:
            request = self.requests[int(outcome.sequence.key.request_id)]
            if request.token0 < 0 or request.interrupted >= 0:
                if request.token0 < 0:
                    takes_ms = (
                        self._events.now - request.arrival
                    ) / 1e6 + self._deployment.first_token_s * 1e3
                    self._late += takes_ms > self._slo.ttft_ms
                self._dispatcher.token(request)
            if outcome.finish_reason != NOT_FINISHED:
                self._dispatcher.finished(request, outcome.sequence.num_generated)
                decoded = (request.output_tokens - 1) * self._slo.tpot_ms * 1e6
                self._slow += request.truncated or request.last_token - request.token0 > decoded
                if worker.prefill is not None:
                    worker.prefill.release(outcome.sequence)
            elif worker.prefill is not None:
                self._handoffs.computed(request)
        if self._most_missed is not None and max(self._late, self._slow) > self._most_missed:
            self._events.stop()
            return
        if worker.spec.role == "decode":
            self._handoffs.give_room(worker)
        self._look(worker)

    def _on_ended(self) -> None:
        """A request has ended; in a closed loop its client goes on."""
        if self._clients:
            self._send(self._clients.after(self._events.now))

    def _send(self, sent: Seq[Sent]) -> None:
        for request, taken_in in sent:
            self.requests.append(request)
            self._events.at(taken_in, self._dispatcher.accept, request)

    def _on_joined(self, handoff: Handoff, sequence: Sequence) -> None:
        handoff.target.unscheduled.add(handoff.request.index)
        self._dispatcher.joined(handoff.request, sequence)
        self._look(handoff.source)

    def _look(self, worker: SimWorker) -> None:
        if worker.draining:
            self._incidents.look(worker)
