"""A worker's shell: streams, what is retained, failures, heartbeats and drain, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.engine.base import LayerHook, StepPlan, StepResult
from diphase.engine.fake import FakeEngine, StepCost
from diphase.engine.gateway_link import GatewayLink
from diphase.engine.host_config import HostConfig
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import ConfigError, InternalError, InvalidRequest, Unauthenticated
from diphase.proto.ids import PROTOCOL_VERSION
from diphase.proto.sampling import SamplingParams

from ..simulation.cluster import SimWorker, World
from ..simulation.virtual_loop import VirtualClock, run_virtually
from .sequences import make_submit

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
    config: HostConfig | None = None,
    cost: StepCost | None = None,
    num_blocks: int = 64,
    scheduler: ColocatedSchedulerConfig | None = None,
) -> None:
    async def main() -> None:
        world = World.of(VirtualClock(asyncio.get_running_loop()), 0)
        worker = SimWorker(
            world,
            "colocated",
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


def test_a_stream_opens_with_who_the_worker_is_and_how_it_does() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        await asyncio.sleep(0.01)
        assert [m.WhichOneof("kind") for m in client.messages] == ["hello", "heartbeat"]
        said = client.messages[0].hello
        assert (said.worker_id, said.role, said.num_blocks) == ("w", "colocated", 64)

    with_worker(body)


def test_wrong_hellos_are_refused() -> None:
    async def body(worker: SimWorker) -> None:
        with pytest.raises(Unauthenticated):
            worker.host.attach(hello(cluster_token="wrong"))
        with pytest.raises(ConfigError, match="protocol"):
            worker.host.attach(hello(cluster_token="secret", protocol_version=99))
        with pytest.raises(InvalidRequest, match="gateway_id"):
            worker.host.attach(hello("", cluster_token="secret"))
        worker.host.attach(hello(cluster_token="secret"))

    with_worker(body, config=HostConfig(cluster_token="secret"))


def test_a_request_gets_its_tokens_one_message_a_step_with_sample_and_load() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=5))
        await asyncio.sleep(1.0)
        assert client.tokens() == expected(5)
        assert [output.index for output in client.outputs()] == [0, 1, 2, 3, 4]
        steps = [m.step for m in client.messages if m.WhichOneof("kind") == "step"]
        assert len(steps) == 5
        assert [s.sample.prefill_tokens for s in steps] == [5, 0, 0, 0, 0]
        assert [s.sample.decode_batch for s in steps] == [0, 1, 1, 1, 1]
        assert [s.sample.decode_context for s in steps] == [0, 6, 7, 8, 9]
        assert all(s.sample.duration_s == pytest.approx(0.01) and s.HasField("load") for s in steps)
        assert steps[0].sample.prefill_context == 12  # 5 * (0 + 5 / 2), rounded to even

    with_worker(body)


def test_every_gateway_hears_of_every_step_but_gets_only_its_own_tokens() -> None:
    async def body(worker: SimWorker) -> None:
        one, other = Client(worker, "one"), Client(worker, "other")
        one.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await asyncio.sleep(1.0)
        assert one.tokens() == expected(3)
        assert other.outputs() == []
        assert len([m for m in other.messages if m.step.HasField("sample")]) == 3

    with_worker(body)


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        ({"prompt": []}, "invalid_request"),
        ({"prompt": [5000]}, "invalid_request"),
        ({"prompt": [1] * 5000}, "prompt_too_long"),
        ({"prompt": [1] * 2000}, "prompt_too_long"),
        ({"request_id": "no spaces allowed"}, "invalid_request"),
        ({"emitted": [1] * 8}, "invalid_request"),
    ],
)
def test_bad_submits_are_answered_and_harm_nobody(broken: dict[str, object], code: str) -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("good", PROMPT, max_tokens=3))
        values = {"request_id": "r", "prompt": PROMPT, **broken}
        client.send(submit=make_submit(**values))  # type: ignore[arg-type]
        await asyncio.sleep(1.0)
        terminal = client.terminal(str(values["request_id"]))
        assert terminal is not None
        assert terminal.error.code == code
        assert client.tokens("good") == expected(3)
        assert worker.idle

    with_worker(body)


def test_garbage_in_a_submit_is_answered_too() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        submit = make_submit("r", PROMPT)
        submit.sampling.temperature = -1.0
        client.send(submit=submit)
        late = make_submit("late", PROMPT)
        late.elapsed_s = float("nan")
        client.send(submit=late)
        client.link.receive(pb.GatewayFrame(messages=[pb.GatewayMessage()]))
        await asyncio.sleep(1.0)
        for name in ("r", "late"):
            terminal = client.terminal(name)
            assert terminal is not None
            assert terminal.error.code == "invalid_request"

    with_worker(body)


def test_a_bug_in_the_role_fails_one_request_and_not_the_worker() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        taken = worker.role.submit

        def raises(message: pb.Submit, now: float) -> None:
            raise KeyError("a bug")

        worker.role.submit = raises  # type: ignore[method-assign]
        client.send(submit=make_submit("r", PROMPT))
        worker.role.submit = taken  # type: ignore[method-assign]
        client.send(submit=make_submit("good", PROMPT, max_tokens=2))
        await asyncio.sleep(1.0)
        terminal = client.terminal()
        assert terminal is not None
        assert terminal.error.code == "internal"
        assert client.tokens("good") == expected(2)

    with_worker(body)


def test_a_submit_that_comes_again_runs_once() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        for _ in range(3):
            client.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await asyncio.sleep(1.0)
        client.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await asyncio.sleep(1.0)
        assert client.tokens() == expected(3)

    with_worker(body)


def test_a_newer_attempt_supersedes_the_older_and_goes_on_where_it_stopped() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=100))
        await asyncio.sleep(0.055)
        emitted = client.tokens()
        assert emitted
        client.send(submit=make_submit("r", PROMPT, attempt=1, emitted=emitted, max_tokens=100))
        client.send(submit=make_submit("r", PROMPT, attempt=0, max_tokens=100))  # late
        await asyncio.sleep(2.0)
        newer = [o for o in client.outputs() if o.attempt == 1]
        assert newer[0].index == len(emitted)
        assert emitted + [t for o in newer for t in o.token_ids] == expected(100)
        assert all(o.attempt == 1 for o in client.outputs()[len(emitted) + 1 :])
        assert worker.idle

    with_worker(body)


def test_a_cancel_ends_the_request_with_one_terminal_event() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=1000))
        await asyncio.sleep(0.055)
        count = len(client.tokens())
        client.send(cancel=pb.Cancel(request_id="r", attempt=0))
        client.send(cancel=pb.Cancel(request_id="r", attempt=0))
        client.send(cancel=pb.Cancel(request_id="unknown", attempt=3))
        await asyncio.sleep(1.0)
        terminal = client.terminal()
        assert terminal is not None
        assert terminal.cancelled
        assert client.outputs()[-1].index == count == len(client.tokens())
        assert worker.idle

    with_worker(body)


def test_a_cancel_of_an_older_attempt_leaves_the_newer_alone() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, attempt=2, max_tokens=5))
        client.send(cancel=pb.Cancel(request_id="r", attempt=1))
        await asyncio.sleep(1.0)
        assert client.tokens() == expected(5)

    with_worker(body)


def test_another_gateway_takes_a_request_over_without_losing_a_token() -> None:
    async def body(worker: SimWorker) -> None:
        old, new = Client(worker, "old"), Client(worker, "new")
        old.send(submit=make_submit("r", PROMPT, max_tokens=50, logprobs=1))
        await asyncio.sleep(0.1)
        new.send(resume=pb.Resume(request_id="r"))
        before = len(old.tokens())
        await asyncio.sleep(2.0)
        resumed = new.last("resumed")
        assert isinstance(resumed, pb.Resumed)
        assert resumed.known
        assert list(resumed.token_ids) == expected(50)[: len(resumed.token_ids)]
        assert len(resumed.logprobs) == len(resumed.token_ids)
        assert list(resumed.submit.prompt_token_ids) == PROMPT
        assert resumed.submit.elapsed_s == pytest.approx(0.1)
        assert list(resumed.token_ids) + new.tokens() == expected(50)
        assert len(old.tokens()) == before
        assert isinstance(old.last("moved"), pb.Moved)

    with_worker(body)


def test_a_takeover_that_comes_before_the_hand_off_gets_everything_of_it() -> None:
    async def body(worker: SimWorker) -> None:
        old, new = Client(worker, "old"), Client(worker, "new")
        new.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(0.01)
        assert new.resumed() == [(False, [])]
        submit = make_submit("r", PROMPT, attempt=1, emitted=[4])
        submit.gateway_id = "old"
        assert worker.host.adopt(submit, [7])
        worker.host.emit([pb.SequenceOutput(request_id="r", attempt=1, index=2, token_ids=[9])])
        await asyncio.sleep(0.01)
        assert new.resumed() == [(False, []), (True, [4, 7])]
        assert new.tokens() == [9]
        assert old.tokens() == []

    with_worker(body)


def test_a_hand_off_of_an_attempt_that_was_superseded_is_not_taken() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, attempt=2, max_tokens=3))
        assert not worker.host.adopt(make_submit("r", PROMPT, attempt=1), [7])
        await asyncio.sleep(1.0)
        assert client.tokens() == expected(3)

    with_worker(body)


def test_a_resumed_request_that_has_ended_says_how() -> None:
    async def body(worker: SimWorker) -> None:
        old = Client(worker, "old")
        old.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await asyncio.sleep(1.0)
        new = Client(worker, "new")
        new.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(1.0)
        resumed = new.last("resumed")
        assert isinstance(resumed, pb.Resumed)
        assert list(resumed.token_ids) == expected(3)
        assert resumed.terminal.finish_reason
        new.send(acknowledge=pb.Acknowledge(request_id="r", attempt=0))
        new.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(1.0)
        resumed = new.last("resumed")
        assert isinstance(resumed, pb.Resumed)
        assert not resumed.known

    with_worker(body)


def test_ended_requests_are_forgotten_after_their_time() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=1))
        await asyncio.sleep(3.0)
        client.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(3.0)
        client.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(0.1)
        answers = [m.resumed.known for m in client.messages if m.WhichOneof("kind") == "resumed"]
        assert answers == [True, False]

    with_worker(body, config=HostConfig(retain_s=5.0))


def test_tokens_wait_for_a_gateway_that_comes_back() -> None:
    async def body(worker: SimWorker) -> None:
        client = Client(worker)
        client.send(submit=make_submit("r", PROMPT, max_tokens=100))
        await asyncio.sleep(0.1)
        client.link.close()
        await asyncio.sleep(0.5)
        again = Client(worker)
        again.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(2.0)
        resumed = again.last("resumed")
        assert isinstance(resumed, pb.Resumed)
        assert list(resumed.token_ids) + again.tokens() == expected(100)

    with_worker(body, config=HostConfig(orphan_s=1.0))


def test_requests_of_a_gateway_that_stays_away_are_cancelled() -> None:
    async def body(worker: SimWorker) -> None:
        client, other = Client(worker), Client(worker, "other")
        client.send(submit=make_submit("r", PROMPT, max_tokens=1000))
        other.send(submit=make_submit("kept", PROMPT, max_tokens=300))
        await asyncio.sleep(0.1)
        client.link.close()
        await asyncio.sleep(2.0)
        assert worker.role.load().running == 1
        other.send(resume=pb.Resume(request_id="r"))
        await asyncio.sleep(3.0)
        resumed = other.last("resumed")
        assert isinstance(resumed, pb.Resumed)
        assert resumed.terminal.cancelled
        assert len(other.tokens("kept")) == 300

    with_worker(body, config=HostConfig(orphan_s=1.0))


def test_a_newer_stream_of_a_gateway_replaces_the_older() -> None:
    async def body(worker: SimWorker) -> None:
        old = Client(worker)
        new = Client(worker)
        assert old.link.closed
        new.send(submit=make_submit("r", PROMPT, max_tokens=3))
        await asyncio.sleep(1.0)
        assert new.tokens() == expected(3)

    with_worker(body)


def test_a_gateway_that_does_not_read_is_disconnected_and_the_others_go_on() -> None:
    async def body(worker: SimWorker) -> None:
        deaf, client = Client(worker, "deaf"), Client(worker)
        await deaf.stop_reading()
        client.send(submit=make_submit("r", PROMPT, max_tokens=200))
        await asyncio.sleep(3.0)
        assert deaf.link.closed
        assert deaf.link.error is not None
        assert "does not read" in deaf.link.error.message
        assert client.tokens() == expected(200)

    with_worker(body, config=HostConfig(max_queued_messages=50))


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

    def __init__(self, worker: SimWorker, failing: set[int]) -> None:
        self._engine = worker.engine
        self._failing = failing
        self.steps = 0
        worker.host._execute = self.execute

    async def execute(self, plan: StepPlan, hook: LayerHook | None) -> StepResult:
        self.steps += 1
        if self.steps in self._failing:
            raise RuntimeError("out of luck")
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
