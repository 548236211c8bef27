"""The thread that reads and copies KV bytes, so that the event loop need not. Knows no hand-offs and no
pools: it runs what it is given, one after the other."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from ..proto.errors import DiphaseError, InternalError

Job = Callable[[], Any]
"""Runs on the worker's thread. A DiphaseError that it raises becomes its result."""


class ByteWorker:
    """Results arrive through poll() in the order of submit(). Used from one thread; `wake` is called from its
    own."""

    def __init__(self, wake: Callable[[], None], *, threaded: bool = True) -> None:
        """`threaded=False` runs jobs inside submit(): for simulation, where the order of events must not
        vary."""
        self._wake = wake
        self._threaded = threaded
        self._jobs: queue.SimpleQueue[tuple[Any, Job] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Any, Any]] = deque()
        self._thread: threading.Thread | None = None
        self._crash: Exception | None = None

    def submit(self, ticket: Any, job: Job) -> None:
        """`ticket` comes back with the job's result."""
        if not self._threaded:
            self._do(ticket, job)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-bytes", daemon=True)
            self._thread.start()
        self._jobs.put((ticket, job))

    def poll(self) -> list[tuple[Any, Any]]:
        """(ticket, result) so far; never blocks.

        Raises:
            InternalError: a job has crashed; nothing can be expected of this worker but close().
        """
        if self._crash is not None:
            raise InternalError(f"the thread that reads KV bytes crashed: {self._crash!r}")
        results = []
        while self._results:
            results.append(self._results.popleft())
        return results

    def close(self) -> None:
        """Ends the thread. Blocks for the job at hand. Idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._do(*job)
            except Exception as error:  # the top of this thread: nobody above it could know
                self._crash = error
                self._wake()
                return

    def _do(self, ticket: Any, job: Job) -> None:
        try:
            result = job()
        except DiphaseError as error:
            result = error
        self._results.append((ticket, result))
        self._wake()
