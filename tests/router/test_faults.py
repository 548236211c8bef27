"""Router under random deaths, silence, delays, repeated and overtaking outputs: every token once, one end
each."""

from __future__ import annotations

import asyncio
import random

import pytest
from diphase.router.gateway import Router

from ..simulation.virtual_loop import run_virtually
from .fake_workers import expected_tokens
from .fakes import (
    FakeCluster,
    Members,
    Outcome,
    fake_cluster,
    generate,
    read,
    start_generation,
    token_request,
)


async def torment(cluster: FakeCluster, members: Members, rng: random.Random, seconds: float) -> None:
    """Kills, restarts and silences workers."""
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(rng.uniform(0.05, 0.6))
        victim = rng.choice(list(cluster.workers.values()))
        if rng.random() < 0.6:
            victim.kill()
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            victim.restarted().start()
            members.set([worker.member for worker in cluster.workers.values()])
        else:
            cluster.network.silence(victim.address)
            await asyncio.sleep(rng.uniform(0.1, 3.0))
            cluster.network.unsilence(victim.address)


async def client(router: Router, rng: random.Random, number: int) -> None:
    """One request; now and then it is given up half-way."""
    await asyncio.sleep(rng.uniform(0.0, 8.0))
    prompt = [rng.randrange(1, 200) for _ in range(rng.choice([3, 60, 90, 200]))]
    max_tokens = rng.randrange(1, 40)
    message = token_request(prompt, max_tokens, request_id=f"r{number}")
    if rng.random() < 0.2:
        generation = await start_generation(router, message)
        try:
            outcome = await asyncio.wait_for(
                read(generation, Outcome(), limit=rng.randrange(1, 10)), rng.uniform(0.01, 2.0)
            )
        except TimeoutError:
            outcome = Outcome()
        generation.close()
        assert outcome.token_ids == expected_tokens(prompt, len(outcome.token_ids))
        return
    outcome = await generate(router, message)
    assert outcome.terminals == 1
    assert outcome.token_ids == expected_tokens(prompt, len(outcome.token_ids))
    if outcome.error is None:
        assert len(outcome.token_ids) == max_tokens
        assert outcome.last.usage.completion_tokens == max_tokens


@pytest.mark.parametrize("seed", range(12))
def test_every_token_once_and_one_end(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        with fake_cluster(prefill=2, decode=2, colocated=seed % 2, seed=seed) as cluster:
            members = Members([worker.member for worker in cluster.workers.values()])
            async with cluster.router(membership=members, max_attempts=10) as router:
                faults = asyncio.create_task(torment(cluster, members, rng, 8.0))
                async with asyncio.TaskGroup() as group:
                    for number in range(60):
                        group.create_task(client(router, random.Random(f"{seed}/{number}"), number))
                await faults
                await asyncio.sleep(5.0)
                dispatcher = router.dispatcher
                assert dispatcher.open_requests == 0
                assert (dispatcher.admission.queued_requests, dispatcher.admission.queued_tokens) == (0, 0)
                assert sum(router.metrics.requests_by_slo.values()) == 60
                for worker in cluster.workers.values():
                    assert not worker.live
                for handle in router.pool.handles():
                    assert handle.incoming == (0, 0)
                    assert handle.waiting_tokens == 0
                journalled = {record.state for record in cluster.journal.records.values()}
                assert journalled <= {"finished", "cancelled", "failed"}

    run_virtually(main())


def test_the_same_seed_gives_the_same_run() -> None:
    async def one_run() -> list[tuple[float, str]]:
        trace: list[tuple[float, str]] = []
        rng = random.Random(5)
        with fake_cluster(prefill=2, decode=2, seed=5) as cluster:
            members = Members([worker.member for worker in cluster.workers.values()])
            async with cluster.router(membership=members) as router:
                faults = asyncio.create_task(torment(cluster, members, rng, 3.0))
                for number in range(10):
                    outcome = await generate(router, token_request([number] * 80, 10))
                    trace.append((asyncio.get_running_loop().time(), outcome.text))
                await faults
        return trace

    assert run_virtually(one_run()) == run_virtually(one_run())
