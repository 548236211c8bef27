"""GatewayServices against a gRPC context that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
import pytest
from diphase.proto import cluster_pb2
from diphase.proto import inference_pb2 as pb
from diphase.router.gateway import Router
from diphase.router.services import GatewayServices
from diphase.router.supervisor_link import SupervisorLink
from diphase.router.text import TextProcessor, TextStream

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
        supervisor=SupervisorLink(lambda: router.pool.supervisor, ""),
    )


async def call(services: GatewayServices, context: Context, message: pb.GenerateRequest) -> None:
    await call_with(services, context, message.SerializeToString())


async def call_with(services: GatewayServices, context: Context, data: bytes) -> None:
    with suppress(Aborted):
        await services._generate(data, context)  # type: ignore[arg-type]


def test_a_request_too_large_for_any_prompt_is_refused_before_it_is_parsed() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                small, large = Context(reads=0), Context(reads=0)
                malformed = b"\xff" * 1000
                await call_with(services, small, malformed)
                await call_with(services, large, malformed * 1000)
                assert "no valid GenerateRequest" in small.details
                assert large.status is grpc.StatusCode.INVALID_ARGUMENT
                assert "the request has 1000000 bytes" in large.details
                assert "8192 tokens, each at most 7 bytes" in large.details

    run_virtually(main())


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


def test_a_bug_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        """Text of a request that hits a bug with its third message."""

        def __init__(self, text: TextStream) -> None:
            self._text = text
            self._pushed = 0

        def push(self, token_ids: Sequence[int]) -> tuple[str, int, bool]:
            self._pushed += 1
            if self._pushed == 3:
                raise ZeroDivisionError("a bug")
            return self._text.push(token_ids)

    good = TextProcessor.stream

    def stream(self: TextProcessor, sampling: pb.Sampling) -> Any:
        text = good(self, sampling)
        return Broken(text) if sampling.max_tokens == 50 else text

    async def main() -> None:
        monkeypatch.setattr(TextProcessor, "stream", stream)
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                broken, beside, after = (Context(reads=100) for _ in range(3))
                async with asyncio.TaskGroup() as group:
                    group.create_task(call(services, broken, token_request(range(100), 50)))
                    group.create_task(call(services, beside, token_request(range(100), 20)))
                await call(services, after, token_request(range(100), 20))
                assert broken.status is grpc.StatusCode.INTERNAL
                assert "ZeroDivisionError" in broken.details
                assert not any(response.finish_reason for response in broken.written)
                for context in (beside, after):
                    assert context.status is None
                    assert context.written[-1].finish_reason == pb.FINISH_REASON_LENGTH
                    assert sum(len(response.token_ids) for response in context.written) == 20
                assert router.dispatcher.open_requests == 0
                assert sum(router.metrics.requests_by_slo.values()) == 3

    run_virtually(main())
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["generate_failed"]


def test_a_glance_does_not_wait_for_a_stopped_worker() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                cluster.network.silence("d0:1")
                began_at = asyncio.get_running_loop().time()
                status = await services._get_status(cluster_pb2.GetStatusRequest(glance=True))
                assert asyncio.get_running_loop().time() == began_at
                assert {worker.state for worker in status.workers} == {"ready"}

    run_virtually(main())


def test_the_status_tells_where_the_gateways_metrics_are() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                services = services_of(router, client_stall_s=60.0)
                services.metrics_address = "127.0.0.1:9000"
                status = await services._get_status(cluster_pb2.GetStatusRequest())
                assert status.metrics_address == "127.0.0.1:9000"

    run_virtually(main())
