"""A gateway's end of a worker's stream, and a worker on virtual time to try it on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.engine.fake import FakeEngine, StepCost
from diphase.engine.gateway_link import GatewayLink
from diphase.engine.host_config import HostConfig
from diphase.proto import worker_pb2 as pb
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.sampling import SamplingParams

from ..simulation.cluster import SimWorker, World
from ..simulation.virtual_loop import VirtualClock, run_virtually

PROMPT = [11, 12, 13, 14, 15]
ORACLE = FakeEngine(num_blocks=1)


def expected(num_tokens: int, prompt: list[int] | None = None) -> list[int]:
    return ORACLE.continuation(prompt or PROMPT, SamplingParams(), num_tokens)


class Client:
    """One gateway's stream, read to the end of what is there."""

    def __init__(self, worker: SimWorker, gateway_id: str = "g") -> None:
        self.link: GatewayLink = worker.host.attach(hello(gateway_id))
        self.messages: list[pb.WorkerMessage] = []
        self.frames: list[pb.WorkerFrame] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (frame := await self.link.next_frame()) is not None:
            self.frames.append(frame)
            self.messages += frame.messages

    def send(self, **message: object) -> None:
        self.link.receive(pb.GatewayFrame(messages=[pb.GatewayMessage(**message)]))  # type: ignore[arg-type]

    def outputs(self, request_id: str = "r") -> list[pb.SequenceOutput]:
        return [
            output
            for message in self.messages
            for output in message.step.outputs
            if output.request_id == request_id
        ]

    def tokens(self, request_id: str = "r") -> list[int]:
        return [token_id for output in self.outputs(request_id) for token_id in output.token_ids]

    def terminal(self, request_id: str = "r") -> pb.Terminal | None:
        found = [o.terminal for o in self.outputs(request_id) if o.HasField("terminal")]
        assert len(found) <= 1
        return found[0] if found else None

    def resumed(self) -> list[tuple[bool, list[int]]]:
        return [
            (m.resumed.known, list(m.resumed.token_ids))
            for m in self.messages
            if m.WhichOneof("kind") == "resumed"
        ]

    def last(self, kind: str) -> object:
        return [getattr(m, kind) for m in self.messages if m.WhichOneof("kind") == kind][-1]

    async def stop_reading(self) -> None:
        self._reader.cancel()
        await asyncio.wait((self._reader,))


def hello(gateway_id: str = "g", **values: object) -> pb.GatewayHello:
    fields = {"gateway_id": gateway_id, "protocol_version": PROTOCOL_VERSION, **values}
    return pb.GatewayHello(**fields)  # type: ignore[arg-type]


def with_worker(
    body: Callable[[SimWorker], Awaitable[None]],
    *,
    role: str = "colocated",
    config: HostConfig | None = None,
    cost: StepCost | None = None,
    num_blocks: int = 64,
    scheduler: ColocatedSchedulerConfig | None = None,
) -> None:
    async def main() -> None:
        world = World.of(VirtualClock(asyncio.get_running_loop()), 0)
        worker = SimWorker(
            world,
            role,
            "w",
            host=config,
            cost=cost or StepCost(base_s=0.01),
            num_blocks=num_blocks,
            scheduler=scheduler,
        )
        await asyncio.sleep(0)
        await body(worker)
        await worker.stop()

    run_virtually(main())
