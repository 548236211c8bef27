"""Who is there: the workers and gateways of a cluster, published by the supervisor and watched by gateways.

In Redis a hash `diphase:{cluster}:members` maps worker_id to JSON, and a channel of the same name with
`:changed` says that it changed. Membership names processes; whether one is alive is the stream's business
(workers.py). When Redis is gone the last known members stay.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import redis.asyncio
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Members are read again after this at the latest: a message lost with a connection does no harm."""
RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the cluster."""

    worker_id: str
    role: str
    """prefill, decode, colocated, gateway or supervisor."""
    address: str
    """host:port of its gRPC server."""
    incarnation: str
    """Fresh at each process start."""
    metrics_address: str = ""
    """host:port of its /metrics."""
    draining: bool = False
    """It finishes what it has; nothing new goes there."""
    layout_hash: str = ""
    """Of its model and KV layout: workers hand over only where it is equal. As the next three, of workers
    only."""
    protocol_version: int = 0
    kv_sharding: str = ""
    package_version: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Member:
        """What a newer release has added is passed over."""
        return cls(**{name: value for name, value in json.loads(text).items() if name in cls.__slots__})


class MembershipSource(Protocol):
    """Where a gateway learns of workers."""

    def watch(self) -> AsyncGenerator[list[Member], None]:
        """The full list at once, and again at each change. Ends when its consumer is cancelled."""
        ...


class FixedMembership:
    """Members that are known beforehand, for a gateway without a store."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = list(members)

    async def watch(self) -> AsyncGenerator[list[Member], None]:
        yield list(self._members)


class RedisMembership:
    """Members in Redis: the supervisor publishes and removes, gateways watch."""

    def __init__(self, client: redis.asyncio.Redis, cluster: str) -> None:
        """`client` stays the caller's."""
        self._client = client
        self._key = f"diphase:{cluster}:members"
        self._channel = f"{self._key}:changed"

    async def publish(self, members: Sequence[Member]) -> None:
        """These are there and nobody else. At once: a gateway never sees a part of them."""
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(self._key)
            if members:
                pipe.hset(self._key, mapping={member.worker_id: member.to_json() for member in members})
            pipe.publish(self._channel, "")
            await pipe.execute()

    async def remove(self, worker_id: str) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hdel(self._key, worker_id)
            pipe.publish(self._channel, worker_id)
            await pipe.execute()

    async def members(self) -> list[Member]:
        """Everybody, ordered by worker_id."""
        found = await self._client.hgetall(self._key)
        return sorted((Member.from_json(text) for text in found.values()), key=lambda m: m.worker_id)

    async def watch(self) -> AsyncGenerator[list[Member], None]:
        known: list[Member] | None = None
        reachable = True
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(self._channel)
                    while True:
                        members = await self.members()
                        reachable = _log_change(reachable, True)
                        # An empty store has lost its data: whether workers live is said by their streams.
                        if members != known and (members or not known):
                            known = members
                            yield list(members)
                        await _wait_for_message(pubsub)
            except (RedisError, OSError) as exc:
                reachable = _log_change(reachable, False, exc)
                await asyncio.sleep(RETRY_S)


async def _wait_for_message(pubsub: PubSub) -> None:
    """Returns at a message of the channel, or after POLL_S."""
    await pubsub.get_message(ignore_subscribe_messages=True, timeout=POLL_S)


def _log_change(before: bool, now: bool, exc: BaseException | None = None) -> bool:
    if before and not now:
        logger.warning("membership_unreachable error=%s keeping=last_known", exc)
    elif now and not before:
        logger.info("membership_reachable")
    return now
