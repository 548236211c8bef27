"""The simulated workers and what the router knows of them: a handle for each, with its load as of its last
complete step, and its prefix cache. What router/workers.py is to a gateway, without streams."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from ...decode_workers.load import write_load
from ...engine.requests import Outcome
from ...engine.sequence import Sequence
from ...proto import worker_pb2 as pb
from ...router.latency_model import INFORMED_SAMPLES, LatencyModel
from ...router.membership import Member
from ...router.prefix_index import PrefixIndex
from ...router.step_time import StepShape, StepTime
from ...router.worker_handle import WorkerHandle, WorkerState
from .deployment import Deployment, SimulationConfig, WorkerSpec
from .events import EventQueue
from .sim_worker import SimWorker


class SimPool:
    """One worker for each place of the deployment: the process that is there, or was there last."""

    def __init__(
        self,
        deployment: Deployment,
        config: SimulationConfig,
        events: EventQueue,
        *,
        shares: bool,
        on_start: Callable[[SimWorker, Seq[Sequence]], None],
        on_done: Callable[[SimWorker, Seq[Outcome]], None],
        on_outgrown: Callable[[SimWorker, Seq[Sequence]], None],
    ) -> None:
        """`shares`: prompts have blocks in common, and the router is to know who has them."""
        self.prefixes = PrefixIndex(config.router.max_prefix_blocks)
        self.workers: list[SimWorker] = []
        self.processes: list[SimWorker] = []
        """All that ever ran."""
        self._deployment = deployment
        self._exact = config.exact
        self._events = events
        self._shares = shares
        self._on_start = on_start
        self._on_done = on_done
        self._on_outgrown = on_outgrown
        self._models: dict[int, LatencyModel] = {}
        self._handles: dict[str, WorkerHandle] = {}
        self._deltas: dict[str, int] = {}
        self._ready: list[WorkerHandle] = []
        self._reporting: list[tuple[SimWorker, WorkerHandle]] = []
        for index, spec in enumerate(deployment.workers):
            self._add(self._process(index, str(index), spec))
        self._look()

    # the router's side

    def ready(self) -> list[WorkerHandle]:
        """Those that take new requests, with their load of this moment, in a fixed order."""
        for worker, handle in self._reporting:
            _report(worker, handle.load)
            if self._shares:
                self._announce(worker)
        return self._ready

    def handle(self, worker: SimWorker) -> WorkerHandle:
        return self._handles[worker.name]

    def worker(self, handle: WorkerHandle) -> SimWorker:
        """The process behind it."""
        return self.workers[int(handle.member.address)]

    def _announce(self, worker: SimWorker) -> None:
        """What its prefix cache has gained and lost."""
        worker.take_blocks()
        stored, evicted = worker.blocks.events()
        if stored or evicted:
            self._deltas[worker.name] += 1
            self.prefixes.delta(worker.name, self._deltas[worker.name], stored, evicted)

    # who is there

    def gone(self, worker: SimWorker) -> None:
        """Its process has ended, unknown to the router."""
        worker.kill()
        self._look()

    def drains(self, worker: SimWorker) -> None:
        """It takes nothing new; the router knows at once, from the registry."""
        worker.draining = True
        handle = self.handle(worker)
        handle.load.draining = True
        handle.state = handle.judge(hangs=False)
        self._look()

    def lost(self, worker: SimWorker, *, drained: bool) -> WorkerHandle:
        """The router knows that its process has ended, and whether that was the end of a drain."""
        handle = self.handle(worker)
        handle.load.drained = drained
        handle.detached(WorkerState.GONE)
        self.prefixes.remove(worker.name)
        self._look()
        return handle

    def restart(self, index: int) -> None:
        """The process comes back as it began."""
        before = self.workers[index]
        worker = self._process(index, before.name, before.spec)
        self._greet(worker, self.handle(worker))
        self._look()

    def replace(self, index: int, spec: WorkerSpec) -> None:
        """Another worker starts there. Names are not used again."""
        self._add(self._process(index, f"{index}+{len(self.processes)}", spec))
        self._look()

    def _process(self, index: int, name: str, spec: WorkerSpec) -> SimWorker:
        deployment = self._deployment
        worker = SimWorker(
            index,
            spec,
            deployment.block_size,
            deployment.context_length,
            self._events,
            name=name,
            exact=self._exact,
            on_start=self._on_start,
            on_done=self._on_done,
            on_outgrown=self._on_outgrown,
        )
        self.workers[index : index + 1] = [worker]
        self.processes.append(worker)
        return worker

    def _add(self, worker: SimWorker) -> None:
        spec, name = worker.spec, worker.name
        model = self._models.get(id(spec.step_time))
        if model is None:
            model = self._models[id(spec.step_time)] = linear_fit(spec.step_time)
        member = Member(worker_id=name, role=spec.role, address=str(worker.index), incarnation=name)
        handle = self._handles[name] = WorkerHandle(member, model)
        self._greet(worker, handle)

    def _greet(self, worker: SimWorker, handle: WorkerHandle) -> None:
        spec, name = worker.spec, worker.name
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
        self.prefixes.snapshot(name, 0, ())
        self._deltas[name] = 0

    def _look(self) -> None:
        """Who is ready; of those whose process has ended unnoticed the last report stays."""
        pairs = [(worker, self.handle(worker)) for worker in self.workers]
        pairs = [(worker, handle) for worker, handle in pairs if handle.state is WorkerState.READY]
        self._ready = [handle for _, handle in pairs]
        self._reporting = [(worker, handle) for worker, handle in pairs if worker.alive]


def _report(worker: SimWorker, load: pb.Load) -> None:
    """What the policy looks at, as of the worker's last complete step."""
    if worker.prefill is not None:
        load.running = worker.prefill.num_started
        load.waiting_requests = worker.prefill.num_waiting
        load.waiting_tokens = worker.prefill.waiting_tokens
        return
    assert worker.decode is not None
    write_load(
        load,
        worker.decode,
        worker.blocks.counts(),
        reserved=worker.reserved_blocks,
        handoffs=worker.handoffs,
        steps=worker.unsettled_steps,
    )


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
