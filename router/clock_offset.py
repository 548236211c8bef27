"""How far a worker's clock is from the gateway's, from pings over their stream.

The offset of the exchange with the shortest round trip is the best estimate, its error at most half of that
round trip (Cristian, 1989; NTP's clock filter). Exchanges older than a window are forgotten, so that drift is
followed.
"""

from __future__ import annotations

from collections import deque


class ClockOffset:
    """The offset of one worker's clock, seconds: worker time - gateway time."""

    def __init__(self, window: int = 16) -> None:
        self._exchanges: deque[tuple[float, float]] = deque(maxlen=window)  # (round trip, offset)
        self._best: tuple[float, float] | None = None

    @property
    def known(self) -> bool:
        """False until the first pong."""
        return self._best is not None

    @property
    def round_trip_s(self) -> float:
        """The shortest of the window; 0 while unknown."""
        return 0.0 if self._best is None else self._best[0]

    def observe(self, sent_at: float, worker_at: float, received_at: float) -> None:
        """One exchange: a ping sent at `sent_at`, answered at `worker_at` (worker clock), back at
        `received_at`."""
        round_trip = max(0.0, received_at - sent_at)
        self._exchanges.append((round_trip, worker_at - (sent_at + received_at) / 2))
        self._best = min(self._exchanges)

    def to_gateway(self, worker_at: float) -> float:
        """A worker's stamp on the gateway's clock. Only when `known`."""
        assert self._best is not None
        return worker_at - self._best[1]

    def reset(self) -> None:
        """The worker was restarted: its clock may be another."""
        self._exchanges.clear()
        self._best = None
