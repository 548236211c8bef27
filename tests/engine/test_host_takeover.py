"""A worker's shell: gateways that come, go, stay away, do not read, and take requests over."""

from __future__ import annotations

import asyncio

import pytest
from diphase.engine.host_config import HostConfig
from diphase.proto import worker_pb2 as pb

from ..simulation.cluster import SimWorker
from .host_client import PROMPT, Client, expected, with_worker
from .sequences import make_submit


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
