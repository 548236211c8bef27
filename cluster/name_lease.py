"""The name of a cluster in a shared store, held by one supervisor at a time.

Two clusters of one name would take each other's workers for their own. The name is therefore a key with a
time to live that the supervisor sets, renews from a thread and deletes. A running cluster that loses it (the
store was away for long) goes on: it asks for it again and says so in its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable

import redis
import redis.client
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..proto.errors import ConfigError
from .store import CONNECT_S, refusal

logger = logging.getLogger(__name__)

LEASE_S = 10.0
"""After a supervisor was killed its name is free after this at the latest."""
RENEWALS = 4
"""In the time for which the lease is held."""
LOOK_S = 0.25


class NameLease:
    """The right to a name. Its methods block for as long as the store does."""

    def __init__(self, client: redis.Redis, cluster: str, owner: str, lease_s: float = LEASE_S) -> None:
        """`client` stays the caller's; `owner` is like no other's."""
        self._client = client
        self._key = f"diphase:{cluster}:supervisor"
        self._owner = owner
        self._lease_ms = int(lease_s * 1000)
        self._held = False

    def take(self) -> bool:
        """Whether the name was free and is held now."""
        self._held = bool(self._client.set(self._key, self._owner, nx=True, px=self._lease_ms))
        return self._held

    def holder(self) -> tuple[str, int]:
        """Who has the name, and for how many milliseconds from now on; less than 0 when nobody has."""
        with self._client.pipeline() as pipe:
            pipe.get(self._key)
            pipe.pttl(self._key)
            owner, left_ms = pipe.execute()
        return (owner or b"").decode(errors="replace"), left_ms

    def renew(self) -> None:
        """Holds the name for the whole time again, also when it was lost and nobody has it now."""
        before = self._held
        try:
            self._change(lambda pipe: pipe.set(self._key, self._owner, px=self._lease_ms), also_free=True)
        except (redis.RedisError, OSError) as exc:
            logger.debug("name_lease_not_renewed key=%s error=%s", self._key, exc)
            return
        if before and not self._held:
            logger.error("name_lease_lost key=%s serving=on", self._key)

    def release(self) -> None:
        """Frees the name if it is held. A store that does not answer frees it by itself."""
        with contextlib.suppress(redis.RedisError, OSError):
            self._change(lambda pipe: pipe.delete(self._key), also_free=False)

    def _change(self, write: Callable[[redis.client.Pipeline], object], *, also_free: bool) -> None:
        """Writes unless another owner has the name, in one transaction."""

        def unless_taken(pipe: redis.client.Pipeline) -> None:
            owner = pipe.get(self._key)
            self._held = owner == self._owner.encode() or (also_free and owner is None)
            pipe.multi()
            if self._held:
                write(pipe)

        self._client.transaction(unless_taken, self._key)


@contextlib.asynccontextmanager
async def held(
    url: str, cluster: str, draw: str, waiting: Callable[[], None], lease_s: float = LEASE_S
) -> AsyncIterator[None]:
    """Holds the name `cluster` in the store at `url` during the block.

    Args:
        draw: makes this supervisor's lease like no other.
        waiting: called when the name is taken, perhaps by a supervisor that was killed.

    Raises:
        ConfigError: another supervisor has the name and renews it, or the store cannot be used.
    """
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=CONNECT_S, socket_connect_timeout=CONNECT_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as exc:
        raise refusal(url, exc) from exc
    lease = NameLease(client, cluster, f"process {os.getpid()} on {socket.gethostname()}, {draw}", lease_s)
    stopped = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, stopped, lease_s / RENEWALS), daemon=True)
    try:
        try:
            await _taken(lease, cluster, waiting)
        except (redis.RedisError, OSError) as exc:
            raise refusal(url, exc) from exc
        renewing.start()
        yield
    finally:
        stopped.set()
        if renewing.ident is not None:
            await asyncio.to_thread(renewing.join)
        await asyncio.to_thread(lease.release)
        client.close()


async def _taken(lease: NameLease, cluster: str, waiting: Callable[[], None]) -> None:
    """Until the name is held: a lease that nobody renews runs out."""
    lowest_ms: int | None = None
    while not await asyncio.to_thread(lease.take):
        owner, left_ms = await asyncio.to_thread(lease.holder)
        if lowest_ms is None:
            waiting()
            lowest_ms = left_ms
        if left_ms > lowest_ms:
            raise ConfigError(
                f'name = "{cluster}": a cluster of that name runs on this store.url already '
                f"({owner.rpartition(', ')[0]}); give this one another name (--set name=...) or stop that one"
            )
        lowest_ms = left_ms
        await asyncio.sleep(LOOK_S)


def _renew(lease: NameLease, stopped: threading.Event, pause_s: float) -> None:
    """A thread of its own: the start of Ray keeps the event loop waiting for seconds."""
    while not stopped.wait(pause_s):
        lease.renew()
