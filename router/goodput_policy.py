"""Diphase's own placement: the most that is left of both objectives and of memory.

What is left of the objectives is a candidate's *slack*: the shares of the TTFT objective, of the TPOT
objective and of the KV pool that remain free after the placement. Goodput is lost where the tightest of them
runs out first, so the candidate with the largest smallest slack is taken (within a hundredth: the one with
the next smallest; then the fixed order of workers). The best pair of one layout is the best of each side, and
a placement costs one look at every worker instead of one at every pair.

Judging by both objectives at once follows DistServe's goodput (OSDI 2024).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .config import RouterConfig
from .forecast import DecodeSide, Forecast
from .placement import Demand, Placement
from .placement_policy import PlacementPolicy, by_part
from .prefix_index import PrefixIndex
from .worker_handle import WorkerHandle


class GoodputPolicy(PlacementPolicy):
    """Both phases stay on a decode worker where little is to compute."""

    def __init__(self, prefixes: PrefixIndex, config: RouterConfig) -> None:
        super().__init__(prefixes, config)
        self._local_prefill_tokens = config.local_prefill_tokens

    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        prefills, decodes = by_part(workers, avoid)
        layouts = dict.fromkeys(worker.layout_hash for worker in prefills)
        forecast = self._predictor.forecast(demand)
        sides = [forecast.decode_side(worker) for worker in decodes]
        candidates = []
        for side in sides:
            uncached = forecast.uncached(side.worker)
            # Both phases on one worker: it is colocated, no prefill worker can hand over to it, or little is
            # to compute.
            alone = side.worker.role == "colocated" or side.worker.layout_hash not in layouts
            if alone or uncached <= self._local_prefill_tokens:
                candidates.append(forecast.alone(side, uncached))
        for layout in layouts:
            then = [
                side for side in sides if side.worker.role == "decode" and side.worker.layout_hash == layout
            ]
            if then:
                first = [worker for worker in prefills if worker.layout_hash == layout]
                candidates.append(_best_pair(forecast, first, then, demand))
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        return max(candidates, key=_preference)  # first of equals


def _best_pair(
    forecast: Forecast, prefills: Sequence[WorkerHandle], sides: Sequence[DecodeSide], demand: Demand
) -> Placement:
    """The best of each, among workers of one layout."""
    prompt = min(map(forecast.prompt_side, prefills), key=lambda side: side.prompt_s)
    decode = sides[0]
    if len(sides) > 1:
        per_objective = 1000.0 / demand.slo.tpot_ms
        decode = max(sides, key=lambda side: min(1.0 - side.token_s * per_objective, side.memory))
    return forecast.pair(prompt, decode)


def _preference(candidate: Placement) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Predictions are not good to less than a hundredth: within it, the next smallest slack decides."""
    return tuple([int(slack * 100.0) for slack in candidate.slacks]), candidate.slacks
