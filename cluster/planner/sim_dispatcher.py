"""The life of requests in virtual time: place, submit, try again elsewhere, end once.

What router/dispatcher.py is to a gateway, by the same rules: placement, admission and attempts are the
router's own objects. Here a message takes no time, and a token that was computed has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from ...engine.sequence import Sequence
from ...proto.errors import DiphaseError, Overloaded, PromptTooLong, SloInfeasible, WorkerLost
from ...proto.slo import Slo
from ...router.admission import Admission
from ...router.attempts import Attempts
from ...router.placement import Demand, Placement
from ...router.placement_policy import make_policy
from ...router.worker_handle import WorkerHandle
from .deployment import SimulationConfig
from .events import EventQueue, to_ns
from .sim_handoffs import Handoffs
from .sim_pool import SimPool
from .sim_request import SimRequest, sequence_of
from .sim_worker import SimWorker

NOTHING_LOST = -1
"""In place of a time."""


class Active(Attempts):
    """An accepted request that has not ended."""

    __slots__ = ("_earlier", "_joined_with", "hosts", "request", "sequence")

    def __init__(self, request: SimRequest) -> None:
        super().__init__()
        self.request = request
        self.hosts: tuple[SimWorker, ...] = ()
        """Processes that the current attempt was placed on, the one that decodes last."""
        self.sequence: Sequence | None = None
        """Of the current attempt, on the worker that has it."""
        self._earlier = 0
        self._joined_with = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has."""
        return self._earlier if self.sequence is None else self.sequence.num_generated

    @property
    def handed_over(self) -> bool:
        """The decode worker has the attempt, the prefill worker has not."""
        return self._joined_with > 0

    def joins(self, sequence: Sequence) -> None:
        """Its hand-off is complete."""
        self.sequence = sequence
        self._joined_with = sequence.num_generated

    def look(self) -> None:
        """Who has sent tokens of this attempt, which nobody noted when they came."""
        for worker in self.hosts:
            worker.single_out()
        self.decoding = 0 < self._joined_with < self.num_tokens
        self.seeded = self.prefill is not None and self.num_tokens > self._earlier

    def next_attempt(self) -> None:
        """Leaves its workers; the tokens that came are kept."""
        self._earlier, self.sequence, self._joined_with = self.num_tokens, None, 0
        super().next_attempt()
        self.hosts = ()
        self.request.verified = self.request.joined = -1


class SimDispatcher:
    """All requests of one simulation. `left` is called for a worker that drains when an attempt has left it
    before its time, `ended` when a request has ended, in whatever way."""

    def __init__(
        self,
        *,
        config: SimulationConfig,
        pool: SimPool,
        handoffs: Handoffs,
        events: EventQueue,
        slo: Slo,
        left: Callable[[SimWorker], None],
        ended: Callable[[], None],
    ) -> None:
        self.policy = make_policy(config.router, pool.prefixes)
        self.open: dict[int, Active] = {}
        self.ended_at = 0
        """When the last request that ended did so."""
        self._config = config.router
        self._admission = Admission(config.router)
        self._pool = pool
        self._handoffs = handoffs
        self._events = events
        self._slo = slo
        self._left = left
        self._ended = ended
        self._unplaced: dict[int, Active] = {}

    def accept(self, request: SimRequest) -> None:
        """It arrives."""
        active = Active(request)
        try:
            self._admission.check_limits(request.prompt_tokens)
            placement = self._choose(active)
            if placement is not None:
                self._admission.check_placement(placement, self._slo)
        except (Overloaded, SloInfeasible) as error:
            request.error = error.code
            self._note_end()
            return
        self.open[request.index] = active
        self._admission.enter(request.prompt_tokens, self._events.now_s)
        self._submit_or_wait(active, placement)

    # what the workers say

    def token(self, request: SimRequest) -> None:
        """The first one of all, or after a loss."""
        now = self._events.now
        if request.token0 < 0:
            request.token0 = now
            self._admission.leave(request.prompt_tokens, self._events.now_s)
        if request.interrupted >= 0:
            request.stall = max(request.stall, now - request.interrupted)
            request.interrupted = -1

    def finished(self, request: SimRequest, num_tokens: int) -> None:
        """Its last token came, the one of that number."""
        request.last_token = self._events.now
        request.truncated = num_tokens < request.output_tokens
        self.policy.observe_completion(num_tokens)
        active = self.open.pop(request.index)
        for worker in active.workers:
            worker.forget_sequence(request.request_id)
        self._note_end()

    def joined(self, request: SimRequest, sequence: Sequence) -> None:
        """Its hand-off is complete."""
        active = self.open[request.index]
        active.joins(sequence)
        assert active.decode is not None
        active.decode.forget_sequence(request.request_id)
        if sequence.num_generated == 1:
            self.policy.observe_handoff((request.verified - request.token0) / 1e9)

    def outgrown(self, request: SimRequest) -> None:
        """The whole pool of its worker is too small for it."""
        self._end(self.open[request.index], PromptTooLong("the pool is too small for it"))

    def refused(self, request: SimRequest, attempt: int, error: DiphaseError) -> None:
        """The decode worker does not take the hand-off."""
        active = self.open.get(request.index)
        if active is not None and active.attempt == attempt and active.prefill is not None:
            self._fail(active, error, active.suspects(active.prefill, error), self._events.now)

    # who comes and goes

    def lost(self, worker: WorkerHandle, error: DiphaseError, since: int) -> None:
        """The worker has been gone since then, with all that it had."""
        for active in list(self.open.values()):
            active.look()
            if active.needs(worker):
                self._fail(active, error, [worker], since)

    def evicted(self, worker: WorkerHandle, error: DiphaseError) -> None:
        """The worker gives up what it has."""
        for active in list(self.open.values()):
            if active.prefill is worker:
                has_it = not active.handed_over
            else:
                has_it = active.decode is worker and (
                    active.prefill is None or active.handed_over or active.request in self._handoffs
                )
            if has_it:
                self._fail(active, error, active.suspects(worker, error), self._events.now)

    def available(self) -> None:
        """A worker became ready."""
        for active in list(self._unplaced.values()):
            placement = self._choose(active)
            if placement is not None:
                self._submit_or_wait(active, placement)

    # attempts

    def _choose(self, active: Active) -> Placement | None:
        request = active.request
        demand = Demand(
            num_tokens=request.prompt_tokens + active.num_tokens,
            max_new_tokens=(request.max_tokens or request.output_tokens) - active.num_tokens,
            slo=self._slo,
            elapsed_s=(self._events.now - request.arrival) / 1e9,
            block_hashes=lambda _: request.hashes,
        )
        return self.policy.place(demand, self._pool.ready(), active.failed_workers)

    def _submit_or_wait(self, active: Active, placement: Placement | None) -> None:
        request, now = active.request, self._events.now
        if placement is None:
            if request.index not in self._unplaced:
                self._unplaced[request.index] = active
                give_up_at = now + to_ns(self._config.wait_for_workers_s)
                self._events.at(give_up_at, self._give_up, active, active.attempt)
            return
        self._unplaced.pop(request.index, None)
        first, decode = self._pool.worker(placement.first), self._pool.worker(placement.decode)
        active.prefill, active.decode, active.hosts = placement.prefill, placement.decode, (first, decode)
        request.prefill_worker, request.decode_worker = first.index, decode.index
        request.attempts = active.attempt + 1
        if placement.prefill is not None:
            num_tokens = request.prompt_tokens + active.num_tokens
            placement.decode.expect_sequence(request.request_id, num_tokens)
        if not first.alive:  # sent to nobody, as will be noticed
            placement.first.expect_prompt(placement.uncached_tokens, self._events.now_s)
            return
        sequence = sequence_of(request, self._slo, active.attempt, active.num_tokens)
        try:
            _add(first, sequence)
        except (Overloaded, PromptTooLong) as error:
            self._fail(active, error, active.suspects(placement.first, error), NOTHING_LOST)
            return
        active.sequence = sequence
        first.unscheduled.add(request.index)
        first.start()

    def _fail(self, active: Active, error: DiphaseError, blamed: Seq[WorkerHandle], since: int) -> None:
        """Tries again elsewhere, or ends the request with this error."""
        request = active.request
        if request.index not in self.open:
            return  # it ended while others were given up
        self._cancel_attempt(active)
        active.blame(blamed, error)
        if not error.retryable or active.exhausted(self._config.max_attempts):
            self._end(active, error)
            return
        if request.interrupted < 0:
            request.interrupted = since
        active.next_attempt()
        self._submit_or_wait(active, self._choose(active))

    def _cancel_attempt(self, active: Active) -> None:
        request = active.request
        for handle in active.workers:
            handle.forget_sequence(request.request_id)
        hosts = [worker for worker in dict.fromkeys(active.hosts) if worker.alive]
        for worker in hosts:
            worker.settle()
        self._handoffs.abort(request)
        for worker in hosts:
            worker.unscheduled.discard(request.index)
            if active.sequence is not None:
                worker.cancel(active.sequence.key)
        for worker in hosts:
            if worker.spec.role == "decode":
                self._handoffs.give_room(worker)
            worker.start()
            if worker.draining:
                self._events.at(self._events.now, self._left, worker)

    def _give_up(self, active: Active, attempt: int) -> None:
        if self._unplaced.get(active.request.index) is active and active.attempt == attempt:
            waited_s = self._config.wait_for_workers_s
            self._end(active, WorkerLost(f"no worker became ready within {waited_s:g} s"))

    def _end(self, active: Active, error: DiphaseError) -> None:
        request = active.request
        del self.open[request.index]
        self._unplaced.pop(request.index, None)
        for handle in active.workers:
            handle.forget_sequence(request.request_id)
        for worker in active.hosts:
            worker.unscheduled.discard(request.index)
        if request.token0 < 0:
            self._admission.leave(request.prompt_tokens, self._events.now_s)
        request.error = error.code
        self._note_end()

    def _note_end(self) -> None:
        self.ended_at = self._events.now
        self._ended()


def _add(worker: SimWorker, sequence: Sequence) -> None:
    """
    Raises:
        Overloaded, PromptTooLong: the worker refuses.
    """
    if sequence.num_tokens >= worker.context_length:
        raise PromptTooLong(f"{sequence.num_tokens} tokens leave no room to generate")
    worker.settle()
    scheduler = worker.prefill or worker.decode
    assert scheduler is not None
    scheduler.add(sequence)
