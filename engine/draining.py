"""How a worker takes its leave: it finishes what it has, and what is not finished in time goes to others.

Knows a role and a deadline, neither gateways nor signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from ..proto.errors import Draining
from .role import Role

logger = logging.getLogger(__name__)

EVICTED_S = 5.0
"""For hand-offs that were ended at the deadline: peers have to say that they write no more."""


async def finish(role: Role, timeout_s: float, tell: Callable[[], None]) -> None:
    """Returns when the role has nothing left, leases included. After `timeout_s` its requests fail in a way
    that makes gateways try them elsewhere. `tell` says to gateways how it stands. Cancelling it
    changes nothing."""
    tell()
    try:
        async with asyncio.timeout(timeout_s):
            await role.drain()
    except TimeoutError:
        load = role.load()
        logger.warning(
            "drain_deadline after_s=%g waiting=%d running=%d handoffs=%d",
            timeout_s, load.waiting_requests, load.running, load.handoffs,
        )  # fmt: skip
        role.evict(Draining(f"the worker stops and did not finish this within {timeout_s:g} s"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVICTED_S):
                await role.drain()
