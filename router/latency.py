"""Where a request's time went: stamps on the gateway's clock, and the stages between them.

Every stage is the difference of two stamps and neighbouring stages share one, so the stages of TTFT add up to
TTFT and none is a remainder. A worker's stamps are converted by its clock offset and put into order: the
conversion's error, at most half a round trip, moves time between neighbouring stages but never creates or
loses any.
"""

from __future__ import annotations

from ..proto import inference_pb2 as pb
from ..proto import worker_pb2
from ..proto.slo import Slo, Verdict, tpot_ms
from .clock_offset import ClockOffset


class RequestTimes:
    """The stamps of one request, seconds on the gateway's clock; None until they are known."""

    __slots__ = (
        "attempts",
        "cached_tokens",
        "decode_scheduled_at",
        "decode_worker",
        "first_written_at",
        "handoff_bytes",
        "handoff_segments",
        "last_written_at",
        "num_written",
        "prefill_scheduled_at",
        "prefill_worker",
        "received_at",
        "submitted_at",
        "token0_at",
        "token1_at",
        "tokenised_at",
        "verified_at",
    )

    def __init__(self, received_at: float, tokenised_at: float) -> None:
        self.received_at = received_at
        self.tokenised_at = tokenised_at
        self.submitted_at: float | None = None
        self.prefill_scheduled_at: float | None = None
        self.token0_at: float | None = None
        self.verified_at: float | None = None
        self.decode_scheduled_at: float | None = None
        self.token1_at: float | None = None
        self.first_written_at: float | None = None
        self.last_written_at = received_at
        self.num_written = 0
        self.cached_tokens = 0
        self.handoff_bytes = 0
        self.handoff_segments = 0
        self.attempts = 0
        self.prefill_worker = ""
        self.decode_worker = ""

    def prefilled(self, times: worker_pb2.PrefillTimes, clock: ClockOffset, now: float) -> None:
        """Token 0 came, at `now`, from a worker with that clock; its submit left at `submitted_at`."""
        earliest = self.tokenised_at if self.submitted_at is None else self.submitted_at
        self.prefill_scheduled_at = _between(earliest, clock.to_gateway(times.scheduled_at), now)
        self.token0_at = _between(self.prefill_scheduled_at, clock.to_gateway(times.token_at), now)
        self.cached_tokens = times.cached_tokens

    def handed_off(self, times: worker_pb2.DecodeTimes, clock: ClockOffset, now: float) -> None:
        """Token 1 came, at `now`, from the decode worker."""
        earliest = self.received_at if self.token0_at is None else self.token0_at
        self.verified_at = _between(earliest, clock.to_gateway(times.verified_at), now)
        self.decode_scheduled_at = _between(self.verified_at, clock.to_gateway(times.scheduled_at), now)
        self.token1_at = _between(self.decode_scheduled_at, clock.to_gateway(times.token_at), now)

    def written(self, num_tokens: int, now: float) -> None:
        """So many tokens are written to the client, at `now`."""
        if self.first_written_at is None:
            self.first_written_at = now
        self.last_written_at = now
        self.num_written += num_tokens

    @property
    def ttft_ms(self) -> float:
        """Receipt to token 0 written."""
        first = self.last_written_at if self.first_written_at is None else self.first_written_at
        return (first - self.received_at) * 1000.0

    @property
    def tpot_ms(self) -> float | None:
        if self.first_written_at is None:
            return None
        return tpot_ms(self.first_written_at, self.last_written_at, self.num_written)

    @property
    def handoff_s(self) -> float:
        """Token 0 sampled to KV verified at the decode worker; 0 without a hand-off."""
        if self.verified_at is None or self.token0_at is None:
            return 0.0
        return self.verified_at - self.token0_at

    def verdict(self, slo: Slo) -> Verdict:
        return slo.verdict(self.ttft_ms, self.tpot_ms)

    def spans(self) -> list[tuple[str, str, float, float]]:
        """(stage, worker or "" for the gateway, begin, end) of the stages that are known, in order."""
        written = self.first_written_at
        prefill, decode = self.prefill_worker, self.decode_worker
        stamps = (
            ("tokenise", "", self.received_at, self.tokenised_at),
            ("placement", "", self.tokenised_at, self.submitted_at),
            ("prefill queue", prefill, self.submitted_at, self.prefill_scheduled_at),
            ("prefill", prefill, self.prefill_scheduled_at, self.token0_at),
            ("delivery", "", self.token0_at, written),
            ("hand-off", decode, self.token0_at, self.verified_at),
            ("decode queue", decode, self.verified_at, self.decode_scheduled_at),
            ("first decode", decode, self.decode_scheduled_at, self.token1_at),
            ("further tokens", decode, self.token1_at, self.last_written_at if written else None),
        )
        return [
            (name, where, begin, end)
            for name, where, begin, end in stamps
            if begin is not None and end is not None
        ]

    def stages(self) -> pb.Stages:
        """The message for the client. A re-attached request has no stages of TTFT: another gateway saw
        them."""
        stages = pb.Stages(
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            attempts=self.attempts,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            handoff_bytes=self.handoff_bytes,
        )
        submitted, scheduled, token0 = self.submitted_at, self.prefill_scheduled_at, self.token0_at
        if submitted is not None and scheduled is not None and token0 is not None:
            written = self.last_written_at if self.first_written_at is None else self.first_written_at
            stages.tokenise_ms = (self.tokenised_at - self.received_at) * 1000.0
            stages.placement_ms = (submitted - self.tokenised_at) * 1000.0
            stages.prefill_queue_ms = (scheduled - submitted) * 1000.0
            stages.prefill_ms = (token0 - scheduled) * 1000.0
            stages.delivery_ms = (written - token0) * 1000.0
            verified, joined, token1 = self.verified_at, self.decode_scheduled_at, self.token1_at
            if verified is not None and joined is not None and token1 is not None:
                stages.handoff_ms = (verified - token0) * 1000.0
                stages.decode_queue_ms = (joined - verified) * 1000.0
                stages.first_decode_ms = (token1 - joined) * 1000.0
        return stages


def _between(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))
