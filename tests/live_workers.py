"""A gateway that speaks to workers in this process over real gRPC, and the rank processes of workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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


def rank_pids(of: int | None = None) -> list[int]:
    """Living rank processes that a process, this one by default, has started; in the order of the ranks."""
    parent = of or os.getpid()
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            if b"rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return sorted(found)
