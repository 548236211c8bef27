"""Hand-offs over real sockets: gRPC links, shm and tcp, both sides in this process on one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import numpy as np
import pytest
from diphase.engine.block_manager import BlockManager
from diphase.kv_transfer.base import Region
from diphase.kv_transfer.coders import Coders
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.grpc_link import GrpcDialer, handoff_service
from diphase.kv_transfer.link import LinkIdentity
from diphase.kv_transfer.receiver import HandoffReceiver, Ready, ReceiveFailed
from diphase.kv_transfer.registry import TransportSet, open_transports
from diphase.kv_transfer.sender import HandoffSender, SendFailed, Sent
from diphase.kv_transfer.side import HandoffSide
from diphase.proto.clock import MonotonicClock
from diphase.proto.handoff_pb2 import HandoffFrame, HandoffMessage
from diphase.proto.handoff_pb2_grpc import HandoffStub
from diphase.proto.ids import HandoffKey
from diphase.proto.kv_layout import KvLayout
from diphase.proto.worker_pb2 import PeerAddress, Submit

LAYOUT = KvLayout(model="test", num_layers=6, num_kv_heads=2, head_dim=16, block_size=8, dtype="bf16")
NUM_BLOCKS = 64


class Side:
    """One worker's pool, memory and transports."""

    def __init__(self, name: str, config: KvTransferConfig) -> None:
        size = NUM_BLOCKS * LAYOUT.block_bytes
        self.fd = os.memfd_create(name)
        os.ftruncate(self.fd, size)
        self.buffer = memoryview(mmap.mmap(self.fd, size))
        self.bytes = np.frombuffer(self.buffer, dtype=np.uint8).reshape(NUM_BLOCKS, -1)
        self.pool = BlockManager(NUM_BLOCKS, LAYOUT.block_size)
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.identity = LinkIdentity(
            worker_id=name, incarnation=f"{name}-1", layout_hash=LAYOUT.fingerprint(), cluster_token="secret"
        )
        self.transports: TransportSet = open_transports(
            config,
            incarnation=self.identity.incarnation,
            pools=[Region(buffer=self.buffer, fd=self.fd)],
            clock=MonotonicClock(),
            token="secret",
        )

    def handoff_side(self, config: KvTransferConfig) -> HandoffSide:
        return HandoffSide(
            config=config,
            layout=LAYOUT,
            transports=self.transports,
            identity=self.identity,
            clock=MonotonicClock(),
            coders=Coders(config.codecs, LAYOUT, MonotonicClock()),
        )

    def close(self) -> None:
        self.transports.close()
        os.close(self.fd)


class Cluster:
    """A prefill and a decode side, joined by gRPC."""

    def __init__(self, config: KvTransferConfig, **identity: Any) -> None:
        self.p, self.d = Side("p", config), Side("d", config)
        self.broken: list[Exception] = []
        self.d.identity = dataclasses.replace(self.d.identity, **identity)
        self.sender = HandoffSender(
            self.p.handoff_side(config),
            pool=self.p.pool,
            dialer=GrpcDialer(),
            events=self.p.events.put_nowait,
        )
        self.receiver = HandoffReceiver(
            self.d.handoff_side(config), pool=self.d.pool, events=self.d.events.put_nowait
        )
        self.server = grpc.aio.server()
        handoff_service(self.receiver)(self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def start(self) -> None:
        await self.server.start()
        self.sender.start(self.broken.append)
        self.receiver.start(self.broken.append)

    async def close(self) -> None:
        assert not self.broken
        await self.sender.close()
        await self.receiver.close()
        await self.server.stop(0)
        self.p.close()
        self.d.close()

    def send(self, key: HandoffKey, num_tokens: int) -> list[int]:
        blocks = self.p.pool.allocate(LAYOUT.num_blocks_for(num_tokens))
        for block in blocks:
            self.p.bytes[block] = np.random.default_rng(block).integers(0, 256, LAYOUT.block_bytes)
        address = PeerAddress(worker_id="d", incarnation="d-1", address=f"127.0.0.1:{self.port}")
        self.sender.begin(key, address, Submit(request_id=key.request_id), num_tokens)
        first = 0
        for stop in self.sender.push_stops(key, last=True):
            self.sender.computed(key, blocks, num_tokens, first, stop - first)
            first = stop
        self.sender.seeded(key, 5, 0.0)
        self.p.pool.release(blocks)
        return blocks


Make = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    clusters: list[Cluster] = []

    async def make_cluster(identity: dict[str, Any] | None = None, **config: Any) -> Cluster:
        clusters.append(Cluster(KvTransferConfig(**config), **(identity or {})))
        await clusters[-1].start()
        return clusters[-1]

    yield make_cluster
    for cluster in clusters:
        await cluster.close()


async def event(side: Side) -> Any:
    return await asyncio.wait_for(side.events.get(), 20.0)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("layerwise_tokens", [0, 1000])
async def test_many_hand_offs_arrive_byte_for_byte(make: Make, transport: str, layerwise_tokens: int) -> None:
    cluster = await make(
        transport=transport,
        layerwise_tokens=layerwise_tokens,
        layers_per_push=4,
        recompute=False,  # these prompts take no time to compute
    )
    for number in range(30):
        num_tokens = 1 + 7 * number % 100
        blocks = cluster.send(HandoffKey("r", number), num_tokens)
        ready = await event(cluster.d)
        assert isinstance(ready, Ready), ready
        np.testing.assert_array_equal(cluster.p.bytes[blocks], cluster.d.bytes[ready.block_ids])
        assert ready.num_bytes == len(blocks) * LAYOUT.block_bytes
        cluster.d.pool.release(ready.block_ids)
        assert await event(cluster.p) == Sent(key=HandoffKey("r", number))
    await asyncio.wait_for(cluster.sender.drain(), 20.0)
    assert cluster.p.pool.counts().free == cluster.d.pool.counts().free == NUM_BLOCKS
    assert cluster.sender.in_flight == cluster.receiver.in_flight == 0


async def test_auto_takes_shared_memory_between_processes_of_one_host(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="diphase.kv_transfer")
    cluster = await make()
    assert cluster.p.transports.names == ["shm", "tcp"]
    cluster.send(HandoffKey("r", 0), 10)
    assert isinstance(await event(cluster.d), Ready)
    assert "transport_chosen name=shm" in caplog.text


async def test_a_wrong_token_is_turned_away_by_the_link(make: Make) -> None:
    cluster = await make(identity={"cluster_token": "other"})
    cluster.send(HandoffKey("r", 0), 10)
    failed = await event(cluster.p)
    assert isinstance(failed, SendFailed)
    assert failed.error.code == "unauthenticated"
    await asyncio.wait_for(cluster.sender.drain(), 20.0)
    assert cluster.p.pool.counts().free == NUM_BLOCKS


async def test_another_layout_is_turned_away_with_both_hashes(make: Make) -> None:
    cluster = await make(identity={"layout_hash": "feedbeef"})
    cluster.send(HandoffKey("r", 0), 10)
    failed = await event(cluster.p)
    assert "feedbeef" in failed.error.message
    assert LAYOUT.fingerprint() in failed.error.message


async def test_nobody_at_the_address_is_a_lost_peer(make: Make) -> None:
    cluster = await make(reserve_timeout_s=1.0)
    await cluster.server.stop(0)
    cluster.send(HandoffKey("r", 0), 10)
    failed = await event(cluster.p)
    assert failed.error.retryable


async def test_a_stopped_service_fails_what_is_in_flight_on_both_sides(make: Make) -> None:
    cluster = await make(transport="tcp")
    taken = cluster.d.pool.allocate(NUM_BLOCKS)
    cluster.send(HandoffKey("r", 0), 10)
    while not cluster.receiver.in_flight:  # noqa: ASYNC110 (the receiver tells nobody that something waits)
        await asyncio.sleep(0)
    await cluster.server.stop(0)
    assert isinstance(await event(cluster.p), SendFailed)
    assert isinstance(await event(cluster.d), ReceiveFailed)
    cluster.d.pool.release(taken)
    await asyncio.wait_for(cluster.sender.drain(), 20.0)
    await asyncio.wait_for(cluster.receiver.drain(), 20.0)
    assert cluster.p.pool.counts().free == cluster.d.pool.counts().free == NUM_BLOCKS


@pytest.mark.parametrize("first", [[], [HandoffMessage()], [HandoffMessage(), HandoffMessage()]])
async def test_a_link_that_does_not_begin_with_a_hello_is_refused(make: Make, first: list[Any]) -> None:
    cluster = await make()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.port}") as channel:
        call = HandoffStub(channel).Attach()
        await call.write(HandoffFrame(messages=first))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
