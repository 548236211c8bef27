"""GatewayServices against a gRPC context that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc
from diphase.proto import inference_pb2 as pb
from diphase.router.gateway import Router
from diphase.router.services import GatewayServices

from ..simulation.virtual_loop import run_virtually
from .fake_workers import LoopClock
from .fakes import fake_cluster, token_request


class Aborted(Exception):
    """What abort() raises."""


class Context:
    """A call whose client stops reading after `reads` messages."""

    def __init__(self, reads: int) -> None:
        self._reads = reads
        self.written: list[pb.GenerateResponse] = []
        self.status: grpc.StatusCode | None = None
        self.details = ""

    async def write(self, message: pb.GenerateResponse) -> None:
        if len(self.written) >= self._reads:
            await asyncio.Event().wait()
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, str]]) -> None:
        self.status, self.details = code, details
        raise Aborted

    def invocation_metadata(self) -> None:
        return None


def services_of(router: Router, client_stall_s: float) -> GatewayServices:
    return GatewayServices(
        dispatcher=router.dispatcher,
        pool=router.pool,
        text=router.text,
        clock=LoopClock(),
        client_stall_s=client_stall_s,
        client_token="",
    )


async def call(services: GatewayServices, context: Context, message: pb.GenerateRequest) -> None:
    with suppress(Aborted):
        await services._generate(message.SerializeToString(), context)  # type: ignore[arg-type]


def test_a_client_that_stops_reading_is_let_go() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                context = Context(reads=3)
                task = asyncio.create_task(call(services, context, token_request(range(100), 100)))
                await asyncio.sleep(50.0)
                services.end_stalled()
                assert not task.done()
                await asyncio.sleep(12.0)
                services.end_stalled()
                await task
                assert context.status is grpc.StatusCode.CANCELLED
                assert "60 s" in context.details
                assert len(context.written) == 3
                assert router.dispatcher.open_requests == 0

    run_virtually(main())


def test_a_call_that_gRPC_cancels_stays_cancelled() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                context = Context(reads=0)
                services = services_of(router, client_stall_s=60.0)
                task = asyncio.create_task(call(services, context, token_request(range(100), 100)))
                await asyncio.sleep(1.0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                assert context.status is None
                assert router.metrics.requests_by_slo["cancelled"] == 1

    run_virtually(main())


def test_a_bug_fails_its_request_alone() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                router.text.model.tokenizer.pieces.clear()  # nothing can be turned into text any more
                context = Context(reads=100)
                await call(services, context, token_request(range(100), 5))
                assert context.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
                assert router.dispatcher.open_requests == 0

    run_virtually(main())
