"""Clients that each send their next request when their last one has ended: a load with a stated concurrency.

As benchmark tools measure: all begin at once, and there are several requests for each client. What a request
takes from its client to the scheduler (HTTP, the tokeniser) is done for one after the other, and is part of
its TTFT. Knows no simulation; that asks `after()` when a request has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...proto.errors import ConfigError
from .events import to_ns
from .sim_request import SimRequest
from .sim_workload import Lengths


class Sent(NamedTuple):
    """A request, with the moment at which its client sends it as its arrival."""

    request: SimRequest
    taken_in: int
    """When it is at the scheduler, in nanoseconds."""


class ClosedLoop:
    """One run's requests: `first()` of all clients, and what follows each."""

    def __init__(self, lengths: Lengths, clients: int, *, intake_s: float = 0.0) -> None:
        """
        Args:
            lengths: of all requests, in the order in which they are sent.
            intake_s: of a request, from its client to the scheduler.

        Raises:
            ConfigError: there is no client, no request, or the intake is negative.
        """
        if clients < 1 or not lengths:
            raise ConfigError(
                f"{clients} clients with {len(lengths)} requests load nothing; there must be one at least of "
                "each"
            )
        if intake_s < 0.0:
            raise ConfigError(f"intake_s = {intake_s} must be at least 0")
        self._lengths: Sequence[tuple[int, int]] = lengths
        self._clients = clients
        self._intake = to_ns(intake_s)
        self._sent = 0
        self._free = 0  # when the intake has done what was sent so far

    def first(self) -> list[Sent]:
        """One for each client, at the beginning.

        Raises:
            ConfigError: it has begun.
        """
        if self._sent:
            raise ConfigError("a closed loop serves one run; make a new one for the next")
        return [self._send(0) for _ in range(min(self._clients, len(self._lengths)))]

    def after(self, now: int) -> list[Sent]:
        """What a client sends whose request has ended; nothing when all have been sent."""
        return [self._send(now)] if self._sent < len(self._lengths) else []

    def _send(self, now: int) -> Sent:
        self._free = max(self._free, now) + self._intake
        prompt, output = self._lengths[self._sent]
        request = SimRequest(
            index=self._sent, arrival=now, prompt_tokens=prompt, output_tokens=output, hashes=[]
        )
        self._sent += 1
        return Sent(request, self._free)
