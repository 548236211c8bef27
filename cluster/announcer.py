"""Tells the store who is there, without anybody waiting for it: a store that is away delays no restart."""

from __future__ import annotations

import asyncio
import logging

from redis.exceptions import RedisError

from ..router.membership import Member, RedisMembership
from .roles import Started

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class Announcer:
    """Keeps the newest word on each process and writes it as soon as the store takes it."""

    def __init__(self, membership: RedisMembership) -> None:
        self._membership = membership
        self._pending: dict[str, Member | None] = {}  # None: it is gone
        self._more = asyncio.Event()

    def publish(self, started: Started) -> None:
        """The process serves."""
        self._tell(
            started.worker_id,
            Member(
                worker_id=started.worker_id,
                role=started.role,
                address=started.address,
                incarnation=started.incarnation,
                metrics_address=started.metrics_address,
            ),
        )

    def remove(self, started: Started) -> None:
        """The process has ended."""
        self._tell(started.worker_id, None)

    async def run(self) -> None:
        """Writes until cancelled."""
        task = asyncio.current_task()
        assert task is not None
        # A connection that breaks while the task is cancelled raises its own error, not the cancellation.
        while not task.cancelling():
            await self._more.wait()
            self._more.clear()
            while self._pending and not task.cancelling():
                worker_id = next(iter(self._pending))
                member = self._pending.pop(worker_id)
                try:
                    if member is None:
                        await self._membership.remove(worker_id)
                    else:
                        await self._membership.publish(member)
                except (RedisError, OSError) as exc:
                    logger.warning("store_unreachable worker_id=%s error=%s", worker_id, exc)
                    self._pending.setdefault(worker_id, member)  # unless there is newer word
                    await asyncio.sleep(RETRY_S)

    def _tell(self, worker_id: str, member: Member | None) -> None:
        self._pending[worker_id] = member
        self._more.set()
