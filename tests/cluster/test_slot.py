from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from diphase.cluster.config import SupervisorConfig, load
from diphase.cluster.roles import Assignment, Started, StartFailed, StartProgress
from diphase.cluster.slot import ProcessGone, Slot
from diphase.proto.clock import system_rng
from diphase.proto.errors import CheckpointError, InternalError, WorkerLost

QUICK = SupervisorConfig(restart_pause_s=0.1)


class FakeProcess:
    """A process that ends when the test says so; each start has the next incarnation."""

    def __init__(self) -> None:
        self.assignments: list[Assignment] = []
        self.failures: list[StartFailed | Exception] = []
        self.gone = asyncio.Event()
        self.starts_at_all = True
        self.drained = asyncio.Event()
        self.closed = False

    async def start(self, assignment: Assignment) -> Started | StartFailed:
        self.assignments.append(assignment)
        if not self.starts_at_all:
            await asyncio.Event().wait()
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        self.gone.clear()
        number = len(self.assignments)
        return Started(
            worker_id=assignment.worker_id,
            role=assignment.role,
            address=f"127.0.0.1:{assignment.port or 7000}",
            metrics_address="127.0.0.1:7001",
            incarnation=f"life-{number}",
            pid=number,
            ticks=0,
            node_id="n",
        )

    async def progress(self) -> StartProgress | None:
        return None

    async def ended(self, started: Started) -> None:
        await self.gone.wait()

    async def kill(self, started: Started) -> None:
        self.gone.set()

    async def drain(self) -> None:
        await self.drained.wait()

    async def close(self) -> None:
        self.closed = True
        self.gone.set()

    def abandon(self) -> None: ...


class Stage:
    """A slot, its process, and the membership as it changes."""

    def __init__(self, config: SupervisorConfig = QUICK, process: FakeProcess | None = None) -> None:
        self.process = process or FakeProcess()
        self.members: dict[str, str] = {}
        self.log: list[str] = []
        self.changed = asyncio.Event()
        assignment = Assignment(
            worker_id="decode-0", role="decode", config=load(None, (), system_rng()), store_url=""
        )
        self.slot = Slot(
            assignment,
            self.process,
            publish=self._publish,
            remove=self._remove,
            drains=lambda started: self._note(f"~{started.incarnation}"),
            config=config,
        )
        self.task = asyncio.get_running_loop().create_task(self.slot.run())

    def _publish(self, started: Started) -> None:
        self.members[started.worker_id] = started.incarnation
        self._note(f"+{started.incarnation}")

    def _remove(self, started: Started) -> None:
        del self.members[started.worker_id]
        self._note(f"-{started.incarnation}")

    def _note(self, change: str) -> None:
        self.log.append(change)
        self.changed.set()

    async def changes(self, count: int) -> list[str]:
        """The first changes of the membership, once there are so many."""
        async with asyncio.timeout(10):
            while len(self.log) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.log[:count]

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_a_started_process_is_published() -> None:
    stage = Stage()
    started = await stage.slot.first_start()
    await stage.changes(1)
    assert stage.members == {"decode-0": started.incarnation}
    await stage.close()


async def test_a_process_that_ends_is_taken_off_the_list_and_started_anew_with_a_fresh_incarnation() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    stage.process.gone.set()
    assert await stage.changes(3) == ["+life-1", "-life-1", "+life-2"]
    await stage.close()


async def test_a_restarted_process_is_given_the_ports_it_had() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    stage.process.gone.set()
    await stage.changes(3)
    first, second = stage.process.assignments
    assert (first.port, first.metrics_port) == (0, 0)
    assert second == replace(first, port=7000, metrics_port=7001)
    await stage.close()


async def test_a_slot_that_retires_drains_its_process_and_ends_with_it() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    retiring = asyncio.create_task(stage.slot.retire(30.0))
    assert await stage.changes(2) == ["+life-1", "~life-1"]
    assert not stage.process.closed
    stage.process.drained.set()
    await retiring
    await stage.task
    assert (await stage.changes(3))[2] == "-life-1"
    assert stage.members == {}
    assert len(stage.process.assignments) == 1


async def test_a_process_that_dies_while_it_drains_is_not_started_again() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    retiring = asyncio.create_task(stage.slot.retire(30.0))
    await stage.changes(2)
    stage.process.gone.set()
    await stage.task
    assert (await stage.changes(3))[2] == "-life-1"
    assert len(stage.process.assignments) == 1
    stage.process.drained.set()
    await retiring


async def test_a_drain_that_takes_too_long_ends_with_the_process() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    await stage.slot.retire(0.01)
    assert stage.process.closed
    await stage.task


async def test_the_first_failure_to_start_is_final_and_keeps_its_kind() -> None:
    stage = Stage()
    stage.process.failures = [StartFailed(code="checkpoint", message="no weights in ./x")]
    with pytest.raises(CheckpointError, match=r"decode-0: no weights in \./x"):
        await stage.slot.first_start()
    assert stage.members == {}
    assert len(stage.process.assignments) == 1
    await stage.close()


async def test_later_failures_to_start_are_tried_again() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    stage.process.failures = [StartFailed(code="internal", message="no memory"), WorkerLost("too slow")]
    stage.process.gone.set()
    assert (await stage.changes(3))[-1] == "+life-4"
    await stage.close()


async def test_a_start_that_takes_too_long_is_given_up() -> None:
    stage = Stage(SupervisorConfig(start_timeout_s=0.01))
    stage.process.starts_at_all = False
    with pytest.raises(WorkerLost, match="decode-0 did not start within"):
        await stage.slot.first_start()
    await stage.close()


async def test_an_unforeseen_failure_of_the_first_start_is_told_in_a_sentence() -> None:
    process = FakeProcess()
    process.failures = [ValueError("bad environment")]
    stage = Stage(process=process)
    async with asyncio.timeout(10):
        with pytest.raises(InternalError, match=r"^decode-0 did not start: ValueError: bad environment$"):
            await stage.slot.first_start()
    await stage.close()


async def test_an_unforeseen_failure_of_a_later_start_is_tried_again() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    stage.process.failures = [ValueError("bad environment"), KeyError("placement group")]
    stage.process.gone.set()
    assert (await stage.changes(3))[-1] == "+life-4"
    await stage.close()


async def test_a_process_that_never_comes_back_ends_the_slot() -> None:
    stage = Stage()
    await stage.slot.first_start()
    await stage.changes(1)
    stage.process.failures = [ProcessGone("its node is gone")]
    stage.process.gone.set()
    with pytest.raises(ProcessGone, match="its node is gone"):
        await stage.task


async def test_a_process_that_is_gone_at_once_fails_the_start() -> None:
    process = FakeProcess()
    process.failures = [ProcessGone("no such node")]
    stage = Stage(process=process)
    with pytest.raises(WorkerLost, match="no such node"):
        await stage.slot.first_start()
    await stage.close()
