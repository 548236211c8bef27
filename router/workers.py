"""The workers as one gateway sees them: a link to each, its liveness, load, clock and step times.

The stream is the one authority on liveness. A worker is lost when its stream ends or when it hangs: silence,
or a step that is older than max(2 s, 5x its prediction). A hung worker keeps its stream; when it speaks again
it is used again, and what it still has of requests that moved on is cancelled by the dispatcher.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from contextlib import aclosing
from typing import Protocol

from ..proto import worker_pb2 as pb
from ..proto.clock import Clock
from ..proto.errors import WorkerLost
from ..proto.ids import PROTOCOL_VERSION
from .inspection import Inspector
from .latency_model import LatencyModel
from .links import LinkFactory, WorkerSilent
from .membership import Member, MembershipSource
from .prefix_index import PrefixIndex
from .step_time import StepShape
from .worker_handle import TICK_S, WorkerHandle, WorkerState

logger = logging.getLogger(__name__)

ROLES = ("prefill", "decode", "colocated")
PING_EVERY_S = 1.0
FIRST_PINGS = 4
"""Exchanges made at once when a stream opens."""
RECONNECT_S = (0.05, 1.0)
"""First and longest pause between dials; it doubles."""


class PoolListener(Protocol):
    """Who is told what the workers say."""

    def outputs(self, worker: WorkerHandle, outputs: Iterable[pb.SequenceOutput]) -> None: ...

    def resumed(self, worker: WorkerHandle, message: pb.Resumed) -> None: ...

    def moved(self, message: pb.Moved) -> None: ...

    def lost(self, worker: WorkerHandle, reason: str) -> None:
        """Its requests are to be tried elsewhere; it may come back."""
        ...

    def available(self, worker: WorkerHandle) -> None:
        """It became ready."""
        ...


class WorkerPool:
    """Links to every worker of the membership."""

    def __init__(
        self,
        *,
        hello: pb.GatewayHello,
        model: str,
        membership: MembershipSource,
        link_factory: LinkFactory,
        prefixes: PrefixIndex,
        clock: Clock,
        hang_after_s: float,
    ) -> None:
        self._hello = hello
        self._model = model
        self._membership = membership
        self._link_factory = link_factory
        self._clock = clock
        self._hang_after_s = hang_after_s
        self._listener: PoolListener | None = None
        self._handles: dict[str, WorkerHandle] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.supervisor = ""
        """host:port of the supervisor's service; empty while it is not known."""
        self._role_models = {role: LatencyModel() for role in ROLES}
        self.prefixes = prefixes
        self.inspector = Inspector()

    def listen(self, listener: PoolListener) -> None:
        """To be called once, before run()."""
        self._listener = listener

    @property
    def listener(self) -> PoolListener:
        assert self._listener is not None, "listen() comes before run()"
        return self._listener

    def handles(self) -> list[WorkerHandle]:
        """Every known worker, ordered by worker_id."""
        return [self._handles[worker_id] for worker_id in sorted(self._handles)]

    def ready(self) -> list[WorkerHandle]:
        """Those that take new requests, in a fixed order."""
        return [handle for handle in self._handles.values() if handle.state is WorkerState.READY]

    def step_error(self, role: str) -> float:
        """Mean over the role's workers of how far their recent steps are from their predictions
        (step_drift.py); NaN before any was predicted."""
        errors = [h.drift.error for h in self._handles.values() if h.role == role and h.drift.num_steps]
        return sum(errors) / len(errors) if errors else math.nan

    def get(self, worker_id: str) -> WorkerHandle | None:
        return self._handles.get(worker_id)

    async def run(self) -> None:
        """Keeps links to the members until cancelled; then every link is closed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_liveness())
            async with aclosing(self._membership.watch()) as changes:
                async for members in changes:
                    self._update(group, members)

    # membership

    def _update(self, group: asyncio.TaskGroup, members: list[Member]) -> None:
        wanted = {member.worker_id: member for member in members if member.role in ROLES}
        self.supervisor = next((member.address for member in members if member.role == "supervisor"), "")
        for worker_id, handle in list(self._handles.items()):
            member = wanted.get(worker_id)
            if member is None:
                self._retire(handle)
            elif member != handle.member and not handle.adopt(member):
                self._drop(handle, "another process took its place")
            else:
                self._judge(handle, self._clock.now())
        for worker_id in sorted(wanted):
            if worker_id not in self._handles:
                self._add(group, wanted[worker_id])

    def _add(self, group: asyncio.TaskGroup, member: Member) -> None:
        handle = WorkerHandle(member, self._role_models[member.role])
        self._handles[member.worker_id] = handle
        task = group.create_task(self._keep_attached(handle))
        self._tasks[member.worker_id] = task
        logger.info(
            "worker_added worker=%s role=%s address=%s", member.worker_id, member.role, member.address
        )

    def _retire(self, handle: WorkerHandle) -> None:
        """It left the membership: its requests may end, nothing new goes there."""
        handle.retired = True
        if not handle.attached:
            self._drop(handle, "left the cluster")

    def _drop(self, handle: WorkerHandle, reason: str) -> None:
        self._detach(handle, reason, WorkerState.GONE)
        del self._handles[handle.worker_id]
        self._tasks.pop(handle.worker_id).cancel()
        logger.info("worker_gone worker=%s reason=%r", handle.worker_id, reason)

    # streams

    async def _keep_attached(self, handle: WorkerHandle) -> None:
        task = asyncio.current_task()
        assert task is not None
        pause = RECONNECT_S[0]
        while True:
            handle.link = self._link_factory(handle.member.address, self._hello)
            reason, state = "its stream ended", WorkerState.CONNECTING
            try:
                await handle.link.run(lambda frame: self._on_frame(handle, frame))
            except WorkerLost as exc:
                reason = exc.message
            except WorkerSilent as exc:  # stopped, perhaps, before this gateway had ever heard it
                reason, state = str(exc), WorkerState.HUNG
            except Exception as exc:
                reason = f"this gateway failed: {type(exc).__name__}: {exc}"
                logger.exception("worker_stream_failed worker=%s", handle.worker_id)
            if task.cancelling():
                return  # dropped: gRPC may answer the cancellation of a stream that breaks with its break
            if handle.attached:
                pause = RECONNECT_S[0]
                logger.warning("worker_detached worker=%s reason=%r", handle.worker_id, reason)
            elif reason != handle.detail:
                logger.warning("worker_not_attached worker=%s reason=%r", handle.worker_id, reason)
            handle.detail = reason
            if handle.retired:
                self._drop(handle, reason)
                return
            self._detach(handle, reason, state)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RECONNECT_S[1])

    def _detach(self, handle: WorkerHandle, reason: str, state: WorkerState) -> None:
        """Nothing more comes from this stream."""
        usable = handle.usable
        handle.detached(state)
        self.prefixes.remove(handle.worker_id)
        if usable:
            self.listener.lost(handle, reason)

    def _on_frame(self, handle: WorkerHandle, frame: pb.WorkerFrame) -> None:
        now = self._clock.now()
        handle.last_frame_at = now
        for message in frame.messages:
            match message.WhichOneof("kind"):
                case "step":
                    self._on_step(handle, message.step, now)
                case "heartbeat":
                    handle.on_heartbeat(message.heartbeat, now)
                case "hello":
                    self._on_hello(handle, message.hello, now)
                case "pong":
                    self._on_pong(handle, message.pong, now)
                case "prefix_delta":
                    self._on_prefix_delta(handle, message.prefix_delta)
                case "prefix_snapshot":
                    snapshot = message.prefix_snapshot
                    self.prefixes.snapshot(handle.worker_id, snapshot.sequence, snapshot.hashes)
                case "resumed":
                    self.listener.resumed(handle, message.resumed)
                case "moved":
                    self.listener.moved(message.moved)
                case "inspected":
                    self.inspector.answered(message.inspected)
        self._judge(handle, now)

    def _on_hello(self, handle: WorkerHandle, hello: pb.WorkerHello, now: float) -> None:
        """Raises WorkerLost, which ends the stream, when the two cannot work together."""
        if hello.protocol_version != PROTOCOL_VERSION:
            raise WorkerLost(f"it speaks protocol {hello.protocol_version}, this gateway {PROTOCOL_VERSION}")
        if hello.model != self._model:
            raise WorkerLost(f"it serves model {hello.model!r}, this gateway {self._model!r}")
        handle.on_hello(hello)
        handle.detail = ""
        self.prefixes.expect_snapshot(handle.worker_id)
        handle.send(pb.GatewayMessage(prefix_snapshot=pb.PrefixSnapshotRequest()))
        self._ping(handle, now)

    def _on_step(self, handle: WorkerHandle, step: pb.StepOutput, now: float) -> None:
        if step.outputs:
            self.listener.outputs(handle, step.outputs)
        if step.HasField("sample"):
            handle.observe_step(StepShape.of(step.sample), step.sample.duration_s)
        if step.HasField("load"):
            handle.on_load(step.load, now)

    def _on_pong(self, handle: WorkerHandle, pong: pb.Pong, now: float) -> None:
        handle.clock.observe(pong.sent_at, pong.at, now)
        if handle.pings < FIRST_PINGS:
            self._ping(handle, now)

    def _on_prefix_delta(self, handle: WorkerHandle, delta: pb.PrefixDelta) -> None:
        if not self.prefixes.delta(handle.worker_id, delta.sequence, delta.stored, delta.evicted):
            handle.send(pb.GatewayMessage(prefix_snapshot=pb.PrefixSnapshotRequest()))

    # liveness

    async def _watch_liveness(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock.now()
            for handle in list(self._handles.values()):
                handle.refresh_terms()
                if handle.attached:
                    handle.flush()
                    self._judge(handle, now)
                    if handle.usable and now - handle.last_ping_at >= PING_EVERY_S:
                        self._ping(handle, now)

    def _judge(self, handle: WorkerHandle, now: float) -> None:
        """Moves an attached worker to the state that its stream shows."""
        if not handle.attached:
            return
        before, hang = handle.state, handle.hang_reason(now, self._hang_after_s)
        handle.state = handle.judge(hang is not None)
        if handle.state is before:
            return
        logger.info("worker_state worker=%s from=%s to=%s", handle.worker_id, before, handle.state)
        if handle.state is WorkerState.HUNG:
            self.listener.lost(handle, hang or "")
        elif handle.state is WorkerState.READY:
            self.listener.available(handle)

    def _ping(self, handle: WorkerHandle, now: float) -> None:
        handle.pings += 1
        handle.last_ping_at = now
        handle.send(pb.GatewayMessage(ping=pb.Ping(sent_at=now)))
