"""A gateway that answers by script and a clock that moves by hand, for the tests of the load client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc.aio
import pytest
from diphase.proto import inference_pb2 as pb
from diphase.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server


class StepClock:
    """Time moves only when something waits for it or moves it; a read can be waited for, so that a server
    can send its next token after the client has stamped the last one."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._reads: asyncio.Queue[None] = asyncio.Queue()

    def now(self) -> float:
        self._reads.put_nowait(None)
        return self.time

    async def sleep_until(self, at: float) -> None:
        await asyncio.sleep(0)  # what is ready to run runs before time moves
        self.time = max(self.time, at)

    def forget_reads(self) -> None:
        while not self._reads.empty():
            self._reads.get_nowait()

    async def was_read(self) -> None:
        await asyncio.wait_for(self._reads.get(), timeout=30)


Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Script: TypeAlias = "Callable[[pb.GenerateRequest, Context], AsyncIterator[pb.GenerateResponse]]"


async def answer(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
    """Every token in a message of its own, at once."""
    count = request.sampling.max_tokens
    for i in range(count):
        yield pb.GenerateResponse(index=i, token_ids=[7])
    yield last_message(request, count)


def last_message(request: pb.GenerateRequest, count: int, ttft_ms: float = 0.0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        index=count,
        finish_reason=pb.FINISH_REASON_LENGTH,
        usage=pb.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=count, cached_tokens=1),
        stages=pb.Stages(
            prefill_ms=3.0,
            ttft_ms=ttft_ms,
            handoff_ms=2.0,
            attempts=1,
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            handoff_bytes=4096,
        ),
        slo="met",
    )


@dataclass
class ScriptedGateway(InferenceServicer):
    """Answers Generate by `script` and keeps what it was asked."""

    script: Script = answer
    context_length: int = 4096
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    cancelled: int = 0
    address: str = ""

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        try:
            async for response in self.script(request, context):
                yield response
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            model="scripted",
            context_length=self.context_length,
            vocab_size=300,
            block_size=16,
            default_slo=pb.Slo(ttft_ms=60_000.0, tpot_ms=30_000.0),
        )


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
async def gateway() -> AsyncIterator[ScriptedGateway]:
    server = grpc.aio.server()
    scripted = ScriptedGateway()
    add_InferenceServicer_to_server(scripted, server)
    scripted.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield scripted
    await server.stop(grace=0)
