"""A child process that ends with its parent, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Has the kernel kill this process when the thread of `parent` (a process id) that started it ends, even
    if this process is stopped or hangs; exits where the parent is gone already. Ctrl-C in a terminal is left
    to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    failed = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if failed or os.getppid() != parent:
        sys.exit(1)
