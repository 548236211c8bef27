"""What is to be placed and what a placement is: plain data that policies, admission and dispatcher share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..proto.slo import Slo
from .worker_handle import WorkerHandle


@dataclass(slots=True)
class Demand:
    """What is to be placed: one attempt at one request."""

    num_tokens: int
    """To be computed or found cached: prompt and tokens of earlier attempts."""
    max_new_tokens: int
    """The most that it may still generate."""
    slo: Slo
    elapsed_s: float
    """Since the gateway received it."""
    block_hashes: Callable[[WorkerHandle], Sequence[bytes]]
    """Of its full blocks, by the layout of that worker."""


@dataclass(slots=True, kw_only=True)
class Placement:
    """A decision and the prediction for it."""

    prefill: WorkerHandle | None
    """None: the decode worker computes the prompt itself."""
    decode: WorkerHandle
    uncached_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    """None for a request of one token."""
    slacks: tuple[float, ...]
    """Shares of the objectives and of the KV pool that are left, ascending. Negative: an objective will be
    missed, or memory is short."""
    informed: bool
    """Whether the step times of both workers were fitted to steps, not taken from a prior."""

    @property
    def first(self) -> WorkerHandle:
        """The worker that gets the submit."""
        return self.decode if self.prefill is None else self.prefill

    def meets(self, slo: Slo) -> bool:
        return self.ttft_ms <= slo.ttft_ms and (self.tpot_ms is None or self.tpot_ms <= slo.tpot_ms)
