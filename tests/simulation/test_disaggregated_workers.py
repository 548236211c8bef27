"""Prefill and decode workers on virtual time: the output is the single engine's, whatever happens in
between, and every pool is idle afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.engine.fake import FakeEngine
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.proto.errors import Cancelled, PromptTooLong
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


@pytest.mark.parametrize("seed", range(4))
def test_disaggregated_output_is_the_single_engines(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(60)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        await serve_all(gateway, requests, lambda i, attempt: placement, rng)
        await until_idle(workers)

    simulate(seed, one_and_one, body)


@pytest.mark.parametrize("seed", range(4))
def test_too_few_blocks_cost_time_and_no_token(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        (
            [rng.randrange(900) for _ in range(rng.randint(20, 120))],
            SamplingParams(max_tokens=80, ignore_eos=True),
        )
        for _ in range(25)
    ]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        await serve_all(gateway, requests, lambda i, attempt: placement, rng)
        await until_idle(workers)
        assert workers[1].role.load().preemptions > 0
        assert all(gateway.prefixes[w.address] == set(w.blocks.known_hashes()) for w in workers)

    simulate(seed, small_pools, body)


@pytest.mark.parametrize("seed", range(4))
def test_cancels_free_everything(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(80)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        cancelled = await serve_all(
            gateway, requests, lambda i, attempt: placement, rng, within_s=1.0, cancels=0.6
        )
        assert cancelled > 10
        await until_idle(workers)

    simulate(seed, small_pools, body)


@pytest.mark.parametrize("seed", range(3))
def test_a_decode_worker_computes_the_prompts_that_are_placed_on_it(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(40)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        both = Placement(workers[0].peer, workers[1].peer)
        alone = Placement(None, workers[1].peer)
        await serve_all(gateway, requests, lambda i, attempt: alone if i % 2 else both, rng)
        await until_idle(workers)

    simulate(seed, one_and_one, body)


@pytest.mark.parametrize("num_blocks", [24, 256])
def test_a_colocated_worker_gives_the_same_tokens(num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    requests = [draw_request(rng) for _ in range(40)]

    def make(world: World) -> list[SimWorker]:
        config = ColocatedSchedulerConfig(max_running=16, prefill_budget=64)
        return [SimWorker(world, "colocated", "c0", num_blocks=num_blocks, scheduler=config)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(None, workers[0].peer)
        await serve_all(gateway, requests, lambda i, attempt: placement, rng, cancels=0.2)
        await until_idle(workers)

    simulate(0, make, body)


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

        def place(i: int, attempt: int) -> Placement:
            n = i + attempt
            return Placement(prefills[n % 2].peer, decodes[n % 2].peer)

        killing = asyncio.create_task(kill())
        await serve_all(gateway, requests, place, rng)
        await killing
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

    simulate(seed, one_and_one, body)


def test_a_prompt_waits_under_lease_while_decode_has_no_room() -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    requests = [([i + 1] * 100, params) for i in range(4)]

    def make(world: World) -> list[SimWorker]:
        return [
            SimWorker(world, "prefill", "p0"),
            SimWorker(world, "decode", "d0", num_blocks=20),  # one sequence of 300 tokens
        ]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        held = 0

        async def watch() -> None:
            nonlocal held
            while True:
                held = max(held, workers[0].role.load().blocks_held)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        await serve_all(gateway, requests, lambda i, attempt: placement, random.Random(0), within_s=0.1)
        watching.cancel()
        assert held >= 7
        await until_idle(workers)

    simulate(0, make, body)


def test_short_prompts_go_whole_and_long_ones_layer_by_layer() -> None:
    transfer = KvTransferConfig(transport="local", layerwise_tokens=64, layers_per_push=1)

    def make(world: World) -> list[SimWorker]:
        return [
            SimWorker(
                world, "prefill", "p0", transfer=transfer, scheduler=PrefillSchedulerConfig(chunk_budget=32)
            ),
            SimWorker(world, "decode", "d0", transfer=transfer),
        ]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        piece_bytes = {}
        for name, length in (("short", 32), ("long", 64)):
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            prompt = [length] * length
            running = asyncio.create_task(gateway.generate(name, prompt, params, lambda attempt: placement))
            await asyncio.sleep(0)
            call = gateway.call(name)
            assert await running == expected(prompt, params)
            assert call.decode_times is not None
            assert call.decode_times.handoff_bytes == length // 16 * workers[0].engine.layout.block_bytes
            piece_bytes[name] = call.decode_times.handoff_bytes / call.decode_times.handoff_segments
        assert piece_bytes["short"] >= workers[0].engine.layout.block_bytes > piece_bytes["long"]

    simulate(0, make, body)


def test_times_are_in_order_and_add_up() -> None:
    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        started = world.clock.now()
        running = asyncio.create_task(gateway.generate("a", [5] * 100, params, lambda attempt: placement))
        await asyncio.sleep(0)
        call = gateway.call("a")
        await running
        prefill, decode = call.prefill_times, call.decode_times
        assert prefill is not None
        assert decode is not None
        stamps = [
            started,
            prefill.received_at,
            prefill.scheduled_at,
            prefill.token_at,
            decode.verified_at,
            decode.scheduled_at,
            decode.token_at,
        ]
        assert stamps == sorted(stamps)
        assert prefill.cached_tokens == 0

    simulate(0, one_and_one, body)


def test_token_0_alone_moves_no_kv_and_leaves_nothing_behind() -> None:
    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        prompt = [9] * 100
        first = expected(prompt, SamplingParams(max_tokens=1, ignore_eos=True))[0]
        for i, params in enumerate(
            [
                SamplingParams(max_tokens=1, ignore_eos=True),
                SamplingParams(max_tokens=50, ignore_eos=True, stop_token_ids=(first,)),
            ]
        ):
            assert await gateway.generate(f"r{i}", prompt, params, lambda attempt: placement) == [first]
            await until_idle(workers)
            assert workers[1].blocks.counts().cached == 0

    simulate(0, one_and_one, body)


def test_a_completion_that_outgrows_the_decode_pool_fails_clearly_and_alone() -> None:
    def make(world: World) -> list[SimWorker]:
        return [SimWorker(world, "prefill", "p0"), SimWorker(world, "decode", "d0", num_blocks=8)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        large = asyncio.create_task(
            gateway.generate(
                "large", [1] * 60, SamplingParams(max_tokens=500, ignore_eos=True), lambda attempt: placement
            )
        )
        small = SamplingParams(max_tokens=30, ignore_eos=True)
        assert await gateway.generate("small", [2] * 20, small, lambda attempt: placement) == expected(
            [2] * 20, small
        )
        with pytest.raises(PromptTooLong, match="8 KV blocks"):
            await large
        await until_idle(workers)

    simulate(0, make, body)


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


def test_a_seed_repeats_a_run_exactly() -> None:
    rng = random.Random(5)
    requests = [draw_request(rng) for _ in range(30)]

    def run() -> list[tuple[float, int]]:
        """When the gateway heard something, and how many steps it knew of."""
        trace: list[tuple[float, int]] = []

        async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
            placement = Placement(workers[0].peer, workers[1].peer)

            async def watch() -> None:
                while True:
                    gateway.heard.clear()
                    await gateway.heard.wait()
                    trace.append((world.clock.now(), len(gateway.samples)))

            watching = asyncio.create_task(watch())
            await serve_all(gateway, requests, lambda i, attempt: placement, random.Random(6), cancels=0.2)
            watching.cancel()

        simulate(5, small_pools, body)
        return trace

    first = run()
    assert len(first) > 100
    assert run() == first
