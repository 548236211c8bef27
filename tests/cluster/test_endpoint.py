"""A gateway as the supervisor and `diphase status` see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from io import StringIO
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.cluster.endpoint import StatusClient, from_rpc, wait_linked
from diphase.cluster.generate import stream
from diphase.cluster.terminal import status_table
from diphase.proto import cluster_pb2
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import ConfigError, WorkerLost
from diphase.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from rich.console import Console

from ..simulation.virtual_loop import run_virtually

WHY = "decode-0 is connecting (it serves model 'a', this gateway 'b')"


class FakeClient(StatusClient):
    """A gateway that is `ready` with some workers, from some time on with all."""

    def __init__(self, ready: set[str], later: float = float("inf")) -> None:
        super().__init__("")
        self.ready = ready
        self.later = later
        self.explains = True

    async def ask(
        self, address: str, timeout_s: float, *, transfers: bool = False
    ) -> cluster_pb2.GetStatusResponse:
        everybody = asyncio.get_running_loop().time() >= self.later
        return cluster_pb2.GetStatusResponse(
            workers=[
                cluster_pb2.WorkerStatus(
                    worker_id=name, state="ready" if everybody or name in self.ready else "connecting"
                )
                for name in ("prefill-0", "decode-0")
            ]
        )

    async def not_ready(self, address: str, timeout_s: float) -> str:
        if not self.explains:
            raise TimeoutError
        return WHY


WORKERS = {"prefill-0", "decode-0"}


def test_linking_ends_when_the_gateway_has_every_worker() -> None:
    async def main() -> float:
        await wait_linked(FakeClient({"prefill-0"}, later=3.0), "g:1", WORKERS)
        return asyncio.get_running_loop().time()

    assert 3.0 <= run_virtually(main()) < 4.0


def test_a_gateway_that_is_being_restarted_is_waited_for() -> None:
    class Restarting(FakeClient):
        async def ask(
            self, address: str, timeout_s: float, *, transfers: bool = False
        ) -> cluster_pb2.GetStatusResponse:
            if asyncio.get_running_loop().time() < 2.0:
                raise ConfigError("no gateway answers")
            return await super().ask(address, timeout_s, transfers=transfers)

    async def main() -> float:
        await wait_linked(Restarting(WORKERS), "g:1", WORKERS)
        return asyncio.get_running_loop().time()

    assert 2.0 <= run_virtually(main()) < 3.0


def test_giving_up_on_a_link_tells_which_worker_and_why() -> None:
    client = FakeClient({"prefill-0"})
    with pytest.raises(WorkerLost) as caught:
        run_virtually(wait_linked(client, "g:1", WORKERS))
    assert caught.value.message == f"the gateway at g:1 gets no stream to decode-0; it says: {WHY}"
    client.explains = False
    with pytest.raises(WorkerLost) as caught:
        run_virtually(wait_linked(client, "g:1", WORKERS))
    assert caught.value.message == "the gateway at g:1 gets no stream to decode-0"


class Gateway(InferenceServicer):
    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthResponse:
        if ("authorization", "Bearer secret") not in (context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send the token")
        return pb.HealthResponse(ready=True, detail=WHY)


async def test_the_client_hears_which_workers_are_not_ready() -> None:
    server = grpc.aio.server()
    add_InferenceServicer_to_server(Gateway(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        friend, stranger = StatusClient("secret"), StatusClient("")
        assert await friend.not_ready(address, 10.0) == WHY
        with pytest.raises(ConfigError, match=r"--set security\.cluster_token=\.\.\. or --config FILE"):
            await stranger.not_ready(address, 10.0)
        await friend.close()
        await stranger.close()
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "details",
    ["Stream removed (Socket closed)", "Cancelling all calls", "Connection reset by peer", "GOAWAY received"],
)
def test_a_gateway_that_went_away_is_told_in_a_sentence(details: str) -> None:
    error = from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details), "g:1")
    assert isinstance(error, WorkerLost)
    assert error.message == "the gateway at g:1 stopped before its answer was complete; try again"


def test_a_host_that_nobody_knows_is_told_in_a_sentence() -> None:
    details = "errors resolving nohost:1: [field:hostname lookup error:address lookup failed for nohost:1]"
    error = from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details), "nohost:1")
    assert isinstance(error, ConfigError)
    assert error.message == "the host name nohost cannot be resolved"


def test_the_gateways_own_words_stay() -> None:
    details = "decode-0 is lost: Connection reset by peer"
    error = from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, details), "g:1")
    assert error.message == details


def rpc_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "")


async def test_a_server_that_ends_in_the_middle_of_a_stream_is_a_sentence() -> None:
    class Slow(InferenceServicer):
        async def Generate(
            self, request: pb.GenerateRequest, context: Any
        ) -> AsyncIterator[pb.GenerateResponse]:
            yield pb.GenerateResponse(text="a")
            await asyncio.Event().wait()

    server = grpc.aio.server()
    add_InferenceServicer_to_server(Slow(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    responses = stream(address, "", pb.GenerateRequest(prompt="x"))
    assert (await anext(responses)).text == "a"
    await server.stop(0.0)
    with pytest.raises(WorkerLost, match="stopped before its answer was complete"):
        await anext(responses)


def test_the_status_table_shows_why_a_worker_is_not_ready() -> None:
    out = StringIO()
    status = cluster_pb2.GetStatusResponse(model="m", gateway_id="g0")
    Console(file=out, width=200).print(status_table(status, "decode-0 is connecting ([/oddly] named)"))
    assert "decode-0 is connecting ([/oddly] named)" in out.getvalue()
