"""Hand-offs held in each state by what holds them in life, and what is done to them there.

A hold yields when a hand-off from prefill-0 to decode-0 is in its state on both sides; leaving it takes away
what held it, not the fault."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from ..router.fakes import until
from .fault_cluster import D0, D1, P0, P1, Client, FaultCluster

LONG, SHORT = 3000, 600
"""Tokens of prompts: LONG ones take prefill-0 about a second."""
NEW_TOKENS = 8
BLOCKER, ITS_TOKENS = 2500, 1500
"""Tokens of what leaves decode-0 less room than LONG needs."""
SLOW = "8mbit"
"""The KV of SHORT takes more than a second, that of LONG six."""

Hold = Callable[[FaultCluster], AbstractAsyncContextManager[Client]]


@asynccontextmanager
async def reserving(cluster: FaultCluster) -> AsyncIterator[Client]:
    """Decode does not answer: the control link is down, or without one it is stopped."""
    if cluster.network is not None:
        cluster.network.set("control", up=False)
    else:
        cluster.stop(D0)
    client = cluster.submit(SHORT, NEW_TOKENS)
    await cluster.in_state(P0, client, "reserving")
    yield client
    if cluster.network is not None:
        cluster.network.set("control", up=True)
    else:
        cluster.resume(D0)


@asynccontextmanager
async def full(cluster: FaultCluster) -> AsyncIterator[Client]:
    """decode-0 has no room for LONG: a request that goes on for long, and ends with the block."""
    blocker = cluster.submit(BLOCKER, ITS_TOKENS, (P1, D0))
    incarnation = cluster.workers[D0].incarnation
    await until(lambda: len(blocker.token_ids) > 2)
    yield blocker
    if cluster.serves(D0) and cluster.workers[D0].incarnation == incarnation:
        seen = len(blocker.token_ids)
        await until(lambda: len(blocker.token_ids) > seen or blocker.done)
        assert blocker.error is None
        assert blocker.attempts == 1, "nobody has touched it"
    await cluster.cancel(blocker)


@asynccontextmanager
async def held(cluster: FaultCluster) -> AsyncIterator[Client]:
    """Decode has no room."""
    async with full(cluster):
        client = cluster.submit(LONG, NEW_TOKENS)
        await cluster.in_state(P0, client, "held")
        await cluster.in_state(D0, client, "waiting")
        yield client


@asynccontextmanager
async def reserved(cluster: FaultCluster) -> AsyncIterator[Client]:
    """Room was found when prefill had just been stopped: nothing comes."""
    async with full(cluster):
        client = cluster.submit(LONG, NEW_TOKENS)
        await cluster.in_state(D0, client, "waiting")
        cluster.stop(P0)
    await cluster.in_state(D0, client, "reserved")
    yield client
    cluster.resume(P0)


@asynccontextmanager
async def sending(cluster: FaultCluster) -> AsyncIterator[Client]:
    """The prompt is long and its chunks are small."""
    client = cluster.submit(LONG, NEW_TOKENS)
    await cluster.in_state(D0, client, "filling")
    yield client


@asynccontextmanager
async def sent(cluster: FaultCluster) -> AsyncIterator[Client]:
    """The KV link is slow."""
    assert cluster.network is not None
    cluster.network.kv_rate(SLOW)
    client = cluster.submit(LONG, NEW_TOKENS)
    await cluster.in_state(D0, client, "verifying")
    yield client
    cluster.network.restore()


@asynccontextmanager
async def quarantined(cluster: FaultCluster) -> AsyncIterator[Client]:
    """Prefill stopped in the middle and does not say that it cancelled."""
    client = cluster.submit(LONG, NEW_TOKENS)
    await cluster.in_state(D0, client, "filling")
    cluster.stop(P0)
    await cluster.in_state(D0, client, "quarantined")
    yield client
    cluster.resume(P0)


@asynccontextmanager
async def fencing(cluster: FaultCluster) -> AsyncIterator[Client]:
    """The client went away; what was on a slow link is still on its way: prefill settles, decode fences."""
    assert cluster.network is not None
    cluster.network.kv_rate(SLOW)
    client = cluster.submit(SHORT, NEW_TOKENS)
    await cluster.in_state(D0, client, "verifying")
    await cluster.cancel(client)
    await cluster.in_state(D0, client, "fencing")
    yield client
    cluster.network.restore()


HOLDS: dict[str, Hold] = {
    "reserving": reserving,
    "held": held,
    "reserved": reserved,
    "sending": sending,
    "sent": sent,
    "quarantined": quarantined,
    "fencing": fencing,
}
FAILING = ("settling", "fencing", "quarantined", "over")
"""States that a hand-off is in once its side has given it up."""


OUTAGE_S = 3.0
LINKS: dict[str, tuple[str, ...]] = {"control": ("control",), "kv": ("kv",), "both": ("control", "kv")}


@dataclass(slots=True)
class Played:
    """What came of one blow."""

    hit: Client
    struck_at: float
    """On the clock of all processes here."""
    beside: list[Client] = field(default_factory=list)
    """Requests of the healthy side that had nothing to do with it."""
    noticed_s: float | None = None
    """After the blow, the hand-off changed its state on the healthy side."""
    over_s: float | None = None
    """It was over there."""
    idle_s: float = 0.0
    """Nothing of it was left on any worker that still ran, as the gateway saw it."""
    again: Client | None = None
    """Through the same pair, when it was whole again."""

    @property
    def token_s(self) -> float | None:
        """After the blow, the client had its next token."""
        return next((at - self.struck_at for at in self.hit.arrivals if at > self.struck_at), None)


async def play(cluster: FaultCluster, hold: str, victim: str, fault: str) -> Played:
    """A blow in a state, and everything until the pair is whole and idle again."""
    healthy, beside = (D0, (P1, D0)) if victim == P0 else (P0, (P0, D1))
    async with HOLDS[hold](cluster) as hit:
        played = Played(hit, time.monotonic())
        await cluster.strike(victim, fault)
        # Where decode is full or the other side is stopped as well, there is nothing to ask of it now.
        if cluster.serves(healthy) and (hold, healthy) != ("held", D0):
            played.beside.append(await cluster.ended(cluster.submit(SHORT, NEW_TOKENS, beside)))
    await cluster.ended(hit)
    if fault == "stop" and victim == P0 and cluster.network is None:
        await stays_quarantined(cluster)
    else:
        await cluster.idle()
        played.idle_s = time.monotonic() - played.struck_at
    await cluster.heal(victim)
    await cluster.idle(victim)  # a worker that goes on first learns what it missed
    played.again = await cluster.ended(cluster.submit(SHORT, NEW_TOKENS))
    await cluster.idle()
    await look_back(cluster, played, healthy)
    return played


async def look_back(cluster: FaultCluster, played: Played, *worker_ids: str) -> None:
    """When these workers had noticed and when it was over there, where it did not end well."""
    if played.hit.attempts == 1 and not played.hit.cancelled:
        return
    failing = [
        (name, at - played.struck_at)
        for worker_id in worker_ids
        for name, at in await cluster.states(worker_id, played.hit)
        if at > played.struck_at and name in FAILING
    ]
    if failing:
        played.noticed_s = min(at for _, at in failing)
        played.over_s = max(at for _, at in failing)


async def stays_quarantined(cluster: FaultCluster) -> None:
    """A stopped process that has our memory mapped may write to it when it goes on: it stays out of use."""
    await until(lambda: cluster.handle(D0).load.blocks_quarantined > 0)
    await cluster.idle(P1, D1)
    assert cluster.handle(D0).load.blocks_quarantined > 0


async def outage(cluster: FaultCluster, hold: str, links: str) -> Played:
    """Links of the pair go down for OUTAGE_S while a hand-off is in a state; others are served meanwhile."""
    assert cluster.network is not None
    async with HOLDS[hold](cluster) as hit:
        played = Played(hit, time.monotonic())
        for link in LINKS[links]:
            cluster.network.set(link, up=False)
        while time.monotonic() < played.struck_at + OUTAGE_S:
            played.beside.append(await cluster.ended(cluster.submit(SHORT, NEW_TOKENS, (P1, D1))))
            played.beside.append(await cluster.ended(cluster.submit(SHORT, NEW_TOKENS, (P0, D1))))
        for link in LINKS[links]:
            cluster.network.set(link, up=True)
    await cluster.ended(hit)
    await cluster.idle()
    played.idle_s = time.monotonic() - played.struck_at
    await look_back(cluster, played, P0, D0)
    # What was lost on the way is sent again at growing intervals: the pair may need a moment.
    while played.again is None or played.again.attempts > 1:
        played.again = await cluster.ended(cluster.submit(SHORT, NEW_TOKENS))
    await cluster.idle()
    return played
