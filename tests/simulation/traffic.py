"""Seeded requests to simulated workers, checked against the single engine's output."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from diphase.decode_workers.config import DecodeSchedulerConfig
from diphase.engine.fake import FakeEngine
from diphase.proto.errors import Cancelled
from diphase.proto.sampling import SamplingParams

from .cluster import SimWorker, World
from .gateway import Gateway, Placement
from .virtual_loop import VirtualClock, run_virtually

ORACLE = FakeEngine(num_blocks=1)

Request = tuple[list[int], SamplingParams]
Make = Callable[[World], list[SimWorker]]
Body = Callable[[World, Gateway, list[SimWorker]], Awaitable[None]]


def expected(prompt: list[int], params: SamplingParams) -> list[int]:
    tokens = ORACLE.continuation(prompt, params, params.max_tokens)
    ends = set(params.stop_token_ids)
    if not params.ignore_eos:
        ends.update(ORACLE.limits.eos_token_ids)
    for i, token_id in enumerate(tokens):
        if token_id in ends and i >= params.min_tokens:
            return tokens[: i + 1]
    return tokens


def draw_request(rng: random.Random) -> Request:
    length = rng.choice([1, 15, 16, 17, 40, 100, 200])
    prompt = [rng.randrange(5, 900) for _ in range(length)]
    if rng.random() < 0.3:  # a shared prefix
        prompt = [(7 * i) % 900 for i in range(64)] + prompt
    params = SamplingParams(
        max_tokens=rng.choice([1, 2, 5, 30, 60]),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        seed=rng.getrandbits(32),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=tuple(rng.sample(range(1000), 10)),
    )
    return prompt, params


async def until_idle(workers: list[SimWorker], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not all(worker.idle for worker in workers):  # noqa: ASYNC110 (virtual time: costs nothing)
            await asyncio.sleep(0.5)


def simulate(seed: int, make: Make, body: Body) -> None:
    """Runs `body` with workers and a gateway attached to all of them."""

    async def main() -> None:
        world = World.of(VirtualClock(asyncio.get_running_loop()), seed)
        workers = make(world)
        gateway = Gateway("g", world.gateways.link)
        running = asyncio.create_task(gateway.run([worker.address for worker in workers]))
        await gateway.attached(*(worker.address for worker in workers))
        try:
            await body(world, gateway, workers)
        finally:
            running.cancel()
            await asyncio.wait((running,))
            for worker in workers:
                await worker.stop()

    run_virtually(main())


async def serve_all(
    gateway: Gateway,
    requests: list[Request],
    place: Callable[[int, int], Placement],
    rng: random.Random,
    *,
    within_s: float = 2.0,
    cancels: float = 0.0,
) -> int:
    """Sends every request at a random time and checks its tokens; `place(request, attempt)`. A share
    `cancels` of them is cancelled at a random time; returns how many were."""
    cancelled = 0

    async def one(i: int) -> None:
        nonlocal cancelled
        await asyncio.sleep(rng.random() * within_s)
        if rng.random() < cancels:
            asyncio.get_running_loop().call_later(rng.random() * 0.5, gateway.cancel, f"r{i}")
        try:
            tokens = await gateway.generate(f"r{i}", *requests[i], lambda attempt: place(i, attempt))
        except Cancelled:
            cancelled += 1
            return
        assert tokens == expected(*requests[i])

    async with asyncio.TaskGroup() as group:
        for i in range(len(requests)):
            group.create_task(one(i))
    return cancelled


def one_and_one(world: World) -> list[SimWorker]:
    return [SimWorker(world, "prefill", "p0"), SimWorker(world, "decode", "d0")]


def small_pools(world: World) -> list[SimWorker]:
    """Long outputs do not fit beside each other."""
    return [
        SimWorker(world, "prefill", "p0", num_blocks=24),
        SimWorker(
            world,
            "decode",
            "d0",
            num_blocks=24,
            scheduler=DecodeSchedulerConfig(max_running=8, prefill_budget=64),
        ),
    ]
