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
from diphase.cluster.processes import MARK
from diphase.cluster.watchdog import Watchdog, sweep

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


@contextmanager
def child(cluster: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that carries the mark, waits, and ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        env={**os.environ, MARK: cluster},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    """A name that no other process has."""
    return f"test-{tmp_path.name}-{os.getpid()}"


def test_only_processes_with_the_mark_are_found(cluster: str) -> None:
    with child(cluster) as mine, child(cluster + "x"):
        assert processes.marked(cluster) == [mine.pid]
    assert processes.marked(cluster) == []


def test_a_process_is_named_by_pid_and_start(cluster: str) -> None:
    with child(cluster) as process:
        ticks = processes.started_at(process.pid)
        assert ticks is not None
        assert not processes.kill(process.pid, ticks + 1)
        assert process.poll() is None
        assert processes.kill(process.pid, ticks)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert processes.started_at(process.pid) is None
    assert not processes.kill(process.pid, ticks)


def test_a_stopped_process_can_be_killed(cluster: str) -> None:
    with child(cluster) as process:
        process.send_signal(signal.SIGSTOP)
        assert processes.kill(process.pid, processes.started_at(process.pid) or 0)
        assert process.wait(timeout=10) == -signal.SIGKILL


async def test_the_end_of_a_process_is_noticed(cluster: str) -> None:
    with child(cluster) as process:
        waiting = asyncio.create_task(
            processes.wait_exit(process.pid, processes.started_at(process.pid) or 0)
        )
        await asyncio.sleep(0)
        assert not waiting.done()
        process.kill()
        async with asyncio.timeout(10):
            await waiting


async def test_a_process_that_is_already_gone_or_another_one_is_not_waited_for(cluster: str) -> None:
    with child(cluster) as process:
        ticks = processes.started_at(process.pid) or 0
        async with asyncio.timeout(10):
            await processes.wait_exit(process.pid, ticks + 1)
    async with asyncio.timeout(10):
        await processes.wait_exit(process.pid, ticks)


def test_a_sweep_ends_stopped_processes_too_and_leaves_other_clusters_alone(cluster: str) -> None:
    with child(cluster) as first, child(cluster) as second, child(cluster + "x") as other:
        second.send_signal(signal.SIGSTOP)
        # Zombies of this process are not counted as alive, or the sweep would wait for them.
        assert sweep(cluster) == 2
        assert (first.wait(timeout=10), second.wait(timeout=10)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert other.poll() is None


def test_a_watchdog_that_is_finished_has_swept_and_removed_the_folder(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    watchdog = Watchdog(cluster, folder)
    with child(cluster) as process:
        assert watchdog.finish() == 1
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert not folder.exists()
    assert watchdog.finish() == 1


def test_a_watchdog_sweeps_when_its_supervisor_is_killed(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    supervisor = subprocess.Popen(
        [
            sys.executable, "-P", "-c",
            "import sys, pathlib; from diphase.cluster.watchdog import Watchdog\n"
            "w = Watchdog(sys.argv[1], pathlib.Path(sys.argv[2])); print('up', flush=True); sys.stdin.read()",
            cluster, str(folder),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert supervisor.stdout is not None
    supervisor.stdout.readline()
    with child(cluster) as process:
        supervisor.kill()
        assert process.wait(timeout=10) == -signal.SIGKILL
    supervisor.communicate()
