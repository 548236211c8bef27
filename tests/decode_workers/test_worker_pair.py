"""A prefill and a decode worker as they run live (gRPC, transports, engine threads), with fake engines: the
output is the single engine's, and both pools are idle afterwards."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest
from diphase.decode_workers.config import DecodeSchedulerConfig, DecodeWorkerConfig
from diphase.decode_workers.worker import start as start_decode
from diphase.engine.base import Engine
from diphase.engine.config import EngineConfig
from diphase.engine.fake import FakeEngine
from diphase.engine.host_config import HostConfig
from diphase.engine.server import Progress, RunningWorker
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig, PrefillWorkerConfig
from diphase.prefill_workers.worker import start as start_prefill
from diphase.proto.errors import Cancelled, ConfigError
from diphase.proto.sampling import SamplingParams

from ..live_workers import attached, placement, until_idle
from ..simulation.gateway import Gateway

LIMIT_S = 60.0
ORACLE = FakeEngine(num_blocks=1)
HOST = HostConfig(cluster_token="secret", heartbeat_s=0.05)


def load(num_blocks: int, config: EngineConfig, *, progress: Progress | None) -> Engine:
    return FakeEngine(num_blocks=num_blocks)


async def start_pair(transport: str, num_blocks: int = 128) -> tuple[RunningWorker, RunningWorker]:
    transfer = KvTransferConfig(transport=transport, layerwise_tokens=64, layers_per_push=1)
    prefill = await start_prefill(
        PrefillWorkerConfig(
            host=HOST, kv_transfer=transfer, scheduler=PrefillSchedulerConfig(chunk_budget=48)
        ),
        worker_id="p0",
        incarnation=f"p0-{transport}",
        load=partial(load, num_blocks),
    )
    decode = await start_decode(
        DecodeWorkerConfig(
            host=HOST,
            kv_transfer=transfer,
            scheduler=DecodeSchedulerConfig(max_running=12, prefill_budget=64),
        ),
        worker_id="d0",
        incarnation=f"d0-{transport}",
        load=partial(load, num_blocks),
    )
    return prefill, decode


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_many_requests_at_once_give_the_single_engines_tokens(transport: str) -> None:
    rng = random.Random(transport)
    async with asyncio.timeout(LIMIT_S):
        prefill, decode = await start_pair(transport)
        both, alone = placement(prefill, decode), placement(None, decode)

        async def one(gateway: Gateway, i: int) -> None:
            prompt = [rng.randrange(900) for _ in range(rng.choice([1, 16, 50, 64, 130, 300]))]
            params = SamplingParams(max_tokens=rng.choice([1, 2, 40]), ignore_eos=True)
            place = alone if i % 8 == 0 else both
            tokens = await gateway.generate(f"r{i}", prompt, params, lambda attempt: place)
            assert tokens == ORACLE.continuation(prompt, params, params.max_tokens)

        async with attached(prefill, decode) as gateway, asyncio.TaskGroup() as group:
            for i in range(60):
                group.create_task(one(gateway, i))
        async with attached(prefill, decode) as gateway:
            await until_idle(gateway, prefill, decode)
        value = decode.host.metrics.registry.get_sample_value
        assert (value("diphase_worker_handoff_seconds_count") or 0) >= 20
        assert (value("diphase_worker_handoff_bytes_sum") or 0) > 0
        await prefill.close()
        await decode.close()


async def test_cancels_and_preemptions_leave_pools_idle() -> None:
    rng = random.Random(1)
    async with asyncio.timeout(LIMIT_S):
        prefill, decode = await start_pair("shm", num_blocks=24)
        both = placement(prefill, decode)
        cancelled = 0

        async def one(gateway: Gateway, i: int) -> None:
            nonlocal cancelled
            prompt = [rng.randrange(900) for _ in range(rng.randint(30, 120))]
            params = SamplingParams(max_tokens=100, ignore_eos=True)
            calling = asyncio.create_task(gateway.generate(f"r{i}", prompt, params, lambda attempt: both))
            if i % 3 == 0:
                frames = gateway.frames + rng.randint(0, 200)
                while gateway.frames < frames and not calling.done():
                    gateway.heard.clear()
                    await gateway.heard.wait()
                gateway.cancel(f"r{i}")
            try:
                assert await calling == ORACLE.continuation(prompt, params, 100)
            except Cancelled:
                cancelled += 1

        async with attached(prefill, decode) as gateway:
            async with asyncio.TaskGroup() as group:
                for i in range(40):
                    group.create_task(one(gateway, i))
            await until_idle(gateway, prefill, decode)
            assert cancelled > 3
            assert gateway.heartbeats[decode.address].load.preemptions > 0
        await prefill.close()
        await decode.close()


async def test_a_drained_pair_has_handed_everything_over() -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    async with asyncio.timeout(LIMIT_S):
        prefill, decode = await start_pair("shm")
        async with attached(prefill, decode) as gateway:
            both = placement(prefill, decode)
            calls = [
                asyncio.create_task(gateway.generate(f"r{i}", [i] * 70, params, lambda attempt: both))
                for i in range(10)
            ]
            await asyncio.sleep(0)
            while not all(gateway.call(f"r{i}").tokens for i in range(10)):  # all have been accepted
                gateway.heard.clear()
                await gateway.heard.wait()
            await prefill.drain()
            await decode.drain()
            for i, call in enumerate(calls):
                assert await call == ORACLE.continuation([i] * 70, params, 60)
        await prefill.close()
        await decode.close()


async def test_a_decode_worker_that_closes_fails_its_requests_for_a_retry_elsewhere() -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    async with asyncio.timeout(LIMIT_S):
        prefill, decode = await start_pair("shm")
        both, alone = placement(prefill, decode), placement(None, prefill)
        async with attached(prefill, decode) as gateway:
            # A prefill worker cannot decode: the second attempt fails for good.
            calls = [
                asyncio.create_task(
                    gateway.generate(f"r{i}", [i] * 70, params, lambda attempt: alone if attempt else both)
                )
                for i in range(5)
            ]
            await asyncio.sleep(0)
            while not any(
                len(gateway.call(f"r{i}").tokens) > 1 for i in range(5)
            ):  # some have been handed over
                gateway.heard.clear()
                await gateway.heard.wait()
            await decode.close()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all("prefill worker needs" in str(result) for result in results)
            await until_idle(gateway, prefill)
        await prefill.close()


async def test_an_address_of_another_machine_fails_the_start_and_frees_the_engine() -> None:
    closed = []

    class Watched(FakeEngine):
        def close(self) -> None:
            closed.append(True)
            super().close()

    config = PrefillWorkerConfig(kv_transfer=KvTransferConfig(host="192.0.2.1"))
    with pytest.raises(ConfigError, match=r"kv_transfer\.host = '192\.0\.2\.1'"):
        await start_prefill(
            config, worker_id="p", incarnation="p", load=lambda config, *, progress: Watched(num_blocks=4)
        )
    assert closed == [True]
