from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diphase.cluster import processes
from diphase.cluster.watchdog import Watchdog, sweep

WAIT = "import os, sys; f = os.memfd_create(sys.argv[1]); print('up', flush=True); sys.stdin.read()"


@contextmanager
def child(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that bears the mark, waits, and ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, mark], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def mark(tmp_path: Path) -> str:
    """A mark that no other process bears; also the name of `folder`."""
    return f"test-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
def folder(tmp_path: Path, mark: str) -> Path:
    folder = tmp_path / mark
    folder.mkdir()
    return folder


def test_only_processes_with_the_mark_are_found(mark: str) -> None:
    with child(mark) as mine, child(mark + "x"):
        assert processes.marked(mark) == [mine.pid]
    assert processes.marked(mark) == []


def test_a_process_that_writes_in_the_folder_belongs_and_one_that_reads_does_not(
    mark: str, folder: Path
) -> None:
    with (folder / "log").open("wb") as log:
        writer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    with (folder / "log").open("rb") as log:
        reader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=log)
    assert processes.marked(mark) == [writer.pid]
    for process in (writer, reader):
        process.kill()
        process.communicate()


def test_a_process_is_named_by_pid_and_start(mark: str) -> None:
    with child(mark) as process:
        ticks = processes.started_at(process.pid)
        assert ticks is not None
        assert not processes.kill(process.pid, ticks + 1)
        assert process.poll() is None
        assert processes.kill(process.pid, ticks)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert processes.started_at(process.pid) is None
    assert not processes.kill(process.pid, ticks)


def test_a_stopped_process_can_be_killed(mark: str) -> None:
    with child(mark) as process:
        process.send_signal(signal.SIGSTOP)
        assert processes.kill(process.pid, processes.started_at(process.pid) or 0)
        assert process.wait(timeout=10) == -signal.SIGKILL


async def test_the_end_of_a_process_is_noticed(mark: str) -> None:
    with child(mark) as process:
        waiting = asyncio.create_task(
            processes.wait_exit(process.pid, processes.started_at(process.pid) or 0)
        )
        await asyncio.sleep(0)
        assert not waiting.done()
        process.kill()
        async with asyncio.timeout(10):
            await waiting


async def test_a_process_that_is_already_gone_or_another_one_is_not_waited_for(mark: str) -> None:
    with child(mark) as process:
        ticks = processes.started_at(process.pid) or 0
        async with asyncio.timeout(10):
            await processes.wait_exit(process.pid, ticks + 1)
    async with asyncio.timeout(10):
        await processes.wait_exit(process.pid, ticks)


def test_a_sweep_ends_stopped_processes_too_and_leaves_other_clusters_alone(mark: str) -> None:
    with child(mark) as first, child(mark) as second, child(mark + "x") as other:
        second.send_signal(signal.SIGSTOP)
        # Zombies of this process are not counted as alive, or the sweep would wait for them.
        assert sweep(mark) == 2
        assert (first.wait(timeout=10), second.wait(timeout=10)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert other.poll() is None


def test_a_watchdog_that_is_finished_has_swept_and_removed_the_folder(mark: str, folder: Path) -> None:
    watchdog = Watchdog(folder)
    with child(mark) as process:
        assert watchdog.finish() == 1
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert not folder.exists()
    assert watchdog.finish() == 1


def test_a_watchdog_sweeps_when_its_supervisor_is_killed(mark: str, folder: Path) -> None:
    supervisor = subprocess.Popen(
        [
            sys.executable, "-P", "-c",
            "import sys, pathlib; from diphase.cluster.watchdog import Watchdog\n"
            "w = Watchdog(pathlib.Path(sys.argv[1])); print('up', flush=True); sys.stdin.read()",
            str(folder),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert supervisor.stdout is not None
    supervisor.stdout.readline()
    with child(mark) as process:
        supervisor.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
    supervisor.communicate()
