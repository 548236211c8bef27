"""What runs inside Ray actors: thin shells around one role's running object.

A shell starts its role, reports where it listens and how far it is, and lets go of it. It knows nothing of
what a role does. When the process dies, Ray starts it anew and the supervisor calls `start` again.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import tempfile
from pathlib import Path

from ..proto.errors import ConfigError, DiphaseError, InternalError
from . import processes, roles, sigterm
from .roles import Assignment, Started, StartFailed, StartProgress

logger = logging.getLogger(__name__)


class RoleActor:
    """One role in this process. Ray runs the methods on one event loop, which is the role's too."""

    module = ""
    """Where the role lives."""

    def __init__(self, mark: str, threads: int) -> None:
        """`mark`: of the cluster's processes, see processes.py. `threads`: OpenMP's share of the cores."""
        self._mark = processes.bear(mark)
        # Read when torch is loaded, below. In Ray's own way (runtime_env) it would cost a fresh process.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Threads that wait for work spin otherwise, and take the cores of the event loops beside them.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        # At once, not when told to: importing torch takes seconds, which a restart can save.
        self._import = asyncio.get_running_loop().run_in_executor(None, importlib.import_module, self.module)
        self._running: roles.Running | None = None
        self._watch: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        sigterm.listen(lambda: loop.call_soon_threadsafe(self._leave))
        self._progress = StartProgress(stage="starting", share=0.0)

    async def start(self, assignment: Assignment) -> Started | StartFailed:
        """Starts the role and returns once it serves; the same answer again when it runs already."""
        try:
            if self._running is None:
                _log_to(assignment)
                _pin(assignment)
                await self._import
                self._running = await roles.start(assignment, _node_ip(), self._report)
                self._watch = asyncio.create_task(self._exit_when_broken(self._running))
        except DiphaseError as exc:
            return StartFailed(code=exc.code, message=exc.message)
        except Exception as exc:  # the top of this process: the supervisor is told and decides
            logger.exception("start_failed worker_id=%s", assignment.worker_id)
            return StartFailed(code=InternalError.code, message=f"{type(exc).__name__}: {exc}")
        return _describe(assignment, self._running)

    def _report(self, stage: str, share: float) -> None:
        self._progress = StartProgress(stage=stage, share=share)

    async def progress(self) -> StartProgress:
        """How far the start is."""
        return self._progress

    async def wait_closed(self) -> None:
        """Never returns: the supervisor's pending call fails when the process dies."""
        await asyncio.Event().wait()

    async def drain(self) -> None:
        """Takes nothing new and returns once nothing is left to do."""
        if self._running is not None:
            await self._running.drain()

    async def stop(self) -> None:
        """Lets go of everything. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await running.close()

    def _leave(self) -> None:
        """SIGTERM, from whoever stops single processes or nodes: the first has it finish what it has; there
        is nothing to finish before it serves, and no more patience at the second."""
        if self._running is None or self._leaving is not None:
            os._exit(1)
        self._leaving = asyncio.create_task(self._exit_when_drained(self._running))

    async def _exit_when_drained(self, running: roles.Running) -> None:
        logger.info("sigterm_received drains=yes")
        try:
            await running.drain()
            await running.close()
        except Exception:  # the top of this process's end
            logger.exception("drain_failed")
        finally:
            os._exit(0)

    async def _exit_when_broken(self, running: roles.Running) -> None:
        try:
            await running.wait()
        except Exception:  # whatever it is, this process is of no more use
            logger.exception("role_broken")
            # At once: its peers see the streams end, and Ray starts a new process.
            os._exit(1)


class PrefillActor(RoleActor):
    """A prefill worker."""

    module = roles.MODULES["prefill"]


class DecodeActor(RoleActor):
    """A decode worker, or a colocated one: the assignment says which."""

    module = roles.MODULES["decode"]


class GatewayActor(RoleActor):
    """A gateway."""

    module = roles.MODULES["gateway"]


ACTORS: dict[str, type[RoleActor]] = {
    "prefill": PrefillActor,
    "decode": DecodeActor,
    "colocated": DecodeActor,
    "gateway": GatewayActor,
}


def _node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _describe(assignment: Assignment, running: roles.Running) -> Started:
    import ray

    pid = os.getpid()
    return Started(
        worker_id=assignment.worker_id,
        role=assignment.role,
        address=running.address,
        metrics_address=running.metrics_address,
        incarnation=running.incarnation,
        pid=pid,
        ticks=processes.started_at(pid) or 0,
        node_id=ray.get_runtime_context().get_node_id(),
        traits=running.traits,
    )


def open_log_dir(folder: str) -> None:
    """Makes `folder` if it is not there; "" is none.

    Raises:
        ConfigError: no file can be written there.
    """
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"supervisor.log_dir = {folder!r} cannot be written: {why}") from exc


def _log_to(assignment: Assignment) -> None:
    """Changes of state go to the configured folder, or to standard error, which Ray keeps."""
    folder = assignment.config.supervisor.log_dir
    open_log_dir(folder)
    handler = logging.FileHandler(Path(folder) / f"{assignment.worker_id}.log") if folder else None
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s", handlers=[handler] if handler else None
    )
    logging.getLogger(__name__.partition(".")[0]).setLevel(logging.INFO)


def _pin(assignment: Assignment) -> None:
    """Confines every thread of this process to its cores: Ray's own threads exist before the role's.

    Raises:
        ConfigError: there is no such core on this node.
    """
    if not assignment.cores:
        return
    # The system itself complains only when none of them is there.
    there = _cores_there()
    if missing := sorted(set(assignment.cores) - there):
        raise ConfigError(
            f"pools.{assignment.role}.cores: there is no core {', '.join(map(str, missing))} here; "
            f"the cores are {', '.join(map(str, sorted(there)))}"
        )
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), assignment.own_cores)


def _cores_there() -> set[int]:
    """The cores that this process may use, whatever it is confined to now."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    try:
        return os.sched_getaffinity(0)
    finally:
        os.sched_setaffinity(0, before)


if sigterm.in_actor_process():
    sigterm.take_over()
