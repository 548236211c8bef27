"""DistServe's dispatch (OSDI 2024, and its released simulator): each phase on the worker of its pool that has
the fewest requests.

First come, first served: a request joins the queue of the prefill worker with the fewest requests, waiting or
computed, and the decode worker with the fewest sequences. Nothing else counts: not the lengths, not what is
cached, not the objectives; and every prompt is computed in the prefill pool, however short.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .placement import Demand, Placement
from .placement_policy import PlacementPolicy, by_part, partners, with_partner
from .worker_handle import WorkerHandle


class DistServePolicy(PlacementPolicy):
    """Where workers can pair, only pairs serve, as in DistServe's own deployments. Without one, the colocated
    worker with the fewest requests serves, and without those a decode worker computes prompts itself rather
    than nobody."""

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        prefills, decodes = by_part(workers, avoid)
        if not decodes:
            return None
        forecast = self._predictor.forecast(demand)
        if paired := with_partner(prefills, decodes):
            prefill = min(paired, key=_prompts)
            return forecast.of(prefill, min(partners(prefill, decodes), key=_sequences))
        colocated = [worker for worker in decodes if worker.role == "colocated"]
        return forecast.of(None, min(colocated or decodes, key=_sequences))


def _prompts(worker: WorkerHandle) -> int:
    """A prefill worker's requests; those that it has computed and still holds for a hand-off are over."""
    return worker.waiting_requests + worker.load.running


def _sequences(worker: WorkerHandle) -> int:
    """Of a worker that decodes, with those on their way to it."""
    incoming, _ = worker.incoming
    return worker.waiting_requests + worker.load.running + incoming
