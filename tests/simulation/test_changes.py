"""What is asked of a supervisor in turn, what it refuses, and what is left of a change that fails; in virtual
time."""

from __future__ import annotations

import asyncio

import pytest
from diphase.cluster.roles import StartFailed
from diphase.proto.errors import ConfigError, InternalError, WorkerLost
from diphase.router.compatibility import mismatches

from ..router.fakes import generate
from .fleet import ALWAYS_HANDED_OVER, Load, Stage, long_request, states
from .virtual_loop import run_virtually


def test_the_only_worker_that_decodes_is_not_restarted_where_there_is_no_room_beside_it() -> None:
    async def main() -> None:
        async with Stage.opened(5, "pools.decode.gpus=1", room=0) as stage, stage.router() as router:
            with pytest.raises(ConfigError, match="decode-0 is the only one of its kind, and its successor"):
                await stage.restart("decode")
            assert states(router) == {"prefill-0": "ready", "decode-0": "ready"}

    run_virtually(main())


def test_a_supervisor_told_twice_does_one_after_the_other() -> None:
    async def main() -> None:
        async with Stage.opened(3) as stage, stage.router(max_attempts=1) as router:
            async with Load(router, 3):
                await asyncio.gather(stage.scale("decode", 4), stage.scale("decode", 2))
                assert stage.said.count(": waits for an earlier change") == 1
                assert stage.said.index(": decode has 4 workers") < stage.said.index(": decode has 2 workers")
                assert stage.names("decode") == ["decode-0", "decode-1"]
                await asyncio.gather(stage.scale("decode", 2), stage.scale("decode", 2))
                assert stage.names("decode") == ["decode-0", "decode-1"]
            await stage.until_idle()

    run_virtually(main())


def test_what_cannot_be_done_is_refused_before_anything_happens() -> None:
    async def main() -> None:
        async with Stage.opened(4, room=2) as stage, stage.router() as router:
            for pool, workers, sentence in (
                ("decode", 0, "nobody could decode; keep one there, or scale colocated"),
                ("decoed", 1, "there is no pool 'decoed'; did you mean decode"),
                ("prefill", 2000, "2000 workers are too many"),
                ("prefill", 4, "pools.prefill: no room for 1 workers. prefill still has 1 worker$"),
            ):
                with pytest.raises(ConfigError, match=sentence):
                    await stage.scale(pool, workers)
            with pytest.raises(ConfigError, match="there is no worker in colocated"):
                await stage.restart("colocated")
            with pytest.raises(ConfigError, match=r"model: a restart changes workers only"):
                await stage.restart("prefill", "model.name=dummy:small")
            with pytest.raises(
                ConfigError, match=r"pools.prefill.workers: a restart leaves how many workers"
            ):
                await stage.restart("prefill", "pools.prefill.workers=3")
            assert stage.room == 2
            assert set(states(router)) == {"prefill-0", "decode-0"}
            # What was reserved before the room ran out is free again.
            await stage.scale("prefill", 3)
            assert stage.room == 0
            await stage.scale("prefill", 1)
            assert stage.room == 2

    run_virtually(main())


def test_a_restart_never_leaves_workers_that_name_different_transports() -> None:
    async def main() -> None:
        async with Stage.opened(4) as stage, stage.router():
            for pool in ("decode", ""):
                await stage.restart(pool, "kv_transfer.transport=shm")
                for other in ("prefill", "decode", ""):
                    with pytest.raises(
                        ConfigError, match=r"transport = 'shm' and with 'tcp' cannot hand over"
                    ):
                        await stage.restart(other, "kv_transfer.transport=tcp")
                await stage.restart("", "kv_transfer.transport=auto")
            await stage.restart("", "kv_transfer.transport=tcp")

    run_virtually(main())


def test_room_that_one_pool_left_is_another_ones() -> None:
    async def main() -> None:
        async with Stage.opened(4, "pools.prefill.workers=3", room=0) as stage, stage.router():
            await stage.scale("prefill", 1)
            await stage.scale("decode", 3)
            with pytest.raises(ConfigError, match="no room"):
                await stage.scale("decode", 4)
            assert stage.names("decode") == ["decode-0", "decode-1", "decode-2"]

    run_virtually(main())


def test_a_place_that_waited_in_vain_for_its_next_worker_is_free_again() -> None:
    async def main() -> None:
        settings = ("pools.decode.gpus=1", "pools.decode.workers=2")
        async with (
            Stage.opened(8, *settings, room=0) as stage,
            stage.router(max_attempts=1, **ALWAYS_HANDED_OVER) as router,
        ):
            calls = [asyncio.create_task(generate(router, long_request(n, max_tokens=250))) for n in range(4)]
            await asyncio.sleep(0.5)
            with pytest.raises(WorkerLost, match="still draining, and ending by themselves: decode-0"):
                await stage.restart("decode", timeout_s=1.0)
            assert [outcome.error for outcome in await asyncio.gather(*calls)] == [None] * 4
            await stage.until_idle()
            assert stage.names("decode") == ["decode-1"]
            await stage.scale("decode", 2)
            assert stage.names("decode") == ["decode-1", "decode-2"]

    run_virtually(main())


def test_a_change_that_fails_on_the_way_leaves_what_serves() -> None:
    async def main() -> None:
        async with (
            Stage.opened(6, "pools.prefill.workers=2") as stage,
            stage.router(max_attempts=1) as router,
        ):
            async with Load(router, 6):
                stage.start_failures.append(StartFailed(code="internal", message="no memory"))
                with pytest.raises(InternalError, match="no memory"):
                    await stage.restart("prefill", "engine.block_size=32")
                assert stage.names("prefill") == ["prefill-0", "prefill-1"]
                stage.start_failures.append(StartFailed(code="internal", message="no memory"))
                with pytest.raises(InternalError, match="no memory"):
                    await stage.scale("decode", 3)
                assert len(stage.names("decode")) == 2
                with pytest.raises(
                    WorkerLost, match="not complete after 1 s; now there are 2 prefill, 2 decode"
                ):
                    await stage.scale("decode", 3, timeout_s=1.0)
                assert stage.room == 7
                # Nobody came to have the new block size.
                await stage.restart("prefill")
            assert not list(mismatches(router.pool.handles()))
            await stage.until_idle()

    run_virtually(main())
