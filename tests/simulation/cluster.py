"""Prefill and decode workers on one event loop: real roles and hosts, fake engines, everything between in
memory.

`Faults` delays and cuts what passes between them; with a seed and a virtual-time loop a run repeats exactly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.decode_workers.role import DecodeRole
from diphase.decode_workers.scheduler import DecodeScheduler
from diphase.engine.block_manager import BlockManager
from diphase.engine.block_tables import BlockTables
from diphase.engine.fake import FAKE_LAYOUT, FakeEngine, StepCost
from diphase.engine.gateway_link import GatewayLink
from diphase.engine.host import WorkerHost
from diphase.engine.host_config import HostConfig
from diphase.engine.server import hello_of
from diphase.kv_transfer.base import Region, TransportContext
from diphase.kv_transfer.coders import Coders
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.link import LinkIdentity
from diphase.kv_transfer.memory_link import LinkNetwork, MemoryDialer
from diphase.kv_transfer.receiver import HandoffReceiver
from diphase.kv_transfer.registry import TransportSet
from diphase.kv_transfer.sender import HandoffSender
from diphase.kv_transfer.side import HandoffSide
from diphase.kv_transfer.transports.local import LocalHub, LocalTransport
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.prefill_workers.role import PrefillRole
from diphase.prefill_workers.scheduler import PrefillScheduler
from diphase.proto import worker_pb2 as pb
from diphase.proto.block_hash import root_hash
from diphase.proto.clock import Clock
from diphase.proto.errors import DiphaseError
from diphase.router.memory_links import MemoryNetwork, WorkerEnd

COST = StepCost(base_s=0.004, prefill_token_s=0.0005, decode_sequence_s=0.001)


@dataclass(slots=True)
class Faults:
    """What goes wrong between processes, drawn from a seed."""

    rng: random.Random
    max_delay_s: float = 0.002
    due: dict[tuple[str, str], float] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    """Processes whose messages to and from others never arrive."""

    def delay(self) -> float:
        return self.rng.random() * self.max_delay_s

    def defer(self, source: str, destination: str, action: Callable[[], None]) -> None:
        """Later, in the order of the direction; never while a side is held."""
        if source in self.held or destination in self.held:
            return
        loop = asyncio.get_running_loop()
        due = max(loop.time() + self.delay(), self.due.get((source, destination), 0.0))
        self.due[source, destination] = due
        loop.call_at(due, action)


@dataclass(slots=True, kw_only=True)
class World:
    """What all processes of a simulation share."""

    clock: Clock
    faults: Faults
    gateways: MemoryNetwork
    workers: LinkNetwork
    hub: LocalHub

    @classmethod
    def of(cls, clock: Clock, seed: int) -> World:
        faults = Faults(random.Random(seed))
        return cls(
            clock=clock,
            faults=faults,
            gateways=MemoryNetwork(faults.delay),
            workers=LinkNetwork(faults.defer),
            hub=LocalHub(faults.defer),
        )


class HostService:
    """Connects a WorkerHost to the router's in-memory network."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._links: dict[WorkerEnd, GatewayLink] = {}
        self._pumps: set[asyncio.Task[None]] = set()

    def attached(self, end: WorkerEnd) -> None:
        pass

    def received(self, end: WorkerEnd, frame: pb.GatewayFrame) -> None:
        link = self._links.get(end)
        if link is None:
            try:
                link = self._links[end] = self._host.attach(frame.messages[0].hello)
            except DiphaseError:
                end.close()
                return
            del frame.messages[0]
            pump = asyncio.create_task(self._pump(link, end))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)
        link.receive(frame)

    def detached(self, end: WorkerEnd) -> None:
        if link := self._links.pop(end, None):
            link.close()

    async def _pump(self, link: GatewayLink, end: WorkerEnd) -> None:
        while (frame := await link.next_frame()) is not None:
            end.send(frame)
        end.close()


class SimWorker:
    """One worker process."""

    def __init__(
        self,
        world: World,
        role: str,
        name: str,
        *,
        num_blocks: int = 64,
        scheduler: PrefillSchedulerConfig | DecodeSchedulerConfig | None = None,
        host: HostConfig | None = None,
        transfer: KvTransferConfig | None = None,
        cost: StepCost = COST,
        block_size: int = FAKE_LAYOUT.block_size,
        address: str = "",
    ) -> None:
        self.name = name
        self.address = address or name
        self.incarnation = f"{name}-{world.clock.now():.6f}"
        layout = replace(FAKE_LAYOUT, block_size=block_size)
        self.engine = FakeEngine(num_blocks=num_blocks, cost=cost, layout=layout)
        self.blocks = BlockManager(num_blocks, self.engine.layout.block_size)
        self._world = world
        self._transfer = transfer or KvTransferConfig(layerwise_tokens=48, layers_per_push=1)
        self._tables = BlockTables(self.blocks, root_hash(self.engine.layout.fingerprint()))
        self.role: PrefillRole | DecodeRole
        if role == "prefill":
            config = scheduler or PrefillSchedulerConfig(chunk_budget=64)
            assert isinstance(config, PrefillSchedulerConfig)
            self.role = self._prefill_role(config)
            running, budget = 1, config.chunk_budget
        else:
            wanted = DecodeSchedulerConfig() if role == "decode" else ColocatedSchedulerConfig()
            decode_config = scheduler or wanted
            assert isinstance(decode_config, DecodeSchedulerConfig)
            self.role = self._decode_role(role, decode_config)
            running, budget = decode_config.max_running, decode_config.prefill_budget
        self.host = WorkerHost(
            role=self.role,
            execute=self.engine.execute_on_loop,
            hello=hello_of(
                self.engine,
                worker_id=name,
                incarnation=self.incarnation,
                role=role,
                max_running=running,
                chunk_budget=budget,
                transports=("local",),
            ),
            config=host or HostConfig(),
            clock=world.clock,
        )
        world.gateways.serve(self.address, HostService(self.host))
        self._running = asyncio.create_task(self.host.run())

    @property
    def peer(self) -> pb.PeerAddress:
        return pb.PeerAddress(worker_id=self.name, incarnation=self.incarnation, address=self.address)

    @property
    def idle(self) -> bool:
        counts = self.blocks.counts()
        load = self.role.load()
        return (
            counts.used == counts.quarantined == 0
            and load.handoffs == load.running == load.waiting_requests == load.waiting_tokens == 0
        )

    async def kill(self) -> None:
        """The process is gone: nothing that it does from here on reaches anyone."""
        self._world.gateways.kill(self.address)
        self._world.workers.kill(self.address)
        self._transport.close()
        await self.stop()

    async def leave(self) -> None:
        """The process ends in good order: what it has sent arrives."""
        await asyncio.sleep(2 * self._world.faults.max_delay_s)
        await self.kill()

    async def stop(self) -> None:
        self._running.cancel()
        await asyncio.wait((self._running,))

    def _transports(self) -> TransportSet:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon(self._pump)

        context = TransportContext(
            incarnation=self.incarnation,
            wake=wake,
            clock=self._world.clock,
            hub=self._world.hub,
        )
        self._transport = LocalTransport(context)
        region = Region(buffer=self.engine.kv_buffer, fd=self.engine.kv_regions[0].fd)
        return TransportSet({"local": self._transport}, [region], byte_thread=False)

    def _side(self) -> HandoffSide:
        return HandoffSide(
            config=self._transfer,
            layout=self.engine.layout,
            transports=self._transports(),
            identity=LinkIdentity(
                worker_id=self.name,
                incarnation=self.incarnation,
                layout_hash=self.engine.layout.fingerprint(),
            ),
            clock=self._world.clock,
            coders=Coders(self._transfer.codecs, self.engine.layout, self._world.clock),
        )

    def _prefill_role(self, config: PrefillSchedulerConfig) -> PrefillRole:
        def open_sender(events: Callable[..., None]) -> HandoffSender:
            sender = HandoffSender(
                self._side(),
                pool=self.blocks,
                dialer=MemoryDialer(self._world.workers, self.address),
                events=events,
            )
            self._pump = sender.pump
            return sender

        return PrefillRole(
            scheduler=PrefillScheduler(config, self._tables, self.engine.limits),
            blocks=self.blocks,
            limits=self.engine.limits,
            num_layers=self.engine.layout.num_layers,
            open_sender=open_sender,
        )

    def _decode_role(self, kind: str, config: DecodeSchedulerConfig) -> DecodeRole:
        def open_receiver(pool: object, events: Callable[..., None]) -> HandoffReceiver:
            receiver = HandoffReceiver(
                self._side(),
                pool=pool,  # type: ignore[arg-type]
                events=events,
            )
            self._pump = receiver.pump
            self._world.workers.listen(self.address, receiver)
            return receiver

        return DecodeRole(
            kind=kind,
            scheduler=DecodeScheduler(config, self._tables, self.engine.limits),
            blocks=self.blocks,
            limits=self.engine.limits,
            open_receiver=open_receiver if kind == "decode" else None,
        )
