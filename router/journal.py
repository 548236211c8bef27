"""The request journal: accepted, placed, terminal, in Redis, so that any gateway can find a request's
workers.

It holds no tokens and nobody waits for it. Records are written in the background, those of one request within
a moment as one; when Redis is away they wait, up to a bound, and beyond it the oldest are dropped and
counted. A request's record is one JSON string under `diphase:{cluster}:request:{client_request_id}` with a
time to live.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import NamedTuple, Protocol

import redis.asyncio
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

RETRY_S = 0.5
WRITE_TIMEOUT_S = 2.0
LOOKUP_TIMEOUT_S = 1.0
BATCH = 500
"""Records a write."""


class JournalRecord(NamedTuple):
    """The latest that is known of a request."""

    state: str
    """accepted, placed, or how it ended: finished, cancelled, failed."""
    gateway_id: str
    attempt: int = 0
    prefill: str = ""
    """worker_id; empty when the decode worker computes the prompt."""
    decode: str = ""
    seed: int = 0
    """Of its sampling, drawn by the gateway when the client gave none."""
    request_id: str = ""
    """What the workers call it."""

    @property
    def ended(self) -> bool:
        return self.state not in ("accepted", "placed")


class JournalUnavailable(Exception):
    """The journal cannot be read now; nothing is known about the request."""


class Journal(Protocol):
    """What a gateway needs of a journal."""

    dropped: int
    """Records given up because too many waited."""

    def record(self, request_id: str, record: JournalRecord) -> None:
        """Notes the latest; never blocks and never fails."""
        ...

    async def lookup(self, request_id: str) -> JournalRecord | None:
        """What any gateway noted; None when nothing is known.

        Raises:
            JournalUnavailable: Redis does not answer.
        """
        ...

    async def run(self) -> None:
        """Writes in the background until cancelled."""
        ...

    async def flush(self) -> None:
        """Writes what waits, once; for the end of the process."""
        ...


class RedisJournal:
    """The live journal. `client` stays the caller's."""

    def __init__(
        self, client: redis.asyncio.Redis, cluster: str, *, flush_s: float, ttl_s: int, max_pending: int
    ) -> None:
        self._client = client
        self._prefix = f"diphase:{cluster}:request:"
        self._flush_s = flush_s
        self._ttl_s = ttl_s
        self._max_pending = max_pending
        self._pending: dict[str, JournalRecord] = {}
        self._has_pending = asyncio.Event()
        self._reachable = True
        self.dropped = 0

    def record(self, request_id: str, record: JournalRecord) -> None:
        self._pending[request_id] = record
        if len(self._pending) > self._max_pending:
            del self._pending[next(iter(self._pending))]
            self.dropped += 1
        self._has_pending.set()

    async def lookup(self, request_id: str) -> JournalRecord | None:
        waiting = self._pending.get(request_id)
        if waiting is not None:
            return waiting
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                text = await self._client.get(self._prefix + request_id)
        except (RedisError, OSError, TimeoutError) as exc:
            raise JournalUnavailable(str(exc)) from exc
        return None if text is None else JournalRecord(*json.loads(text))

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        # A connection that breaks while the task is cancelled raises its own error, not the cancellation.
        while not task.cancelling():
            await self._has_pending.wait()
            await asyncio.sleep(self._flush_s if self._reachable else RETRY_S)
            await self._write()
            if not self._pending:
                self._has_pending.clear()

    async def flush(self) -> None:
        while self._pending and await self._write():
            pass

    async def _write(self) -> bool:
        """One batch; on failure it waits on, behind no newer record of the same request."""
        batch = dict(list(self._pending.items())[:BATCH])
        for request_id in batch:
            del self._pending[request_id]
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S), self._client.pipeline(transaction=False) as pipe:
                for request_id, record in batch.items():
                    pipe.set(self._prefix + request_id, json.dumps(record), ex=self._ttl_s)
                await pipe.execute()
        except asyncio.CancelledError:
            self._give_back(batch)  # flush() writes it again, which does no harm
            raise
        except (RedisError, OSError, TimeoutError) as exc:
            self._give_back(batch)
            if self._reachable:
                logger.warning("journal_unreachable error=%s serving=on", exc)
            self._reachable = False
            return False
        if not self._reachable:
            logger.info("journal_reachable")
        self._reachable = True
        return True

    def _give_back(self, batch: dict[str, JournalRecord]) -> None:
        """Older than what came meanwhile: first in line, and first to be dropped."""
        batch.update(self._pending)
        self._pending = batch
        excess = len(batch) - self._max_pending
        for request_id in list(batch)[: max(0, excess)]:
            del batch[request_id]
            self.dropped += 1
