"""Worker processes without Ray, started, killed, stopped and started again under their old address."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diphase.cluster import processes
from diphase.router.membership import Member

NURSERY = Path(__file__).with_name("worker_nursery.py")
TOKEN = "secret"
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Site:
    """Where a worker runs."""

    namespace: str | None = None
    """None: that of the test."""
    host: str = "127.0.0.1"
    """Of its gRPC service."""
    kv_host: str = "127.0.0.1"


@dataclass(slots=True, kw_only=True)
class Worker:
    """One name and address; the process behind it may change."""

    worker_id: str
    role: str
    scheduler: dict[str, Any] = field(default_factory=dict)
    kv_cache_mib: int = 32
    site: Site
    address: str = ""
    """Of the gRPC service; empty before the first start."""
    metrics: str = ""
    incarnation: str = ""
    pid: int = 0
    """0: none runs."""
    started_at: int = 0
    stopped: bool = False

    @property
    def member(self) -> Member:
        return Member(
            worker_id=self.worker_id, role=self.role, address=self.address, incarnation=self.incarnation
        )


class WorkerProcesses:
    """Made by `worker_processes`, which ends what still runs."""

    def __init__(
        self, nursery: asyncio.subprocess.Process, transfer: dict[str, Any], heartbeat_s: float
    ) -> None:
        self._nursery = nursery
        self._transfer = transfer
        self._heartbeat_s = heartbeat_s
        self._said: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._started: list[Worker] = []

    async def listen(self) -> None:
        assert self._nursery.stdout is not None
        while line := await self._nursery.stdout.readline():
            words = json.loads(line)
            self._said[words["incarnation"]].set_result(words)

    async def start(self, worker: Worker) -> None:
        """Another process under the same name, and the same address if it had one."""
        worker.incarnation = f"{worker.worker_id}-{next(self._numbers)}"
        said = self._said[worker.incarnation] = asyncio.get_running_loop().create_future()
        order = {
            "worker_id": worker.worker_id,
            "role": worker.role,
            "incarnation": worker.incarnation,
            "namespace": worker.site.namespace,
            "scheduler": worker.scheduler,
            "engine": {"model": "dummy:tiny", "dtype": "fp32", "kv_cache_mib": worker.kv_cache_mib},
            "host": {
                "host": worker.site.host,
                "port": int(worker.address.rpartition(":")[2] or 0),
                "cluster_token": TOKEN,
                "heartbeat_s": self._heartbeat_s,
            },
            "kv_transfer": {**self._transfer, "host": worker.site.kv_host},
        }
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        async with asyncio.timeout(START_S):
            words = await said
        worker.pid, worker.address, worker.metrics = words["pid"], words["address"], words["metrics"]
        worker.started_at = processes.started_at(worker.pid) or 0
        worker.stopped = False
        if worker not in self._started:
            self._started.append(worker)

    def kill(self, worker: Worker) -> None:
        self._signal(worker, signal.SIGKILL)
        worker.pid = 0

    def stop(self, worker: Worker) -> None:
        """It hangs, until resume()."""
        self._signal(worker, signal.SIGSTOP)
        worker.stopped = True

    def resume(self, worker: Worker) -> None:
        if worker.pid:
            self._signal(worker, signal.SIGCONT)
        worker.stopped = False

    def drain(self, worker: Worker) -> asyncio.Task[None]:
        """It takes nothing new and ends when it has nothing left; the task waits for that."""
        self._signal(worker, signal.SIGTERM)
        pid, worker.pid = worker.pid, 0
        return asyncio.create_task(processes.wait_exit(pid, worker.started_at))

    def alive(self, worker: Worker) -> bool:
        """Whether the process that was started last still runs."""
        return bool(worker.pid) and processes.started_at(worker.pid) == worker.started_at

    def end(self) -> None:
        for worker in self._started:
            if worker.pid:
                processes.kill(worker.pid, worker.started_at)

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        assert self.alive(worker), f"{worker.worker_id} does not run"
        os.kill(worker.pid, number)


@asynccontextmanager
async def worker_processes(log: Path, heartbeat_s: float, **transfer: Any) -> AsyncIterator[WorkerProcesses]:
    """`transfer`: of their KvTransferConfig. What they log goes to the file `log`."""
    with log.open("w") as errors:
        nursery = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(NURSERY)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    running = WorkerProcesses(nursery, transfer, heartbeat_s)
    listening = asyncio.create_task(running.listen())
    try:
        yield running
    finally:
        running.end()
        nursery.kill()  # and with it what it bore and we have not heard of
        await nursery.wait()
        await listening
