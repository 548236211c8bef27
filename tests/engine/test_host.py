"""A worker's shell: hellos, submits, attempts and cancels, on virtual time."""

from __future__ import annotations

import asyncio

import pytest
from diphase.engine.host_config import HostConfig
from diphase.proto import worker_pb2 as pb
from diphase.proto.errors import ConfigError, InvalidRequest, Unauthenticated

from ..simulation.cluster import SimWorker
from .host_client import PROMPT, Client, expected, hello, with_worker
from .sequences import make_submit


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
