"""A further rank of a worker, in a process of its own that rank 0 starts: loads its part of the model and
computes every step that rank 0 announces. No requests, no sampling; no torch before it is on its cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys

from ..proto.errors import DiphaseError, InternalError, WorkerLost
from . import rank_wire
from .rank_wire import Kind, RankSpec

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> int:
    """`fd`: of the connection to rank 0. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for rank 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with socket.socket(fileno=fd) as sock:
        try:
            _die_with_parent()
            _run(sock)
        except WorkerLost:
            return 0  # rank 0 is gone, or knows that another is
        except Exception as exc:  # the top of this process: rank 0 is told, and ends the worker
            if not isinstance(exc, DiphaseError):
                logger.exception("rank_failed")
            with contextlib.suppress(OSError):
                rank_wire.send(sock, Kind.FAILED, rank_wire.failed_payload(exc))
            return 1
    return 0


def _run(sock: socket.socket) -> None:
    kind, payload, _ = rank_wire.receive(sock)
    if kind is not Kind.SPEC:
        raise InternalError(f"a rank was told {kind.name} before what it is")
    spec = RankSpec.from_bytes(payload)
    if cores := spec.config.cores_of(spec.rank):
        os.sched_setaffinity(0, cores)  # threads that torch starts have them too
    from .rank_steps import compute

    compute(sock, spec)


def _die_with_parent() -> None:
    """Also when this process is stopped, or loads and reads nothing; the kernel sees to it."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent:
        raise WorkerLost("rank 0 is gone")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
