"""Hand-offs under the router's own dispatcher: it places attempts, retries, cancels and puts tokens in order.

Between it and the workers are queues in both directions, in order for each worker, delivered at any time. The
token of request r at index i is 100 r + i, whoever generates it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

from diphase.kv_transfer import machine as k
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2 as wpb
from diphase.proto.slo import Slo
from diphase.router.active_request import RequestStream
from diphase.router.config import RouterConfig
from diphase.router.dispatcher import Dispatcher
from diphase.router.metrics import GatewayMetrics
from diphase.router.placement import Placement
from diphase.router.text import PreparedRequest

from .handoff_drivers import Move
from .handoff_faults import FaultyWorld
from .handoff_parts import ENDED, Scenario, Violation

MAX_TOKENS = 4


class Handle:
    """What the dispatcher knows of one life of a worker."""

    def __init__(self, at: int, role: str) -> None:
        self.at, self.role = at, role
        self.worker_id = f"{role}{at}"
        self.clock = SimpleNamespace(known=False)
        self.parted = False  # no worker drains here: they are killed
        self.inbox: list[wpb.GatewayMessage] = []
        """To the worker, in order."""
        self.outbox: list[wpb.SequenceOutput | str] = []
        """To the gateway, in order; "lost" and "up" stand for what its link says."""

    @property
    def peer_address(self) -> wpb.PeerAddress:
        return wpb.PeerAddress(worker_id=self.worker_id, address=str(self.at), incarnation=str(id(self)))

    def send(self, message: wpb.GatewayMessage) -> None:
        self.inbox.append(message)

    def cancel(self, request_id: str, attempt: int) -> None:
        self.send(wpb.GatewayMessage(cancel=wpb.Cancel(request_id=request_id, attempt=attempt)))

    def acknowledge(self, request_id: str, attempt: int) -> None:
        """Retention of terminal events is not part of this world."""

    def expect_prompt(self, num_tokens: int, now: float) -> None:
        """Load is not part of this world, here and below."""

    def expect_sequence(self, request_id: str, num_tokens: int) -> None: ...

    def forget_sequence(self, request_id: str) -> None: ...


class Gateway:
    """The dispatcher's surroundings: pool of workers, placement policy, journal and clock in one."""

    def __init__(self, max_attempts: int) -> None:
        self.up: list[Handle] = []
        self.placed = 0
        self.dispatcher = Dispatcher(
            gateway_id="g",
            config=RouterConfig(max_attempts=max_attempts),
            max_open_requests=100,
            pool=cast(Any, self),
            policy=cast(Any, self),
            journal=cast(Any, self),
            metrics=GatewayMetrics(),
            clock=self,
        )

    def now(self) -> float:
        return 0.0

    def listen(self, listener: Any) -> None: ...

    def record(self, request_id: str, record: Any) -> None: ...

    def observe_completion(self, num_tokens: int) -> None: ...

    def ready(self) -> list[Handle]:
        return self.up

    def place(self, demand: Any, workers: Sequence[Handle], avoid: Collection[str]) -> Placement | None:
        """In turn; a worker that failed the request only where there is no other."""
        self.placed += 1
        chosen = []
        for role in ("p", "d"):
            of_role = [worker for worker in workers if worker.role == role]
            preferred = [worker for worker in of_role if worker.worker_id not in avoid] or of_role
            if not preferred:
                return None
            chosen.append(cast(Any, preferred[self.placed % len(preferred)]))
        return Placement(
            prefill=chosen[0],
            decode=chosen[1],
            uncached_tokens=1,
            ttft_ms=1.0,
            tpot_ms=1.0,
            slacks=(1.0,),
            informed=True,
        )


class RoutedWorld(FaultyWorld):
    """See the module's paragraph."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.gateway = Gateway(scenario.max_attempts)
        self.handles = [Handle(at, process.role) for at, process in enumerate(self.processes)]
        self.gateway.up.extend(self.handles)
        self.departed: list[Handle] = []
        """Those of processes that are gone, while the gateway has not heard it."""
        self.streams: dict[int, RequestStream] = {}
        self.emitted: dict[int, int] = {}
        """Transfer -> tokens that were known when its attempt began."""
        self.generated: dict[int, int] = {}
        """Transfer -> tokens that its taker has."""
        self.endings: dict[int, tuple[Any, ...]] = {}

    # What the router does in the place of World.

    def moves(self) -> Iterator[Move]:
        for handle in {id(handle): handle for handle in (*self.handles, *self.departed)}.values():
            if handle.outbox:
                yield ("hear_from", handle)
            if handle.inbox and self.can_work(handle):
                yield ("work", handle)
        yield from super().moves()

    def slow_moves(self) -> Iterator[Move]:
        for move in super().slow_moves():
            if move[0] != "start":
                yield move
        for number in range(len(self.requests)):
            if number not in self.streams:
                yield ("accept", number)
            elif self.streams[number].active.ended and not self.requests[number].outcome:
                yield ("read_last", number)

    def can_work(self, handle: Handle) -> bool:
        """A submit waits at the worker until its prompt has blocks."""
        if handle not in self.handles or not self.processes[handle.at].alive:
            return False
        if handle.inbox[0].HasField("cancel"):
            return True
        number = int(handle.inbox[0].submit.request_id)
        available: int = self.processes[handle.at].pool.value.available
        return available >= self.scenario.requests[number]

    def accept(self, number: int) -> None:
        if len({handle.role for handle in self.gateway.up}) < 2:
            return  # the gateway would wait for workers by the clock of its loop
        request = PreparedRequest(
            request_id=str(number),
            client_request_id=str(number),
            prompt_token_ids=[1],
            sampling=pb.Sampling(max_tokens=MAX_TOKENS),
            slo=Slo(ttft_ms=1e6, tpot_ms=1e6),
            received_at=0.0,
            tokenised_at=0.0,
        )
        self.streams[number] = self.gateway.dispatcher.accept(request)

    def work(self, handle: Handle) -> None:
        """A worker takes the gateway's next message."""
        message = handle.inbox.pop(0)
        if message.HasField("submit"):
            self.submit(handle, message.submit)
            return
        number, attempt = int(message.cancel.request_id), message.cancel.attempt
        for index, t in enumerate(self.transfers):
            if t.request == number and t.attempt <= attempt:
                session = self.sessions[t.session]
                if (session.p_at, session.d_at)[handle.role == "d"] == handle.at:
                    (self.end_p if handle.role == "p" else self.end_d)(index)

    def submit(self, handle: Handle, message: wpb.Submit) -> None:
        number = int(message.request_id)
        request = self.requests[number]
        request.attempt = message.attempt
        to = next((h for h in self.handles if h.peer_address.incarnation == message.decode.incarnation), None)
        if to is None or not self.processes[to.at].alive:
            self.emit(
                handle, number, message.attempt, len(message.emitted_token_ids), tokens=(), end="failed"
            )
            return
        self.start(number, handle.at, to.at)
        self.emitted[request.transfer] = len(message.emitted_token_ids)

    # What workers say.

    def emit(
        self, handle: Handle, number: int, attempt: int, index: int, *, tokens: Sequence[int], end: str = ""
    ) -> None:
        output = wpb.SequenceOutput(request_id=str(number), attempt=attempt, index=index, token_ids=tokens)
        if end == "failed":
            error = wpb.WireError(code="transfer", message="failed", retryable=True)
            output.terminal.CopyFrom(wpb.Terminal(error=error))
        elif end:
            output.terminal.finish_reason = pb.FINISH_REASON_LENGTH
        handle.outbox.append(output)

    def say_of(self, index: int, side: str, at: int, tokens: Sequence[int], end: str = "") -> None:
        t = self.transfers[index]
        session = self.sessions[t.session]
        handle = self.handles[session.p_at if side == "p" else session.d_at]
        self.emit(handle, t.request, t.attempt, at, tokens=tokens, end=end)

    def report(self, index: int, side: str, fault: k.Fault | None) -> None:
        super().report(index, side, fault)
        self.reports = ()
        if fault is not None:
            self.say_of(index, side, self.emitted.get(index, 0), (), "failed")
        elif side == "d":
            self.generated[index] = self.emitted[index] + 1
            self.seal(self.sessions[self.transfers[index].session].d_at, self.transfers[index])

    def engine_fails(self, index: int) -> None:
        super().engine_fails(index)
        self.reports = ()
        self.say_of(index, "p", self.emitted[index], (), "failed")

    def no_need(self, index: int) -> None:
        """Whether the first token ends the request is not for chance to say here: see seed."""

    def seed(self, index: int) -> None:
        t, at = self.transfers[index], self.emitted[index]
        last = at + 1 == MAX_TOKENS
        if t.computed == self.scenario.steps:
            self.say_of(index, "p", at, (self.token(t, at),), "length" if last else "")
        if last:
            self.end_p(index, ENDED)
        else:
            super().seed(index)

    def finish(self, index: int) -> None:
        """The taker's next token."""
        t, at = self.transfers[index], self.generated[index]
        self.generated[index] += 1
        last = at + 1 == MAX_TOKENS
        self.say_of(index, "d", at, (self.token(t, at),), "length" if last else "")
        if last:
            self.free_taker(t)

    def token(self, t: Any, at: int) -> int:
        return 100 * int(t.request) + at

    # What the gateway hears.

    def hear_from(self, handle: Handle, keep: bool = False) -> None:
        word = handle.outbox[0]
        if not keep:
            handle.outbox.pop(0)
        dispatcher = self.gateway.dispatcher
        if word == "lost":
            self.gateway.up.remove(handle)
            self.departed.remove(handle)
            dispatcher.lost(cast(Any, handle), "killed")
        elif word == "up":
            self.gateway.up.append(handle)
            dispatcher.available(cast(Any, handle))
        else:
            dispatcher.outputs(cast(Any, handle), [cast(Any, word)])

    def crash(self, at: int) -> None:
        super().crash(at)
        self.reports = ()
        handle = self.handles[at]
        handle.outbox.append("lost")
        self.departed.append(handle)

    def restart(self, at: int) -> None:
        super().restart(at)
        self.handles[at] = Handle(at, self.processes[at].role)
        self.handles[at].outbox.append("up")

    # The prefix cache: prompts of one length are the same.

    def hashes(self, t: Any) -> tuple[bytes, ...]:
        blocks = self.scenario.requests[t.request]
        return tuple(f"{blocks}-{block}".encode() for block in range(blocks - 1))

    def cached(self, at: int, t: Any) -> tuple[int, ...]:
        found: tuple[int, ...] = self.pool(at, "match_prefix", self.hashes(t))
        return found

    def seal(self, at: int, t: Any) -> None:
        for block, block_hash in zip(t.d_cached + t.d_blocks, self.hashes(t), strict=False):
            self.pool(at, "seal", block, block_hash)

    # Clients.

    def client_goes(self, number: int) -> None:
        self.close(number, "cancelled")

    def read_last(self, number: int) -> None:
        """The client has everything: it ends once, and what it has is in order and whole."""
        active = self.streams[number].active
        active.delivered = bool(active.finish_reason)
        self.close(number, "done" if active.delivered else "failed")

    def close(self, number: int, outcome: str) -> None:
        if self.requests[number].outcome:
            raise Violation(f"3: request {number} ends a second time")
        self.requests[number].outcome = outcome
        self.gateway.dispatcher.close(self.streams[number])

    def check_clients(self) -> None:
        """Token i once and in order; an end is for ever."""
        for number, stream in self.streams.items():
            active = stream.active
            tokens = active.token_ids
            if tokens != [100 * number + at for at in range(len(tokens))]:
                raise Violation(f"3: request {number} has the tokens {tokens}")
            end = (active.finish_reason, active.error, len(tokens) if active.ended else 0)
            if active.finish_reason and len(tokens) != MAX_TOKENS:
                raise Violation(f"3: request {number} is finished with {len(tokens)} tokens")
            if active.ended and self.endings.setdefault(number, end) != end:
                raise Violation(f"3: request {number} ended with {self.endings[number]}, and now {end}")
