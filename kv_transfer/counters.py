"""What one side of the hand-off has counted since it started: plain numbers exported to
Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class HandoffCounters:
    """Monotonic, all of them."""

    transfers: int = 0
    """Hand-offs that ended well."""
    num_bytes: int = 0
    """KV bytes that those moved."""
    num_segments: int = 0
    """Runs of bytes that those moved."""
    failures: Counter[str] = field(default_factory=Counter)
    """Hand-offs that did not, by error code."""
    refused: Counter[str] = field(default_factory=Counter)
    """Messages and notices that changed nothing, by reason: stale, stray, repeated, malformed."""
    digest_mismatches: int = 0
    quarantined_blocks: int = 0
    """Blocks that ever went into quarantine."""


class HandoffCollector(Collector):
    """The counters for Prometheus, read when it asks."""

    def __init__(self, counters: HandoffCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        failures = CounterMetricFamily(
            "diphase_failed_handoffs", "Hand-offs that failed as this side sees them", labels=["code"]
        )
        for code, count in sorted(counters.failures.items()):
            failures.add_metric([code], count)
        refused = CounterMetricFamily(
            "diphase_refused_handoff_messages",
            "Hand-off messages and notices that changed nothing",
            labels=["reason"],
        )
        for reason, count in sorted(counters.refused.items()):
            refused.add_metric([reason], count)
        yield from (failures, refused)
        yield CounterMetricFamily(
            "diphase_digest_mismatches", "KV blocks whose digest was wrong", value=counters.digest_mismatches
        )
        yield CounterMetricFamily(
            "diphase_quarantined_blocks",
            "KV blocks that went into quarantine",
            value=counters.quarantined_blocks,
        )
