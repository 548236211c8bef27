"""One place in the cluster that shall always have a running process in it.

The slot starts the process, publishes it, waits for its end, takes it off the list and begins again.
Starting anew is the process's own business (Ray's, live); whether it still answers is judged elsewhere
(liveness.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ..proto.errors import DiphaseError, InternalError, WorkerLost, from_wire
from .config import SupervisorConfig
from .roles import Assignment, Started, StartFailed, StartProgress

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1


class ProcessGone(Exception):
    """The process will not come back under its handle. Never reaches a person: the supervisor says what it
    means."""


class Process(Protocol):
    """A process that comes back under the same handle when it died."""

    async def start(self, assignment: Assignment) -> Started | StartFailed:
        """Waits until the process is there and serves.

        Raises:
            ProcessGone: it will never come back.
            DiphaseError: this start failed; another one may not.
        """
        ...

    async def progress(self) -> StartProgress | None:
        """How far the start is; None while the process is not there."""
        ...

    async def ended(self, started: Started) -> None:
        """Returns when that process has ended."""
        ...

    async def kill(self, started: Started) -> None:
        """Ends that process, also when it is stopped."""
        ...

    async def drain(self) -> None: ...

    async def close(self) -> None:
        """Stops it for good."""
        ...

    def abandon(self) -> None:
        """Has it ended for good by force, and waits for nothing."""
        ...


class Slot:
    """Keeps one process running."""

    def __init__(
        self,
        assignment: Assignment,
        process: Process,
        *,
        publish: Callable[[Started], None],
        remove: Callable[[Started], None],
        drains: Callable[[Started], None],
        config: SupervisorConfig,
    ) -> None:
        """`publish`, `drains` and `remove` tell the rest of the cluster who is there."""
        self.assignment = assignment
        self.process = process
        self.started: Started | None = None
        self.retiring = False
        """Its process ends for good."""
        self._publish = publish
        self._remove = remove
        self._drains = drains
        self._config = config
        self._first: asyncio.Future[Started] = asyncio.get_running_loop().create_future()

    async def first_start(self) -> Started:
        """Returns once the process serves for the first time.

        Raises:
            DiphaseError: it could not be started; the slot has given up.
        """
        return await asyncio.shield(self._first)

    async def run(self) -> None:
        """Until cancelled, or the process of a slot that retires has ended. The first failure to start is
        final, later ones are tried again.

        Raises:
            ProcessGone: it ended and will never come back.
        """
        try:
            self.started = await self._start()
        except Exception as exc:
            self._first.set_exception(self._reason(exc))
            self._first.exception()  # seen: the waiter may be gone already
            return
        self._first.set_result(self.started)
        while True:
            self._publish(self.started)
            await self.process.ended(self.started)
            self._take_off()
            if self.retiring:
                return
            self.started = await self._restart()

    async def retire(self, drain_s: float) -> None:
        """Has the process finish what it has, for `drain_s` at most, and ends it for good. The slot is of no
        more use, also when this is cancelled."""
        self.retiring = True
        if (started := self.started) is not None:
            logger.info("process_drains worker_id=%s pid=%d", started.worker_id, started.pid)
            self._drains(started)
            try:
                async with asyncio.timeout(drain_s):
                    await self.process.drain()
            except TimeoutError:
                logger.warning("drain_incomplete worker_id=%s after_s=%g", started.worker_id, drain_s)
        await self.process.close()
        self._take_off()

    def _take_off(self) -> None:
        """Its process has ended. Nothing happens when that is known."""
        ended, self.started = self.started, None
        if ended is not None:
            level = logging.INFO if self.retiring else logging.WARNING
            logger.log(level, "process_ended worker_id=%s pid=%d", ended.worker_id, ended.pid)
            self._remove(ended)

    async def _start(self) -> Started:
        timeout_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.process.start(self.assignment)
        except TimeoutError:
            raise WorkerLost(f"{self.assignment.worker_id} did not start within {timeout_s:.0f} s") from None
        if isinstance(answer, StartFailed):
            raise from_wire(answer.code, f"{self.assignment.worker_id}: {answer.message}")
        # The next start takes the ports of this one: clients and scrapers find it where it was.
        self.assignment = replace(
            self.assignment, port=_port(answer.address), metrics_port=_port(answer.metrics_address)
        )
        logger.info(
            "process_started worker_id=%s pid=%d address=%s incarnation=%s node=%s",
            answer.worker_id, answer.pid, answer.address, answer.incarnation, answer.node_id,
        )  # fmt: skip
        return answer

    async def _restart(self) -> Started:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._start()
            except ProcessGone:
                raise
            except Exception as exc:
                error = self._reason(exc)
                logger.error("restart_failed worker_id=%s error=%s", self.assignment.worker_id, error.message)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._config.restart_pause_s)

    def _reason(self, exc: Exception) -> DiphaseError:
        """Why a start failed, for a person."""
        if isinstance(exc, DiphaseError):
            return exc
        if isinstance(exc, ProcessGone):
            return WorkerLost(str(exc))
        logger.error("start_failed worker_id=%s", self.assignment.worker_id, exc_info=exc)
        return InternalError(f"{self.assignment.worker_id} did not start: {type(exc).__name__}: {exc}")


def _port(address: str) -> int:
    return int(address.rpartition(":")[2] or 0)
