"""A cluster of fake workers with routers in front of it, a fake journal, and the client's view."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from diphase.checkpoints.lookup import resolve
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import DiphaseError
from diphase.router.config import GatewayConfig, RouterConfig, SloConfig
from diphase.router.gateway import GatewayParts, Router
from diphase.router.generation import Generation
from diphase.router.journal import JournalRecord, JournalUnavailable
from diphase.router.membership import FixedMembership, Member, MembershipSource
from diphase.router.memory_links import MemoryNetwork
from diphase.router.text import ServedModel

from .fake_workers import MODEL, FakeWorker, LoopClock


def served_model() -> ServedModel:
    return ServedModel.load(resolve(MODEL))


class MemoryJournal:
    """A journal that several gateways share."""

    def __init__(self) -> None:
        self.dropped = 0
        self.records: dict[str, JournalRecord] = {}
        self.history: dict[str, list[str]] = {}
        self.available = True

    def record(self, request_id: str, record: JournalRecord) -> None:
        self.records[request_id] = record
        self.history.setdefault(request_id, []).append(record.state)

    async def lookup(self, request_id: str) -> JournalRecord | None:
        if not self.available:
            raise JournalUnavailable("away")
        return self.records.get(request_id)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def flush(self) -> None:
        return None


class Members:
    """A membership that tests change."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = list(members)
        self._changed = asyncio.Event()

    def set(self, members: Sequence[Member]) -> None:
        self._members = list(members)
        self._changed.set()

    async def watch(self) -> AsyncGenerator[list[Member], None]:
        while True:
            self._changed.clear()
            yield list(self._members)
            await self._changed.wait()


class FakeCluster:
    """Workers on one in-memory network, and routers in front of them."""

    def __init__(
        self,
        prefill: int = 1,
        decode: int = 1,
        colocated: int = 0,
        *,
        seed: int | None = None,
        **worker: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.jitter = random.Random(seed) if seed is not None else None
        self.network = MemoryNetwork(
            (lambda: self.rng.uniform(0.0001, 0.004)) if seed is not None else lambda: 0.0
        )
        self.journal = MemoryJournal()
        self.workers: dict[str, FakeWorker] = {}
        for role, number in (("prefill", prefill), ("decode", decode), ("colocated", colocated)):
            for i in range(number):
                name = f"{role[0]}{i}"
                FakeWorker(
                    name,
                    role,
                    self.network,
                    self.workers,
                    jitter=self.jitter,
                    **worker,
                ).start()
        self._seeds = count(7)
        """Each router draws ids of its own."""

    @asynccontextmanager
    async def router(
        self, gateway_id: str = "g0", membership: MembershipSource | None = None, **options: Any
    ) -> AsyncIterator[Router]:
        """A router that knows these workers; ready when they are."""
        slo = options.pop("slo", SloConfig())
        bounds = {name: options.pop(name) for name in ("max_open_requests",) if name in options}
        parts = GatewayParts(
            gateway_id=gateway_id,
            model=served_model(),
            membership=membership or FixedMembership([worker.member for worker in self.workers.values()]),
            journal=self.journal,
            config=GatewayConfig(**bounds),
            router=RouterConfig(**options),
            slo=slo,
            link_factory=self.network.link,
            clock=LoopClock(),
            rng=random.Random(next(self._seeds)),
        )
        router = Router(parts)
        task = asyncio.get_running_loop().create_task(router.pool.run())
        try:
            await asyncio.sleep(0.1)
            yield router
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.kill()


@contextmanager
def fake_cluster(*args: Any, **options: Any) -> Iterator[FakeCluster]:
    cluster = FakeCluster(*args, **options)
    try:
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Outcome:
    """What one client saw."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    responses: list[pb.GenerateResponse] = field(default_factory=list)
    error: DiphaseError | None = None

    @property
    def last(self) -> pb.GenerateResponse:
        return self.responses[-1]

    @property
    def terminals(self) -> int:
        """Finishes and errors: must be 1."""
        return sum(bool(r.finish_reason) for r in self.responses) + (self.error is not None)


def token_request(
    prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 8, **fields: Any
) -> pb.GenerateRequest:
    sampling = fields.pop("sampling", None) or pb.Sampling(max_tokens=max_tokens)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **fields)


async def start_generation(router: Router, message: pb.GenerateRequest) -> Generation:
    clock = LoopClock()
    if message.HasField("resume_from"):
        stream = await router.dispatcher.resume(router.text.check_resume(message))
        text = router.text.stream(stream.active.request.sampling)
        return Generation(router.dispatcher, stream, text, clock, message.resume_from)
    request = await router.text.prepare(message, clock.now())
    stream = router.dispatcher.accept(request)
    return Generation(router.dispatcher, stream, router.text.stream(request.sampling), clock)


async def read(generation: Generation, outcome: Outcome, limit: int | None = None) -> Outcome:
    """Reads to the end, or until `limit` tokens are here; checks that indices have no gap and no
    repetition."""
    expected = None
    try:
        while not generation.finished:
            response = await generation.next()
            if response.token_ids:
                assert expected is None or response.index == expected
                expected = response.index + len(response.token_ids)
            outcome.token_ids += response.token_ids
            outcome.text += response.text
            outcome.responses.append(response)
            if limit is not None and len(outcome.token_ids) >= limit:
                return outcome
        generation.delivered()
    except DiphaseError as error:
        outcome.error = error
    return outcome


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Returns when it holds; the caller's timeout bounds the wait."""
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        await asyncio.sleep(0.005)


async def generate(router: Router, message: pb.GenerateRequest) -> Outcome:
    """One call from beginning to end."""
    outcome = Outcome()
    try:
        generation = await start_generation(router, message)
    except DiphaseError as error:
        outcome.error = error
        return outcome
    try:
        return await read(generation, outcome)
    finally:
        generation.close()
