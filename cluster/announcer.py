"""Tells the store who is there, without anybody waiting for it: a store that is away delays no restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import asdict, replace

from redis.exceptions import RedisError

from ..router.membership import Member, RedisMembership
from .roles import Started

logger = logging.getLogger(__name__)

REPEAT_S = 2.0
"""The store is told again after this at the latest: it may have lost everything while it ran."""
RETRY_S = 0.5


class Announcer:
    """Knows who is there now and has the store say the same."""

    def __init__(self, membership: RedisMembership) -> None:
        self._membership = membership
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()

    def publish(self, started: Started) -> None:
        """The process serves."""
        self.add(
            Member(
                worker_id=started.worker_id,
                role=started.role,
                address=started.address,
                incarnation=started.incarnation,
                metrics_address=started.metrics_address,
                **asdict(started.traits),
            )
        )

    def add(self, member: Member) -> None:
        """It is there, started by whomever."""
        self._members[member.worker_id] = member
        self._changed.set()

    def drains(self, started: Started) -> None:
        """The process takes its leave: it finishes what it has."""
        if member := self._members.get(started.worker_id):
            self.add(replace(member, draining=True))

    def remove(self, started: Started) -> None:
        """The process has ended."""
        self._members.pop(started.worker_id, None)
        self._changed.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        task = asyncio.current_task()
        assert task is not None
        reachable = True
        # A connection that breaks while the task is cancelled raises its own error, not the cancellation.
        while not task.cancelling():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPEAT_S if reachable else RETRY_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._membership.publish(list(self._members.values()))
                reachable = True
            except (RedisError, OSError) as exc:
                if reachable:
                    logger.warning("store_unreachable error=%s again_in_s=%.1f", exc, RETRY_S)
                reachable = False
