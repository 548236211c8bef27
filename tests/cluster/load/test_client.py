"""The open-loop client against a scripted gateway: what it stamps, what it sends, and how things end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from diphase.cluster.endpoint import open_channel
from diphase.cluster.load.client import (
    LEAD_S,
    LoadClient,
    LoopTimer,
    Outcome,
    RequestResult,
    Timer,
    fetch_model,
)
from diphase.cluster.load.workload import PlannedRequest
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import ConfigError
from diphase.proto.inference_pb2_grpc import InferenceStub
from diphase.proto.slo import Slo

from .conftest import Context, ScriptedGateway, StepClock, last_message


def planned(arrivals: list[float], output_tokens: int = 4) -> list[PlannedRequest]:
    return [
        PlannedRequest(
            index=i, arrival_s=at, input_tokens=3, output_tokens=output_tokens, prompt=[10 + i, 11, 12]
        )
        for i, at in enumerate(arrivals)
    ]


@pytest.fixture
async def channel(gateway: ScriptedGateway) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(gateway.address) as opened:
        yield opened


def client_of(channel: grpc.aio.Channel, timer: Timer, timeout_s: float = 60.0) -> LoadClient:
    slo = Slo(ttft_ms=1500.0, tpot_ms=250.0)
    return LoadClient(InferenceStub(channel), slo=slo, timeout_s=timeout_s, timer=timer)


async def test_every_token_is_stamped_when_it_comes(
    gateway: ScriptedGateway, channel: grpc.aio.Channel, clock: StepClock
) -> None:
    async def paced(request: pb.GenerateRequest, _: Context) -> AsyncIterator[pb.GenerateResponse]:
        clock.forget_reads()
        for i, (delay, count) in enumerate([(0.7, 1), (0.1, 1), (0.3, 2)]):
            clock.time += delay
            yield pb.GenerateResponse(index=i, token_ids=[7] * count)
            await clock.was_read()
        clock.time += 5.0  # the last message has no token: it must not count
        yield last_message(request, 4, ttft_ms=690.0)

    gateway.script = paced
    [result] = await client_of(channel, clock).run_open_loop(planned([2.0]))
    assert result.outcome is Outcome.FINISHED
    assert result.token_s == pytest.approx([2.7, 2.8, 3.1, 3.1])
    assert result.ttft_ms == pytest.approx(700.0)
    assert result.tpot_ms == pytest.approx(400.0 / 3)
    assert result.itl_ms == pytest.approx([100.0, 300.0, 0.0])
    assert {name: value for name, value in result.stages.items() if value} == {
        "prefill_ms": 3.0,
        "handoff_ms": 2.0,
        "ttft_ms": 690.0,
    }
    assert result.stages["placement_ms"] == 0.0, "a stage that took no time is still a stage"
    assert "decode_queue_ms" not in result.stages, "a stage that the request did not have is none"
    assert result.handoff_bytes == 4096
    assert (result.prompt_tokens, result.cached_tokens) == (3, 1)
    assert result.workers == ("prefill-0", "decode-0")
    assert result.server_verdict == "met"


async def test_requests_go_out_at_their_times_whatever_became_of_earlier_ones(
    gateway: ScriptedGateway, channel: grpc.aio.Channel, clock: StepClock
) -> None:
    everyone_came = asyncio.Event()

    async def held(request: pb.GenerateRequest, _: Context) -> AsyncIterator[pb.GenerateResponse]:
        # Nobody is answered before all have been sent: a closed loop would wait for ever.
        if len(gateway.requests) == 3:
            everyone_came.set()
        await everyone_came.wait()
        yield pb.GenerateResponse(index=0, token_ids=[7] * 4)
        yield last_message(request, 4)

    gateway.script = held
    results = await asyncio.wait_for(client_of(channel, clock).run_open_loop(planned([0.0, 0.5, 2.0])), 60)
    assert [r.sent_s for r in results] == pytest.approx([0.0, 0.5, 2.0])
    assert [r.lateness_ms for r in results] == pytest.approx([0.0, 0.0, 0.0])
    assert all(r.outcome is Outcome.FINISHED for r in results)


async def test_a_late_send_is_measured_and_counts_against_ttft(channel: grpc.aio.Channel) -> None:
    class SlowTimer(StepClock):
        """Wakes a quarter of a second after the time it was asked for."""

        async def sleep_until(self, at: float) -> None:
            await super().sleep_until(at + 0.25)

    [result] = await client_of(channel, SlowTimer()).run_open_loop(planned([1.0]))
    assert result.lateness_ms == pytest.approx(250.0)
    assert result.ttft_ms == pytest.approx(250.0)


async def test_what_is_sent_is_what_was_planned(
    gateway: ScriptedGateway, channel: grpc.aio.Channel, clock: StepClock
) -> None:
    plan = planned([0.0], output_tokens=9)
    plan.append(PlannedRequest(index=1, arrival_s=0.1, input_tokens=2, output_tokens=1, prompt="two words"))
    await client_of(channel, clock).run_open_loop(plan)
    ids, text = sorted(gateway.requests, key=lambda r: r.prompt)
    assert list(ids.token_ids.ids) == [10, 11, 12]
    assert ids.sampling.max_tokens == 9
    assert ids.sampling.ignore_eos
    assert ids.sampling.temperature == 0.0
    assert (ids.slo.ttft_ms, ids.slo.tpot_ms) == (1500.0, 250.0)
    assert text.prompt == "two words"


async def test_the_clusters_token_is_shown(gateway: ScriptedGateway, channel: grpc.aio.Channel) -> None:
    shown: list[object] = []

    async def look(request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        shown.append(dict(context.invocation_metadata() or ()).get("authorization"))
        yield pb.GenerateResponse(index=0, token_ids=[7] * 4)
        yield last_message(request, 4)

    gateway.script = look
    client = LoadClient(InferenceStub(channel), slo=Slo(), timeout_s=60, timer=StepClock(), token="secret")
    await client.run_open_loop(planned([0.0]))
    assert shown == ["Bearer secret"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Outcome.REJECTED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.TIMED_OUT),
        (grpc.StatusCode.UNAVAILABLE, Outcome.FAILED),
    ],
)
async def test_refusals_and_failures_are_told_apart(
    gateway: ScriptedGateway,
    channel: grpc.aio.Channel,
    clock: StepClock,
    status: grpc.StatusCode,
    outcome: Outcome,
) -> None:
    async def refuse(_: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(index=0, token_ids=[7])
        await context.abort(status, "the reason")

    gateway.script = refuse
    [result] = await client_of(channel, clock).run_open_loop(planned([0.0]))
    assert result.outcome is outcome
    assert result.detail == f"{status.name}: the reason"


async def test_the_deadline_ends_a_request_that_hangs(
    gateway: ScriptedGateway, channel: grpc.aio.Channel
) -> None:
    async def hang(_: pb.GenerateRequest, __: Context) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(index=0, token_ids=[7])
        await asyncio.Event().wait()

    gateway.script = hang
    [result] = await client_of(channel, LoopTimer(), timeout_s=0.3).run_open_loop(planned([0.0]))
    assert result.outcome is Outcome.TIMED_OUT
    assert len(result.token_s) == 1


@pytest.mark.parametrize(
    ("responses", "detail"),
    [
        ([pb.GenerateResponse(index=0, token_ids=[7])], "without a finish reason"),
        (
            [pb.GenerateResponse(index=0, token_ids=[7]), pb.GenerateResponse(index=2, token_ids=[7])],
            "token 2 came",
        ),
        (
            [pb.GenerateResponse(index=0, token_ids=[7]), pb.GenerateResponse(index=0, token_ids=[7])],
            "token 0 came",
        ),
        ([last_message(pb.GenerateRequest(), 4)], "0 tokens came and 4 were counted"),
    ],
)
async def test_lost_and_repeated_tokens_are_failures(
    gateway: ScriptedGateway,
    channel: grpc.aio.Channel,
    clock: StepClock,
    responses: list[pb.GenerateResponse],
    detail: str,
) -> None:
    async def broken(_: pb.GenerateRequest, __: Context) -> AsyncIterator[pb.GenerateResponse]:
        for response in responses:
            yield response

    gateway.script = broken
    [result] = await client_of(channel, clock).run_open_loop(planned([0.0]))
    assert result.outcome is Outcome.FAILED
    assert detail in result.detail


async def test_one_by_one_never_has_two_at_once(
    gateway: ScriptedGateway, channel: grpc.aio.Channel, clock: StepClock
) -> None:
    running = 0

    async def alone(request: pb.GenerateRequest, _: Context) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal running
        running += 1
        assert running == 1
        yield pb.GenerateResponse(index=0, token_ids=[7] * 4)
        running -= 1
        yield last_message(request, 4)

    gateway.script = alone
    results = await client_of(channel, clock).run_one_by_one(planned([0.0, 0.0, 0.0]))
    assert [r.outcome for r in results] == [Outcome.FINISHED] * 3


async def test_cancelling_a_run_cancels_what_it_sent(
    gateway: ScriptedGateway, channel: grpc.aio.Channel
) -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def hang(_: pb.GenerateRequest, __: Context) -> AsyncIterator[pb.GenerateResponse]:
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        yield pb.GenerateResponse()

    gateway.script = hang
    run = asyncio.create_task(client_of(channel, LoopTimer()).run_open_loop(planned([0.0])))
    await asyncio.wait_for(arrived.wait(), 30)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.wait_for(gone.wait(), 30)


async def test_each_end_is_told_once(channel: grpc.aio.Channel, clock: StepClock) -> None:
    ended: list[RequestResult] = []
    client = LoadClient(InferenceStub(channel), slo=Slo(), timeout_s=60, timer=clock, on_done=ended.append)
    results = await client.run_open_loop(planned([0.0, 0.1, 0.2]))
    assert sorted(r.index for r in ended) == [0, 1, 2]
    assert {id(r) for r in ended} == {id(r) for r in results}


async def test_nobody_at_the_address_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diphase.cluster.load.client._CONNECT_S", 0.2)
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(ConfigError, match=r"no gateway answers at 127\.0\.0\.1:1 .*diphase serve"):
            await fetch_model(InferenceStub(channel), "127.0.0.1:1")


async def test_the_live_timer_never_returns_early() -> None:
    timer = LoopTimer()
    at = timer.now() + LEAD_S
    await timer.sleep_until(at)
    assert timer.now() >= at
    await timer.sleep_until(at - 100.0)
