"""Workers come and go while requests run, in virtual time: nothing fails, no token is lost or repeated, and
the supervisor, the registry and the gateways agree in the end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from diphase.proto import inference_pb2 as pb
from diphase.router.compatibility import mismatches
from diphase.router.worker_handle import WorkerState

from ..router.fakes import Outcome, generate, read, start_generation
from .fleet import ALWAYS_HANDED_OVER, START_S, Load, Stage, long_request, states
from .test_router_with_workers import expected
from .virtual_loop import run_virtually


@pytest.mark.parametrize("seed", range(2))
def test_pools_grow_and_shrink_under_load_and_no_request_needs_a_second_try(seed: int) -> None:
    async def main() -> None:
        async with Stage.opened(seed) as stage, stage.router(max_attempts=1) as router:
            async with Load(router, seed) as load:
                await stage.scale("prefill", 3)
                await stage.scale("decode", 2)
                assert set(stage.names("prefill")) == {"prefill-0", "prefill-1", "prefill-2"}
                await asyncio.sleep(3.0)
                await stage.scale("prefill", 1)
                await stage.scale("decode", 1)
                await asyncio.sleep(1.0)
                await stage.scale("prefill", 0)
                await asyncio.sleep(1.0)
                await stage.scale("prefill", 2)
            used = {outcome.last.stages.prefill_worker for outcome in load.outcomes}
            assert {"prefill-1", "prefill-2", "decode-0"} <= used
            assert "decode-1" in {outcome.last.stages.decode_worker for outcome in load.outcomes}
            assert stage.names("decode") == ["decode-0"]
            assert stage.names("prefill") == ["prefill-3", "prefill-4"]
            await stage.until_idle()
            assert set(states(router)) == {"prefill-3", "prefill-4", "decode-0"}

    run_virtually(main())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_a_rolling_restart_of_both_pools_costs_no_request_an_attempt(seed: int, workers: int) -> None:
    async def main() -> None:
        settings = (f"pools.prefill.workers={workers}", f"pools.decode.workers={workers}")
        async with Stage.opened(seed, *settings) as stage, stage.router(max_attempts=1) as router:
            before = set(stage.processes)
            async with Load(router, seed):
                await stage.restart()
            after = {*stage.names("prefill"), *stage.names("decode")}
            assert not after & before
            assert len(after) == 2 * workers
            await stage.until_idle()
            # The successor serves before its predecessor begins to leave.
            first = [f"prefill-{workers}: starts", f"prefill-{workers}: serves", "prefill-0: drains"]
            assert stage.said[: len(first)] == first

    run_virtually(main())


def test_without_room_beside_it_a_worker_ends_before_its_successor_starts() -> None:
    async def main() -> None:
        settings = ("pools.prefill.gpus=1", "pools.decode.workers=2", "pools.decode.gpus=1")
        async with Stage.opened(5, *settings, room=0) as stage, stage.router(max_attempts=1) as router:
            async with Load(router, 5):
                await stage.restart()
            # Decode workers computed the prompts while the only prefill worker was replaced.
            assert stage.said[:4] == [
                ": no room beside prefill-0: it ends first",
                "prefill-0: drains",
                "prefill-0: has ended",
                "prefill-1: starts",
            ]
            assert (stage.names("prefill"), stage.names("decode")) == (
                ["prefill-1"],
                ["decode-2", "decode-3"],
            )
            await stage.until_idle()

    run_virtually(main())


@pytest.mark.parametrize("seed", range(2))
def test_a_worker_that_dies_while_it_drains_is_not_started_again(seed: int) -> None:
    async def main() -> None:
        settings = ("pools.prefill.workers=2", "pools.decode.workers=2")
        async with Stage.opened(seed, *settings) as stage, stage.router(**ALWAYS_HANDED_OVER) as router:
            async with Load(router, seed):
                calls = [asyncio.create_task(generate(router, long_request(n))) for n in range(4)]
                await asyncio.sleep(1.0)
                leaving = [
                    asyncio.create_task(stage.scale("decode", 1)),
                    asyncio.create_task(stage.scale("prefill", 1)),
                ]
                await asyncio.sleep(0.2)
                assert states(router)["decode-1"] == "draining"
                await stage.processes["decode-1"].kill()
                await asyncio.gather(*leaving)
            outcomes = await asyncio.gather(*calls)
            assert [outcome.token_ids for outcome in outcomes] == [
                expected(long_request(n)) for n in range(4)
            ]
            assert max(outcome.last.stages.attempts for outcome in outcomes) == 2
            assert (stage.names("prefill"), stage.names("decode")) == (["prefill-0"], ["decode-0"])
            await asyncio.sleep(2 * START_S)
            await stage.until_idle()
            assert set(states(router)) == {"prefill-0", "decode-0"}

    run_virtually(main())


def test_a_prefill_worker_that_is_scaled_in_serves_its_leases_first() -> None:
    async def main() -> None:
        # One request fills the decode worker's pool: the KV of the others is held where it was computed.
        settings = ("pools.prefill.workers=2", "engine.kv_cache_mib=40")
        async with (
            Stage.opened(1, *settings) as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            messages = [long_request(n, prompt=300, max_tokens=150) for n in range(5)]
            calls = []
            for message in messages:
                calls.append(asyncio.create_task(generate(router, message)))
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            handle = router.pool.get("prefill-1")
            assert handle is not None
            assert handle.load.handoffs > 0
            scaled = asyncio.create_task(stage.scale("prefill", 1))
            await asyncio.sleep(0.5)
            assert handle.state is WorkerState.DRAINING
            assert handle.load.handoffs > 0
            assert handle.load.running == handle.load.waiting_requests == 0
            assert not scaled.done()
            await scaled
            outcomes = await asyncio.gather(*calls)
            assert [outcome.token_ids for outcome in outcomes] == list(map(expected, messages))
            assert {outcome.last.stages.attempts for outcome in outcomes} == {1}
            await stage.until_idle()

    run_virtually(main())


@pytest.mark.parametrize("seed", range(2))
def test_at_the_deadline_of_a_drain_requests_go_on_elsewhere(seed: int) -> None:
    async def main() -> None:
        settings = ("pools.prefill.workers=2", "pools.decode.workers=2", "host.drain_timeout_s=0.5")
        async with (
            Stage.opened(seed, *settings) as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            messages = [long_request(n, max_tokens=200) for n in range(4)]
            calls = [asyncio.create_task(generate(router, message)) for message in messages]
            await asyncio.sleep(1.0 + 0.1 * seed)
            began = asyncio.get_running_loop().time()
            await asyncio.gather(stage.scale("decode", 1), stage.scale("prefill", 1))
            assert asyncio.get_running_loop().time() - began < 3.0
            assert not any(call.done() for call in calls)
            outcomes = await asyncio.gather(*calls)
            assert [outcome.token_ids for outcome in outcomes] == list(map(expected, messages))
            assert {outcome.last.stages.attempts for outcome in outcomes} == {1, 2}
            await stage.until_idle()

    run_virtually(main())


def test_at_the_deadline_of_a_drain_prompts_that_wait_are_given_up_at_once() -> None:
    async def main() -> None:
        async with (
            Stage.opened(4, "pools.prefill.workers=2", "host.drain_timeout_s=0.1") as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            messages = [long_request(n, prompt=400, max_tokens=3) for n in range(12)]
            calls = [asyncio.create_task(generate(router, message)) for message in messages]
            await asyncio.sleep(0.2)
            handle = router.pool.get("prefill-1")
            assert handle is not None
            assert handle.load.waiting_requests > 2
            began = asyncio.get_running_loop().time()
            await stage.scale("prefill", 1)
            assert asyncio.get_running_loop().time() - began < 1.0
            outcomes = await asyncio.gather(*calls)
            assert [outcome.token_ids for outcome in outcomes] == list(map(expected, messages))
            assert {outcome.last.stages.attempts for outcome in outcomes} == {1, 2}
            await stage.until_idle()

    run_virtually(main())


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_at_the_deadline_of_a_drain_leases_are_given_up_on_both_sides(pool: str) -> None:
    async def main() -> None:
        settings = (f"pools.{pool}.workers=2", "engine.kv_cache_mib=40", "host.drain_timeout_s=0.3")
        async with (
            Stage.opened(2, *settings) as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            messages = [long_request(n, prompt=300, max_tokens=150) for n in range(12)]
            calls = []
            for message in messages:
                calls.append(asyncio.create_task(generate(router, message)))
                await asyncio.sleep(0.05)
            handle = router.pool.get(f"{pool}-1")
            assert handle is not None

            def holds_or_waits() -> bool:
                """Computed for nobody yet; or without room beside what runs."""
                load = handle.load
                busy = load.running or load.waiting_requests if pool == "prefill" else not load.running
                return bool(load.handoffs) and not (busy or load.blocks_reserved)

            while not holds_or_waits():  # noqa: ASYNC110 (virtual time)
                await asyncio.sleep(0.02)
            began = asyncio.get_running_loop().time()
            await stage.scale(pool, 1)
            assert asyncio.get_running_loop().time() - began < 2.0
            outcomes = await asyncio.gather(*calls)
            assert [outcome.error for outcome in outcomes] == [None] * len(messages)
            assert [outcome.token_ids for outcome in outcomes] == list(map(expected, messages))
            assert {outcome.last.stages.attempts for outcome in outcomes} == {1, 2}
            await stage.until_idle()

    run_virtually(main())


def test_workers_of_unequal_layouts_are_never_placed_together() -> None:
    async def main() -> None:
        async with (
            Stage.opened(7, "pools.prefill.workers=2", "pools.decode.workers=2") as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            pairs = set()
            async with Load(router, 7) as load:
                # While they are replaced there are both block sizes in both pools.
                await stage.restart("", "engine.block_size=32")
            for outcome in load.outcomes:
                pairs.add((outcome.last.stages.prefill_worker, outcome.last.stages.decode_worker))
            old, new = {"prefill-0", "prefill-1", "decode-0", "decode-1"}, {"prefill-2", "prefill-3"}
            assert all(({prefill, decode} <= old) or not {prefill, decode} & old for prefill, decode in pairs)
            assert {prefill for prefill, _ in pairs} & new
            assert not list(mismatches(router.pool.handles()))
            # Of one kind alone: decode workers compute what nobody can hand over to them.
            async with Load(router, 8) as load:
                await stage.restart("prefill", "engine.block_size=16")
                await asyncio.sleep(2.0)
            assert {outcome.last.stages.prefill_worker for outcome in load.outcomes[-3:]} <= {
                "decode-2",
                "decode-3",
            }
            found = list(mismatches(router.pool.handles()))
            assert {(pair.prefill, pair.decode) for pair in found} == {
                (prefill, decode) for prefill in stage.names("prefill") for decode in stage.names("decode")
            }
            assert "(blocks of 16) and" in found[0].reason
            assert "(blocks of 32)" in found[0].reason
            await stage.until_idle()

    run_virtually(main())


def test_a_gateway_that_connects_meanwhile_knows_who_drains_and_finds_what_runs_there() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            stage = await stack.enter_async_context(Stage.opened(9, "pools.decode.workers=2"))
            messages = [long_request(n, max_tokens=200) for n in range(4)]
            before = [Outcome() for _ in messages]
            async with stage.router("g0", max_attempts=1, **ALWAYS_HANDED_OVER) as first:
                for message, outcome in zip(messages, before, strict=True):
                    await read(await start_generation(first, message), outcome, limit=5)
                scaled = asyncio.create_task(stage.scale("decode", 1))
                await asyncio.sleep(0.3)
            second = await stack.enter_async_context(stage.router("g1", max_attempts=1))
            assert states(second)["decode-1"] == "draining"
            fresh = await generate(second, long_request(99, max_tokens=5))
            assert fresh.last.stages.decode_worker == "decode-0"
            after = await asyncio.gather(
                *(
                    generate(
                        second,
                        pb.GenerateRequest(request_id=message.request_id, resume_from=len(outcome.token_ids)),
                    )
                    for message, outcome in zip(messages, before, strict=True)
                )
            )
            for message, begun, ended in zip(messages, before, after, strict=True):
                assert begun.token_ids + ended.token_ids == expected(message)
            assert {outcome.last.stages.decode_worker for outcome in after} == {"decode-0", "decode-1"}
            await scaled
            await stage.until_idle()
            assert set(states(second)) == {"prefill-0", "decode-0"}

    run_virtually(main())


def test_a_store_that_loses_everything_during_a_change_tells_the_end_of_it() -> None:
    async def main() -> None:
        async with Stage.opened(10) as stage, stage.router(max_attempts=1) as router:
            async with Load(router, 10):
                growing = asyncio.create_task(stage.scale("decode", 3))
                await asyncio.sleep(1.0)
                stage.registry.lose_everything()
                await asyncio.sleep(START_S)
                assert not growing.done(), "no gateway can know of the new workers"
                stage.registry.away = False
                await growing
                stage.registry.lose_everything()
                await stage.scale("decode", 1)
                await asyncio.sleep(0.1)
                # A gateway keeps who it knew and sees by the stream that they have ended.
                assert states(router)["decode-0"] == "ready"
                assert "ready" not in (states(router)["decode-1"], states(router)["decode-2"])
                stage.registry.away = False
                await asyncio.sleep(3.0)
                assert set(states(router)) == {"prefill-0", "decode-0"}
            await stage.until_idle()

    run_virtually(main())
