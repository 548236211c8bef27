"""Fake workers for one event loop, real or virtual. Tokens are a function of prompt and index, so that every
attempt gives the same ones; times come from the loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash
from diphase.proto import inference_pb2 as pb
from diphase.proto import worker_pb2 as wpb
from diphase.proto.block_hash import block_hashes, root_hash
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.router.membership import Member
from diphase.router.memory_links import MemoryNetwork, WorkerEnd

LAYOUT = "layout-1"
BLOCK_SIZE = 4
MODEL = "dummy:tiny"
FIRST_WORD = 300
"""Ids from here on are words of the dummy model's tokenizer."""


def expected_token(prompt: Sequence[int], index: int) -> int:
    """What every fake worker generates at `index`."""
    return FIRST_WORD + xxhash.xxh3_64_intdigest(f"{list(prompt)}/{index}".encode()) % 200


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    return [expected_token(prompt, index) for index in range(count)]


class LoopClock:
    """A Clock on the running loop's time, `offset` seconds ahead of it."""

    def __init__(self, offset: float = 0.0) -> None:
        self._offset = offset

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self._offset


@dataclass(eq=False)
class Attempt:
    submit: wpb.Submit
    gateway_id: str
    token_ids: list[int]
    task: asyncio.Task[None] | None = None
    terminal: wpb.Terminal | None = None


@dataclass(eq=False)
class FakeWorker:
    """One worker process. Prefill makes token 0 and hands over; decode makes the rest, or everything."""

    worker_id: str
    role: str
    network: MemoryNetwork
    peers: dict[str, FakeWorker]
    """Every worker by worker_id; the hand-off's network."""
    incarnation: str = "1"
    prompt_s: float = 0.01
    step_s: float = 0.02
    handoff_s: float = 0.005
    clock: LoopClock = field(default_factory=lambda: LoopClock(1000.0))
    chunk_budget: int = 512
    jitter: random.Random | None = None
    """Makes times uneven and repeats outputs."""
    refuse: list[wpb.WireError] = field(default_factory=list)
    """Errors for the next submits, in order."""
    steps_before_failure: int | None = None
    """Decode fails the hand-off after so many tokens, once."""
    submits: list[wpb.Submit] = field(default_factory=list)
    cancels: list[wpb.Cancel] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    load: wpb.Load = field(default_factory=lambda: wpb.Load(blocks_total=1000, blocks_free=1000))
    step_age_s: float = 0.0
    snapshots_sent: int = 0
    inspections: int = 0
    """Questions about its transfers, none of which it answers."""

    def __post_init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.redirects: dict[str, str] = {}
        self.ends: dict[str, WorkerEnd] = {}
        self.stored: list[bytes] = []
        self._names: dict[WorkerEnd, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.alive = False

    @property
    def address(self) -> str:
        return f"{self.worker_id}:1"

    @property
    def member(self) -> Member:
        return Member(
            worker_id=self.worker_id, role=self.role, address=self.address, incarnation=self.incarnation
        )

    @property
    def live(self) -> set[str]:
        """Requests that it works on."""
        return {request_id for request_id, attempt in self.attempts.items() if attempt.terminal is None}

    def start(self) -> None:
        self.alive = True
        self.peers[self.worker_id] = self
        self.network.serve(self.address, self)
        self._spawn(self._beat())

    def kill(self) -> None:
        """kill -9: nothing is said any more."""
        self.alive = False
        self.network.kill(self.address)
        for task in list(self._tasks):
            task.cancel()

    def restarted(self) -> FakeWorker:
        """A fresh process in its place."""
        return replace(
            self, incarnation=str(int(self.incarnation) + 1), submits=[], cancels=[], acknowledged=[]
        )

    # WorkerService

    def attached(self, end: WorkerEnd) -> None:
        return None

    def detached(self, end: WorkerEnd) -> None:
        name = self._names.pop(end, None)
        if name is not None and self.ends.get(name) is end:
            del self.ends[name]

    def received(self, end: WorkerEnd, frame: wpb.GatewayFrame) -> None:
        for message in frame.messages:
            match message.WhichOneof("kind"):
                case "hello":
                    name = f"{message.hello.gateway_id}/{message.hello.incarnation}"
                    self._names[end] = name
                    self.ends[name] = end
                    self._send(name, wpb.WorkerMessage(hello=self.hello()))
                case "ping":
                    pong = wpb.Pong(sent_at=message.ping.sent_at, at=self.clock.now())
                    self._send(self._names[end], wpb.WorkerMessage(pong=pong))
                case "submit":
                    self._on_submit(self._names[end], message.submit)
                case "cancel":
                    self.cancels.append(message.cancel)
                    self._on_cancel(message.cancel)
                case "acknowledge":
                    self._on_acknowledge(message.acknowledge)
                case "resume":
                    self._on_resume(self._names[end], message.resume)
                case "inspect":
                    self.inspections += 1
                case "prefix_snapshot":
                    self.snapshots_sent += 1
                    snapshot = wpb.PrefixSnapshot(sequence=0, hashes=self.stored)
                    self._send(self._names[end], wpb.WorkerMessage(prefix_snapshot=snapshot))

    def hello(self) -> wpb.WorkerHello:
        return wpb.WorkerHello(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            model=MODEL,
            block_size=BLOCK_SIZE,
            num_blocks=1000,
            context_length=8192,
            max_running=64,
            chunk_budget=self.chunk_budget,
            layout_hash=LAYOUT,
            protocol_version=PROTOCOL_VERSION,
        )

    # requests

    def _on_submit(self, gateway_id: str, submit: wpb.Submit) -> None:
        self.submits.append(submit)
        known = self.attempts.get(submit.request_id)
        if known is not None and known.task is not None:
            known.task.cancel()  # a newer attempt ends an older one without a word
        attempt = Attempt(submit, gateway_id, list(submit.emitted_token_ids))
        if self.refuse:
            self._output(attempt, [], wpb.Terminal(error=self.refuse.pop(0)))
            return
        self.attempts[submit.request_id] = attempt
        run = self._prefill(attempt) if self.role == "prefill" else self._decode(attempt, None)
        attempt.task = self._spawn(run)

    def _on_acknowledge(self, message: wpb.Acknowledge) -> None:
        self.acknowledged.append(message.request_id)
        attempt = self.attempts.get(message.request_id)
        if attempt is not None and attempt.terminal and attempt.submit.attempt <= message.attempt:
            del self.attempts[message.request_id]

    def _on_cancel(self, cancel: wpb.Cancel) -> None:
        attempt = self.attempts.get(cancel.request_id)
        if attempt is None or attempt.terminal is not None or attempt.submit.attempt > cancel.attempt:
            return
        if attempt.task is not None:
            attempt.task.cancel()
        self._output(attempt, [], wpb.Terminal(cancelled=True))

    def named(self, client_request_id: str) -> str:
        """What workers call the request that its client calls so; empty when it is not here."""
        names = [
            request_id
            for request_id, attempt in self.attempts.items()
            if attempt.submit.client_request_id == client_request_id
        ]
        return names[-1] if names else ""

    def _on_resume(self, gateway_id: str, resume: wpb.Resume) -> None:
        answer = wpb.Resumed(request_id=resume.request_id, client_request_id=resume.client_request_id)
        attempt = self.attempts.get(resume.request_id)
        if not resume.request_id:
            if name := self.named(resume.client_request_id):
                answer.known = True
                answer.submit.request_id = name
        elif attempt is None:
            self.redirects[resume.request_id] = gateway_id
        else:
            if attempt.gateway_id != gateway_id:
                moved = wpb.Moved(request_id=resume.request_id, attempt=attempt.submit.attempt)
                self._send(attempt.gateway_id, wpb.WorkerMessage(moved=moved))
            attempt.gateway_id = gateway_id
            answer = wpb.Resumed(
                request_id=resume.request_id,
                client_request_id=resume.client_request_id,
                known=True,
                submit=attempt.submit,
                token_ids=attempt.token_ids,
                terminal=attempt.terminal,
            )
            if attempt.submit.sampling.HasField("logprobs"):
                answer.logprobs.extend(
                    pb.TokenLogprobs(logprob=-float(i)) for i in range(len(attempt.token_ids))
                )
        self._send(gateway_id, wpb.WorkerMessage(resumed=answer))

    async def _prefill(self, attempt: Attempt) -> None:
        submit = attempt.submit
        received = self.clock.now()
        scheduled = await self._pause(self.prompt_s / 5)
        token_at = await self._pause(self.prompt_s)
        self._store(submit)
        times = wpb.PrefillTimes(
            received_at=received, scheduled_at=scheduled, token_at=token_at, cached_tokens=0
        )
        last = len(attempt.token_ids) + 1 >= submit.sampling.max_tokens
        token = self._next_token(attempt)
        self._output(attempt, [token], _finished() if last else None, prefill=times)
        if last:
            return
        await self._pause(self.handoff_s)
        peer = self.peers.get(submit.decode.worker_id)
        if peer is None or not peer.alive or peer.incarnation != submit.decode.incarnation:
            error = wpb.WireError(code="peer_lost", message="the decode worker is gone", retryable=True)
            self._output(attempt, [], wpb.Terminal(error=error))
            return
        del self.attempts[submit.request_id]
        peer.take_over(attempt)

    def take_over(self, attempt: Attempt) -> None:
        """The hand-off has arrived."""
        submit = attempt.submit
        known = self.attempts.get(submit.request_id)
        if known is not None and known.submit.attempt > submit.attempt:
            return
        if known is not None and known.task is not None:
            known.task.cancel()
        gateway_id = self.redirects.pop(submit.request_id, attempt.gateway_id)
        mine = Attempt(submit, gateway_id, list(attempt.token_ids))
        self.attempts[submit.request_id] = mine
        verified = self.clock.now()
        mine.task = self._spawn(self._decode(mine, verified))

    async def _decode(self, attempt: Attempt, verified: float | None) -> None:
        submit = attempt.submit
        scheduled = await self._pause(self.step_s / 10)
        first = True
        while attempt.terminal is None:
            if self.steps_before_failure is not None:
                if self.steps_before_failure == 0:
                    self.steps_before_failure = None
                    error = wpb.WireError(code="digest_mismatch", message="a bit flipped", retryable=True)
                    self._output(attempt, [], wpb.Terminal(error=error))
                    return
                self.steps_before_failure -= 1
            token_at = await self._pause(self.step_s)
            last = len(attempt.token_ids) + 1 >= submit.sampling.max_tokens
            token = self._next_token(attempt)
            prefill = decode = None
            if first and verified is None:
                prefill = wpb.PrefillTimes(received_at=scheduled, scheduled_at=scheduled, token_at=token_at)
                self._store(submit)
            elif first and verified is not None:
                decode = wpb.DecodeTimes(
                    verified_at=verified,
                    scheduled_at=scheduled,
                    token_at=token_at,
                    handoff_bytes=4096,
                    handoff_segments=2,
                )
            first = False
            self._output(attempt, [token], _finished() if last else None, prefill=prefill, decode=decode)

    def _next_token(self, attempt: Attempt) -> int:
        return expected_token(attempt.submit.prompt_token_ids, len(attempt.token_ids))

    def _output(
        self,
        attempt: Attempt,
        tokens: list[int],
        terminal: wpb.Terminal | None,
        prefill: wpb.PrefillTimes | None = None,
        decode: wpb.DecodeTimes | None = None,
    ) -> None:
        index = len(attempt.token_ids)
        attempt.token_ids += tokens
        attempt.terminal = terminal
        output = wpb.SequenceOutput(
            request_id=attempt.submit.request_id,
            attempt=attempt.submit.attempt,
            index=index,
            token_ids=tokens,
            terminal=terminal,
            prefill=prefill,
            decode=decode,
        )
        if attempt.submit.sampling.HasField("logprobs"):
            output.logprobs.extend(pb.TokenLogprobs(logprob=-float(index)) for _ in tokens)
        sample = wpb.StepSample(decode_batch=1, decode_context=index + 1, duration_s=self.step_s)
        step = wpb.StepOutput(outputs=[output], sample=sample, load=self.load)
        self._send(attempt.gateway_id, wpb.WorkerMessage(step=step))
        if self.jitter is not None and self.jitter.random() < 0.1:
            self._send(attempt.gateway_id, wpb.WorkerMessage(step=step))

    def _store(self, submit: wpb.Submit) -> None:
        hashes = block_hashes(submit.prompt_token_ids, BLOCK_SIZE, root_hash(LAYOUT))
        self.stored += [h for h in hashes if h not in self.stored]

    async def _beat(self) -> None:
        sequence = 0
        while True:
            sequence += 1
            beat = wpb.Heartbeat(
                sequence=sequence, at=self.clock.now(), step_age_s=self.step_age_s, load=self.load
            )
            for gateway_id in list(self.ends):
                self._send(gateway_id, wpb.WorkerMessage(heartbeat=beat))
            await asyncio.sleep(0.25)

    async def _pause(self, seconds: float) -> float:
        """Waits and returns the worker's time."""
        await asyncio.sleep(seconds * (self.jitter.uniform(0.3, 2.0) if self.jitter else 1.0))
        return self.clock.now()

    def _send(self, gateway_id: str, message: wpb.WorkerMessage) -> None:
        end = self.ends.get(gateway_id)
        if end is not None and self.alive:
            end.send(wpb.WorkerFrame(messages=[message]))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _finished() -> wpb.Terminal:
    return wpb.Terminal(finish_reason=pb.FINISH_REASON_LENGTH)
