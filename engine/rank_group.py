"""The other ranks of a worker as rank 0 sees them: their processes, connections and pools. No torch.

They live and die with the worker: a rank ends when its connection or its parent does, and a worker that has
lost one cannot go on.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from ..proto.errors import DiphaseError, InternalError, WorkerLost
from . import rank_wire
from .base import KvRegion
from .config import EngineConfig
from .rank_wire import Kind, RankSpec

LOAD_TIMEOUT_S = 900.0
"""For a rank's model; as long as the supervisor gives a worker by default."""


class RankGroup:
    """Ranks 1 to config.tensor_parallel - 1. Made, asked and closed by the engine's thread."""

    def __init__(self, config: EngineConfig, fingerprint: str) -> None:
        """Starts the processes, which then load their models."""
        self._config = config
        # A file of no folder: nothing is left of it, however this process ends. It is never closed: torch
        # opens the path once more whenever it lets go of the group, and must not meet another file there.
        store = os.memfd_create("diphase-ranks", os.MFD_CLOEXEC)
        self.store_path = f"/proc/{os.getpid()}/fd/{store}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._closing = os.eventfd(0, os.EFD_CLOEXEC)
        self._watcher: threading.Thread | None = None
        self._in_step = False
        self._closed = False
        try:
            for rank in range(1, config.tensor_parallel):
                self._start(
                    RankSpec(config=config, rank=rank, fingerprint=fingerprint, store_path=self.store_path)
                )
        except BaseException:
            self.close()
            raise

    def _start(self, spec: RankSpec) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._sockets.append(ours)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", f"{__package__}.rank_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    # Read when torch is loaded; threads that wait for work would spin otherwise.
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": str(spec.config.threads),
                        "OMP_WAIT_POLICY": "passive",
                    },
                )
            )
        ours.settimeout(LOAD_TIMEOUT_S)
        rank_wire.send(ours, Kind.SPEC, spec.to_bytes())

    def wait_loaded(self, sizes: list[int]) -> list[KvRegion]:
        """The pools of ranks 1 and up, mapped, once all have loaded.

        Args:
            sizes: bytes that the pools must have.

        Raises:
            DiphaseError: a rank could not load its model; what it said of it.
            WorkerLost: a rank is gone.
        """
        regions = []
        for sock, size_bytes in zip(self._sockets, sizes, strict=True):
            try:
                kind, payload, fd = rank_wire.receive(sock)
            except TimeoutError as exc:
                raise WorkerLost(f"a rank took more than {LOAD_TIMEOUT_S:.0f} s to load its model") from exc
            if kind is Kind.FAILED:
                raise rank_wire.failure(payload)
            regions.append(_mapped(kind, payload, fd, size_bytes))
            sock.settimeout(self._config.rank_timeout_s)
        return regions

    def announce(self, rows: bytes) -> None:
        """Has every rank compute a step (StepRows.to_bytes()).

        Raises:
            WorkerLost: one is gone or reads nothing, or the step before failed.
        """
        if self._in_step:
            # The others wait for rank 0's part of a sum of that step, and would take one of this for it.
            raise WorkerLost("a step failed on rank 0 of this worker, and the other ranks are still in it")
        self._in_step = True
        for sock in self._sockets:
            try:
                rank_wire.send(sock, Kind.STEP, rows)
            except OSError as exc:
                raise WorkerLost(f"a rank of this worker does not take a step: {exc}") from exc

    def step_done(self) -> None:
        """Rank 0 has computed the announced step to its end, and so have the others."""
        self._in_step = False

    def reason(self, error: DiphaseError) -> DiphaseError:
        """`error`, or what a rank said before it ended."""
        for sock in self._sockets:
            try:
                sock.settimeout(0.0)
                kind, payload, _ = rank_wire.receive(sock)
            except (OSError, DiphaseError):
                continue
            if kind is Kind.FAILED:
                return WorkerLost(f"a rank of this worker failed: {rank_wire.failure(payload)}")
        return error

    def watch(self, lost: Callable[[DiphaseError], None]) -> None:
        """Calls `lost` once, from a thread of its own, when a rank ends though it was not closed."""
        self._watcher = threading.Thread(target=self._watch, args=(lost,), name="ranks", daemon=True)
        self._watcher.start()

    def _watch(self, lost: Callable[[DiphaseError], None]) -> None:
        handles = {os.pidfd_open(process.pid): process.pid for process in self._processes}
        poll = select.poll()
        for handle in (self._closing, *handles):
            poll.register(handle, select.POLLIN)
        ready = [handle for handle, _events in poll.poll()]
        for handle in handles:
            os.close(handle)
        if self._closing not in ready:
            pids = ", ".join(str(handles[handle]) for handle in ready)
            lost(WorkerLost(f"a rank of this worker has ended: process {pids}"))

    def close(self) -> None:
        """Ends the processes. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._closing, 1)
        if self._watcher is not None:
            self._watcher.join()
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            process.send_signal(signal.SIGKILL)  # they have nothing to save, and one may be stopped
        for process in self._processes:
            process.wait()
        os.close(self._closing)


def _mapped(kind: Kind, payload: bytes, fd: int | None, size_bytes: int) -> KvRegion:
    said = rank_wire.ready_size(payload) if kind is Kind.READY else None
    if fd is None or said != size_bytes or os.fstat(fd).st_size != size_bytes:
        if fd is not None:
            os.close(fd)
        raise InternalError(f"a rank offers a pool of {said} bytes where {size_bytes} are due")
    pages = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return KvRegion(buffer=memoryview(pages), fd=fd)
