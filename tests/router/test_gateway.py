"""A whole gateway on loopback: real gRPC and HTTP, fake workers behind it."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from diphase.proto import cluster_pb2, inference_pb2
from diphase.proto import inference_pb2 as pb
from diphase.proto.cluster_pb2_grpc import ClusterStub
from diphase.proto.errors import ConfigError
from diphase.proto.inference_pb2_grpc import InferenceStub
from diphase.router.config import GatewayConfig, RouterConfig, SloConfig
from diphase.router.gateway import GatewayParts, RunningGateway, start_parts
from diphase.router.membership import FixedMembership
from diphase.router.services import RETRY_AFTER
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from .fake_workers import LoopClock, expected_tokens
from .fakes import FakeCluster, served_model, until

PROMPT = list(range(100))


def parts(cluster: FakeCluster, config: GatewayConfig | None = None, **options: Any) -> GatewayParts:
    token = str(options.pop("cluster_token", ""))
    return GatewayParts(
        gateway_id="g0",
        model=served_model(),
        membership=FixedMembership([worker.member for worker in cluster.workers.values()]),
        journal=cluster.journal,
        config=config or GatewayConfig(port=0),
        router=RouterConfig(**options),
        slo=SloConfig(),
        link_factory=cluster.network.link,
        cluster_token=token,
        clock=LoopClock(),
        rng=random.Random(7),
    )


@asynccontextmanager
async def running(
    config: GatewayConfig | None = None, workers: tuple[int, int] = (1, 1), **options: Any
) -> AsyncIterator[tuple[FakeCluster, RunningGateway, grpc.aio.Channel]]:
    cluster = FakeCluster(*workers, prompt_s=0.002, step_s=0.002, handoff_s=0.001)
    gateway = await start_parts(parts(cluster, config, **options))
    try:
        async with asyncio.timeout(30), grpc.aio.insecure_channel(gateway.address) as channel:
            await until(lambda: len(gateway.router.pool.ready()) == sum(workers))
            yield cluster, gateway, channel
    finally:
        await gateway.stop()
        cluster.stop()


def request(max_tokens: int = 5, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.Sampling(max_tokens=max_tokens),
        **fields,
    )


def inference(channel: grpc.aio.Channel) -> Any:
    return InferenceStub(channel)


async def test_generate_streams_tokens_text_and_the_account() -> None:
    async with running() as (_, _, channel):
        responses = [r async for r in inference(channel).Generate(request(5, request_id="r"))]
        assert [token for r in responses for token in r.token_ids] == expected_tokens(PROMPT, 5)
        assert [r.index for r in responses] == list(range(5))
        tokenizer = served_model().tokenizer
        assert "".join(r.text for r in responses) == tokenizer.decode(expected_tokens(PROMPT, 5))
        last = responses[-1]
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert last.slo == "met"
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (100, 5)
        stages = last.stages
        total = (
            stages.tokenise_ms
            + stages.placement_ms
            + stages.prefill_queue_ms
            + stages.prefill_ms
            + stages.delivery_ms
        )
        assert total == pytest.approx(stages.ttft_ms, abs=1e-6)
        assert all(not r.HasField("usage") for r in responses[:-1])


async def test_a_stop_string_ends_the_request_and_its_work() -> None:
    async with running() as (cluster, _, channel):
        text = served_model().tokenizer.decode(expected_tokens(PROMPT, 40))
        stop = text.split()[4]
        message = request(40)
        message.sampling.stop.append(stop)
        responses = [r async for r in inference(channel).Generate(message)]
        assert "".join(r.text for r in responses) == text[: text.index(stop)]
        assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
        assert responses[-1].usage.completion_tokens < 40
        await until(lambda: not any(worker.live for worker in cluster.workers.values()))


async def status_of(
    call: Any,
) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [r async for r in call]
    metadata: Any = caught.value.trailing_metadata() or ()
    trailing = {key: str(value) for key, value in metadata}
    return caught.value.code(), caught.value.details() or "", trailing


@pytest.mark.parametrize(
    ("message", "code", "hint"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "set prompt"),
        (pb.GenerateRequest(prompt=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        (pb.GenerateRequest(prompt="x", model="m"), grpc.StatusCode.NOT_FOUND, "dummy:tiny"),
        (pb.GenerateRequest(prompt="x" * 9000), grpc.StatusCode.INVALID_ARGUMENT, "shorten"),
        (pb.GenerateRequest(request_id="r", resume_from=1), grpc.StatusCode.NOT_FOUND, "no request 'r'"),
    ],
)
async def test_bad_requests_get_a_status_and_a_sentence(
    message: pb.GenerateRequest, code: grpc.StatusCode, hint: str
) -> None:
    async with running() as (cluster, _, channel):
        found, details, _ = await status_of(inference(channel).Generate(message))
        assert found is code
        assert hint in details
        assert not any(worker.submits for worker in cluster.workers.values())


async def test_invalid_utf8_and_garbage_are_invalid_arguments() -> None:
    async with running() as (_, _, channel):
        call = channel.unary_stream("/diphase.v1.Inference/Generate")  # type: ignore[call-arg]
        for data in (b"\x1a\x02\xff\xfe", b"\xff\xff\xff"):
            code, details, _ = await status_of(call(data))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "UTF-8" in details
        good = [r async for r in inference(channel).Generate(request(1))]
        assert len(good) == 1


async def test_oversized_messages_are_refused() -> None:
    async with running(GatewayConfig(port=0, max_message_bytes=10_000)) as (_, _, channel):
        big = pb.GenerateRequest(prompt="x" * 20_000)
        code, details, _ = await status_of(inference(channel).Generate(big))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "10000" in details


def nodelay_of_connections(port: int) -> list[int]:
    """TCP_NODELAY of this process's connections from or to a port of its own."""
    found = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        if not os.path.realpath(entry).rpartition("/")[2].startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(entry.name))) as copy, suppress(OSError):  # not connected
            is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6)
            if is_tcp and port in (copy.getsockname()[1], copy.getpeername()[1]):
                found.append(copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    return found


async def test_no_message_waits_for_the_acknowledgement_of_another() -> None:
    async with running() as (_, gateway, channel):
        await inference(channel).Health(pb.HealthRequest())
        assert nodelay_of_connections(int(gateway.address.rpartition(":")[2])) == [1, 1]  # client and gateway


async def test_overload_says_when_to_come_back() -> None:
    async with running(max_queued_requests=1) as (cluster, _, channel):
        cluster.workers["p0"].prompt_s = 0.3
        stub = inference(channel)
        first = stub.Generate(request(2))
        await until(lambda: bool(cluster.workers["p0"].submits))
        code, details, trailing = await status_of(stub.Generate(request(2)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_queued_requests" in details
        assert int(trailing[RETRY_AFTER]) >= 50
        assert len([r async for r in first]) == 2


async def test_a_client_that_goes_away_frees_both_sides() -> None:
    async with running() as (cluster, gateway, channel):
        call = inference(channel).Generate(request(5000))
        async for _ in call:
            break
        call.cancel()
        await until(lambda: gateway.router.dispatcher.open_requests == 0)
        await until(lambda: not any(worker.live for worker in cluster.workers.values()))
        assert gateway.router.metrics.requests_by_slo["cancelled"] == 1


async def test_health_follows_the_workers() -> None:
    async with running(workers=(1, 1)) as (cluster, _, channel):
        health = health_pb2_grpc.HealthStub(channel)
        stub = inference(channel)
        assert (await stub.Health(pb.HealthRequest())).ready
        check = health_pb2.HealthCheckRequest(service="diphase.v1.Inference")

        async def reports(status: int) -> bool:
            return bool((await health.Check(check)).status == status)

        await until(lambda: reports(health_pb2.HealthCheckResponse.SERVING))
        cluster.workers["d0"].kill()
        await until(lambda: reports(health_pb2.HealthCheckResponse.NOT_SERVING))
        answer = await stub.Health(pb.HealthRequest())
        assert not answer.ready
        assert "d0 is connecting" in answer.detail


async def test_health_says_why_a_worker_is_not_used_also_when_others_are() -> None:
    async with running(workers=(2, 1)) as (cluster, _, channel):
        stub = inference(channel)
        assert (await stub.Health(pb.HealthRequest())).detail == ""
        cluster.workers["p1"].kill()

        async def told() -> bool:
            answer = await stub.Health(pb.HealthRequest())
            return bool(answer.ready and answer.detail == "p1 is connecting (nobody listens at p1:1)")

        await until(told)


async def test_model_and_status_are_told() -> None:
    async with running() as (_, _, channel):
        model = await inference(channel).GetModel(inference_pb2.GetModelRequest())
        assert (model.model, model.context_length, model.vocab_size, model.block_size) == (
            "dummy:tiny",
            8192,
            512,
            4,
        )
        assert model.has_chat_template
        assert model.default_slo.ttft_ms == 2000.0
        _ = [r async for r in inference(channel).Generate(request(2))]
        status = await ClusterStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
        assert [(w.worker_id, w.role, w.state) for w in status.workers] == [
            ("d0", "decode", "ready"),
            ("p0", "prefill", "ready"),
        ]
        assert status.workers[0].load.blocks_total == 1000
        assert status.gateway_id == "g0"
        assert status.requests_by_slo["met"] == 1
        assert (status.queued_requests, status.running_requests, status.queued_tokens) == (0, 0, 0)


async def test_a_view_waits_for_workers_only_when_it_is_to_show_what_they_transferred() -> None:
    async with running() as (cluster, _, channel):
        stub = ClusterStub(channel)
        for _ in range(3):
            await stub.GetStatus(cluster_pb2.GetStatusRequest())
        await stub.GetStatus(cluster_pb2.GetStatusRequest(transfers=True))
        # A gateway that is slow to answer is killed: its view must not hang on a worker that was stopped.
        assert {name: worker.inspections for name, worker in cluster.workers.items()} == {"p0": 1, "d0": 1}


async def test_reflection_lists_the_services() -> None:
    async with running() as (_, _, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"diphase.v1.Inference", "diphase.v1.Cluster", "grpc.health.v1.Health"} <= names
        call.cancel()


async def test_metrics_are_served() -> None:
    async with running() as (_, gateway, channel):
        _ = [r async for r in inference(channel).Generate(request(3))]
        url = f"http://{gateway.metrics_address}/metrics"
        text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())).decode()
        for line in (
            'diphase_requests_total{slo="met"} 1.0',
            'diphase_requests_total{slo="both"} 0.0',
            'diphase_requests_ended_total{state="finished"} 1.0',
            'diphase_placements_total{kind="pair"} 1.0',
            "diphase_ttft_seconds_count 1.0",
            "diphase_tpot_seconds_count 1.0",
            "diphase_itl_seconds_count 2.0",
            "diphase_prefill_queue_seconds_count 1.0",
            "diphase_handoff_seconds_count 1.0",
            "diphase_handoff_bytes_sum 4096.0",
            "diphase_handoff_segments_sum 2.0",
            'diphase_tokens_total{kind="completion"} 3.0',
            "diphase_decode_workers_ready 1.0",
            "diphase_open_requests 0.0",
        ):
            assert line in text.splitlines()


async def test_a_taken_port_is_a_config_error_and_nothing_is_left_behind() -> None:
    cluster = FakeCluster(0, 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.port = {port}"):
            await start_parts(parts(cluster), port=port)
        with pytest.raises(ConfigError, match=f"gateway.metrics_port = {port}"):
            await start_parts(parts(cluster), metrics_port=port)


async def test_beyond_loopback_everybody_needs_the_token() -> None:
    cluster = FakeCluster(0, 0)
    everywhere = GatewayConfig(host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match="cluster_token"):
        await start_parts(parts(cluster, everywhere))
    gateway = await start_parts(parts(cluster, everywhere, cluster_token="secret"))
    try:
        port = gateway.address.rpartition(":")[2]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference(channel)
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetModel(pb.GetModelRequest(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert (await status_of(stub.Generate(request(), metadata=metadata)))[
                    0
                ] is caught.value.code()
            good = (("authorization", "Bearer secret"),)
            assert (await stub.GetModel(pb.GetModelRequest(), metadata=good)).model == "dummy:tiny"
    finally:
        await gateway.stop()


async def test_drain_lets_running_requests_finish() -> None:
    async with running() as (_, gateway, channel):
        stub = inference(channel)
        call = stub.Generate(request(50))
        responses = aiter(call)
        first = await anext(responses)
        drained = asyncio.create_task(gateway.drain())
        await asyncio.sleep(0)
        code, _, trailing = await status_of(stub.Generate(request(2)))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert RETRY_AFTER in trailing
        rest = [r async for r in responses]
        assert len(first.token_ids) + sum(len(r.token_ids) for r in rest) == 50
        await drained


async def test_stopping_cancels_what_runs() -> None:
    async with running() as (cluster, gateway, channel):
        call = inference(channel).Generate(request(5000))
        await call.read()
        await gateway.stop()
        await until(lambda: not any(worker.live for worker in cluster.workers.values()))
        assert gateway.router.dispatcher.open_requests == 0
