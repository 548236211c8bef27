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
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.link import LinkIdentity
from diphase.kv_transfer.local import LocalHub, LocalTransport
from diphase.kv_transfer.memory_link import LinkNetwork, MemoryDialer
from diphase.kv_transfer.receiver import HandoffReceiver, ReceiverEvent
from diphase.kv_transfer.registry import TransportSet
from diphase.kv_transfer.sender import HandoffSender, SenderEvent
from diphase.kv_transfer.side import HandoffSide
from diphase.proto.ids import HandoffKey
from diphase.proto.kv_layout import KvLayout
from diphase.proto.worker_pb2 import PeerAddress, Submit

LAYOUT = KvLayout(model="test", num_layers=4, num_kv_heads=1, head_dim=4, block_size=4, dtype="bf16")


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
    memory: np.ndarray[Any, Any]
    transports: TransportSet
    identity: LinkIdentity
    events: list[Any] = field(default_factory=list)


class Pair:
    """`p` (prefill) and `d` (decode) with their drivers, pumped by hand."""

    def __init__(self, config: KvTransferConfig, num_blocks: int, layout: KvLayout = LAYOUT) -> None:
        self.config = config
        self.layout = layout
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
        memory = np.zeros(self.num_blocks * self.layout.block_bytes, dtype=np.uint8)
        incarnation = incarnation or f"{name}-1"
        context = TransportContext(incarnation=incarnation, wake=lambda: None, clock=self.clock, hub=self.hub)
        return Worker(
            name=name,
            pool=BlockManager(self.num_blocks, self.layout.block_size),
            memory=memory,
            transports=TransportSet(
                {"local": LocalTransport(context)},
                Region(buffer=memory.data),
                byte_thread=False,
            ),
            identity=LinkIdentity(
                worker_id=name, incarnation=incarnation, layout_hash=self.layout.fingerprint()
            ),
        )

    def side(self, worker: Worker) -> HandoffSide:
        return HandoffSide(
            config=self.config,
            layout=self.layout,
            transports=worker.transports,
            identity=worker.identity,
            clock=self.clock,
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
            self.view(self.p, block)[:] = rng.integers(0, 256, self.layout.block_bytes, dtype=np.uint8)
        submit = Submit(request_id=key.request_id, attempt=key.attempt)
        self.sender.begin(key, self.address(), submit, num_tokens, block_hashes)
        return blocks

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

    def make(num_blocks: int = 16, **config: Any) -> Pair:
        pair = Pair(KvTransferConfig(**{"layerwise_tokens": 1_000_000, **config}), num_blocks)
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
