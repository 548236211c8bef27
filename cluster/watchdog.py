"""The process that ends a cluster's processes when its supervisor is gone, however it went.

It reads a pipe that only the supervisor holds. The pipe's end means that the supervisor has stopped or was
killed: whatever still bears the cluster's mark gets SIGKILL, and the cluster's folder is removed. A clean
stop and a `kill -9` of the supervisor take the same path; after a clean stop there is nothing left to end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .processes import marked, start_apart

SWEEP_S = 5.0
"""Processes that a raylet was just about to start may appear while others are ended."""


def sweep(mark: str, spare: int = 0) -> int:
    """SIGKILL to every process of the cluster, `spare` excepted, until none is left; how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + SWEEP_S
    while (left := [pid for pid in marked(mark) if pid != spare]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.02)
    return len(killed)


class Watchdog:
    """The supervisor's end of the pipe."""

    def __init__(self, folder: Path) -> None:
        """Starts the process. Once this one is gone it ends the processes that bear the mark `folder.name`,
        and removes the folder."""
        self._process = start_apart(
            [sys.executable, "-P", "-m", "diphase.cluster.watchdog", str(folder)], stdin=subprocess.PIPE
        )

    def finish(self) -> int:
        """Sweeps now; how many processes had to be killed. Idempotent."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
        return self._process.wait(timeout=2 * SWEEP_S)


def main() -> None:
    folder = Path(sys.argv[1])
    supervisor = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    # In a clean stop the supervisor is still there, with the logs that Ray opened in its process.
    killed = sweep(folder.name, spare=supervisor)
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(min(killed, 100))


if __name__ == "__main__":
    main()
