"""What the benchmarks share: the head of every result, and an orderly end. Knows nothing of what they
measure."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from diphase.cluster.load.report import environment, write_json

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM
"""Exit status, as a shell reports it."""


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` below the command that was run, its date, versions and kind of machine."""
    command = shlex.join([".venv/bin/python", "-P", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    write_json(path, {"command": command, **environment(), **content})


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but SIGTERM cancels `main` once, so that it stops what it started; further ones are
    ignored meanwhile.

    Raises:
        SystemExit: it was cancelled so.
    """

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: None if task.cancelling() else task.cancel()
        )
        return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise SystemExit(TERMINATED) from None
