from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from diphase.cluster.config import SupervisorConfig
from diphase.cluster.liveness import LivenessWatch, Persistence, hung_incarnations
from diphase.cluster.roles import Started
from diphase.proto import cluster_pb2 as pb
from diphase.proto.errors import WorkerLost

from ..simulation.virtual_loop import run_virtually


@dataclass
class ManualClock:
    time: float = 100.0

    def now(self) -> float:
        return self.time


@dataclass
class FakeProcess:
    killed: list[str] = field(default_factory=list)

    async def kill(self, started: Started) -> None:
        self.killed.append(started.worker_id)


@dataclass
class FakeSlot:
    """What the watch uses of a Slot."""

    started: Started | None
    process: FakeProcess


def process(worker_id: str, role: str) -> Started:
    return Started(
        worker_id=worker_id,
        role=role,
        address=f"{worker_id}:1",
        metrics_address="",
        incarnation=f"i-{worker_id}",
        pid=1,
        ticks=0,
        node_id="n",
    )


def view(**states: str) -> pb.GetStatusResponse:
    """A gateway's view: worker name to state."""
    return pb.GetStatusResponse(
        workers=[
            pb.WorkerStatus(worker_id=name, incarnation=f"i-{name}", state=state)
            for name, state in states.items()
        ]
    )


class Stage:
    """Two gateways and two workers; what each gateway answers is the test's."""

    def __init__(self) -> None:
        self.answers: dict[str, pb.GetStatusResponse | Exception] = {
            "g0:1": view(p="ready", d="ready"),
            "g1:1": view(p="ready", d="ready"),
        }
        self.process = FakeProcess()
        self.clock = ManualClock()
        people = [
            process("p", "prefill"),
            process("d", "decode"),
            process("g0", "gateway"),
            process("g1", "gateway"),
        ]
        slots = [FakeSlot(started, self.process) for started in people]
        self.slots = {slot.started.worker_id: slot for slot in slots if slot.started}
        self.watch = LivenessWatch(slots, self.ask, self.clock, SupervisorConfig(hang_grace_s=0.5))  # type: ignore[arg-type]

    async def ask(self, address: str, timeout_s: float) -> pb.GetStatusResponse:
        answer = self.answers[address]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def look(self, after_s: float = 0.0) -> list[str]:
        """Who was killed by now, after another look."""
        self.clock.time += after_s
        await self.watch.look()
        return self.process.killed


@pytest.mark.parametrize(
    ("views", "hung"),
    [
        ([], set()),
        ([{"a": "ready"}], set()),
        ([{"a": "hung"}], {"i-a"}),
        ([{"a": "hung"}, {"a": "hung"}], {"i-a"}),
        ([{"a": "hung"}, {"a": "ready"}], set()),
        ([{"a": "hung"}, {}], {"i-a"}),
        ([{"a": "gone", "b": "hung"}], {"i-b"}),
    ],
)
def test_a_worker_hangs_when_every_gateway_that_knows_it_says_so(
    views: list[Mapping[str, str]], hung: set[str]
) -> None:
    assert hung_incarnations([view(**states) for states in views]) == hung


def test_what_is_interrupted_starts_over() -> None:
    persistence = Persistence()
    assert persistence.update(0.0, ["a"]) == {"a": 0.0}
    assert persistence.update(2.0, ["a", "b"]) == {"a": 2.0, "b": 0.0}
    assert persistence.update(3.0, ["b"]) == {"b": 1.0}
    assert persistence.update(4.0, ["a"]) == {"a": 0.0}


async def test_a_worker_that_all_gateways_call_hung_is_killed_after_the_grace() -> None:
    stage = Stage()
    stage.answers = {address: view(p="ready", d="hung") for address in stage.answers}
    assert await stage.look() == []
    assert await stage.look(after_s=0.4) == []
    assert await stage.look(after_s=0.1) == ["d"]


async def test_a_worker_that_recovers_within_the_grace_is_left_alone() -> None:
    stage = Stage()
    well = dict(stage.answers)
    stage.answers = {address: view(p="hung", d="ready") for address in well}
    await stage.look()
    stage.answers = dict(well)
    await stage.look(after_s=0.4)
    stage.answers = {address: view(p="hung", d="ready") for address in well}
    assert await stage.look(after_s=0.4) == []


async def test_one_gateway_that_disagrees_saves_the_worker() -> None:
    stage = Stage()
    stage.answers["g0:1"] = view(p="hung", d="hung")
    await stage.look()
    assert await stage.look(after_s=10) == []


async def test_a_silent_gateway_is_killed_and_the_other_one_still_judges() -> None:
    stage = Stage()
    stage.answers = {"g0:1": TimeoutError(), "g1:1": view(p="hung", d="ready")}
    assert await stage.look() == []
    assert set(await stage.look(after_s=1)) == {"g0", "p"}


async def test_slow_answers_with_good_ones_between_them_kill_no_gateway() -> None:
    stage = Stage()
    well = stage.answers["g0:1"]
    for answer in (TimeoutError(), well, TimeoutError(), WorkerLost("no connection"), TimeoutError(), well):
        stage.answers["g0:1"] = answer
        assert await stage.look(after_s=1) == []


async def test_the_silence_of_a_gateway_is_not_held_against_its_successor() -> None:
    stage = Stage()
    stage.answers["g0:1"] = TimeoutError()
    await stage.look()
    stage.slots["g0"].started = replace(process("g0", "gateway"), incarnation="i-next")
    assert await stage.look(after_s=1) == []
    assert await stage.look(after_s=1) == ["g0"]


def test_a_gateway_that_stops_is_killed_after_two_seconds_by_default() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        stage = Stage()
        killed_at: list[float] = []

        async def ask(address: str, timeout_s: float) -> pb.GetStatusResponse:
            if loop.time() >= 5.0:
                await asyncio.sleep(timeout_s)
                raise TimeoutError
            return view(p="ready", d="ready")

        class Process(FakeProcess):
            async def kill(self, started: Started) -> None:
                killed_at.append(loop.time())
                gateway.started = None

        gateway = FakeSlot(process("g0", "gateway"), Process())
        watch = LivenessWatch([gateway], ask, stage.clock, SupervisorConfig())  # type: ignore[list-item]
        running = asyncio.create_task(watch.run())
        await asyncio.sleep(20.0)
        running.cancel()
        [at] = killed_at
        assert 6.0 < at <= 7.0

    run_virtually(main())


async def test_a_gateway_that_is_not_there_is_its_slots_business() -> None:
    stage = Stage()
    stage.answers["g0:1"] = WorkerLost("connection refused")
    assert await stage.look() == []


async def test_a_process_that_is_being_restarted_is_neither_asked_nor_killed() -> None:
    stage = Stage()
    stage.answers = {address: view(p="hung", d="ready") for address in stage.answers}
    stage.slots["p"].started = None
    await stage.look()
    assert await stage.look(after_s=10) == []
