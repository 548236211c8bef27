"""What a gateway knows of one worker, as plain data: state, load, clock offset, step times, and what it was
promised.

A worker's reported load is a little old. What this gateway has sent there since counts on top of it until a
report includes it.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from ..proto import worker_pb2 as pb
from .clock_offset import ClockOffset
from .latency_model import LatencyModel
from .links import Link
from .membership import Member
from .step_drift import StepDrift
from .step_time import StepShape

TICK_S = 0.1
"""How often a gateway looks who hangs."""
MIN_STEP_AGE_S = 2.0
STEP_AGE_FACTOR = 5.0
"""A step hangs when it is older than max(MIN_STEP_AGE_S, STEP_AGE_FACTOR * its prediction)."""
OWN_MODEL_SAMPLES = 64
"""Steps after which a worker is predicted by its own fit instead of its role's."""
REPORT_MARGIN_S = 0.001


class WorkerState(StrEnum):
    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    HUNG = "hung"
    GONE = "gone"


class WorkerHandle:
    """One worker. Changed by the pool (what the worker says) and the dispatcher (what is placed there)."""

    def __init__(self, member: Member, role_model: LatencyModel) -> None:
        self.member = member
        self.worker_id = member.worker_id
        self.role = member.role
        self.incarnation = member.incarnation
        self.retired = False
        self.state = WorkerState.CONNECTING
        self.detail = ""
        """Why there is no stream to it; empty while there is one, and before the first dial has failed."""
        self.link: Link | None = None
        self.hello: pb.WorkerHello | None = None
        self.parted = False
        """Its last stream ended after it had drained: what it computed is in other workers' hands."""
        self.layout_hash = member.layout_hash
        """Of its model and KV layout; workers pair only when equal. Known from the registry before there is a
        stream, then from its hello, as the next three."""
        self.protocol_version = member.protocol_version
        self.kv_sharding = member.kv_sharding
        self.package_version = member.package_version
        self.block_size = 1
        """Said by its hello, as the next two."""
        self.chunk_budget = 0
        self.max_running = 0
        self.load = pb.Load()
        self.clock = ClockOffset()
        self.last_frame_at = 0.0
        self.last_ping_at = 0.0
        self.pings = 0
        self.step_age_s = 0.0
        self.step_predicted_s = 0.0
        self._role_model = role_model
        self._own_model = LatencyModel()
        self.drift = StepDrift()
        """Of its steps, from the predictions of `model`."""
        self.terms = role_model.terms
        """The coefficients of `model`, for arithmetic at each placement."""
        self._unreported: deque[tuple[float, int]] = deque()  # (sent at, prompt tokens)
        self._unreported_tokens = 0
        self._incoming: dict[str, int] = {}  # request_id -> context tokens of hand-offs on their way here
        self._incoming_tokens = 0

    # what the worker says

    @property
    def attached(self) -> bool:
        """Its stream is open and it said hello."""
        return self.hello is not None

    @property
    def usable(self) -> bool:
        """Requests placed here may still be served."""
        return self.state in (WorkerState.READY, WorkerState.DRAINING)

    @property
    def leaves(self) -> bool:
        """It takes nothing new, by its own word or the registry's, or has left in order."""
        return self.load.draining or self.retired or self.member.draining or self.parted

    @property
    def model(self) -> LatencyModel:
        """Its own step times, or its role's while it has shown few."""
        return self._own_model if self._own_model.num_samples >= OWN_MODEL_SAMPLES else self._role_model

    def refresh_terms(self) -> None:
        """Takes over the fit; a role's may have changed without a step of this worker."""
        self.terms = self.model.terms

    def adopt(self, member: Member) -> bool:
        """Takes a changed membership entry; False when it names another process than the attached one."""
        if member.address != self.member.address:
            return False
        if member.incarnation not in (self.incarnation, self.member.incarnation) and self.attached:
            return False
        self.member = member
        self.retired = False
        if not self.attached:
            self._describe(member)
        return True

    def _describe(self, source: Member | pb.WorkerHello) -> None:
        self.layout_hash = source.layout_hash
        self.protocol_version = source.protocol_version
        self.kv_sharding = source.kv_sharding
        self.package_version = source.package_version

    def send(self, message: pb.GatewayMessage) -> None:
        if self.link is not None:
            self.link.send(message)

    def send_later(self, message: pb.GatewayMessage) -> None:
        """As send(), for what nobody waits for."""
        if self.link is not None:
            self.link.send_later(message)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Ends this attempt and older ones."""
        self.send(pb.GatewayMessage(cancel=pb.Cancel(request_id=request_id, attempt=attempt)))

    def acknowledge(self, request_id: str, attempt: int) -> None:
        """The terminal event of this attempt is here."""
        self.send_later(pb.GatewayMessage(acknowledge=pb.Acknowledge(request_id=request_id, attempt=attempt)))

    def flush(self) -> None:
        if self.link is not None:
            self.link.flush()

    def on_hello(self, hello: pb.WorkerHello) -> None:
        self.hello = hello
        self.incarnation = hello.incarnation
        self.parted = False
        self._describe(hello)
        self.block_size = max(1, hello.block_size)
        self.chunk_budget = hello.chunk_budget
        self.max_running = hello.max_running

    def on_heartbeat(self, heartbeat: pb.Heartbeat, now: float) -> None:
        self.step_age_s = heartbeat.step_age_s
        self.step_predicted_s = heartbeat.step_predicted_s
        if heartbeat.HasField("load"):
            self.on_load(heartbeat.load, now)

    def on_load(self, load: pb.Load, now: float) -> None:
        self.load = load
        reported_until = now - self.clock.round_trip_s - REPORT_MARGIN_S
        unreported = self._unreported
        while unreported and unreported[0][0] <= reported_until:
            self._unreported_tokens -= unreported.popleft()[1]

    def observe_step(self, shape: StepShape, duration_s: float) -> None:
        if self.model.informed:
            self.drift.observe(self.model.step_s(shape), duration_s)
        self._own_model.observe(shape, duration_s)
        if self.model is not self._own_model:
            self._role_model.observe(shape, duration_s)
        self.terms = self.model.terms

    def detached(self, state: WorkerState) -> None:
        """Its stream is gone, and with it what was promised to it."""
        self.parted = self.load.drained
        self.state = state
        self.hello = None
        self.link = None
        self.load = pb.Load()
        self.clock.reset()
        self.pings = 0
        self.step_age_s = 0.0
        self._unreported.clear()
        self._unreported_tokens = 0
        self._incoming.clear()
        self._incoming_tokens = 0

    def judge(self, hangs: bool) -> WorkerState:
        """The state that an attached worker is in."""
        if hangs:
            return WorkerState.HUNG
        if self.leaves:
            return WorkerState.DRAINING
        return WorkerState.READY if self.clock.known else WorkerState.CONNECTING

    def hang_reason(self, now: float, hang_after_s: float) -> str | None:
        """Why it counts as hung; None when it does not."""
        silence = now - self.last_frame_at
        if silence > hang_after_s:
            return f"no frame for {silence:.1f} s"
        if self.step_age_s > max(MIN_STEP_AGE_S, STEP_AGE_FACTOR * self.step_predicted_s):
            return f"a step has run for {self.step_age_s:.1f} s, predicted were {self.step_predicted_s:.3f} s"
        return None

    # what was placed here

    def expect_prompt(self, num_tokens: int, now: float) -> None:
        """A submit left for this worker; the reports that it has not seen lack these tokens."""
        self._unreported.append((now, num_tokens))
        self._unreported_tokens += num_tokens

    def expect_sequence(self, request_id: str, num_tokens: int) -> None:
        """A hand-off of so many tokens will come here."""
        self.forget_sequence(request_id)
        self._incoming[request_id] = num_tokens
        self._incoming_tokens += num_tokens

    def forget_sequence(self, request_id: str) -> None:
        """It arrived, or never will."""
        self._incoming_tokens -= self._incoming.pop(request_id, 0)

    @property
    def waiting_requests(self) -> int:
        return self.load.waiting_requests + len(self._unreported)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens to be computed before a prompt that is placed now."""
        return self.load.waiting_tokens + self._unreported_tokens

    @property
    def incoming(self) -> tuple[int, int]:
        """Sequences that will join the batch, and their context tokens; other gateways' hand-offs
        included."""
        own = len(self._incoming)
        if not own and not self.load.handoffs:
            return 0, 0
        others = max(0, self.load.handoffs - own)
        mean = self._incoming_tokens / own if own else self._mean_context
        return own + others, self._incoming_tokens + round(others * mean)

    @property
    def promised_tokens(self) -> int:
        """Context tokens of sequences on their way here that still need blocks: what is granted to a hand-off
        has left `usable_blocks` already."""
        tokens = self.incoming[1]
        return max(0, tokens - self.load.blocks_reserved * self.block_size) if tokens else 0

    @property
    def _mean_context(self) -> float:
        return self.load.running_context / self.load.running if self.load.running else 0.0

    @property
    def usable_blocks(self) -> int:
        """Blocks that are free or only cached."""
        return self.load.blocks_free + self.load.blocks_cached

    @property
    def peer_address(self) -> pb.PeerAddress:
        return pb.PeerAddress(
            worker_id=self.worker_id, incarnation=self.incarnation, address=self.member.address
        )
