"""Splitwise's cluster-level scheduling (ISCA 2024, and its simulator): join the shortest queue, by pending
prompt tokens for the prompt and by memory for the tokens, with a mixed pool that takes what the two pools
have no room for.

The prompt pool is the prefill workers and the token pool the decode workers. Mixed are the colocated workers,
and decode workers for as long as they have prompts of their own to compute: one that was borrowed for a
prompt leaves the token pool by that, and is back when its prompts are done. A colocated worker neither takes
nor gives hand-offs, so it serves both phases or none; prefill workers cannot be borrowed for tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .forecast import Forecast
from .placement import Demand, Placement
from .placement_policy import PlacementPolicy, by_part, partners, with_partner
from .worker_handle import WorkerHandle

MAX_PENDING_TOKENS = 8192
"""A prompt that has to queue goes to another pool when more would be pending (splitwise-sim)."""


class SplitwisePolicy(PlacementPolicy):
    """Both workers of a request are chosen at once, so that KV can go layer by layer."""

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        prefills, decodes = by_part(workers, avoid)
        if not decodes:
            return None
        forecast = self._predictor.forecast(demand)
        paired = with_partner(prefills, decodes)
        prefill = min(paired, key=_pending_tokens) if paired else None
        if prefill is None or _crowded(prefill, demand):
            return forecast.of(None, _for_both_phases(decodes, demand))
        return _for_tokens(forecast, prefill, decodes, demand)


def _for_tokens(
    forecast: Forecast, prefill: WorkerHandle, decodes: Sequence[WorkerHandle], demand: Demand
) -> Placement:
    """The prompt pool has room: where do the tokens go?"""
    targets = partners(prefill, decodes)
    pool = [worker for worker in targets if not _mixed(worker) and _fits(worker, demand)]
    found = pool or [
        worker
        for worker in decodes
        if _fits(worker, demand)
        and (worker in targets if worker.role == "decode" else not _crowded(worker, demand))
    ]
    decode = min(found or targets, key=_memory)  # without room anywhere, the hand-off waits for it
    return forecast.of(None if decode.role == "colocated" else prefill, decode)


def _for_both_phases(decodes: Sequence[WorkerHandle], demand: Demand) -> WorkerHandle:
    """The prompt pool is crowded, or there is none: a mixed worker with room for both phases; else one
    borrowed from the token pool; else the least loaded."""
    roomy = [worker for worker in decodes if _fits(worker, demand) and not _crowded(worker, demand)]
    mixed = [worker for worker in roomy if _mixed(worker)]
    return min(mixed or roomy or decodes, key=lambda worker: (_pending_tokens(worker), _memory(worker)))


def _mixed(worker: WorkerHandle) -> bool:
    return worker.role == "colocated" or worker.waiting_tokens > 0


def _pending_tokens(worker: WorkerHandle) -> int:
    return worker.waiting_tokens


def _crowded(worker: WorkerHandle, demand: Demand) -> bool:
    """A prompt that need not queue is welcome at any length."""
    return worker.waiting_requests > 0 and worker.waiting_tokens + demand.num_tokens > MAX_PENDING_TOKENS


def _memory(worker: WorkerHandle) -> int:
    """Tokens of KV that are taken or promised; a prompt under way counts twice until it is computed, since
    it has its blocks already."""
    taken = (worker.load.blocks_total - worker.usable_blocks) * worker.block_size
    return taken + worker.waiting_tokens + worker.promised_tokens


def _fits(worker: WorkerHandle, demand: Demand) -> bool:
    """Room for all that it may become. A worker that has not reported yet gets the benefit of the doubt."""
    total = worker.load.blocks_total * worker.block_size
    return not total or _memory(worker) + demand.num_tokens + demand.max_new_tokens < total
