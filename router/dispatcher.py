"""The life of accepted requests: place, submit, collect, try again, end once. Knows nothing of gRPC or text.

Every failure, of a worker, a link or a hand-off, ends the *attempt*; the next one carries the prompt and the
tokens so far to other workers, so that the client sees a pause and neither a repeated nor a missing token.
Outputs are taken by (attempt, index); those of an attempt that is over are answered with a Cancel, so that a
worker that was thought lost stops working on them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from ..proto import worker_pb2 as pb
from ..proto.clock import Clock
from ..proto.errors import (
    DiphaseError,
    Draining,
    InvalidRequest,
    Overloaded,
    SloInfeasible,
    WorkerLost,
    from_wire,
)
from ..proto.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from ..proto.slo import slo_to_proto
from .active_request import ActiveRequest, RequestStream
from .admission import Admission
from .config import RouterConfig
from .journal import Journal, JournalRecord
from .metrics import GatewayMetrics
from .placement import Demand, Placement
from .placement_policy import PlacementPolicy
from .prompt_hashes import PromptHashes
from .reattach import Reattacher
from .text import PreparedRequest
from .worker_handle import WorkerHandle
from .workers import WorkerPool

logger = logging.getLogger(__name__)


class Dispatcher:
    """All requests of one gateway. Everything happens on the event loop; nothing here awaits a worker except
    resume()."""

    def __init__(
        self,
        *,
        gateway_id: str,
        config: RouterConfig,
        max_open_requests: int,
        pool: WorkerPool,
        policy: PlacementPolicy,
        journal: Journal,
        metrics: GatewayMetrics,
        clock: Clock,
    ) -> None:
        self.gateway_id = gateway_id
        self.admission = Admission(config)
        self.metrics = metrics
        self._config = config
        self._max_open_requests = max_open_requests
        self._pool = pool
        self._policy = policy
        self._journal = journal
        self._clock = clock
        self._active: dict[str, ActiveRequest] = {}
        self._by_client_id: dict[str, ActiveRequest] = {}
        self._unplaced: dict[str, ActiveRequest] = {}
        self._roots: dict[str, bytes] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._reattacher = Reattacher(
            pool=pool,
            journal=journal,
            timeout_s=config.resume_timeout_s,
            active=self._active,
            adopt=self._adopt,
            close=self.close,
            clock=clock,
        )
        pool.listen(self)

    # clients

    @property
    def open_requests(self) -> int:
        return len(self._active)

    def accept(self, request: PreparedRequest) -> RequestStream:
        """Takes a request and sends it on its way. The caller reads the stream and close()s it, whatever
        happens.

        Raises:
            InvalidRequest: its request_id is running already.
            Overloaded: a hard limit is reached.
            SloInfeasible: no placement can meet its SLO (admission "slo").
            Draining: this gateway stops.
        """
        try:
            self._check_room(request)
            active = ActiveRequest(request)
            placement = self._choose(active)
            if placement is not None:
                self.admission.check_placement(placement, request.slo)
        except (Overloaded, SloInfeasible, Draining):
            self.metrics.rejected()
            raise
        self._register(active)
        active.queued = True
        self.admission.enter(len(request.prompt_token_ids), self._clock.now())
        self._journalise(active, "accepted")
        self._submit_or_wait(active, placement)
        return active.stream

    async def resume(self, client_request_id: str) -> RequestStream:
        """Re-attaches to a running request, wherever it was accepted; its stream starts at token 0.

        Raises:
            NotFound: no such request runs.
            WorkerLost: the workers that had it are lost too.
            Draining: this gateway stops.
        """
        if self._draining:
            raise Draining("this gateway stops; use another one", retry_after_s=1.0)
        active = self._by_client_id.get(client_request_id)
        if active is None:
            active = await self._reattacher.find(client_request_id)
        return active.reattach()

    def stop(self, stream: RequestStream) -> None:
        """The text is complete (a stop string): whatever the workers still send is surplus."""
        active = stream.active
        if not active.ended:
            self._cancel_attempt(active)
            active.finish(FINISH_REASON_STOP)

    def close(self, stream: RequestStream) -> None:
        """The client's call is over. A request that is not cancels everywhere, at once. Idempotent."""
        active = stream.active
        if active.stream is not stream or self._active.get(active.request_id) is not active:
            return
        self._forget(active)
        if active.delivered:
            self._policy.observe_completion(active.times.num_written)
            if active.finisher is not None:
                active.finisher.acknowledge(active.request_id, active.attempt)
            verdict = active.times.verdict(active.request.slo)
            self.metrics.finished(active.times, verdict, len(active.request.prompt_token_ids))
            self._journalise(active, "finished")
        elif active.error is not None:
            self.metrics.failed()
            self._journalise(active, "failed")
        else:
            self._cancel_attempt(active)
            self.metrics.cancelled()
            self._journalise(active, "cancelled")

    async def drain(self) -> None:
        """Takes nothing new; returns when nothing runs."""
        self._draining = True
        await self._idle.wait()

    # what the workers say

    def outputs(self, worker: WorkerHandle, outputs: Iterable[pb.SequenceOutput]) -> None:
        now = self._clock.now()
        for output in outputs:
            active = self._active.get(output.request_id)
            if (
                active is None
                or output.attempt != active.attempt
                or (worker is not active.prefill and worker is not active.decode)
            ):
                self._refuse_stale(worker, output)
                continue
            if output.token_ids:
                self._take_tokens(active, worker, output, now)
            if output.HasField("terminal"):
                self._take_terminal(active, worker, output)

    def resumed(self, worker: WorkerHandle, message: pb.Resumed) -> None:
        self._reattacher.resumed(worker, message)

    def moved(self, message: pb.Moved) -> None:
        """Another gateway has the request from here on."""
        active = self._active.get(message.request_id)
        if active is not None and message.attempt >= active.attempt:
            self._forget(active)
            active.stream.detach(
                WorkerLost(f"request {active.client_request_id} was re-attached through another gateway")
            )

    def lost(self, worker: WorkerHandle, reason: str) -> None:
        error = (Draining if worker.parted else WorkerLost)(f"worker {worker.worker_id} was lost: {reason}")
        self._reattacher.lost(worker)
        for active in list(self._active.values()):
            if active.needs(worker):
                self._fail_attempt(active, error, retryable=True, blamed=[worker])

    def available(self, worker: WorkerHandle) -> None:
        self._reattacher.available(worker)
        for active in list(self._unplaced.values()):
            placement = self._choose(active)
            if placement is not None:
                self._submit_or_wait(active, placement)

    # attempts

    def _choose(self, active: ActiveRequest) -> Placement | None:
        request = active.request
        token_ids = request.prompt_token_ids
        if active.token_ids:
            token_ids = token_ids + active.token_ids
        demand = Demand(
            num_tokens=len(token_ids),
            max_new_tokens=request.sampling.max_tokens - len(active.token_ids),
            slo=request.slo,
            elapsed_s=self._clock.now() - request.received_at,
            block_hashes=PromptHashes(token_ids, self._roots),
        )
        return self._policy.place(demand, self._pool.ready(), active.failed_workers)

    def _submit_or_wait(self, active: ActiveRequest, placement: Placement | None) -> None:
        """Sends the attempt to its worker, or waits for one, but not for ever."""
        if placement is None:
            if active.request_id not in self._unplaced:
                self._unplaced[active.request_id] = active
                active.give_up = asyncio.get_running_loop().call_later(
                    self._config.wait_for_workers_s, self._give_up, active
                )
            return
        self._stop_waiting(active)
        now = self._clock.now()
        request, times = active.request, active.times
        active.prefill, active.decode = placement.prefill, placement.decode
        submit = pb.Submit(
            request_id=request.request_id,
            client_request_id=request.client_request_id,
            attempt=active.attempt,
            gateway_id=self.gateway_id,
            prompt_token_ids=request.prompt_token_ids,
            emitted_token_ids=active.token_ids,
            sampling=request.sampling,
            slo=slo_to_proto(request.slo),
            elapsed_s=now - request.received_at,
        )
        if placement.prefill is not None:
            submit.decode.CopyFrom(placement.decode.peer_address)
            num_tokens = len(request.prompt_token_ids) + len(active.token_ids)
            placement.decode.expect_sequence(request.request_id, num_tokens)
        placement.first.expect_prompt(placement.uncached_tokens, now)
        placement.first.send(pb.GatewayMessage(submit=submit))
        if not active.token_ids:
            times.submitted_at = now
        times.attempts = active.attempt + 1
        times.prefill_worker, times.decode_worker = placement.first.worker_id, placement.decode.worker_id
        self.metrics.placed(placement.prefill is not None)
        self._journalise(active, "placed")

    def _take_tokens(
        self, active: ActiveRequest, worker: WorkerHandle, output: pb.SequenceOutput, now: float
    ) -> None:
        if output.index == 0 and output.HasField("prefill"):
            active.observe_prefill(worker, output.prefill, now)
        if worker is active.decode and not active.decoding:
            active.decoding = True
            worker.forget_sequence(active.request_id)
            if output.HasField("decode") and active.observe_handoff(worker, output, now):
                self._policy.observe_handoff(active.times.handoff_s)
                self.metrics.handed_off(active.times)
        active.seeded |= worker is active.prefill
        active.take(output.index, list(output.token_ids), output.logprobs)
        if active.queued and active.token_ids:
            active.queued = False
            self.admission.leave(len(active.request.prompt_token_ids), now)

    def _take_terminal(self, active: ActiveRequest, worker: WorkerHandle, output: pb.SequenceOutput) -> None:
        terminal = output.terminal
        if terminal.finish_reason:
            active.finisher = worker
            active.take_terminal(output.index + len(output.token_ids), terminal.finish_reason)
        elif worker is active.prefill and not active.needs_prefill:
            logger.info("late_failure request_id=%s worker=%s", active.request_id, worker.worker_id)
        elif terminal.cancelled:
            error: DiphaseError = WorkerLost(f"worker {worker.worker_id} gave the request up")
            self._fail_attempt(active, error, retryable=True, blamed=[worker])
        else:
            worker.acknowledge(active.request_id, active.attempt)
            error = from_wire(terminal.error.code, terminal.error.message)
            blamed = active.suspects(worker, error)
            self._fail_attempt(active, error, retryable=terminal.error.retryable, blamed=blamed)

    def _fail_attempt(
        self, active: ActiveRequest, error: DiphaseError, *, retryable: bool, blamed: Sequence[WorkerHandle]
    ) -> None:
        """Tries again elsewhere, or ends the request with this error."""
        if active.ended:
            return
        logger.info(
            "attempt_failed request_id=%s attempt=%d code=%s message=%r",
            active.client_request_id, active.attempt, error.code, error.message,
        )  # fmt: skip
        self._cancel_attempt(active)
        active.blame(blamed, error)
        if len(active.token_ids) >= active.request.sampling.max_tokens:
            active.finish(FINISH_REASON_LENGTH)  # only the terminal event was lost
        elif not retryable or active.exhausted(self._config.max_attempts):
            self._end_with(active, error)
        else:
            self.metrics.retried(error.code)
            active.next_attempt()
            self._submit_or_wait(active, self._choose(active))

    def _cancel_attempt(self, active: ActiveRequest) -> None:
        for worker in active.workers:
            worker.cancel(active.request_id, active.attempt)
            worker.forget_sequence(active.request_id)

    def _refuse_stale(self, worker: WorkerHandle, output: pb.SequenceOutput) -> None:
        self.metrics.stale()
        if output.HasField("terminal"):
            worker.acknowledge(output.request_id, output.attempt)
        else:
            worker.cancel(output.request_id, output.attempt)

    # bookkeeping

    def _check_room(self, request: PreparedRequest) -> None:
        if self._draining:
            raise Draining("this gateway stops; use another one", retry_after_s=1.0)
        if request.client_request_id in self._by_client_id:
            name = request.client_request_id
            raise InvalidRequest(
                f"request_id {name!r} is running already; choose another, or set resume_from"
            )
        if len(self._active) >= self._max_open_requests:
            raise Overloaded(
                f"{len(self._active)} requests are open, the limit (gateway.max_open_requests); retry later",
                retry_after_s=1.0,
            )
        self.admission.check_limits(len(request.prompt_token_ids))

    def _register(self, active: ActiveRequest) -> None:
        self._active[active.request_id] = active
        self._by_client_id[active.client_request_id] = active
        self._idle.clear()

    def _forget(self, active: ActiveRequest) -> None:
        del self._active[active.request_id]
        if self._by_client_id.get(active.client_request_id) is active:
            del self._by_client_id[active.client_request_id]
        self._stop_waiting(active)
        if active.queued:
            active.queued = False
            self.admission.leave(len(active.request.prompt_token_ids), self._clock.now())
        for worker in active.workers:
            worker.forget_sequence(active.request_id)
        if not self._active:
            self._idle.set()

    def _adopt(self, active: ActiveRequest) -> None:
        """A request that another gateway had accepted."""
        self._register(active)
        self._journalise(active, "placed")

    def _give_up(self, active: ActiveRequest) -> None:
        self._stop_waiting(active)
        waited_s = self._config.wait_for_workers_s
        self._end_with(active, WorkerLost(f"no worker became ready within {waited_s:g} s; retry later"))

    def _end_with(self, active: ActiveRequest, error: DiphaseError) -> None:
        if error.retryable and error.retry_after_s is None:
            error.retry_after_s = 1.0
        active.fail(error)

    def _stop_waiting(self, active: ActiveRequest) -> None:
        self._unplaced.pop(active.request_id, None)
        if active.give_up is not None:
            active.give_up.cancel()
            active.give_up = None

    def _journalise(self, active: ActiveRequest, state: str) -> None:
        self._journal.record(
            active.client_request_id,
            JournalRecord(
                state,
                self.gateway_id,
                active.attempt,
                active.prefill.worker_id if active.prefill is not None else "",
                active.decode.worker_id if active.decode is not None else "",
                active.request.sampling.seed,
                active.request_id,
            ),
        )
