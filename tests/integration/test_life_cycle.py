"""Operators scale and restart pools of real processes while clients are served: every answer is the
reference's, token for token, with no failed attempt, and the supervisor, the store and the gateways
agree in the end.

The model computes in fp32, as in test_faults.py: a request that moves computes by prefill what was decoded
before.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from diphase.cluster import processes
from diphase.cluster.endpoint import StatusClient
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import generate
from diphase.proto import cluster_pb2 as pb
from diphase.proto.sampling import SamplingParams

from .served import (
    TINY,
    Served,
    command_of,
    complete,
    idle,
    prompt_request,
    run,
    served,
    wait_until,
)

NUM_PROMPTS = 12
MAX_TOKENS = 40
LONG_TOKENS = 1200
CLIENTS = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    """One worker of each kind, with room for more, and two gateways that give no request a second chance."""
    settings = ("model.dtype=fp32", "gateway.replicas=2", "router.max_attempts=1", "host.drain_timeout_s=2")
    with served(*TINY, *settings, "pools.prefill.cpus=0.25", "pools.decode.cpus=0.25") as cluster:
        yield cluster


def reference(engine: TorchEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [[token.token_id for token in tokens] for tokens in generate(engine, prompts, params)]


class Clients:
    """A few that send one request after the other, through either gateway, while the block lasts."""

    def __init__(self, cluster: Served, engine: TorchEngine, seed: int) -> None:
        rng = random.Random(seed)
        self._prompts = [
            [rng.randrange(512) for _ in range(rng.randrange(80, 400))] for _ in range(NUM_PROMPTS)
        ]
        self._truth = reference(engine, self._prompts, MAX_TOKENS)
        self._addresses = cluster.addresses
        self._stopped = False
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Clients:
        await self._group.__aenter__()
        for number in range(CLIENTS):
            self._group.create_task(self._ask(number))
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._stopped = True
        await self._group.__aexit__(*exc)

    async def _ask(self, number: int) -> None:
        while not self._stopped:
            which = number % NUM_PROMPTS
            address = self._addresses[number % len(self._addresses)]
            answer = await complete(address, prompt_request(self._prompts[which], MAX_TOKENS))
            assert answer.token_ids == self._truth[which]
            number += CLIENTS


async def use(cluster: Served, engine: TorchEngine, prefill: str, decode: str) -> None:
    """Sends prompts that nobody has cached until both workers have served one."""
    seen: set[str] = set()
    rng = random.Random(f"{prefill} {decode}")
    async with asyncio.timeout(30.0):
        while not {prefill, decode} <= seen:
            prompts = [[rng.randrange(512) for _ in range(rng.randrange(300, 600))] for _ in range(8)]
            answers = await asyncio.gather(
                *(complete(cluster.addresses[0], prompt_request(prompt, 20)) for prompt in prompts)
            )
            truth = await asyncio.to_thread(reference, engine, prompts, 20)
            assert [answer.token_ids for answer in answers] == truth
            for answer in answers:
                assert answer.last is not None
                seen |= {answer.last.stages.prefill_worker, answer.last.stages.decode_worker}


async def operate(cluster: Served, *words: str) -> list[str]:
    """One command to its end; its lines."""
    done = await asyncio.to_thread(run, *words, "--address", cluster.addresses[1])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def states(cluster: Served) -> dict[str, str]:
    return {worker["worker_id"]: worker["state"] for worker in cluster.status()["workers"]}


def names(cluster: Served) -> dict[str, str]:
    """The only worker of each pool."""
    found = {name.partition("-")[0]: name for name, state in states(cluster).items() if state == "ready"}
    assert set(found) == {"prefill", "decode"}
    return found


def members(cluster: Served) -> set[str]:
    """Whom the store knows."""
    with redis.Redis(unix_socket_path=str(cluster.folder / "store.sock")) as store:
        [key] = store.keys("diphase:*:members")
        return {name.decode() for name in store.hkeys(key)}


async def test_pools_are_scaled_while_they_serve_and_the_store_dies(
    cluster: Served, engine: TorchEngine
) -> None:
    async with Clients(cluster, engine, 1):
        said = await operate(cluster, "scale", "decode", "2")
        assert said == ["decode-1: starts", "decode-1: serves", "decode has 2 workers"]
        await operate(cluster, "scale", "prefill", "2")
        await use(cluster, engine, "prefill-1", "decode-1")
        [store] = [pid for pid in processes.marked(cluster.folder.name) if "valkey-server" in command_of(pid)]
        os.kill(store, signal.SIGKILL)
        await operate(cluster, "scale", "prefill", "3")
        await use(cluster, engine, "prefill-2", "decode-0")
        # What Kubernetes does to a process, or an operator: it finishes what it has, and comes back.
        line = cluster.signal_worker("decode-0", signal.SIGTERM)
        await asyncio.to_thread(cluster.wait_line, "process_started worker_id=decode-0 ", 60.0, after=line)
        line = cluster.signal_worker("prefill-0", signal.SIGTERM)
        await asyncio.to_thread(cluster.wait_line, "process_started worker_id=prefill-0 ", 60.0, after=line)
        await use(cluster, engine, "prefill-0", "decode-0")
        await operate(cluster, "scale", "prefill", "1")
        assert "decode-1: has ended" in await operate(cluster, "scale", "decode", "1")
    wanted = {"prefill-0": "ready", "decode-0": "ready"}
    await asyncio.to_thread(wait_until, lambda: states(cluster) == wanted, "two workers", 15)
    assert members(cluster) == {"gateway-0", "gateway-1", "supervisor", *wanted}
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 15)
    refused = await asyncio.to_thread(run, "scale", "decode", "0", "--address", cluster.addresses[0])
    assert refused.returncode == 2
    assert refused.stderr.startswith("diphase scale: without a worker in decode nobody could decode; ")


async def drains(cluster: Served, worker_id: str) -> pb.WorkerStatus:
    """Returns once the worker says that it drains and still has something; what a gateway says of it."""
    client = StatusClient("")
    try:
        async with asyncio.timeout(60.0):
            while True:
                status = await client.ask(cluster.addresses[0], 10.0)
                for worker in status.workers:
                    load = worker.load
                    left = load.running or load.waiting_requests or load.handoffs
                    if worker.worker_id == worker_id and load.draining and left:
                        return worker
    finally:
        await client.close()


async def test_both_pools_are_restarted_while_they_serve_and_layouts_keep_apart(
    cluster: Served, engine: TorchEngine
) -> None:
    prompt = list(range(100))
    [truth] = reference(engine, [prompt], LONG_TOKENS)
    restarted = asyncio.Event()

    async def keep_busy() -> None:
        """A request that lasts is always there when a worker begins to drain."""
        while not restarted.is_set():
            answer = await complete(cluster.addresses[0], prompt_request(prompt, LONG_TOKENS))
            assert answer.token_ids == truth

    async with Clients(cluster, engine, 2), asyncio.TaskGroup() as group:
        before = names(cluster)
        group.create_task(keep_busy())
        restart = group.create_task(operate(cluster, "restart"))
        worker = await drains(cluster, before["decode"])
        assert worker.state == "draining"
        assert (await restart)[-1] == "every worker of prefill and decode is a new one"
        restarted.set()
        after = names(cluster)
        assert not set(after.values()) & set(before.values())
        await operate(cluster, "restart", "prefill", "--with", "engine.block_size=32")
        # Nobody may hand over to it, so it computes prompts itself.
        await use(cluster, engine, after["decode"], after["decode"])
        shown = " ".join(" ".join(await operate(cluster, "status")).split())
        assert f"{names(cluster)['prefill']} never hands over to {after['decode']}: KV layouts " in shown
        await operate(cluster, "restart", "decode", "--with", "engine.block_size=32")
        after = names(cluster)
        await use(cluster, engine, after["prefill"], after["decode"])
    await asyncio.to_thread(wait_until, lambda: idle(cluster), "every block to be free or cached", 15)
