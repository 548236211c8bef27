"""A gateway for tests of workers: submits to given workers, collects by (attempt, index), retries what
failed.

It speaks worker.proto over the router's links (gRPC or in memory) and asserts on the way what every gateway
relies on: inside an attempt no token comes twice, none comes after the terminal event, and there is one
terminal event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import Cancelled, DiphaseError, WorkerLost, from_wire
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.sampling import SamplingParams, sampling_to_proto
from diphase.proto.slo import Slo, slo_to_proto
from diphase.router.links import Link, LinkFactory

REDIAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Placement:
    """Worker addresses of one attempt; without a prefill worker the decode worker computes the prompt."""

    prefill: pb.PeerAddress | None
    decode: pb.PeerAddress

    @property
    def first(self) -> str:
        return (self.prefill or self.decode).address

    @property
    def addresses(self) -> set[str]:
        return {self.first, self.decode.address}


@dataclass(slots=True, eq=False)
class Call:
    """One request."""

    submit: pb.Submit
    place: Callable[[int], Placement]
    placement: Placement
    done: asyncio.Future[list[int]]
    tokens: dict[int, int] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)  # indices that came in this attempt
    total: int | None = None
    prefill_times: pb.PrefillTimes | None = None
    decode_times: pb.DecodeTimes | None = None

    def contiguous(self) -> list[int]:
        found: list[int] = []
        while len(found) in self.tokens:
            found.append(self.tokens[len(found)])
        return found


class Gateway:
    """Run `run()` as a task; then generate()."""

    def __init__(
        self, gateway_id: str, link_factory: LinkFactory, *, token: str = "", max_attempts: int = 32
    ) -> None:
        self.gateway_id = gateway_id
        self.heartbeats: dict[str, pb.Heartbeat] = {}
        self.hellos: dict[str, pb.WorkerHello] = {}
        self.samples: list[pb.StepSample] = []
        self.prefixes: dict[str, set[bytes]] = {}
        self.moved: list[str] = []
        self.frames = 0
        self.heard = asyncio.Event()
        """Set at every frame."""
        self._link_factory = link_factory
        self._token = token
        self._max_attempts = max_attempts
        self._links: dict[str, Link] = {}
        self.calls: dict[str, Call] = {}
        self._attached: dict[str, asyncio.Event] = {}

    async def run(self, addresses: list[str]) -> None:
        """Keeps a stream to each worker until cancelled."""
        async with asyncio.TaskGroup() as group:
            for address in addresses:
                self._attached[address] = asyncio.Event()
                group.create_task(self._keep(address))

    async def attached(self, *addresses: str) -> None:
        await asyncio.sleep(0)
        for address in addresses:
            await self._attached[address].wait()

    def send(self, address: str, **message: object) -> None:
        if link := self._links.get(address):
            link.send(pb.GatewayMessage(**message))  # type: ignore[arg-type]

    def take_over(self, request_id: str, other: Gateway, addresses: Iterable[str]) -> None:
        """Goes on with a request of another gateway that is gone, and with it what that one had received."""
        call = self.calls[request_id] = other.calls.pop(request_id)
        call.tokens.clear()
        call.fresh.clear()
        call.total = None
        for address in addresses:
            self.send(address, resume=pb.Resume(request_id=request_id))

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        place: Callable[[int], Placement],
        slo: Slo | None = None,
    ) -> list[int]:
        """All tokens of a request that may take several attempts."""
        submit = pb.Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(params),
            slo=slo_to_proto(slo or Slo()),
        )
        loop = asyncio.get_running_loop()
        call = Call(submit=submit, place=place, placement=place(0), done=loop.create_future())
        self.calls[request_id] = call
        self._submit(call)
        try:
            return await call.done
        finally:
            self.calls.pop(request_id, None)
            for address in call.placement.addresses:
                self.send(
                    address,
                    acknowledge=pb.Acknowledge(request_id=request_id, attempt=call.submit.attempt),
                )

    def call(self, request_id: str) -> Call:
        return self.calls[request_id]

    def cancel(self, request_id: str) -> None:
        """The client went away."""
        call = self.calls.get(request_id)
        if call is not None and not call.done.done():
            self._cancel_attempt(call)
            call.done.set_exception(Cancelled("by the test"))

    def _submit(self, call: Call) -> None:
        placement = call.placement
        if placement.prefill is not None:
            call.submit.decode.CopyFrom(placement.decode)
        else:
            call.submit.ClearField("decode")
        call.fresh.clear()
        call.total = None
        if placement.first in self._links:
            message = pb.Submit()
            message.CopyFrom(call.submit)
            self.send(placement.first, submit=message)
        else:
            self._retry(call, WorkerLost(f"no stream to {placement.first}"))

    def _cancel_attempt(self, call: Call) -> None:
        for address in call.placement.addresses:
            self.send(
                address, cancel=pb.Cancel(request_id=call.submit.request_id, attempt=call.submit.attempt)
            )

    def _retry(self, call: Call, error: DiphaseError) -> None:
        if call.done.done():
            return
        if not error.retryable or call.submit.attempt + 1 >= self._max_attempts:
            call.done.set_exception(error)
            return
        self._cancel_attempt(call)
        emitted = call.contiguous()
        call.tokens = dict(enumerate(emitted))
        call.submit.attempt += 1
        del call.submit.emitted_token_ids[:]
        call.submit.emitted_token_ids.extend(emitted)
        call.placement = call.place(call.submit.attempt)
        asyncio.get_running_loop().call_later(min(2.0, 0.05 * 2**call.submit.attempt), self._submit, call)

    async def _keep(self, address: str) -> None:
        while True:
            hello = pb.GatewayHello(
                gateway_id=self.gateway_id,
                incarnation=self.gateway_id,
                cluster_token=self._token,
                protocol_version=PROTOCOL_VERSION,
            )
            link = self._link_factory(address, hello)
            link.send(pb.GatewayMessage(prefix_snapshot=pb.PrefixSnapshotRequest()))
            try:
                await link.run(partial(self._on_frame, address, link))
            except WorkerLost as error:
                self._links.pop(address, None)
                for call in list(self.calls.values()):
                    if address in call.placement.addresses:
                        self._retry(call, error)
            await asyncio.sleep(REDIAL_S)

    def _on_frame(self, address: str, link: Link, frame: pb.WorkerFrame) -> None:
        self.frames += 1
        self.heard.set()
        for message in frame.messages:
            match message.WhichOneof("kind"):
                case "hello":
                    self._links[address] = link
                    self.hellos[address] = message.hello
                    self._attached[address].set()
                case "step":
                    if message.step.HasField("sample"):
                        self.samples.append(message.step.sample)
                    for output in message.step.outputs:
                        self._on_output(output)
                case "heartbeat":
                    self.heartbeats[address] = message.heartbeat
                case "prefix_snapshot":
                    self.prefixes[address] = set(message.prefix_snapshot.hashes)
                case "prefix_delta":
                    known = self.prefixes.setdefault(address, set())
                    known |= set(message.prefix_delta.stored)
                    known -= set(message.prefix_delta.evicted)
                case "resumed":
                    self._on_resumed(message.resumed)
                case "moved":
                    self.moved.append(message.moved.request_id)

    def _on_resumed(self, resumed: pb.Resumed) -> None:
        call = self.calls.get(resumed.request_id)
        if call is not None and resumed.known:
            assert resumed.submit.attempt == call.submit.attempt
            for index, token_id in enumerate(resumed.token_ids):
                assert call.tokens.setdefault(index, token_id) == token_id
            if resumed.HasField("terminal"):
                call.total = len(resumed.token_ids)
            self._finish(call)

    def _on_output(self, output: pb.SequenceOutput) -> None:
        call = self.calls.get(output.request_id)
        if call is None or output.attempt != call.submit.attempt or call.done.done():
            return
        if output.terminal.HasField("error"):
            error = from_wire(output.terminal.error.code, output.terminal.error.message)
            self._retry(call, error)
            return
        assert call.total is None or output.index < call.total, "a token after the terminal event"
        for index, token_id in enumerate(output.token_ids, output.index):
            assert index not in call.fresh, f"token {index} of {output.request_id} came twice"
            assert call.tokens.get(index, token_id) == token_id
            call.fresh.add(index)
            call.tokens[index] = token_id
        if output.HasField("prefill"):
            call.prefill_times = output.prefill
        if output.HasField("decode"):
            call.decode_times = output.decode
        if output.HasField("terminal"):
            assert call.total is None, "two terminal events"
            if output.terminal.cancelled:
                call.done.set_exception(Cancelled("by the worker"))
                return
            call.total = output.index + len(output.token_ids)
        self._finish(call)

    def _finish(self, call: Call) -> None:
        tokens = call.contiguous()
        if call.total is not None and len(tokens) == call.total:
            call.done.set_result(tokens)
