"""Serves a workload in virtual time with the router's policy and admission and the workers' schedulers.

Deterministic: the same deployment, configuration and requests give the same records.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ...engine.requests import NOT_FINISHED, Outcome
from ...engine.sequence import Sequence
from ...proto import worker_pb2 as pb
from ...proto.errors import Overloaded, PromptTooLong, SloInfeasible
from ...proto.slo import Slo
from ...router.admission import Admission
from ...router.latency_model import INFORMED_SAMPLES, LatencyModel
from ...router.membership import Member
from ...router.placement import Demand, Placement
from ...router.placement_policy import make_policy
from ...router.prefix_index import PrefixIndex
from ...router.step_time import StepShape, StepTime
from ...router.worker_handle import WorkerHandle, WorkerState
from .deployment import Deployment, SimulationConfig
from .events import EventQueue
from .records import SimResult
from .sim_handoffs import Handoff, Handoffs
from .sim_request import SimRequest, sequence_of
from .sim_worker import SimWorker


class Simulation:
    """One run."""

    def __init__(self, deployment: Deployment, config: SimulationConfig, requests: Seq[SimRequest]) -> None:
        self._deployment = deployment
        self.requests = list(requests)
        self._slo = Slo(ttft_ms=config.ttft_ms, tpot_ms=config.tpot_ms)
        self._most_missed = config.most_missed
        self._late = self._slow = 0
        self._events = EventQueue()
        self.workers = [
            SimWorker(
                index,
                spec,
                deployment.block_size,
                deployment.context_length,
                self._events,
                exact=config.exact,
                on_start=self._on_start,
                on_done=self._on_done,
            )
            for index, spec in enumerate(deployment.workers)
        ]
        self._prefixes = PrefixIndex(config.router.max_prefix_blocks)
        self._shares = any(request.hashes for request in self.requests)
        self._deltas = [0] * len(self.workers)
        models: dict[int, LatencyModel] = {}
        self._handles = [self._handle_of(worker, models) for worker in self.workers]
        self._policy = make_policy(config.router, self._prefixes)
        self._admission = Admission(config.router)
        self._handoffs = Handoffs(deployment, self.workers, self._events, self._slo, self._on_joined)

    def run(self) -> SimResult:
        for request in self.requests:
            self._events.at(request.arrival, self._arrive, request)
        self._events.run()
        return SimResult.of(self._deployment, self.requests, self.workers, self._events.now)

    # a request's way

    def _arrive(self, request: SimRequest) -> None:
        try:
            self._admission.check_limits(request.prompt_tokens)
            placement = self._place(request)
            if placement is None:
                raise Overloaded("nothing can serve it", retry_after_s=1.0)
            self._admission.check_placement(placement, self._slo)
            self._submit(request, placement)
        except (Overloaded, SloInfeasible, PromptTooLong):
            request.rejected = True
            return
        self._admission.enter(request.prompt_tokens, self._events.now_s)

    def _place(self, request: SimRequest) -> Placement | None:
        for worker, handle in zip(self.workers, self._handles, strict=True):
            self._report(worker, handle.load)
            if self._shares:
                self._announce(worker)
        demand = Demand(
            num_tokens=request.prompt_tokens,
            max_new_tokens=request.output_tokens,
            slo=self._slo,
            elapsed_s=0.0,
            block_hashes=lambda _: request.hashes,
        )
        return self._policy.place(demand, self._handles)

    def _submit(self, request: SimRequest, placement: Placement) -> None:
        """
        Raises:
            Overloaded, PromptTooLong: the worker refuses.
        """
        first = self.workers[int(placement.first.worker_id)]
        decode = int(placement.decode.worker_id)
        sequence = sequence_of(request, self._slo)
        if first.prefill is not None:
            first.prefill.add(sequence)
            placement.decode.expect_sequence(sequence.key.request_id, request.prompt_tokens)
        else:
            assert first.decode is not None
            first.settle()
            first.decode.add(sequence)
        request.prefill_worker, request.decode_worker = first.index, decode
        first.unscheduled.add(request.index)
        first.start()

    def _on_start(self, worker: SimWorker, sequences: Seq[Sequence]) -> None:
        unscheduled = worker.unscheduled
        if worker.decode is not None:
            for sequence in worker.decode.take_outgrown():
                self.requests[int(sequence.key.request_id)].rejected = True
        if not unscheduled:
            return
        now = self._events.now
        for sequence in sequences:
            index = int(sequence.key.request_id)
            if index not in unscheduled:
                continue
            unscheduled.remove(index)
            request = self.requests[index]
            if request.token0 >= 0:
                request.joined = now
                continue
            request.scheduled = now
            request.cached_tokens = sequence.num_cached
            if worker.prefill is not None and request.output_tokens > 1:
                target = self.workers[request.decode_worker]
                self._handoffs.begin(request, worker, target, sequence)

    def _on_done(self, worker: SimWorker, outcomes: Seq[Outcome]) -> None:
        for outcome in outcomes:
            request = self.requests[int(outcome.sequence.key.request_id)]
            if request.token0 < 0:
                request.token0 = self._events.now
                self._admission.leave(request.prompt_tokens, self._events.now_s)
                takes_ms = (request.token0 - request.arrival) / 1e6 + self._deployment.first_token_s * 1e3
                self._late += takes_ms > self._slo.ttft_ms
            if outcome.finish_reason != NOT_FINISHED:
                request.last_token = self._events.now
                self._policy.observe_completion(request.output_tokens)
                decoded = (request.output_tokens - 1) * self._slo.tpot_ms * 1e6
                self._slow += request.last_token - request.token0 > decoded
                if worker.prefill is not None:
                    worker.prefill.release(outcome.sequence)
                    self._handles[request.decode_worker].forget_sequence(request.key.request_id)
            elif worker.prefill is not None:
                self._handoffs.computed(request)
        if self._most_missed is not None and max(self._late, self._slow) > self._most_missed:
            self._events.stop()
            return
        if worker.spec.role == "decode":
            self._handoffs.give_room(worker)

    def _on_joined(self, handoff: Handoff) -> None:
        request = handoff.request
        handoff.target.unscheduled.add(request.index)
        self._handles[handoff.target.index].forget_sequence(request.key.request_id)
        self._policy.observe_handoff((request.verified - request.token0) / 1e9)

    # what the router knows

    def _handle_of(self, worker: SimWorker, models: dict[int, LatencyModel]) -> WorkerHandle:
        spec, name = worker.spec, str(worker.index)
        if id(spec.step_time) not in models:
            models[id(spec.step_time)] = linear_fit(spec.step_time)
        model = models[id(spec.step_time)]
        member = Member(worker_id=name, role=spec.role, address=name, incarnation=name)
        handle = WorkerHandle(member, model)
        if worker.prefill is not None:
            budget, running = spec.scheduler.chunk_budget, 1  # type: ignore[union-attr]
        else:
            budget, running = spec.scheduler.prefill_budget, spec.scheduler.max_running  # type: ignore[union-attr]
        handle.on_hello(
            pb.WorkerHello(
                worker_id=name,
                incarnation=name,
                role=spec.role,
                block_size=self._deployment.block_size,
                chunk_budget=min(budget, 2**32 - 1),
                max_running=min(running, 2**32 - 1),
            )
        )
        handle.state = WorkerState.READY
        handle.refresh_terms()
        handle.load.blocks_total = spec.num_blocks
        self._prefixes.snapshot(name, 0, ())
        return handle

    def _report(self, worker: SimWorker, load: pb.Load) -> None:
        """What the policy looks at, as of the worker's last complete step."""
        if worker.prefill is not None:
            load.running = worker.prefill.num_started
            load.waiting_requests = worker.prefill.num_waiting
            load.waiting_tokens = worker.prefill.waiting_tokens
            return
        decode = worker.decode
        assert decode is not None
        load.waiting_requests = decode.num_waiting
        load.waiting_tokens = decode.waiting_tokens
        load.running = decode.num_running
        load.running_context = worker.running_context
        load.blocks_free = worker.usable_blocks
        load.blocks_running = max(0, worker.spec.num_blocks - load.blocks_free)
        load.handoffs = self._handoffs.under_way[worker.index]

    def _announce(self, worker: SimWorker) -> None:
        worker.take_blocks()
        stored, evicted = worker.blocks.events()
        if stored or evicted:
            self._deltas[worker.index] += 1
            self._prefixes.delta(str(worker.index), self._deltas[worker.index], stored, evicted)


def linear_fit(step_time: StepTime) -> LatencyModel:
    """What the live router would have learned of these step times: its model, fitted to a grid of steps."""
    model = LatencyModel(memory=1_000_000)
    for tokens in (64, 256, 1024, 4096):
        for prompts in (1, 4):
            shape = StepShape(prefill_tokens=tokens * prompts, prefill_context=prompts * tokens * tokens / 2)
            model.observe(shape, step_time.step_s(shape))
    for batch in (1, 4, 16, 64):
        for context in (128, 512, 2048):
            shape = StepShape(decode_batch=batch, decode_context=batch * context)
            model.observe(shape, step_time.step_s(shape))
    assert model.informed, f"the grid has fewer steps than {INFORMED_SAMPLES}"
    return model
