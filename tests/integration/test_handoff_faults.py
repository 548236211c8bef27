"""Faults in every state of a hand-off, with real processes, real bytes and real links: workers are killed,
stopped and started again, links go down, decode runs out of blocks, prefill drains.

After each: the request that was hit has exactly its tokens, those beside it never noticed, the healthy
processes are the same, everything is idle again, and the pair works. Over tcp each worker of that pair has a
network namespace of its own; shm needs a common one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
import pytest_asyncio
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.proto.sampling import SamplingParams
from diphase.router.worker_handle import WorkerState

from ..network_namespaces import Refused
from ..router.fakes import until
from . import fault_cells as cells
from .fault_cells import LONG, NEW_TOKENS, SHORT, Played
from .fault_cluster import D0, D1, P0, P1, PAIR, Client, FaultCluster, fault_cluster
from .fault_network import FaultNetwork, fault_network

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

LIMIT_S = 60.0
"""Of a test; what it waits for comes within the deadlines of fault_cluster.TRANSFER on an idle machine."""


@pytest.fixture(scope="module")
def network() -> Iterator[FaultNetwork]:
    with ExitStack() as stack:
        try:
            network = stack.enter_context(fault_network())
        except Refused as refused:
            pytest.skip(str(refused))
        yield network


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def over_tcp(
    network: FaultNetwork, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[FaultCluster]:
    log = tmp_path_factory.mktemp("tcp") / "workers.log"
    async with fault_cluster(log, network, transport="tcp") as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def over_shm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultCluster]:
    """Every part goes through the staging buffers, beside."""
    log = tmp_path_factory.mktemp("shm") / "workers.log"
    async with fault_cluster(log, None, transport="shm", staging="always") as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def mended(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """One test's failure is not the next one's."""
    yield
    for name in ("over_tcp", "over_shm"):
        if name in request.fixturenames:
            async with asyncio.timeout(LIMIT_S):
                await request.getfixturevalue(name).mend()


def check_tokens(engine: TorchEngine, *clients: Client) -> None:
    expected = generate(
        engine,
        [client.prompt for client in clients],
        [SamplingParams(max_tokens=client.max_tokens, ignore_eos=True) for client in clients],
    )
    for client, tokens in zip(clients, expected, strict=True):
        assert client.error is None
        assert client.token_ids == [token.token_id for token in tokens]


def check(engine: TorchEngine, played: Played) -> None:
    assert played.again is not None
    asked = [*played.beside, played.again]
    assert [client.attempts for client in asked] == [1] * len(asked), "it had nothing to do with it"
    check_tokens(engine, *asked, *([] if played.hit.cancelled else [played.hit]))


def pids(cluster: FaultCluster) -> dict[str, int]:
    assert all(map(cluster.processes.alive, cluster.workers.values()))
    return {name: worker.pid for name, worker in cluster.workers.items()}


async def strike(cluster: FaultCluster, engine: TorchEngine, hold: str, victim: str, fault: str) -> Played:
    before = pids(cluster)
    async with asyncio.timeout(LIMIT_S):
        played = await cells.play(cluster, hold, victim, fault)
    check(engine, played)
    changed = {name for name, pid in pids(cluster).items() if pid != before[name]}
    assert changed == (set() if fault == "stop" else {victim})
    return played


@pytest.mark.parametrize("victim", [P0, D0])
@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("hold", cells.HOLDS)
async def test_over_tcp_a_worker_is_lost_in_each_state(
    over_tcp: FaultCluster, engine: TorchEngine, hold: str, fault: str, victim: str
) -> None:
    played = await strike(over_tcp, engine, hold, victim, fault)
    assert played.hit.attempts == 2 or played.hit.cancelled


@pytest.mark.parametrize("victim", [P0, D0])
@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("hold", ["reserving", "held", "sending"])
async def test_over_shm_a_worker_is_lost_in_each_state(
    over_shm: FaultCluster, engine: TorchEngine, hold: str, fault: str, victim: str
) -> None:
    await strike(over_shm, engine, hold, victim, fault)


@pytest.mark.parametrize("victim", [P0, D0])
@pytest.mark.parametrize("hold", ["held", "sending"])
async def test_a_worker_comes_back_at_once_under_the_same_address(
    over_tcp: FaultCluster, engine: TorchEngine, hold: str, victim: str
) -> None:
    address = over_tcp.workers[victim].address
    await strike(over_tcp, engine, hold, victim, "restart")
    assert over_tcp.workers[victim].address == address


@pytest.mark.parametrize(
    ("hold", "links"), [("held", "control"), ("sent", "control"), ("sent", "kv"), ("sent", "both")]
)
async def test_links_of_the_pair_are_down_for_three_seconds(
    over_tcp: FaultCluster, engine: TorchEngine, hold: str, links: str
) -> None:
    before = pids(over_tcp)
    async with asyncio.timeout(LIMIT_S):
        played = await cells.outage(over_tcp, hold, links)
    check(engine, played)
    assert pids(over_tcp) == before


async def test_a_full_decode_worker_lets_hand_offs_wait_and_goes_on(
    over_shm: FaultCluster, engine: TorchEngine
) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with cells.held(over_shm) as waits:
            assert waits.attempts == 1
        await over_shm.ended(waits)
        await over_shm.idle()
    assert waits.attempts == 1
    check_tokens(engine, waits)


async def test_what_may_not_even_wait_at_a_full_decode_worker_goes_to_another(
    over_shm: FaultCluster, engine: TorchEngine
) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with cells.held(over_shm) as first:
            second = over_shm.submit(LONG, NEW_TOKENS)
            await over_shm.in_state(D0, second, "waiting")
            third = await over_shm.ended(over_shm.submit(LONG, NEW_TOKENS))  # max_waiting is 2
        for waits in (first, second):
            await over_shm.ended(waits)
        await over_shm.idle()
    assert [first.attempts, second.attempts, third.attempts] == [1, 1, 2]
    check_tokens(engine, first, second, third)


async def test_a_prefill_worker_that_drains_keeps_its_leases_and_ends_afterwards(
    over_shm: FaultCluster, engine: TorchEngine
) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with cells.held(over_shm) as leased:
            drained = over_shm.processes.drain(over_shm.workers[P0])
            await over_shm.ready(P0, state=WorkerState.DRAINING)
            elsewhere = await over_shm.ended(over_shm.submit(SHORT, NEW_TOKENS, (P1, D1)))
            assert not drained.done(), "its lease is not over"
        await over_shm.ended(leased)
        await drained
        await over_shm.idle()
    assert [leased.attempts, elsewhere.attempts] == [1, 1]
    check_tokens(engine, leased, elsewhere)


async def test_without_another_worker_it_is_one_error_that_may_be_retried(
    over_shm: FaultCluster, engine: TorchEngine
) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with cells.sending(over_shm) as hit:
            for worker_id in (D1, D0):
                await over_shm.strike(worker_id, "kill")
        await over_shm.ended(hit)
        await over_shm.idle(P0, P1)
        assert hit.error is not None
        assert hit.error.retryable
        for worker_id in (D1, D0):
            await over_shm.heal(worker_id)
        again = await over_shm.ended(over_shm.submit(SHORT, NEW_TOKENS, PAIR))
    check_tokens(engine, again)


async def test_a_pause_shorter_than_every_deadline_costs_nothing_but_time(
    over_shm: FaultCluster, engine: TorchEngine
) -> None:
    async with asyncio.timeout(LIMIT_S):
        for worker_id in PAIR:
            async with cells.sending(over_shm) as paused:
                over_shm.stop(worker_id)
                await over_shm.reported(D1)
                over_shm.resume(worker_id)
            await until(lambda paused=paused: paused.done)  # type: ignore[misc]
            check_tokens(engine, paused)
        await over_shm.idle()
