"""A further rank of a worker, in a process of its own that rank 0 starts: loads its part of the model and
computes every step that rank 0 announces. No requests, no sampling; no torch before it is on its cores.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys

from ..proto.errors import DiphaseError, InternalError, WorkerLost
from ..proto.parent_death import end_with
from . import rank_wire
from .rank_wire import Kind, RankSpec

logger = logging.getLogger(__name__)


def main(fd: int) -> int:
    """`fd`: of the connection to rank 0. Returns the exit status."""
    end_with(os.getppid())
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with socket.socket(fileno=fd) as sock:
        try:
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


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
