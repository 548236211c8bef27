"""What a simulation came to: a record for each request, the use of each worker, and the figures of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .deployment import Deployment
from .events import LAST
from .sim_request import SimRequest
from .sim_worker import SimWorker

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUse:
    """Of one worker process over the whole run."""

    role: str
    busy: float
    """Share of the time that its (first) stage computed."""
    steps: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """Arrays are by request, in the order of the workload."""

    ttft_ms: Floats
    """Infinite for a request that was refused, truncated or never finished."""
    tpot_ms: Floats
    """0 for a request of one token; infinite as above."""
    rejected: int
    """Too much for the cluster, or too long."""
    truncated: int
    """Ended by a worker before their last token: what they would have met is not known, so they missed."""
    failed: int
    """Lost with a worker, and not served elsewhere."""
    retried: int
    """Placed more than once."""
    stall_ms: Floats
    """Longest time from the loss of a worker to the next token; 0 for who lost none."""
    duration_s: float
    gpus: int
    workers: tuple[WorkerUse, ...]
    requests: tuple[SimRequest, ...]

    @classmethod
    def of(
        cls, deployment: Deployment, requests: Sequence[SimRequest], workers: Sequence[SimWorker], end: int
    ) -> SimResult:
        served = np.array([request.last_token >= 0 and not request.truncated for request in requests])
        arrival, token0, last, count = (
            np.array([min(getattr(request, name), LAST) for request in requests], dtype=np.int64)
            for name in ("arrival", "token0", "last_token", "output_tokens")
        )
        ttft = np.where(served, (token0 - arrival) / 1e6 + deployment.first_token_s * 1e3, np.inf)
        tpot = np.where(served, (last - token0) / np.maximum(count - 1, 1) / 1e6, np.inf)
        return cls(
            ttft_ms=ttft,
            tpot_ms=tpot,
            rejected=sum(request.rejected for request in requests),
            truncated=sum(request.truncated for request in requests),
            failed=sum(bool(request.error) and not request.rejected for request in requests),
            retried=sum(request.attempts > 1 for request in requests),
            stall_ms=np.array([request.stall / 1e6 for request in requests]),
            duration_s=end / 1e9,
            gpus=deployment.gpus,
            workers=tuple(
                WorkerUse(
                    role=worker.spec.role,
                    busy=worker.busy_ns / end if end else 0.0,
                    steps=worker.steps,
                    preemptions=0 if worker.decode is None else worker.decode.preemptions,
                )
                for worker in workers
            ),
            requests=tuple(requests),
        )

    def attainment(self, ttft_ms: float, tpot_ms: float) -> float:
        """Share of all requests that meet both objectives (DistServe, OSDI 2024)."""
        return float(np.mean((self.ttft_ms <= ttft_ms) & (self.tpot_ms <= tpot_ms)))

    def percentiles_inside(self, ttft_ms: float, tpot_ms: float, share: float = 0.9) -> bool:
        """Whether that percentile of TTFT and that of TPOT are each inside their objective, as DistServe's
        released simulator judges: by linear interpolation, and strictly below."""
        return _quantile(self.ttft_ms, share) < ttft_ms and _quantile(self.tpot_ms, share) < tpot_ms


def _quantile(values: Floats, share: float) -> float:
    """By linear interpolation; infinite as soon as an infinite value takes part."""
    ordered = np.sort(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
    return float(high) if np.isinf(high) else float(low + (high - low) * (place - np.floor(place)))
