"""Whether a request is taken: the hard limits of one gateway, and in "slo" mode the prediction of its
placement."""

from __future__ import annotations

from ..proto.errors import Overloaded, SloInfeasible
from ..proto.slo import Slo
from .config import RouterConfig
from .placement import Placement

SMOOTHING = 0.05
"""Weight of the newest interval between first tokens in their running mean."""
MIN_RETRY_S, MAX_RETRY_S = 0.05, 60.0


class Admission:
    """Counts the requests that wait for their first token, and their prompt tokens."""

    def __init__(self, config: RouterConfig) -> None:
        self._max_requests = config.max_queued_requests
        self._max_tokens = config.max_queued_tokens
        self._judges_slo = config.admission == "slo"
        self.queued_requests = 0
        self.queued_tokens = 0
        self._last_start_at: float | None = None
        self._interval_s = 0.1  # between first tokens while requests wait

    def check_limits(self, num_tokens: int) -> None:
        """Raises:
        Overloaded: a limit would be passed; says which and when to come back.
        """
        if self.queued_requests >= self._max_requests:
            raise Overloaded(
                f"{self.queued_requests} requests wait for their first token, the limit "
                f"(router.max_queued_requests); retry later or add workers",
                retry_after_s=self._retry_after_s(1),
            )
        if self.queued_requests and self.queued_tokens + num_tokens > self._max_tokens:
            mean = self.queued_tokens / self.queued_requests
            raise Overloaded(
                f"{self.queued_tokens} prompt tokens wait, {num_tokens} more pass the limit of "
                f"{self._max_tokens} (router.max_queued_tokens); retry later or add workers",
                retry_after_s=self._retry_after_s(num_tokens / mean),
            )

    def check_placement(self, placement: Placement, slo: Slo) -> None:
        """Raises:
        SloInfeasible: in "slo" mode, when even the best placement is predicted to miss the SLO.
        """
        if not self._judges_slo or not placement.informed or placement.meets(slo):
            return
        tpot_ms = placement.tpot_ms or 0.0
        raise SloInfeasible(
            f"no placement meets the SLO now: predicted are {placement.ttft_ms:.0f} ms to the first token "
            f"(objective {slo.ttft_ms:.0f}) and {tpot_ms:.1f} ms for each further one (objective "
            f"{slo.tpot_ms:.1f}); retry later, relax slo.ttft_ms or slo.tpot_ms, or add workers",
            retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, (placement.ttft_ms - slo.ttft_ms) / 1000.0)),
        )

    def enter(self, num_tokens: int, now: float) -> None:
        """A request was taken and waits."""
        if self.queued_requests == 0:
            self._last_start_at = now
        self.queued_requests += 1
        self.queued_tokens += num_tokens

    def leave(self, num_tokens: int, now: float) -> None:
        """It got its first token, or ended without."""
        self.queued_requests -= 1
        self.queued_tokens -= num_tokens
        if self._last_start_at is not None:
            self._interval_s += SMOOTHING * (now - self._last_start_at - self._interval_s)
        self._last_start_at = now

    def _retry_after_s(self, num_requests: float) -> float:
        """When so many of those that wait will have left."""
        return min(MAX_RETRY_S, max(MIN_RETRY_S, num_requests * self._interval_s))
