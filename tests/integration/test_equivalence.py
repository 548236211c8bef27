"""The disaggregated workers' output equals the single engine's, token for token: real engines (a tiny model of dummy
weights), real gRPC, real transports, real KV bytes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest
from diphase.decode_workers.config import DecodeSchedulerConfig, DecodeWorkerConfig
from diphase.decode_workers.worker import start as start_decode
from diphase.engine.config import EngineConfig
from diphase.engine.engine import TorchEngine
from diphase.engine.generate import WHOLE, generate
from diphase.engine.host_config import HostConfig
from diphase.engine.server import RunningWorker
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig, PrefillWorkerConfig
from diphase.prefill_workers.worker import start as start_prefill
from diphase.proto.sampling import SamplingParams

from ..decode_workers.test_worker_pair import attached, placement, until_idle

LIMIT_S = 120.0
MODEL = "dummy:tiny"
NUM_TOKENS = 24
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 511, 700, 1024, 1500, 2600, 4000)


def config(kv_cache_mib: int = 64) -> EngineConfig:
    return EngineConfig(model=MODEL, kv_cache_mib=kv_cache_mib)


@pytest.fixture(scope="module")
def single_engine() -> Iterator[TorchEngine]:
    engine = TorchEngine.load(config())
    yield engine
    engine.close()


def prompts(lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab_size) for _ in range(length)] for length in lengths]


def truth(engine: TorchEngine, of: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in generate(engine, of, params)]


async def run_pair(
    of: list[list[int]],
    params: list[SamplingParams],
    *,
    transport: str,
    chunk_budget: int,
    batch: int,
    decode_kv_mib: int = 64,
) -> tuple[list[list[int]], int]:
    """The outputs of a prefill and a decode worker with `batch` requests at a time, and the preemptions."""
    host = HostConfig(cluster_token="secret", heartbeat_s=0.05)
    transfer = KvTransferConfig(transport=transport)
    prefill = await start_prefill(
        PrefillWorkerConfig(
            engine=config(),
            host=host,
            kv_transfer=transfer,
            scheduler=PrefillSchedulerConfig(chunk_budget=chunk_budget),
        ),
        worker_id="p0",
        incarnation=f"p-{transport}-{chunk_budget}-{batch}-{decode_kv_mib}",
    )
    decode = await start_decode(
        DecodeWorkerConfig(
            engine=config(decode_kv_mib),
            host=host,
            kv_transfer=transfer,
            scheduler=DecodeSchedulerConfig(max_running=16),
        ),
        worker_id="d0",
        incarnation=f"d-{transport}-{chunk_budget}-{batch}-{decode_kv_mib}",
    )
    try:
        return await run_requests(of, params, prefill, decode, batch)
    finally:
        await prefill.close()
        await decode.close()


async def run_requests(
    of: list[list[int]],
    params: list[SamplingParams],
    prefill: RunningWorker,
    decode: RunningWorker,
    batch: int,
) -> tuple[list[list[int]], int]:
    place = placement(prefill, decode)
    outputs: list[list[int]] = [[] for _ in of]
    slots = asyncio.Semaphore(batch)

    async with attached(prefill, decode) as gateway:

        async def one(i: int) -> None:
            async with slots:
                outputs[i] = await gateway.generate(f"r{i}", of[i], params[i], lambda attempt: place)

        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for i in range(len(of)):
                group.create_task(one(i))
        await until_idle(gateway, prefill, decode)
        return outputs, gateway.heartbeats[decode.address].load.preemptions


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("chunk_budget", [64, 512, WHOLE], ids=["chunks of 64", "chunks of 512", "whole"])
@pytest.mark.parametrize("batch", [1, 4, 16])
async def test_greedy_output_equals_the_single_engines(
    single_engine: TorchEngine, transport: str, chunk_budget: int, batch: int
) -> None:
    lengths = LENGTHS if batch == 16 else LENGTHS[::2] if batch == 4 else LENGTHS[1::4]
    of = prompts(lengths, single_engine.limits.vocab_size, seed=batch)
    params = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)] * len(of)
    outputs, _ = await run_pair(of, params, transport=transport, chunk_budget=chunk_budget, batch=batch)
    assert outputs == truth(single_engine, of, params)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_forced_preemption_changes_no_token(single_engine: TorchEngine, transport: str) -> None:
    of = prompts((40, 90, 100, 120, 17, 64, 80, 33) * 2, single_engine.limits.vocab_size, seed=7)
    params = [SamplingParams(max_tokens=90, ignore_eos=True)] * len(of)
    outputs, preemptions = await run_pair(
        of, params, transport=transport, chunk_budget=512, batch=16, decode_kv_mib=1
    )
    assert preemptions > 0
    assert outputs == truth(single_engine, of, params)


async def test_seeded_sampling_equals_the_single_engines(single_engine: TorchEngine) -> None:
    of = prompts(LENGTHS[:10], single_engine.limits.vocab_size, seed=3)
    params = [
        SamplingParams(
            max_tokens=NUM_TOKENS,
            temperature=0.8,
            top_k=(0, 40)[i % 2],
            top_p=(1.0, 0.9)[i % 3 == 0],
            min_p=(0.0, 0.02)[i % 4 == 0],
            repetition_penalty=(1.0, 1.2)[i % 2],
            frequency_penalty=0.1 * (i % 3),
            seed=1000 + i,
            ignore_eos=True,
        )
        for i in range(len(of))
    ]
    outputs, _ = await run_pair(of, params, transport="shm", chunk_budget=128, batch=10)
    assert outputs == truth(single_engine, of, params)
