"""SIGTERM in the process of an actor: told to the actor, where Ray would exit at once or has it blocked.

Only a process's main thread may set a handler, and Ray runs actors beside it. But it is the main thread that
loads an actor's class, and with it this package: `take_over` is called there.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

_listener: Callable[[], object] | None = None


def in_actor_process() -> bool:
    """Whether Ray started this process to run actors, and this is the thread that may set handlers."""
    worker = sys.modules.get("ray._private.worker")
    return (
        worker is not None
        and worker.global_worker.mode == worker.WORKER_MODE
        and threading.current_thread() is threading.main_thread()
    )


def take_over() -> None:
    """From now on SIGTERM calls who listens; before somebody does, it ends the process as by default."""
    signal.signal(signal.SIGTERM, _receive)
    # The processes of a private Ray inherit it blocked, see ray_runtime.py.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def listen(listener: Callable[[], object]) -> None:
    """`listener` is called on the main thread for each SIGTERM."""
    global _listener  # noqa: PLW0603 (a process has one disposition of a signal)
    _listener = listener


def _receive(_number: int, _frame: object) -> None:
    if _listener is None:
        sys.exit(128 + signal.SIGTERM)
    _listener()
