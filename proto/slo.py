"""Service-level objectives, latency arithmetic and the verdict: the one definition of goodput.

A request meets its SLO when TTFT <= ttft_ms and TPOT <= tpot_ms. TPOT is (last - first) / (n - 1) over the
times at which its n tokens were written to the client, hand-off included; a request of one token is judged on
TTFT alone. Goodput counts requests that met both (DistServe, OSDI 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from . import inference_pb2 as pb
from .errors import InvalidRequest

MAX_OBJECTIVE_MS = 3_600_000.0


class Priority(IntEnum):
    """Scheduling class; higher goes first."""

    BATCH = 1
    STANDARD = 2
    INTERACTIVE = 3


class Verdict(StrEnum):
    """Label `slo` of diphase_requests_total: how an accepted or refused request ended."""

    MET = "met"
    TTFT = "ttft"
    TPOT = "tpot"
    BOTH = "both"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """One request's objectives."""

    ttft_ms: float = 2000.0
    """Gateway's receipt of the request to token 0 written to the client."""
    tpot_ms: float = 100.0
    """Mean time for each token after the first."""
    priority: Priority = Priority.STANDARD

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if not (0.0 < value <= MAX_OBJECTIVE_MS) or math.isnan(value):
                raise InvalidRequest(f"slo.{name} = {value} is out of range; use (0, {MAX_OBJECTIVE_MS:.0f}]")

    def verdict(self, ttft_ms: float, tpot_ms: float | None) -> Verdict:
        """Judges a finished request; `tpot_ms` is None for a request of one token."""
        late = ttft_ms > self.ttft_ms
        slow = tpot_ms is not None and tpot_ms > self.tpot_ms
        if late and slow:
            return Verdict.BOTH
        if late:
            return Verdict.TTFT
        return Verdict.TPOT if slow else Verdict.MET


def tpot_ms(first_at_s: float, last_at_s: float, num_tokens: int) -> float | None:
    """Mean milliseconds a token after the first; None below two tokens."""
    if num_tokens < 2:
        return None
    return (last_at_s - first_at_s) * 1000.0 / (num_tokens - 1)


def slo_from_proto(message: pb.Slo, default: Slo) -> Slo:
    """Objectives of a request, absent ones from `default`.

    Raises:
        InvalidRequest: an objective is not a positive number up to an hour, or the priority is unknown.
    """
    priority = default.priority
    if message.HasField("priority") and message.priority != pb.PRIORITY_UNSPECIFIED:
        try:
            priority = Priority(message.priority)
        except ValueError:
            raise InvalidRequest(f"slo.priority {message.priority} is unknown; use 1, 2 or 3") from None
    return Slo(
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else default.ttft_ms,
        tpot_ms=message.tpot_ms if message.HasField("tpot_ms") else default.tpot_ms,
        priority=priority,
    )


def slo_to_proto(slo: Slo) -> pb.Slo:
    return pb.Slo(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms, priority=pb.Priority.Name(slo.priority))
