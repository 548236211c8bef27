"""The attempts at one request: who has it now, whose loss ends that, and whether it is tried again.

Pure, so that a gateway and the planner's simulator decide alike. Knows no streams, no tokens and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..proto.errors import DiphaseError, Draining, Overloaded, TransferError
from .worker_handle import WorkerHandle


class Attempts:
    """The one that runs, by number from 0, and what is remembered of those before it."""

    __slots__ = ("attempt", "decode", "decoding", "failed_workers", "moves", "prefill", "seeded")

    def __init__(self, attempt: int = 0) -> None:
        self.attempt = attempt
        self.prefill: WorkerHandle | None = None
        self.decode: WorkerHandle | None = None
        self.decoding = False
        """The decode worker has sent tokens of this attempt."""
        self.seeded = False
        """The prefill worker has sent the first token of this attempt."""
        self.failed_workers: set[str] = set()
        self.moves = 0
        """Attempts that ended because a worker drained; they cost none."""

    @property
    def has_gap(self) -> bool:
        """Whether later tokens are here while an earlier one is missing."""
        return False

    @property
    def workers(self) -> list[WorkerHandle]:
        """Those that have the current attempt."""
        return [worker for worker in (self.prefill, self.decode) if worker is not None]

    @property
    def needs_prefill(self) -> bool:
        """Whether losing the prefill worker ends the attempt: tokens that only it has are missing."""
        if self.prefill is None or (self.decoding and not self.has_gap):
            return False
        # Where it drained, decode has verified the hand-off, whether or not it has sent a token yet.
        return not (self.prefill.parted and self.seeded) or self.has_gap

    def needs(self, worker: WorkerHandle) -> bool:
        """Whether losing the worker ends the attempt."""
        return self.decode is worker or (self.prefill is worker and self.needs_prefill)

    def suspects(self, worker: WorkerHandle, error: DiphaseError) -> list[WorkerHandle]:
        """Who may be the reason that the worker reports this error: when a hand-off fails or is refused,
        either side."""
        return self.workers if isinstance(error, TransferError | Draining | Overloaded) else [worker]

    def blame(self, workers: Sequence[WorkerHandle], error: DiphaseError) -> None:
        """The attempt ended by one of them. A drain is nobody's failure, however many workers drain: unless
        none of these is known to leave and all have failed the request before, for then it could go on so
        for ever."""
        if isinstance(error, Draining) and any(
            worker.leaves or worker.worker_id not in self.failed_workers for worker in workers
        ):
            self.moves += 1
        self.failed_workers.update(worker.worker_id for worker in workers)

    def exhausted(self, max_attempts: int) -> bool:
        """Whether the attempt that ended was the last."""
        return self.attempt + 1 - self.moves >= max_attempts

    def next_attempt(self) -> None:
        """Leaves its workers."""
        self.attempt += 1
        self.prefill = self.decode = None
        self.decoding = self.seeded = False
