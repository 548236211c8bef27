"""The processes that a search asks its questions, and their end with it, however that comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from ...proto.parent_death import end_with
from .goodput import Mapped


@contextmanager
def processes_for(count: int) -> Iterator[Mapped]:
    """Yields a map() over so many processes; over none for one. When the block is left by an error, they do
    not finish what they compute. A signal that ends this process ends them, and so does Ctrl-C, which must
    not raise an exception meanwhile: an executor that meets one at a bad moment waits for ever."""
    if count == 1:
        yield map
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with ProcessPoolExecutor(count, initializer=end_with, initargs=(os.getpid(),)) as executor:
            try:
                yield executor.map
            except BaseException:
                for process in multiprocessing.active_children():
                    process.kill()
                raise
    finally:
        signal.signal(signal.SIGINT, before)
