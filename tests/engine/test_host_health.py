"""A worker's shell: heartbeats, prefix announcements, failing steps, drain and metrics."""

from __future__ import annotations

import asyncio

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.decode_workers.role import DecodeRole
from diphase.engine.base import LayerHook, StepPlan, StepResult
from diphase.engine.fake import StepCost
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import InternalError, WorkerLost, from_wire

from ..simulation.cluster import SimWorker
from .host_client import PROMPT, Client, expected, with_worker
from .sequences import make_submit


def test_heartbeats_flow_while_a_step_runs_and_tell_its_age() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        for i in range(4):  # what a step takes is learned
            client.send(submit=make_submit(f"warm{i}", PROMPT, max_tokens=3))
            await asyncio.sleep(10.0)
        client.messages.clear()
        client.send(submit=make_submit("r", PROMPT, max_tokens=1))
        await asyncio.sleep(1.9)
        beats = [m.heartbeat for m in client.messages if m.WhichOneof("kind") == "heartbeat"]
        assert len(beats) >= 6
        ages = [beat.step_age_s for beat in beats]
        assert ages == sorted(ages)
        assert ages[-1] > 1.0
        assert beats[-1].step_predicted_s == pytest.approx(2.0, rel=0.1)
        assert [beat.sequence for beat in beats] == list(
            range(beats[0].sequence, beats[0].sequence + len(beats))
        )
        await asyncio.sleep(1.0)
        last = client.last("heartbeat")
        assert isinstance(last, pb.Heartbeat)
        assert last.step_age_s == 0.0

    with_worker(body, cost=StepCost(base_s=2.0))


def test_pings_are_answered_with_both_clocks() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        await asyncio.sleep(1.0)
        client.send(ping=pb.Ping(sent_at=17.0))
        await asyncio.sleep(0.01)
        pong = client.last("pong")
        assert isinstance(pong, pb.Pong)
        assert (pong.sent_at, pong.at) == (17.0, 1.0)

    with_worker(body)


def test_prefix_deltas_and_snapshots_agree_with_the_pool() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        for i in range(12):
            client.send(submit=make_submit(f"r{i}", [i + 5] * 60, max_tokens=20))
            await asyncio.sleep(0.5)
        late = Client(worker, "late")
        late.send(prefix_snapshot=pb.PrefixSnapshotRequest())
        await asyncio.sleep(0.1)
        known: set[bytes] = set()
        deltas = [m.prefix_delta for m in client.messages if m.WhichOneof("kind") == "prefix_delta"]
        assert [delta.sequence for delta in deltas] == list(range(1, len(deltas) + 1))
        for delta in deltas:
            known = (known | set(delta.stored)) - set(delta.evicted)
        assert any(delta.evicted for delta in deltas)
        snapshot = late.last("prefix_snapshot")
        assert isinstance(snapshot, pb.PrefixSnapshot)
        assert snapshot.sequence == len(deltas)
        assert set(snapshot.hashes) == known == set(worker.blocks.known_hashes())

    with_worker(body, num_blocks=16)


class Broken:
    """An engine whose given steps raise."""

    def __init__(self, worker: SimWorker, failing: set[int], error: Exception | None = None) -> None:
        self._engine = worker.engine
        self._failing = failing
        self._error = error or RuntimeError("out of luck")
        self.steps = 0
        worker.host._execute = self.execute

    async def execute(self, plan: StepPlan, hook: LayerHook | None) -> StepResult:
        self.steps += 1
        if self.steps in self._failing:
            raise self._error
        return await self._engine.execute_on_loop(plan, hook)


def test_an_engine_failure_fails_the_requests_of_its_step_only() -> None:
    async def body(worker: SimWorker) -> None:
        Broken(worker, {2})
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=5))
        client.send(submit=make_submit("waiting", PROMPT, max_tokens=5))
        await asyncio.sleep(1.0)
        terminal = client.terminal()
        assert terminal is not None
        assert terminal.error.code == "internal"
        assert "out of luck" in terminal.error.message
        assert client.outputs()[-1].index == 1
        assert client.tokens("waiting") == expected(5)
        assert worker.idle

    with_worker(body, scheduler=ColocatedSchedulerConfig(max_running=1))


def test_two_failures_in_a_row_end_the_worker() -> None:
    async def body(worker: SimWorker) -> None:
        Broken(worker, {1, 2})
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT))
        client.send(submit=make_submit("s", PROMPT))
        await asyncio.sleep(1.0)
        assert client.link.closed
        with pytest.raises(InternalError, match="2 steps in a row"):
            worker._running.result()

    with_worker(body, scheduler=ColocatedSchedulerConfig(max_running=1))


def test_a_step_that_lost_a_rank_fails_retryably_and_ends_the_worker() -> None:
    async def body(worker: SimWorker) -> None:
        Broken(worker, {2}, WorkerLost("a rank of this worker has ended"))
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=5))
        await asyncio.sleep(1.0)
        terminal = client.terminal()
        assert terminal is not None
        assert from_wire(terminal.error.code, terminal.error.message).retryable
        assert client.link.closed
        with pytest.raises(WorkerLost, match="a rank of this worker"):
            worker._running.result()

    with_worker(body, scheduler=ColocatedSchedulerConfig(max_running=1))


def test_an_idle_engine_that_lost_a_rank_ends_the_worker() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        await asyncio.sleep(0.1)
        assert not client.link.closed
        worker.host.broken(WorkerLost("a rank of this worker has ended"))
        await asyncio.sleep(0.1)
        assert client.link.closed
        with pytest.raises(WorkerLost, match="a rank of this worker"):
            worker._running.result()

    with_worker(body)


def test_a_broken_hand_off_ends_the_worker() -> None:
    """It would take requests for ever that can never arrive."""

    async def body(worker: SimWorker) -> None:
        def poll(max_events: int = 64) -> list[object]:
            raise InternalError("transport local crashed")

        client = Client(worker)
        await asyncio.sleep(0.1)
        assert not client.link.closed
        worker._transport.poll = poll  # type: ignore[assignment,method-assign]
        assert isinstance(worker.role, DecodeRole)
        assert worker.role._receiver is not None
        worker.role._receiver._timer.wake()
        await asyncio.sleep(0.1)
        assert client.link.closed
        with pytest.raises(InternalError, match="the hand-off broke: transport local crashed"):
            worker._running.result()

    with_worker(body, role="decode")


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=50))
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(worker.host.drain())
        await asyncio.sleep(0.1)
        client.send(submit=make_submit("late", PROMPT))
        await asyncio.sleep(0.1)
        assert not draining.done()
        terminal = client.terminal("late")
        assert terminal is not None
        assert (terminal.error.code, terminal.error.retryable) == ("draining", True)
        last = client.last("heartbeat")
        assert isinstance(last, pb.Heartbeat)
        assert last.load.draining
        await draining
        assert client.tokens() == expected(50)

    with_worker(body)


def test_a_drain_does_not_wait_for_a_deaf_gateway_for_ever() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        await client.stop_reading()
        client.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await worker.host.drain()
        assert asyncio.get_running_loop().time() == pytest.approx(2.0, abs=0.2)

    with_worker(body)


def test_metrics_count_steps_tokens_ends_and_blocks() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=5))
        client.send(submit=make_submit("bad", []))
        await asyncio.sleep(0.02)
        client.send(submit=make_submit("gone", PROMPT, max_tokens=500))
        await asyncio.sleep(0.3)
        value = worker.host.metrics.registry.get_sample_value
        assert value("diphase_kv_blocks", {"owner": "running"}) == 2.0
        client.send(cancel=pb.Cancel(request_id="gone", attempt=0))
        await asyncio.sleep(0.5)
        assert value("diphase_step_tokens_total", {"phase": "prefill"}) == 10.0
        assert value("diphase_worker_terminals_total", {"state": "finished"}) == 1.0
        assert value("diphase_worker_terminals_total", {"state": "cancelled"}) == 1.0
        assert value("diphase_refused_submits_total", {"code": "invalid_request"}) == 1.0
        assert value("diphase_kv_blocks", {"owner": "running"}) == 0.0
        assert value("diphase_attached_gateways") == 1.0
        assert (value("diphase_step_seconds_count", {"kind": "decode"}) or 0) > 4

    with_worker(body)
