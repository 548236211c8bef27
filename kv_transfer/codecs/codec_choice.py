"""Which codec a hand-off uses, or whether its KV is worth sending at all: the break-even rule over what was
measured on this link and in this process.

A codec pays when `size / ratio / bandwidth + encode + decode` is less than `size / bandwidth`; computing
the prompt anew at the other end pays when that is quicker still. Pure decisions over estimates that are
fed by who sends: no clock, no thread, no codec is run here. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .codec import RAW, Codec

RECOMPUTE = "recompute"

SMALLEST_BURST_BYTES = 64 * 1024
"""What moves fewer bytes tells of latency, not of bandwidth."""
STALE_AFTER_S = 60.0
"""A link that was not measured for so long is unknown again: it is sent to uncompressed and measured."""
MEASUREMENTS = 4
"""Of a link, before a choice trusts them. The first ones have the connection's start, the page faults of
fresh memory and whoever else starts in them: by one alone, loopback may seem slow enough for a codec."""
_LARGEST_BURST_BYTES = 8 * 1024 * 1024
"""A link that is never idle is measured each time that so much has moved."""
_FORGET_BYTES = 64 * 1024 * 1024
"""Bytes later, what was measured weighs 1/e of its first weight."""


class Rate:
    """Bytes, or what else is counted, a second over the recent past: amounts and seconds are summed with
    forgetting, so that a long transfer weighs more than a short one and a rate of rates is never taken."""

    __slots__ = ("_amount", "_forget", "_seconds")

    def __init__(self, forget: float = _FORGET_BYTES) -> None:
        """An amount of `forget` later, what was measured weighs 1/e of its first weight."""
        self._forget = forget
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        keep = math.exp(-amount / self._forget)
        self._amount = self._amount * keep + amount
        self._seconds = self._seconds * keep + seconds

    @property
    def value(self) -> float | None:
        """None while nothing is known."""
        return self._amount / self._seconds if self._seconds > 0.0 else None


class LinkEstimate:
    """Bandwidth of one link: bytes of the writes that were done over the time that any was on its way, so
    that writes in parallel count their time once. Times are of the caller's clock, seconds."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._in_flight = 0
        self._burst_bytes = 0
        self._burst_began = 0.0
        self._measured_at = -math.inf
        self._measurements = 0

    def started(self, now: float) -> None:
        """A write has been handed to the transport."""
        if not self._in_flight:
            self._begin(now)
        self._in_flight += 1

    def done(self, num_bytes: int, now: float) -> None:
        """A write that was started has ended well; `num_bytes` as they were on the wire."""
        self._in_flight -= 1
        self._burst_bytes += num_bytes
        if self._in_flight and self._burst_bytes < _LARGEST_BURST_BYTES:
            return
        if self._burst_bytes >= SMALLEST_BURST_BYTES and now > self._burst_began:
            if now - self._measured_at > STALE_AFTER_S:
                self._measurements = 0
            self._rate.add(self._burst_bytes, now - self._burst_began)
            self._measured_at = now
            self._measurements += 1
        self._begin(now)

    def failed(self, now: float) -> None:
        """A write that was started has ended otherwise: how much of it moved is not known, so the time
        that it shared with others tells nothing."""
        self._in_flight -= 1
        self._begin(now)

    def bytes_per_s(self, now: float) -> float | None:
        """None while nothing large enough to tell was measured, or only long ago."""
        return self._rate.value if now - self._measured_at <= STALE_AFTER_S else None

    def settled_bytes_per_s(self, now: float) -> float | None:
        """bytes_per_s() for who gives something up by it; None until MEASUREMENTS were made, none of them
        long after the one before."""
        return self.bytes_per_s(now) if self._measurements >= MEASUREMENTS else None

    def _begin(self, now: float) -> None:
        self._burst_bytes = 0
        self._burst_began = now


class CodecEstimate:
    """What one codec does to the KV of this model: how much smaller, how fast in, how fast out."""

    def __init__(self) -> None:
        self._encoded = Rate()  # KV bytes over seconds
        self._decoded = Rate()
        self._shrunk = Rate()  # KV bytes over payload bytes

    def encoded(self, kv_bytes: int, payload_bytes: int, seconds: float) -> None:
        """One encode()."""
        if kv_bytes > 0 and payload_bytes > 0 and seconds > 0.0:
            self._encoded.add(kv_bytes, seconds)
            self._shrunk.add(kv_bytes, payload_bytes)

    def decoded(self, kv_bytes: int, seconds: float) -> None:
        """One decode(), here or, as it reported, at the other end."""
        if kv_bytes > 0 and seconds > 0.0:
            self._decoded.add(kv_bytes, seconds)

    @property
    def ratio(self) -> float | None:
        """KV bytes a payload byte; None before the first encode()."""
        return self._shrunk.value

    @property
    def encode_bytes_per_s(self) -> float | None:
        """KV bytes a second."""
        return self._encoded.value

    @property
    def decode_bytes_per_s(self) -> float | None:
        """KV bytes a second."""
        return self._decoded.value

    def coding_s(self, kv_bytes: int) -> float | None:
        """To encode and decode so much KV, one after the other; None while it is not known."""
        encode, decode = self.encode_bytes_per_s, self.decode_bytes_per_s
        if encode is None or decode is None:
            return None
        return kv_bytes / encode + kv_bytes / decode

    def break_even_bytes_per_s(self) -> float | None:
        """The bandwidth below which this codec beats sending the KV as it is; 0 if none does."""
        ratio, coding = self.ratio, self.coding_s(1)
        if ratio is None or coding is None:
            return None
        return max(1.0 - 1.0 / ratio, 0.0) / coding


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How the KV of one hand-off gets there."""

    codec: str
    """Name of a codec, or RECOMPUTE: send nothing and compute the prompt at the other end."""
    seconds: float | None
    """What it is expected to take; None when the bandwidth is not known."""
    reason: str
    """In numbers, for the log and the trace."""


def choose(
    size_bytes: int,
    *,
    num_tokens: int,
    bytes_per_s: float | None,
    allowed: Iterable[Codec],
    estimates: Mapping[str, CodecEstimate],
    backlog_bytes: int = 0,
    prefill_tokens_per_s: float | None = None,
) -> Choice:
    """The quickest way for `size_bytes` of KV, the tokens of which are `num_tokens`, over a link that has
    `backlog_bytes` to bring before.

    Args:
        bytes_per_s: of the link, more than 0; None: not known.
        allowed: codecs that both ends have and the configuration names; `raw` is always allowed.
        estimates: of codecs by name; one that has none, or none yet, is not chosen.
        prefill_tokens_per_s: of the other end; None: recomputing is no choice.
    """
    if bytes_per_s is None:
        return Choice(codec=RAW, seconds=None, reason="raw: the link's bandwidth is not known")
    wait = backlog_bytes / bytes_per_s
    seconds = {RAW: wait + size_bytes / bytes_per_s}
    for codec in allowed:
        estimate = estimates.get(codec.name)
        if codec.name == RAW or estimate is None:
            continue
        ratio, coding = estimate.ratio, estimate.coding_s(size_bytes)
        if ratio is not None and coding is not None:
            seconds[codec.name] = wait + size_bytes / ratio / bytes_per_s + coding
    if prefill_tokens_per_s:
        seconds[RECOMPUTE] = num_tokens / prefill_tokens_per_s
    best = min(seconds, key=lambda name: seconds[name])
    others = ", ".join(f"{name} {1e3 * took:.1f}" for name, took in seconds.items() if name != best)
    return Choice(
        codec=best,
        seconds=seconds[best],
        reason=f"{best} {1e3 * seconds[best]:.1f} ms"
        + (f" against {others} ms" if others else "")
        + f" for {size_bytes} bytes behind {backlog_bytes} at {bytes_per_s / 1e6:.1f} MB/s",
    )
