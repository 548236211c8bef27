"""A worker's shell, the same for every role: gateways' streams, the step loop, heartbeats, what was emitted,
drain.

Every decision is made on one event loop by the role that it is handed; `execute` runs a plan elsewhere (the
engine's thread, or virtual time). It knows no gRPC (service.py), no threads (engine_thread.py) and nothing of
prefill, decode or hand-offs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ..proto.clock import Clock
from ..proto.errors import (
    DiphaseError,
    Draining,
    InternalError,
    WorkerLost,
)
from ..proto.ids import HandoffKey
from ..proto.inference_pb2 import TokenLogprobs
from ..proto.worker_pb2 import (
    Cancel,
    GatewayHello,
    GatewayMessage,
    Heartbeat,
    Load,
    Moved,
    Pong,
    PrefixDelta,
    PrefixSnapshot,
    Resume,
    Resumed,
    SequenceOutput,
    StepOutput,
    StepSample,
    Submit,
    WorkerHello,
    WorkerMessage,
)
from . import draining
from .base import LayerHook, StepPlan, StepResult
from .gateway_link import GatewayLink
from .gateways import Gateways, check_hello
from .host_config import HostConfig
from .host_metrics import HostMetrics
from .requests import cancelled_output, failed_output, key_of
from .retention import Retained, Retention
from .role import Role
from .step_predictor import StepPredictor, describe

logger = logging.getLogger(__name__)

Execute = Callable[[StepPlan, LayerHook | None], Awaitable[StepResult]]

FAILED_STEPS_TO_EXIT = 2
"""Steps that raise in a row: one may be its requests' fault, the next one's are others."""


class WorkerHost:
    """One worker. `run` serves until it is cancelled or the engine is broken."""

    def __init__(
        self,
        *,
        role: Role,
        execute: Execute,
        hello: WorkerHello,
        config: HostConfig,
        clock: Clock,
        metrics: HostMetrics | None = None,
    ) -> None:
        self.hello = hello
        self.metrics = metrics or HostMetrics()
        for collector in role.collectors():
            self.metrics.registry.register(collector)
        self._role = role
        self._execute = execute
        self._config = config
        self._clock = clock
        self._retention = Retention(config.max_retained, config.retain_s)
        self._predictor = StepPredictor()
        self._gateways = Gateways(clock)
        self._work = asyncio.Event()
        self._broken: asyncio.Future[None]
        self._draining = self._drained = False
        self._stopped = False
        self._step_started_at: float | None = None
        self._step_predicted_s = 0.0
        self._heartbeats = 0
        self._prefix_sequence = 0

    async def run(self) -> None:
        """Steps and heartbeats.

        Raises:
            InternalError, WorkerLost: the engine failed twice in a row or has lost a rank, or the hand-off
                broke; the process should end.
        """
        self._broken = asyncio.get_running_loop().create_future()
        self._role.start(self)
        steps = asyncio.create_task(self._run_steps(), name="steps")
        beats = asyncio.create_task(self._run_heartbeats(), name="heartbeats")
        try:
            await asyncio.wait((steps, beats, self._broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            steps.cancel()
            beats.cancel()
            self._broken.cancel()
            results = await asyncio.gather(steps, beats, self._broken, return_exceptions=True)
            self._stopped = True
            self._gateways.close(Draining("the worker has stopped"))
            await self._role.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def drain(self) -> None:
        """Refuses new requests and returns when nothing is left, or was given to other workers after
        drain_timeout_s, and the gateways have read it, or flush_s has passed. Cancelling it leaves the worker
        draining."""
        self._draining = True
        await draining.finish(self._role, self._config.drain_timeout_s, self._tell)
        self._drained = True
        self._tell()
        await self._gateways.wait_empty(self._config.flush_s)

    # gateways

    def attach(self, hello: GatewayHello) -> GatewayLink:
        """A gateway's new stream; it replaces an older one of the same gateway.

        Raises:
            Unauthenticated: the cluster token is wrong.
            ConfigError: the gateway speaks another protocol version.
            InvalidRequest: it does not say who it is.
            Draining: the worker has stopped.
        """
        check_hello(hello, self._config.cluster_token)
        if self._stopped:
            raise Draining("the worker has stopped")
        link = GatewayLink(
            # A process of its own: what one that died had accepted is not its successor's to cancel.
            f"{hello.gateway_id}/{hello.incarnation}",
            max_queued=self._config.max_queued_messages,
            on_message=self._receive,
            on_close=self._gateways.closed,
        )
        self._gateways.add(link)
        link.send(WorkerMessage(hello=self.hello))
        link.send(WorkerMessage(heartbeat=self._heartbeat()))
        return link

    def _receive(self, link: GatewayLink, message: GatewayMessage) -> None:
        try:
            match message.WhichOneof("kind"):
                case "submit":
                    self._submit(link, message.submit)
                case "cancel":
                    self._cancel(message.cancel)
                case "resume":
                    self._resume(link, message.resume)
                case "acknowledge":
                    self._retention.acknowledge(message.acknowledge.request_id, message.acknowledge.attempt)
                case "ping":
                    link.send(WorkerMessage(pong=Pong(sent_at=message.ping.sent_at, at=self._clock.now())))
                case "prefix_snapshot":
                    self._send_snapshot(link)
                case "inspect":
                    link.send(WorkerMessage(inspected=self._role.inspect(message.inspect)))
                case unknown:
                    logger.warning("message_ignored gateway_id=%s kind=%s", link.gateway_id, unknown)
        except (
            Exception
        ) as exc:  # the top of a gateway's message: it must not take the others' requests along
            logger.exception("message_failed gateway_id=%s", link.gateway_id)
            if message.HasField("submit"):
                self._refuse(link, message.submit, InternalError(f"{type(exc).__name__}: {exc}"))

    # requests

    def _submit(self, link: GatewayLink, submit: Submit) -> None:
        now = self._clock.now()
        known = self._retention.get(submit.request_id)
        if known is not None and known.submit.attempt >= submit.attempt:
            return  # sent again, or overtaken
        if known is not None:
            self._supersede(known)
        submit.gateway_id = link.gateway_id
        try:
            if self._draining:
                raise Draining("this worker takes no new work")
            self._role.submit(submit, now)
        except DiphaseError as error:
            self._refuse(link, submit, error)
            return
        self._retention.open(submit, link.gateway_id, now)
        self._work.set()

    def _refuse(self, link: GatewayLink, submit: Submit, error: DiphaseError) -> None:
        self.metrics.refused(error.code)
        logger.info("submit_refused request_id=%s error=%s", submit.request_id, error.message)
        output = failed_output(key_of(submit), len(submit.emitted_token_ids), error)
        link.send(WorkerMessage(step=StepOutput(outputs=[output])))

    def _supersede(self, known: Retained) -> None:
        """An older attempt ends without a word: its gateway has moved on."""
        self._role.cancel(known.key.request_id, known.key.attempt)
        self._retention.retire(known.key)

    def _cancel(self, cancel: Cancel) -> None:
        self._role.cancel(cancel.request_id, cancel.attempt)
        known = self._retention.get(cancel.request_id)
        if known is not None and known.terminal is None and known.submit.attempt <= cancel.attempt:
            self.emit([cancelled_output(known.key, len(known.token_ids))])
        self._work.set()

    def _resume(self, link: GatewayLink, resume: Resume) -> None:
        now, request_id = self._clock.now(), resume.request_id
        known = self._retention.get(request_id) if request_id else None
        answer = Resumed(request_id=request_id, client_request_id=resume.client_request_id)
        if not request_id:
            if named := self._retention.find(resume.client_request_id):
                answer.known = True
                answer.submit.request_id = named.submit.request_id
                answer.submit.elapsed_s = named.submit.elapsed_s + now - named.since
        elif known is None:
            # Its hand-off may be on the way: what comes of it should go to the new gateway.
            self._retention.redirect(request_id, link.gateway_id, now)
        if known is None:
            link.send(WorkerMessage(resumed=answer))
            return
        if known.gateway_id != link.gateway_id:
            moved = Moved(request_id=request_id, attempt=known.submit.attempt)
            self._gateways.send(known.gateway_id, WorkerMessage(moved=moved))
        known.gateway_id = link.gateway_id
        self._role.resume(request_id, link.gateway_id)
        link.send(WorkerMessage(resumed=known.to_resumed(now)))

    # what a role may ask of its host (role.Shell)

    def wake(self) -> None:
        self._work.set()

    def adopt(
        self, submit: Submit, token_ids: Sequence[int] = (), logprobs: Sequence[TokenLogprobs] = ()
    ) -> bool:
        known = self._retention.get(submit.request_id)
        if known is not None and known.submit.attempt > submit.attempt:
            return False
        if known is not None:
            self._supersede(known)
        now = self._clock.now()
        taker = self._retention.redirected(submit.request_id)
        gateway_id = taker or submit.gateway_id
        retained = self._retention.open(submit, gateway_id, now)
        retained.token_ids += token_ids
        retained.logprobs += logprobs
        if taker is not None:
            # It asked before the request was here, and the prefill worker may have forgotten it meanwhile.
            self._gateways.send(taker, WorkerMessage(resumed=retained.to_resumed(now)))
        self._gateways.expect(gateway_id)
        return True

    def emit(self, outputs: Sequence[SequenceOutput]) -> None:
        for gateway_id, group in self._by_gateway(outputs).items():
            self._gateways.send(gateway_id, WorkerMessage(step=StepOutput(outputs=group)))

    def broken(self, error: Exception) -> None:
        if not self._broken.done():
            lost = isinstance(error, WorkerLost)  # the engine says so, beside its steps
            self._broken.set_exception(error if lost else InternalError(f"the hand-off broke: {error}"))

    def retire(self, key: HandoffKey) -> None:
        self._retention.retire(key)

    def handed_off(self, seconds: float, tail_s: float, num_bytes: int, num_segments: int) -> None:
        self.metrics.handed_off(seconds, tail_s, num_bytes, num_segments)

    # steps

    async def _run_steps(self) -> None:
        failures = 0
        while True:
            self._work.clear()
            plan = self._role.plan(self._clock.now())
            if plan is None:
                self._send_prefix_delta()
                await self._work.wait()
                continue
            failures = 0 if await self._step(plan) else failures + 1
            if failures >= FAILED_STEPS_TO_EXIT:
                raise InternalError(f"the engine failed in {failures} steps in a row")

    async def _step(self, plan: StepPlan) -> bool:
        """Runs one step and sends what it gave; False when the engine raised."""
        hook = self._role.layer_hook(plan)
        sample = describe(plan)
        self._step_predicted_s = self._predictor.predict(sample)
        started = self._step_started_at = self._clock.now()
        try:
            result = await self._execute(plan, hook)
        except WorkerLost as error:  # no further step can run: what other requests it has fails with it
            self.metrics.step_failed()
            self.emit(self._role.fail(plan, error))
            raise
        except Exception as exc:  # the top of a step: its requests fail, the worker lives
            logger.exception("step_failed sequences=%d", len(plan.chunks))
            self.metrics.step_failed()
            self.emit(self._role.fail(plan, InternalError(f"the engine failed: {type(exc).__name__}: {exc}")))
            return False
        finally:
            self._step_started_at = None
        sample.ended_at = self._clock.now()
        sample.duration_s = sample.ended_at - started
        self._predictor.observe(sample)
        self.metrics.step(sample)
        self._send_step(self._role.complete(plan, result, sample.ended_at), sample)
        return True

    def _send_step(self, outputs: Sequence[SequenceOutput], sample: StepSample) -> None:
        """One message a gateway: its own tokens, and what every gateway's latency model needs."""
        groups, load = self._by_gateway(outputs), self._load()
        for link in self._gateways:
            step = StepOutput(outputs=groups.get(link.gateway_id, ()), sample=sample, load=load)
            link.send(WorkerMessage(step=step))
        self._send_prefix_delta()

    def _by_gateway(self, outputs: Iterable[SequenceOutput]) -> dict[str, list[SequenceOutput]]:
        """Remembers outputs and groups them by who gets them."""
        now = self._clock.now()
        groups: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            retained = self._retention.record(output, now)
            if retained is None:
                self.metrics.stale_output()
                continue
            groups.setdefault(retained.gateway_id, []).append(output)
        for group in groups.values():
            self.metrics.outputs(group)
        return groups

    # heartbeats and prefix events

    async def _run_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            self._heartbeats += 1
            heartbeat = self._heartbeat()
            self._gateways.send_all(WorkerMessage(heartbeat=heartbeat))
            self.metrics.state(heartbeat.load, len(self._retention), len(self._gateways))
            self._retention.expire(self._clock.now())
            self._cancel_orphans()
            # Blocks may have come out of quarantine or a lease without anyone saying so.
            self._work.set()

    def _tell(self) -> None:
        self._gateways.send_all(WorkerMessage(heartbeat=self._heartbeat()))

    def _heartbeat(self) -> Heartbeat:
        now = self._clock.now()
        started = self._step_started_at
        return Heartbeat(
            sequence=self._heartbeats,
            at=now,
            step_age_s=0.0 if started is None else now - started,
            step_predicted_s=0.0 if started is None else self._step_predicted_s,
            load=self._load(),
        )

    def _load(self) -> Load:
        load = self._role.load()
        load.draining, load.drained = self._draining, self._drained
        return load

    def _cancel_orphans(self) -> None:
        for retained in self._retention.live_of(self._gateways.take_lost(self._config.orphan_s)):
            request_id, attempt = retained.key
            logger.info("orphan_cancelled request_id=%s gateway_id=%s", request_id, retained.gateway_id)
            self._cancel(Cancel(request_id=request_id, attempt=attempt))

    def _send_prefix_delta(self) -> None:
        stored, evicted = self._role.prefix_events()
        if stored or evicted:
            self._prefix_sequence += 1
            delta = PrefixDelta(sequence=self._prefix_sequence, stored=stored, evicted=evicted)
            self._gateways.send_all(WorkerMessage(prefix_delta=delta))

    def _send_snapshot(self, link: GatewayLink) -> None:
        self._send_prefix_delta()  # what the others lack of it
        snapshot = PrefixSnapshot(sequence=self._prefix_sequence, hashes=self._role.prefix_snapshot())
        link.send(WorkerMessage(prefix_snapshot=snapshot))
