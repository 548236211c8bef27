"""Killed workers, cut connections, gateways that take over, on virtual time: attempts are lost, no tokens."""

from __future__ import annotations

import asyncio
import random

import pytest
from diphase.proto.sampling import SamplingParams

from .cluster import SimWorker, World
from .gateway import Gateway, Placement
from .traffic import draw_request, expected, one_and_one, serve_all, simulate, until_idle


def failed_handoffs(worker: SimWorker) -> float:
    """As /metrics tells, whatever the error."""
    [metric] = [m for m in worker.host.metrics.registry.collect() if m.name == "diphase_failed_handoffs"]
    return sum(sample.value for sample in metric.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_costs_an_attempt_and_no_token(seed: int, victim: str) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(40)]

    def make(world: World) -> list[SimWorker]:
        return [
            *(SimWorker(world, "prefill", f"p{i}") for i in range(2)),
            *(SimWorker(world, "decode", f"d{i}") for i in range(2)),
        ]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        prefills, decodes = workers[:2], workers[2:]
        dead = prefills[0] if victim == "prefill" else decodes[0]

        async def kill() -> None:
            await asyncio.sleep(0.5 + rng.random())
            await dead.kill()

        attempts = 0

        def place(i: int, attempt: int) -> Placement:
            nonlocal attempts
            attempts += 1
            n = i + attempt
            return Placement(prefills[n % 2].peer, decodes[n % 2].peer)

        killing = asyncio.create_task(kill())
        await serve_all(gateway, requests, place, rng)
        await killing
        assert attempts > len(requests)
        await until_idle([worker for worker in workers if worker is not dead])

    simulate(seed, make, body)


@pytest.mark.parametrize("seed", range(4))
def test_cut_and_silent_connections_between_workers_cost_attempts_and_no_token(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(40)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)

        async def disturb() -> None:
            for _ in range(4):
                await asyncio.sleep(rng.random() * 0.7)
                if rng.random() < 0.5:
                    world.workers.cut("p0", "d0")
                else:
                    # Messages and KV of this process get lost for longer than any deadline.
                    world.faults.held.update((workers[0].incarnation, "p0"))
                    await asyncio.sleep(12.0)
                    world.faults.held.clear()

        disturbing = asyncio.create_task(disturb())
        await serve_all(gateway, requests, lambda i, attempt: placement, rng, within_s=20.0)
        await disturbing
        await until_idle(workers, 120.0)
        assert failed_handoffs(workers[0]) > 0

    simulate(seed, one_and_one, body)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.12, 0.13, 0.14, 0.15, 0.3])
def test_another_gateway_takes_over_at_any_moment_of_a_request(after_s: float, seed: int) -> None:
    """Also while the prompt is computed and the decode worker has not heard of the request."""

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        world.faults.max_delay_s = 0.02  # what is under way meets what comes later
        other = Gateway("other", world.gateways.link)
        running = asyncio.create_task(other.run(["p0", "d0"]))
        await other.attached("p0", "d0")
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        placement = Placement(workers[0].peer, workers[1].peer)
        calling = asyncio.create_task(gateway.generate("r", [3] * 200, params, lambda attempt: placement))
        await asyncio.sleep(0.03 + after_s)
        other.take_over("r", gateway, ["p0", "d0"])
        assert await calling == expected([3] * 200, params)
        await until_idle(workers)
        running.cancel()
        await asyncio.wait((running,))

    simulate(seed, one_and_one, body)
