"""A gateway as the supervisor and `diphase status` see it."""

from __future__ import annotations

import asyncio
from io import StringIO
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.cluster.endpoint import StatusClient, wait_linked
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

    async def ask(self, address: str, timeout_s: float) -> cluster_pb2.GetStatusResponse:
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
    run_virtually(wait_linked(FakeClient({"prefill-0"}, later=3.0), "g:1", WORKERS))


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
        with pytest.raises(ConfigError, match="send the token"):
            await stranger.not_ready(address, 10.0)
        await friend.close()
        await stranger.close()
    finally:
        await server.stop(None)


def test_the_status_table_shows_why_a_worker_is_not_ready() -> None:
    out = StringIO()
    status = cluster_pb2.GetStatusResponse(model="m", gateway_id="g0")
    Console(file=out, width=200).print(status_table(status, "decode-0 is connecting ([/oddly] named)"))
    assert "decode-0 is connecting ([/oddly] named)" in out.getvalue()
