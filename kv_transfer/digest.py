"""Digests of KV bytes, computed on a thread of their own: the event loop must not read megabytes.

xxh3_64 runs at memory speed (sha256 costs fifty times as much) and finds what a transport may do wrong; it is
no protection against an adversary, which the cluster token keeps out.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


def digest_runs(buffer: memoryview, runs: NDArray[np.int64]) -> list[int]:
    """xxh3_64 of each run (offset, length) of `buffer`."""
    return [xxhash.xxh3_64_intdigest(buffer[begin : begin + length]) for begin, length in runs.tolist()]


class DigestWorker:
    """Answers arrive through poll() in the order of submit(). Used from one thread; `wake` is called from its
    own."""

    def __init__(self, buffer: memoryview, wake: Callable[[], None], *, threaded: bool = True) -> None:
        """`threaded=False` computes inside submit(): for simulation, where the order of events must not
        vary."""
        self._buffer = buffer
        self._wake = wake
        self._threaded = threaded
        self._jobs: queue.SimpleQueue[tuple[Any, NDArray[np.int64]] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Any, list[int]]] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, ticket: Any, runs: NDArray[np.int64]) -> None:
        """Asks for the digests of `runs` ([n, 2]: offset, length); `ticket` comes back with them."""
        if not self._threaded:
            self._answer(ticket, runs)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-digest", daemon=True)
            self._thread.start()
        self._jobs.put((ticket, runs))

    def poll(self) -> list[tuple[Any, list[int]]]:
        """(ticket, digests) so far; never blocks."""
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
            self._answer(*job)

    def _answer(self, ticket: Any, runs: NDArray[np.int64]) -> None:
        self._results.append((ticket, digest_runs(self._buffer, runs)))
        self._wake()
