"""What a gateway asks its workers, and the time line that it makes of their answers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from diphase.proto.worker_pb2 import GatewayMessage, Inspected, TraceEvent
from diphase.router.active_request import ActiveRequest
from diphase.router.clock_offset import ClockOffset
from diphase.router.inspection import ANSWER_S, Inspector
from diphase.router.latency import RequestTimes
from diphase.router.traces import MAX_REQUESTS, RecentRequests, time_line
from diphase.router.worker_handle import WorkerHandle

from ..simulation.virtual_loop import run_virtually


class Worker:
    """Answers when it is told to."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.asked: list[tuple[int, str]] = []

    def send(self, message: GatewayMessage) -> None:
        self.asked.append((message.inspect.id, message.inspect.request_id))


def workers(*names: str) -> list[Any]:
    return [cast(WorkerHandle, Worker(name)) for name in names]


def test_who_does_not_answer_in_time_is_left_out() -> None:
    async def main() -> None:
        inspector = Inspector()
        quick, hung = workers("p0", "d0")
        asking = asyncio.ensure_future(inspector.ask([quick, hung], "r"))
        await asyncio.sleep(0)
        assert [name for _, name in (*quick.asked, *hung.asked)] == ["r", "r"]
        inspector.answered(Inspected(id=quick.asked[0][0]))
        inspector.answered(Inspected(id=quick.asked[0][0]))
        began = asyncio.get_running_loop().time()
        assert set(await asking) == {"p0"}
        assert asyncio.get_running_loop().time() - began == pytest.approx(ANSWER_S)
        inspector.answered(Inspected(id=hung.asked[0][0]))
        assert await inspector.ask([]) == {}

    run_virtually(main())


def test_answers_belong_to_their_question() -> None:
    async def main() -> None:
        inspector = Inspector()
        [worker] = workers("p0")
        first = asyncio.ensure_future(inspector.ask([worker], "a"))
        second = asyncio.ensure_future(inspector.ask([worker], "b"))
        await asyncio.sleep(0)
        for number, name in reversed(worker.asked):
            inspector.answered(Inspected(id=number, events=[TraceEvent(name=name)]))
        assert [(await asked)["p0"].events[0].name for asked in (first, second)] == ["a", "b"]

    run_virtually(main())


def times() -> RequestTimes:
    found = RequestTimes(100.0, 100.001)
    found.submitted_at = 100.002
    found.prefill_scheduled_at = 100.010
    found.token0_at = 100.200
    found.prefill_worker, found.decode_worker = "p0", "d0"
    return found


def test_a_time_line_is_in_order_and_on_the_gateways_clock() -> None:
    clock = ClockOffset()
    clock.observe(50.0, 1050.0, 50.0)  # the worker's clock is 1,000 s ahead
    answers = {
        "p0": Inspected(
            events=[
                TraceEvent(begin_s=1100.3, end_s=1100.4, track="hand-off, attempt 0", name="push"),
                TraceEvent(
                    begin_s=1100.005, end_s=1100.005, track="hand-off, attempt 0", name="peer granted"
                ),
            ]
        )
    }
    trace = time_line("id", times(), "g0", answers, {"p0": clock})
    shown = [
        (e.where, e.name, round(e.begin_s * 1e3, 6), round((e.end_s - e.begin_s) * 1e3, 6))
        for e in trace.events
    ]
    assert shown == [
        ("g0", "tokenise", 0.0, 1.0),
        ("g0", "placement", 1.0, 1.0),
        ("p0", "prefill queue", 2.0, 8.0),
        ("p0", "peer granted", 5.0, 0.0),
        ("p0", "prefill", 10.0, 190.0),
        ("p0", "push", 300.0, 100.0),
    ]


class Active:
    def __init__(self, request_id: str, client_request_id: str) -> None:
        self.request_id, self.client_request_id = request_id, client_request_id
        self.times = times()


def active(request_id: str, client_request_id: str) -> ActiveRequest:
    return cast(ActiveRequest, Active(request_id, client_request_id))


def test_requests_are_found_by_either_name_until_they_are_forgotten() -> None:
    recent = RecentRequests()
    first = active("g-1", "mine")
    recent.add(first)
    assert recent.find("mine") == recent.find("g-1") == ("g-1", first.times)
    recent.add(active("g-2", "mine"))
    assert (recent.find("mine") or ("",))[0] == "g-2", "a name that is used again is the newest's"
    for i in range(MAX_REQUESTS - 1):
        recent.add(active(f"other-{i}", f"theirs-{i}"))
    assert recent.find("g-1") is None
    assert (recent.find("mine") or ("",))[0] == "g-2"
    recent.add(active("last", "last"))
    assert recent.find("mine") is None
