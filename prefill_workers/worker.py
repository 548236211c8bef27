"""A prefill worker: engine, scheduler, hand-off and service put together in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from ..engine.block_manager import BlockManager
from ..engine.block_tables import BlockTables
from ..engine.engine import TorchEngine
from ..engine.server import LoadEngine, Progress, RunningWorker, hello_of, load_engine, serve
from ..kv_transfer.base import Region
from ..kv_transfer.grpc_link import GrpcDialer
from ..kv_transfer.sender import HandoffSender, SenderEvent
from ..kv_transfer.side import open_side
from ..proto.block_hash import root_hash
from ..proto.clock import MonotonicClock
from .config import PrefillWorkerConfig
from .role import PrefillRole
from .scheduler import PrefillScheduler


async def start(
    config: PrefillWorkerConfig,
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
        blocks = BlockManager(engine.num_blocks, engine.layout.block_size)
        tables = BlockTables(blocks, root_hash(engine.layout.fingerprint()))

        def open_sender(events: Callable[[SenderEvent], None]) -> HandoffSender:
            return HandoffSender(side, pool=blocks, dialer=GrpcDialer(), events=events)

        role = PrefillRole(
            scheduler=PrefillScheduler(config.scheduler, tables, engine.limits),
            blocks=blocks,
            limits=engine.limits,
            num_layers=engine.layout.num_layers,
            open_sender=open_sender,
        )
        hello = hello_of(
            engine,
            worker_id=worker_id,
            incarnation=incarnation,
            role=role.kind,
            max_running=1,
            chunk_budget=config.scheduler.chunk_budget,
            transports=side.transports.names,
        )
        return await serve(
            role=role, engine=engine, thread=thread, hello=hello, config=config.host, clock=clock, parts=parts
        )
