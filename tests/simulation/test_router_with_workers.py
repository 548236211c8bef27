"""The whole cluster in virtual time: real routers, real workers, fake engines, faults from a seed.

The fake engine's tokens depend on the KV bytes that it reads, so equality with the oracle says that every
block was where it had to be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

import pytest
from diphase.checkpoints.chat_template import ChatTemplate
from diphase.checkpoints.dummy import byte_tokenizer
from diphase.checkpoints.tokenizer import Tokenizer
from diphase.engine.fake import FAKE_LIMITS, FakeEngine
from diphase.proto import inference_pb2 as pb
from diphase.proto.errors import DiphaseError
from diphase.proto.sampling import sampling_from_proto
from diphase.router.config import GatewayConfig, RouterConfig, SloConfig
from diphase.router.gateway import GatewayParts, Router
from diphase.router.membership import Member, MembershipSource
from diphase.router.text import ServedModel

from ..router.fakes import Members, MemoryJournal, Outcome, generate, read, start_generation
from .cluster import SimWorker, World
from .virtual_loop import VirtualClock, run_virtually

ORACLE = FakeEngine(num_blocks=1)
MODEL = ServedModel(
    name=FAKE_LIMITS.name,
    context_length=FAKE_LIMITS.context_length,
    vocab_size=FAKE_LIMITS.vocab_size,
    tokenizer=Tokenizer(
        byte_tokenizer(FAKE_LIMITS.vocab_size),
        model_vocab_size=FAKE_LIMITS.vocab_size,
        where="the fake model",
    ),
    chat_template=ChatTemplate(None, model="fake"),
)
POOLS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def router_of(
    gateway_id: str,
    world: World,
    membership: MembershipSource,
    journal: MemoryJournal,
    start: int,
    **options: int,
) -> Router:
    """A gateway of the simulated world; `start` makes its ids other than those of its predecessors."""
    return Router(
        GatewayParts(
            gateway_id=gateway_id,
            model=MODEL,
            membership=membership,
            journal=journal,
            config=GatewayConfig(),
            router=RouterConfig(**options),  # type: ignore[arg-type]
            slo=SloConfig(),
            link_factory=world.gateways.link,
            clock=world.clock,
            rng=random.Random(f"{gateway_id}/{start}"),
        )
    )


class Cluster:
    """Workers by name, restarted by whoever kills them."""

    def __init__(self, seed: int, pools: dict[str, str] | None = None) -> None:
        self.pools = pools or POOLS
        self.world = World.of(VirtualClock(asyncio.get_running_loop()), seed)
        self.journal = MemoryJournal()
        self.workers = {name: SimWorker(self.world, role, name) for name, role in self.pools.items()}
        self.members = Members([])
        self._starts = count()  # of gateways: each draws ids of its own
        self._publish()

    def _publish(self) -> None:
        self.members.set(
            [
                Member(worker_id=name, role=self.pools[name], address=name, incarnation=worker.incarnation)
                for name, worker in self.workers.items()
            ]
        )

    async def restart(self, name: str, pause_s: float) -> None:
        """kill -9, and a fresh process a while later."""
        await self.workers[name].kill()
        await asyncio.sleep(pause_s)
        self.workers[name] = SimWorker(self.world, self.pools[name], name)
        self._publish()

    @asynccontextmanager
    async def router(self, gateway_id: str = "g0", **options: int) -> AsyncIterator[Router]:
        router = router_of(gateway_id, self.world, self.members, self.journal, next(self._starts), **options)
        running = asyncio.create_task(router.pool.run())
        try:
            await asyncio.sleep(0.2)
            yield router
        finally:
            running.cancel()
            await asyncio.wait((running,))

    async def until_idle(self) -> None:
        async with asyncio.timeout(60.0):
            while not all(worker.idle for worker in self.workers.values()):  # noqa: ASYNC110 (virtual time)
                await asyncio.sleep(0.5)

    async def stop(self) -> None:
        for worker in self.workers.values():
            await worker.stop()


def draw_request(rng: random.Random, number: int) -> pb.GenerateRequest:
    prompt = [rng.randrange(5, 900) for _ in range(rng.choice([1, 16, 17, 70, 100, 200]))]
    if rng.random() < 0.4:
        prompt = [(7 * i) % 900 for i in range(80)] + prompt  # a shared prefix
    sampling = pb.Sampling(
        max_tokens=rng.choice([1, 2, 5, 30]),
        temperature=rng.choice([0.0, 1.0]),
        ignore_eos=True,
        seed=rng.getrandbits(32),
    )
    return pb.GenerateRequest(request_id=f"r{number}", token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


def expected(message: pb.GenerateRequest) -> list[int]:
    params = sampling_from_proto(message.sampling)
    return ORACLE.continuation(list(message.token_ids.ids), params, params.max_tokens)


def check(message: pb.GenerateRequest, outcome: Outcome) -> None:
    """One end; the tokens are the single engine's, all of them unless it failed."""
    assert outcome.terminals == 1
    tokens = expected(message)
    assert outcome.token_ids == tokens[: len(outcome.token_ids)]
    if outcome.error is None:
        assert len(outcome.token_ids) == len(tokens)


async def client(router: Router, rng: random.Random, number: int) -> None:
    await asyncio.sleep(rng.uniform(0.0, 6.0))
    message = draw_request(rng, number)
    if rng.random() > 0.2:
        check(message, await generate(router, message))
        return
    try:
        generation = await start_generation(router, message)
    except DiphaseError:
        return
    patience = asyncio.timeout(rng.uniform(0.01, 1.5))
    try:
        async with patience:
            outcome = await read(generation, Outcome())
            check(message, outcome)
    except TimeoutError:
        pass
    generation.close()


@pytest.mark.parametrize("seed", range(6))
def test_kills_and_cancels_lose_nothing_and_leave_nothing(seed: int) -> None:
    async def main() -> None:
        cluster = Cluster(seed)
        rng = random.Random(seed)
        async with cluster.router(max_attempts=10) as router:
            async with asyncio.TaskGroup() as group:
                for number in range(50):
                    group.create_task(client(router, random.Random(f"{seed}/{number}"), number))
                for name in rng.sample(sorted(cluster.pools), 4):  # each worker of each kind once
                    await asyncio.sleep(rng.uniform(0.3, 1.5))
                    await cluster.restart(name, rng.uniform(0.0, 0.4))
            await cluster.until_idle()
            assert router.dispatcher.open_requests == 0
            assert sum(router.metrics.requests_by_slo.values()) == 50
        await cluster.stop()

    run_virtually(main())


@pytest.mark.parametrize("successor", ["another", "restarted"])
@pytest.mark.parametrize("seed", range(10))
def test_a_lost_gateways_requests_go_on_through_its_successor(seed: int, successor: str) -> None:
    async def main() -> None:
        cluster = Cluster(seed)
        rng = random.Random(seed)
        messages = [draw_request(rng, number) for number in range(8)]
        before = [Outcome() for _ in messages]
        async with AsyncExitStack() as stack:
            if successor == "another":
                second = await stack.enter_async_context(cluster.router("g1", max_attempts=10))
            async with cluster.router("g0", max_attempts=10) as first:
                for message, outcome in zip(messages, before, strict=True):
                    generation = await start_generation(first, message)
                    limit = rng.randrange(1, message.sampling.max_tokens + 1)
                    if rng.random() < 0.7:
                        await read(generation, outcome, limit=limit)
                    if generation.finished:
                        generation.delivered()
                        generation.close()
                await asyncio.sleep(0.01)  # the last submit has left
            if successor == "restarted":
                second = await stack.enter_async_context(cluster.router("g0", max_attempts=10))
            for message, outcome in zip(messages, before, strict=True):
                if outcome.responses and outcome.last.finish_reason:
                    continue
                taken = len(outcome.token_ids)
                after = await generate(
                    second, pb.GenerateRequest(request_id=message.request_id, resume_from=taken)
                )
                assert after.error is None
                assert outcome.token_ids + after.token_ids == expected(message)
            await cluster.until_idle()
        await cluster.stop()

    run_virtually(main())


def test_a_dead_prefill_pool_is_taken_over_by_decode() -> None:
    async def main() -> None:
        cluster = Cluster(1, {"p0": "prefill", "d0": "decode"})
        async with cluster.router() as router:
            await cluster.workers["p0"].kill()
            rng = random.Random(1)
            for number in range(6):
                message = draw_request(rng, number)
                outcome = await generate(router, message)
                check(message, outcome)
                assert outcome.error is None
                assert outcome.last.stages.prefill_worker == "d0"
        await cluster.stop()

    run_virtually(main())


def test_a_cached_prefix_is_found_by_the_router_and_used_by_the_worker() -> None:
    async def main() -> None:
        cluster = Cluster(2, {"p0": "prefill", "p1": "prefill", "d0": "decode"})
        async with cluster.router(local_prefill_tokens=0) as router:
            prompt = list(range(5, 205))
            message = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(max_tokens=2, ignore_eos=True)
            )
            first = await generate(router, message)
            await asyncio.sleep(0.5)
            again = [await generate(router, message) for _ in range(3)]
            assert {outcome.last.stages.prefill_worker for outcome in again} == {
                first.last.stages.prefill_worker
            }
            assert [outcome.last.usage.cached_tokens for outcome in again] == [192, 192, 192]
        await cluster.stop()

    run_virtually(main())
