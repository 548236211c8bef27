"""Prefill and decode workers on virtual time give the single engine's output and leave idle pools."""

from __future__ import annotations

import asyncio
import random

import pytest
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.proto.errors import PromptTooLong
from diphase.proto.sampling import SamplingParams

from .cluster import SimWorker, World
from .gateway import Gateway, Placement
from .traffic import draw_request, expected, one_and_one, serve_all, simulate, small_pools, until_idle


def num_handoffs(worker: SimWorker) -> float:
    """As /metrics tells."""
    return worker.host.metrics.registry.get_sample_value("diphase_worker_handoff_seconds_count") or 0.0


@pytest.mark.parametrize("seed", range(4))
def test_disaggregated_output_is_the_single_engines(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(60)]

    async def body(world: World, gateway: Gateway, workers: list[SimWorker]) -> None:
        placement = Placement(workers[0].peer, workers[1].peer)
        await serve_all(gateway, requests, lambda i, attempt: placement, rng)
        await until_idle(workers)
        # All but those that end with token 0.
        longer = sum(len(expected(*request)) > 1 for request in requests)
        assert num_handoffs(workers[1]) == longer > 0

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
        assert num_handoffs(workers[1]) == sum(len(expected(*request)) > 1 for request in requests[::2])

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
        cancelled = await serve_all(gateway, requests, lambda i, attempt: placement, rng, cancels=0.2)
        assert cancelled < len(requests) / 2  # the others' tokens were compared
        await until_idle(workers)
        assert num_handoffs(workers[0]) == 0

    simulate(0, make, body)


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
    transfer = KvTransferConfig(layerwise_tokens=64, layers_per_push=1)

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
