"""Which worker has which blocks in its prefix cache.

Fed by the sequence-numbered deltas on each worker's stream; a gap makes the entry stale until a snapshot
arrives. A stale or forgotten block only costs a better placement, never a wrong result: the worker looks for
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class _WorkerBlocks:
    """The hashes of one worker, oldest first."""

    __slots__ = ("hashes", "sequence")

    def __init__(self) -> None:
        self.hashes: dict[bytes, None] = {}
        self.sequence: int | None = None  # of the last delta included; None: waiting for a snapshot


class PrefixIndex:
    """Block hashes by worker, at most `max_blocks` for each; beyond it the oldest are forgotten."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._workers: dict[str, _WorkerBlocks] = {}

    def delta(self, worker_id: str, sequence: int, stored: Iterable[bytes], evicted: Iterable[bytes]) -> bool:
        """Takes in a delta. False: one is missing, its worker's hashes are dropped; ask for a snapshot (once:
        while it is under way, deltas are ignored and True is returned)."""
        blocks = self._workers.get(worker_id)
        if blocks is None:
            self._workers[worker_id] = _WorkerBlocks()
            return False
        if blocks.sequence is None:
            return True
        if sequence <= blocks.sequence:
            return True  # included in the snapshot
        if sequence != blocks.sequence + 1:
            blocks.hashes.clear()
            blocks.sequence = None
            return False
        blocks.sequence = sequence
        for block_hash in evicted:
            blocks.hashes.pop(block_hash, None)
        self._store(blocks, stored)
        return True

    def snapshot(self, worker_id: str, sequence: int, hashes: Iterable[bytes]) -> None:
        """Replaces what is known of the worker."""
        blocks = _WorkerBlocks()
        blocks.sequence = sequence
        self._store(blocks, hashes)
        self._workers[worker_id] = blocks

    def expect_snapshot(self, worker_id: str) -> None:
        """A snapshot was asked for: forget the worker's blocks until it comes."""
        self._workers[worker_id] = _WorkerBlocks()

    def remove(self, worker_id: str) -> None:
        """The worker is gone, its cache with it."""
        self._workers.pop(worker_id, None)

    def cached_blocks(self, worker_id: str, block_hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt the worker has."""
        blocks = self._workers.get(worker_id)
        if blocks is None or not blocks.hashes:
            return 0
        known = blocks.hashes
        count = 0
        for block_hash in block_hashes:
            if block_hash not in known:
                break
            count += 1
        return count

    def num_blocks(self, worker_id: str) -> int:
        """Hashes kept for the worker."""
        blocks = self._workers.get(worker_id)
        return 0 if blocks is None else len(blocks.hashes)

    def _store(self, blocks: _WorkerBlocks, stored: Iterable[bytes]) -> None:
        known = blocks.hashes
        for block_hash in stored:
            known.pop(block_hash, None)  # stored anew: youngest again
            known[block_hash] = None
        for _ in range(len(known) - self._max_blocks):
            del known[next(iter(known))]
