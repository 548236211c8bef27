"""What a worker that decodes tells the router of its load: of a live worker and of a simulated one the same.

A function of the scheduler's state and the pool's; no clock, no protocol.
"""

from __future__ import annotations

from ..engine.block_manager import BlockCounts
from ..proto.worker_pb2 import Load
from .scheduler import DecodeScheduler


def write_load(
    load: Load,
    scheduler: DecodeScheduler,
    counts: BlockCounts,
    *,
    reserved: int,
    handoffs: int,
    steps: int = 0,
) -> None:
    """
    Args:
        load: all that is known here is replaced.
        reserved: blocks granted to hand-offs that are not complete. Those that a sequence has, too, may be
            among them.
        handoffs: that are not complete, with blocks or without.
        steps: of the steady batch that the scheduler has not been told of, the last of which still runs.
    """
    taken = scheduler.blocks_to_advance(steps)  # of free blocks first
    from_free = min(taken, counts.free)
    used = counts.used + taken
    reserved = min(reserved, used)
    load.waiting_requests = scheduler.num_waiting
    load.waiting_tokens = scheduler.waiting_tokens
    load.running = scheduler.num_running
    load.running_context = scheduler.running_context + max(0, steps - 1) * scheduler.num_running
    load.blocks_total = counts.total
    load.blocks_free = counts.free - from_free
    load.blocks_cached = counts.cached - (taken - from_free)
    load.blocks_running = used - reserved
    load.blocks_reserved = reserved
    load.blocks_quarantined = counts.quarantined
    load.handoffs = handoffs
    load.preemptions = scheduler.preemptions
