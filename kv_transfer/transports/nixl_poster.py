"""The thread on which large slices are posted to NIXL: over some lanes UCX copies the bytes before the post
returns, and the transport's own thread has frames to read and jobs to describe meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from ...proto.errors import TransferError

Call = Callable[[], Any]


class Poster:
    """One call at a time, from one thread; `stir`, called from its own, says that take() has the outcome.
    While it is busy NIXL is its own: nobody else may call the agent without waiting."""

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._report: Callable[[Any], None] | None = None

    @property
    def is_busy(self) -> bool:
        """From submit() until take() has handed the outcome on."""
        return self._report is not None

    @property
    def has_outcome(self) -> bool:
        return not self._outcomes.empty()

    def submit(self, call: Call, report: Callable[[Any], None]) -> None:
        """`report` is given by take() what the call returned, or its exception."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-nixl-posts", daemon=True)
            self._thread.start()
        self._report = report
        self._calls.put(call)

    def take(self) -> bool:
        """Reports the outcome, if there is one; returns whether the poster is free.

        Raises:
            Exception: the call's own, if it is no TransferError.
        """
        if self._report is not None and self.has_outcome:
            report, self._report = self._report, None
            outcome = self._outcomes.get()
            if isinstance(outcome, Exception) and not isinstance(outcome, TransferError):
                raise outcome
            report(outcome)
        return self._report is None

    def close(self) -> None:
        """Waits for the call at hand, and forgets its outcome. Idempotent."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None
        self._report, self._outcomes = None, queue.SimpleQueue()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                outcome = call()
            except Exception as error:  # the top of this thread: take() raises it
                outcome = error
            self._outcomes.put(outcome)
            del call, outcome  # handles of transfers live as long as their moves
            self._stir()
