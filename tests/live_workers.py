"""A gateway that speaks to workers in this process over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from diphase.engine.server import RunningWorker
from diphase.proto import worker_pb2 as pb
from diphase.router.links import GrpcLink

from .simulation.gateway import Gateway, Placement


@asynccontextmanager
async def attached(*workers: RunningWorker) -> AsyncIterator[Gateway]:
    gateway = Gateway("g", GrpcLink, token="secret")
    addresses = [worker.address for worker in workers]
    running = asyncio.create_task(gateway.run(addresses))
    try:
        await gateway.attached(*addresses)
        yield gateway
    finally:
        running.cancel()
        await asyncio.wait((running,))


def placement(prefill: RunningWorker | None, decode: RunningWorker) -> Placement:
    def peer(worker: RunningWorker) -> pb.PeerAddress:
        return pb.PeerAddress(
            worker_id=worker.hello.worker_id, incarnation=worker.incarnation, address=worker.address
        )

    return Placement(peer(prefill) if prefill else None, peer(decode))


async def until_idle(gateway: Gateway, *workers: RunningWorker) -> None:
    """As the gateway sees it: by heartbeats."""
    for worker in workers:
        while True:
            beat = gateway.heartbeats[worker.address]
            load = beat.load
            if load.blocks_free + load.blocks_cached == load.blocks_total and not load.handoffs:
                break
            gateway.heard.clear()
            await gateway.heard.wait()
