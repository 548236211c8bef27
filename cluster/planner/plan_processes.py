"""The processes that a search asks its questions, and their end with it, however that comes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType

from .goodput import Mapped

TOLD_TO_END = 128 + signal.SIGTERM
"""Exit status."""


@contextmanager
def processes_for(count: int) -> Iterator[Mapped]:
    """Yields a map() over so many processes; over none for one. When the block is left by an error, by Ctrl-C
    or by SIGTERM, which ends the command with status 143, they do not finish what they compute."""
    if count == 1:
        yield map
        return
    told: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        _terminate()
        sys.exit(TOLD_TO_END)

    with _on_sigterm(end):
        try:
            with ProcessPoolExecutor(count) as executor:
                try:
                    yield executor.map
                except BaseException:
                    _terminate()
                    raise
        except BrokenProcessPool:
            if told:  # the exit was raised where nobody lets it through, such as beside a fork
                sys.exit(TOLD_TO_END)
            raise


def _terminate() -> None:
    for process in multiprocessing.active_children():
        process.terminate()


@contextmanager
def _on_sigterm(end: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
