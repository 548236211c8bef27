"""A prefill and a decode worker with real engines in this process, over real gRPC and real transports."""

from __future__ import annotations

import asyncio
from typing import Any

from diphase.decode_workers.config import DecodeSchedulerConfig, DecodeWorkerConfig
from diphase.decode_workers.worker import start as start_decode
from diphase.engine.config import EngineConfig
from diphase.engine.host_config import HostConfig
from diphase.engine.server import RunningWorker
from diphase.kv_transfer.config import KvTransferConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig, PrefillWorkerConfig
from diphase.prefill_workers.worker import start as start_prefill
from diphase.proto.sampling import SamplingParams

from ..live_workers import attached, placement, until_idle

LIMIT_S = 120.0


async def run_pair(
    of: list[list[int]],
    params: list[SamplingParams],
    *,
    transport: str,
    chunk_budget: int,
    batch: int,
    model: str = "dummy:tiny",
    decode_kv_mib: int = 64,
    dtype: str = "bf16",
    tensor_parallel: tuple[int, int] = (1, 1),
    **transfer_config: Any,
) -> tuple[list[list[int]], int]:
    """The outputs of a prefill and a decode worker with `batch` requests at a time, and the preemptions.

    `tensor_parallel`: of the prefill and of the decode worker."""
    host = HostConfig(cluster_token="secret", heartbeat_s=0.05)
    transfer = KvTransferConfig(transport=transport, **transfer_config)
    prefill = await start_prefill(
        PrefillWorkerConfig(
            engine=EngineConfig(
                model=model, dtype=dtype, kv_cache_mib=64, tensor_parallel=tensor_parallel[0]
            ),
            host=host,
            kv_transfer=transfer,
            scheduler=PrefillSchedulerConfig(chunk_budget=chunk_budget),
        ),
        worker_id="p0",
        incarnation=f"p-{transport}-{chunk_budget}-{batch}-{decode_kv_mib}",
    )
    decode = await start_decode(
        DecodeWorkerConfig(
            engine=EngineConfig(
                model=model, dtype=dtype, kv_cache_mib=decode_kv_mib, tensor_parallel=tensor_parallel[1]
            ),
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
