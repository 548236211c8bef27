"""A prefill and a decode side in one process: real machines, drivers, pools and bytes; links and time are
given."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from diphase.engine.block_manager import BlockManager
from diphase.kv_transfer.base import Region, TransportContext
from diphase.kv_transfer.coders import Coders
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.link import LinkIdentity
from diphase.kv_transfer.memory_link import LinkNetwork, MemoryDialer
from diphase.kv_transfer.pool_bytes import PoolBytes
from diphase.kv_transfer.receiver import HandoffReceiver, ReceiverEvent
from diphase.kv_transfer.registry import TransportSet
from diphase.kv_transfer.sender import HandoffSender, SenderEvent
from diphase.kv_transfer.side import HandoffSide
from diphase.kv_transfer.transports.local import LocalHub, LocalTransport
from diphase.proto.clock import MonotonicClock
from diphase.proto.ids import HandoffKey
from diphase.proto.kv_layout import UNSHARDED, KvLayout, Sharding
from diphase.proto.worker_pb2 import PeerAddress, Submit

LAYOUT = KvLayout(model="test", num_layers=4, num_kv_heads=2, head_dim=4, block_size=4, dtype="bf16")


class ManualClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


class Network:
    """The `defer` of links and hub: what goes from one peer to another waits here, in order, until it is let
    go."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self.held: set[tuple[str, str]] = set()

    def __call__(self, source: str, destination: str, action: Callable[[], None]) -> None:
        self.lanes.setdefault((source, destination), []).append(action)

    def step(self) -> bool:
        """Lets one action of each lane that is not held go; False when there was none."""
        ready = [lane for key, lane in self.lanes.items() if lane and key not in self.held]
        for lane in ready:
            lane.pop(0)()
        return bool(ready)


@dataclass
class Worker:
    """One side with its pool and memory."""

    name: str
    pool: BlockManager
    memories: list[np.ndarray[Any, Any]]
    """Of each rank."""
    staging: np.ndarray[Any, Any]
    transports: TransportSet
    identity: LinkIdentity
    events: list[Any] = field(default_factory=list)

    @property
    def memory(self) -> np.ndarray[Any, Any]:
        """Of a worker of one rank."""
        [memory] = self.memories
        return memory


class Pair:
    """`p` (prefill) and `d` (decode) with their drivers, pumped by hand."""

    def __init__(
        self,
        config: KvTransferConfig,
        num_blocks: int,
        layout: KvLayout = LAYOUT,
        p_sharding: Sharding = UNSHARDED,
        d_sharding: Sharding = UNSHARDED,
    ) -> None:
        self.config = config
        self.layout = layout
        self.shardings = {"p": p_sharding, "d": d_sharding}
        self.clock = ManualClock()
        self.control = Network()
        self.data = Network()
        self.links = LinkNetwork(self.control)
        self.hub = LocalHub(self.data)
        self.num_blocks = num_blocks
        self.p = self.worker("p")
        self.d = self.worker("d")
        self.receiver = self.new_receiver(self.d)
        self.dialer = MemoryDialer(self.links, "p:1")
        self.sender = HandoffSender(
            self.side(self.p), pool=self.p.pool, dialer=self.dialer, events=self.p.events.append
        )

    def worker(self, name: str, incarnation: str = "") -> Worker:
        sharding = self.shardings[name]
        ranks = [sharding.rank_layout(self.layout, rank) for rank in range(sharding.num_ranks)]
        memories = [np.zeros(self.num_blocks * rank.block_bytes, dtype=np.uint8) for rank in ranks]
        staging = np.zeros(self.config.staging_mib << 20, dtype=np.uint8)
        incarnation = incarnation or f"{name}-1"
        context = TransportContext(incarnation=incarnation, wake=lambda: None, clock=self.clock, hub=self.hub)
        return Worker(
            name=name,
            pool=BlockManager(self.num_blocks, self.layout.block_size),
            memories=memories,
            staging=staging,
            transports=TransportSet(
                {"local": LocalTransport(context)},
                [Region(buffer=memory.data) for memory in memories],
                staging=Region(buffer=staging.data) if self.config.staging != "never" else None,
                byte_thread=False,
            ),
            identity=LinkIdentity(
                worker_id=name,
                incarnation=incarnation,
                layout_hash=self.layout.fingerprint(),
                sharding=sharding,
            ),
        )

    def side(self, worker: Worker) -> HandoffSide:
        return HandoffSide(
            config=self.config,
            layout=self.layout,
            transports=worker.transports,
            identity=worker.identity,
            clock=self.clock,
            coders=Coders(self.config.codecs, self.layout, MonotonicClock()),
        )

    def new_receiver(self, worker: Worker) -> HandoffReceiver:
        receiver = HandoffReceiver(self.side(worker), pool=worker.pool, events=worker.events.append)
        self.links.listen("d:1", receiver)
        return receiver

    def address(self) -> PeerAddress:
        return PeerAddress(worker_id="d", incarnation=self.d.identity.incarnation, address="d:1")

    def begin(self, key: HandoffKey, num_tokens: int, block_hashes: tuple[bytes, ...] = ()) -> list[int]:
        """Blocks of a sequence whose hand-off begins; their bytes are random."""
        blocks = self.p.pool.allocate(self.layout.num_blocks_for(num_tokens))
        rng = np.random.default_rng(abs(hash(key)) % 2**32)
        for block in blocks:
            data = rng.integers(0, 256, self.layout.block_bytes, dtype=np.uint8)
            self.bytes_of(self.p).scatter(data.data, [block], 0, self.layout.num_layers)
        submit = Submit(request_id=key.request_id, attempt=key.attempt)
        self.sender.begin(key, self.address(), submit, num_tokens, block_hashes)
        return blocks

    def bytes_of(self, worker: Worker) -> PoolBytes:
        buffers = [memory.data for memory in worker.memories]
        return PoolBytes(self.layout, self.shardings[worker.name], buffers)

    def read(self, worker: Worker, blocks: list[int]) -> bytes:
        """Their KV in canonical order."""
        out = bytearray(len(blocks) * self.layout.block_bytes)
        self.bytes_of(worker).gather(memoryview(out), blocks, 0, self.layout.num_layers)
        return bytes(out)

    def view(self, worker: Worker, block: int) -> np.ndarray[Any, Any]:
        size = self.layout.block_bytes
        return worker.memory[block * size : (block + 1) * size]

    def pump(self, rounds: int = 50) -> None:
        """Everything that can happen without time passing."""
        for _ in range(rounds):
            moved = self.control.step() | self.data.step()
            before = len(self.p.events) + len(self.d.events)
            self.sender.pump()
            self.receiver.pump()
            if not moved and before == len(self.p.events) + len(self.d.events) and not self.pending():
                return

    def pending(self) -> bool:
        return any(
            lane and key not in network.held
            for network in (self.control, self.data)
            for key, lane in network.lanes.items()
        )

    def pass_time(self, seconds: float) -> None:
        """In small steps, with everything pumped between them."""
        until = self.clock.time + seconds
        while self.clock.time < until:
            self.clock.time = min(until, self.clock.time + 0.25)
            self.pump()

    def sent(self) -> list[SenderEvent]:
        return list(self.p.events)

    def received(self) -> list[ReceiverEvent]:
        return list(self.d.events)


@pytest.fixture
async def make_pair() -> Any:
    """Builds a Pair on the running loop (whose own time is not used)."""
    assert asyncio.get_running_loop()
    pairs: list[Pair] = []

    def make(
        num_blocks: int = 16,
        p_sharding: Sharding = UNSHARDED,
        d_sharding: Sharding = UNSHARDED,
        **config: Any,
    ) -> Pair:
        config = {"layerwise_tokens": 1_000_000, "staging_mib": 1, "staging_window_mib": 1, **config}
        pair = Pair(KvTransferConfig(**config), num_blocks, p_sharding=p_sharding, d_sharding=d_sharding)
        pairs.append(pair)
        return pair

    yield make
    for pair in pairs:
        await pair.sender.close()
        await pair.receiver.close()
        pair.p.transports.close()
        pair.d.transports.close()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)
