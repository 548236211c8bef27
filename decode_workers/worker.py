"""A decode or colocated worker: engine, scheduler, hand-off and service put together in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from ..engine.block_manager import BlockManager
from ..engine.block_tables import BlockTables
from ..engine.engine import TorchEngine
from ..engine.server import LoadEngine, Progress, RunningWorker, hello_of, load_engine, serve
from ..kv_transfer.base import Region
from ..kv_transfer.grpc_link import handoff_service
from ..kv_transfer.receiver import HandoffReceiver, ReceiverEvent
from ..kv_transfer.side import HandoffSide, open_side
from ..proto.block_hash import root_hash
from ..proto.clock import MonotonicClock
from .config import DecodeWorkerConfig
from .reservations import ReservationPool
from .role import DecodeRole, OpenReceiver
from .scheduler import DecodeScheduler


async def start(
    config: DecodeWorkerConfig,
    *,
    worker_id: str,
    incarnation: str,
    progress: Progress | None = None,
    load: LoadEngine = TorchEngine.load,
) -> RunningWorker:
    """Returns a worker that serves. `incarnation` has to be fresh; `progress` is called from the engine's
    thread.

    Raises:
        CheckpointError: the model cannot be found or read.
        ConfigError: a port is in use, or the KV pool does not fit the machine.
        TransferError: the configured transport does not work here.
    """
    clock = MonotonicClock()
    with ExitStack() as parts:
        engine, thread = await load_engine(load, config.engine, progress, parts)
        transports: list[str] = []
        open_receiver: OpenReceiver | None = None
        if config.role == "decode":
            side = open_side(
                config.kv_transfer,
                worker_id=worker_id,
                incarnation=incarnation,
                cluster_token=config.host.cluster_token,
                layout=engine.layout,
                pools=[Region(buffer=pool.buffer, fd=pool.fd) for pool in engine.kv_regions],
                sharding=engine.sharding,
                clock=clock,
                parts=parts,
            )
            transports = side.transports.names
            open_receiver = _receiver_opener(side)
        blocks = BlockManager(engine.num_blocks, engine.layout.block_size)
        tables = BlockTables(blocks, root_hash(engine.layout.fingerprint()))
        role = DecodeRole(
            kind=config.role,
            scheduler=DecodeScheduler(config.scheduler, tables, engine.limits),
            blocks=blocks,
            limits=engine.limits,
            open_receiver=open_receiver,
            servicers=lambda receiver: [handoff_service(receiver)],
        )
        hello = hello_of(
            engine,
            worker_id=worker_id,
            incarnation=incarnation,
            role=role.kind,
            max_running=config.scheduler.max_running,
            chunk_budget=config.scheduler.prefill_budget,
            transports=transports,
        )
        return await serve(
            role=role, engine=engine, thread=thread, hello=hello, config=config.host, clock=clock, parts=parts
        )


def _receiver_opener(side: HandoffSide) -> OpenReceiver:
    def open_receiver(pool: ReservationPool, events: Callable[[ReceiverEvent], None]) -> HandoffReceiver:
        return HandoffReceiver(side, pool=pool, events=events)

    return open_receiver
