"""The worker's gRPC service on a real socket, with a colocated worker behind it."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeWorkerConfig
from diphase.decode_workers.worker import start
from diphase.engine.base import Engine
from diphase.engine.config import EngineConfig
from diphase.engine.fake import FakeEngine
from diphase.engine.host_config import HostConfig
from diphase.engine.server import Progress, RunningWorker
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import CheckpointError, ConfigError
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.sampling import SamplingParams
from diphase.proto.worker_pb2_grpc import WorkerStub
from diphase.router.links import GrpcLink

from ..simulation.gateway import Gateway, Placement

LIMIT_S = 30.0


def load(config: EngineConfig, *, progress: Progress | None) -> Engine:
    return FakeEngine(num_blocks=64)


async def start_worker(**host: object) -> RunningWorker:
    config = DecodeWorkerConfig(
        scheduler=ColocatedSchedulerConfig(),
        host=HostConfig(**host),  # type: ignore[arg-type]
    )
    return await start(config, worker_id="w", incarnation="i", load=load)


@pytest.fixture
async def worker() -> AsyncIterator[RunningWorker]:
    running = await start_worker(cluster_token="secret", hello_timeout_s=0.2)
    yield running
    await running.close()


async def refusal(address: str, *frames: pb.GatewayFrame) -> tuple[grpc.StatusCode, str]:
    """How the worker ends a stream that starts with these frames."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = WorkerStub(channel).Attach()
        for frame in frames:
            await call.write(frame)
        async with asyncio.timeout(LIMIT_S):
            code, details = await call.code(), await call.details()
        return code, details


def hello(**values: object) -> pb.GatewayFrame:
    fields = {"gateway_id": "g", "cluster_token": "secret", "protocol_version": PROTOCOL_VERSION, **values}
    return pb.GatewayFrame(messages=[pb.GatewayMessage(hello=pb.GatewayHello(**fields))])  # type: ignore[arg-type]


async def test_a_wrong_token_is_unauthenticated(worker: RunningWorker) -> None:
    code, _ = await refusal(worker.address, hello(cluster_token="guess"))
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_another_protocol_version_is_refused(worker: RunningWorker) -> None:
    code, details = await refusal(worker.address, hello(protocol_version=99))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "protocol 99" in details


async def test_a_stream_must_begin_with_a_hello(worker: RunningWorker) -> None:
    frame = pb.GatewayFrame(messages=[pb.GatewayMessage(ping=pb.Ping(sent_at=1.0))])
    code, details = await refusal(worker.address, frame)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "hello" in details


async def test_a_stream_that_says_nothing_is_ended(worker: RunningWorker) -> None:
    _, details = await refusal(worker.address)
    assert "no hello" in details


async def test_requests_are_served_and_a_client_that_hangs_up_harms_nobody(worker: RunningWorker) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    placement = Placement(None, pb.PeerAddress(address=worker.address))
    for _ in range(2):
        gateway = Gateway("g", GrpcLink, token="secret")
        running = asyncio.create_task(gateway.run([worker.address]))
        async with asyncio.timeout(LIMIT_S):
            await gateway.attached(worker.address)
            tokens = await gateway.generate("r", [5, 6, 7], params, lambda attempt: placement)
        assert tokens == FakeEngine(num_blocks=1).continuation([5, 6, 7], params, 20)
        running.cancel()
        await asyncio.wait((running,))


async def test_a_malformed_frame_ends_only_its_own_stream(worker: RunningWorker) -> None:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        attach = channel.stream_stream("/diphase.v1.Worker/Attach", bytes, bytes)
        call: grpc.aio.StreamStreamCall[bytes, bytes] = attach(None)
        await call.write(b"\xff\xff\xff not a frame")
        with pytest.raises(grpc.aio.AioRpcError):
            async with asyncio.timeout(LIMIT_S):
                await call.read()
    code, _ = await refusal(worker.address, hello(cluster_token="guess"))
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def metrics_of(worker: RunningWorker) -> str:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://{worker.metrics_address}/metrics", timeout=LIMIT_S) as response:
            return str(response.read().decode())

    return await asyncio.get_running_loop().run_in_executor(None, fetch)


async def test_metrics_are_served(worker: RunningWorker) -> None:
    text = await metrics_of(worker)
    assert "diphase_kv_blocks" in text
    assert "diphase_step_seconds" in text


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
async def test_a_worker_on_an_ipv6_address_is_reached_at_the_addresses_it_announces() -> None:
    worker = await start_worker(host="::1", cluster_token="secret")
    try:
        assert worker.address.startswith("[::1]:")
        code, _ = await refusal(worker.address, hello(cluster_token="guess"))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "diphase_kv_blocks" in await metrics_of(worker)
    finally:
        await worker.close()


@pytest.mark.parametrize("field", ["port", "metrics_port"])
async def test_a_port_in_use_is_a_clear_error_and_leaves_nothing_behind(field: str) -> None:
    closed = []

    class Watched(FakeEngine):
        def close(self) -> None:
            closed.append(True)
            super().close()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host = HostConfig(**{field: taken.getsockname()[1]})
        config = DecodeWorkerConfig(scheduler=ColocatedSchedulerConfig(), host=host)
        with pytest.raises(ConfigError, match="use"):
            await start(
                config,
                worker_id="w",
                incarnation="i",
                load=lambda config, *, progress: Watched(num_blocks=8),
            )
    assert closed == [True]


async def test_a_model_that_does_not_load_fails_the_start() -> None:
    def missing(config: EngineConfig, *, progress: Progress | None) -> Engine:
        raise CheckpointError("config.json is missing")

    with pytest.raises(CheckpointError, match=r"config\.json"):
        await start(DecodeWorkerConfig(), worker_id="w", incarnation="i", load=missing)


async def test_closing_twice_is_fine_and_ends_the_wait(worker: RunningWorker) -> None:
    waiting = asyncio.create_task(worker.wait_closed())
    await asyncio.sleep(0)
    assert not waiting.done()
    await worker.close()
    await worker.close()
    async with asyncio.timeout(LIMIT_S):
        await waiting


def test_beyond_loopback_a_token_is_required() -> None:
    with pytest.raises(ConfigError, match="cluster_token"):
        HostConfig(host="0.0.0.0")
    HostConfig(host="0.0.0.0", cluster_token="secret")
