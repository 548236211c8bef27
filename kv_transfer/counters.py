"""What one side of the hand-off has counted since it started: plain numbers exported to
Prometheus."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..proto.worker_pb2 import TransferFigures

MAX_PEERS = 256
"""Peers whose figures are kept; beyond it the one that was unused longest is forgotten."""
NO_TRANSPORT = "none"
"""Of hand-offs that failed before a transport was chosen."""


@dataclass(slots=True)
class PeerCounters:
    """What one transport did with one peer. Monotonic, all of them; seconds are sums."""

    transfers: int = 0
    """Hand-offs that ended well."""
    num_bytes: int = 0
    """KV bytes that those moved."""
    wire_bytes: int = 0
    """Bytes of the parts whose write was done; fewer than the KV where a codec shrank them."""
    num_segments: int = 0
    """Runs of bytes that those moved."""
    queued_s: float = 0.0
    """From a part's push to its write."""
    wire_s: float = 0.0
    """From a part's write to its end."""
    verify_s: float = 0.0
    """From a part's arrival to the end of its check."""
    failures: Counter[str] = field(default_factory=Counter)
    """Hand-offs that did not end well, by error code."""
    fences: int = 0
    """Asked for."""
    quarantined_blocks: int = 0
    """Blocks that ever went into quarantine."""


@dataclass(slots=True)
class HandoffCounters:
    """Monotonic, all of them."""

    peers: OrderedDict[tuple[str, str], PeerCounters] = field(default_factory=OrderedDict)
    """(transport, the peer's worker_id) -> its figures, the least recently used first."""
    refused: Counter[str] = field(default_factory=Counter)
    """Messages and notices that changed nothing, by reason: stale, stray, repeated, malformed."""
    digest_mismatches: int = 0

    def peer(self, transport: str, worker_id: str) -> PeerCounters:
        """The figures of a peer, to count into."""
        key = (transport or NO_TRANSPORT, worker_id)
        counters = self.peers.setdefault(key, PeerCounters())
        self.peers.move_to_end(key)
        if len(self.peers) > MAX_PEERS:
            self.peers.popitem(last=False)
        return counters

    def figures(self, *, outgoing: bool) -> list[TransferFigures]:
        """The figures of every peer that something was done with, as a message."""
        return [
            TransferFigures(
                transport=transport,
                peer=worker_id,
                outgoing=outgoing,
                transfers=peer.transfers,
                bytes=peer.num_bytes,
                segments=peer.num_segments,
                wire_bytes=peer.wire_bytes,
                queued_s=peer.queued_s,
                wire_s=peer.wire_s,
                verify_s=peer.verify_s,
                failures=peer.failures,
                fences=peer.fences,
                quarantined_blocks=peer.quarantined_blocks,
            )
            for (transport, worker_id), peer in self.peers.items()
            if transport != NO_TRANSPORT or peer.failures
        ]

    def total(self) -> PeerCounters:
        """The sum over the peers that are known."""
        total = PeerCounters()
        for peer in self.peers.values():
            for each in fields(PeerCounters):
                setattr(total, each.name, getattr(total, each.name) + getattr(peer, each.name))
        return total


class HandoffCollector(Collector):
    """The counters for Prometheus, read when it asks."""

    def __init__(self, counters: HandoffCounters, staging: Callable[[], Mapping[str, int]] = dict) -> None:
        """`staging`: bytes of staging buffers that are in use now, by what for."""
        self._counters = counters
        self._staging = staging

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        for ending, help_text, attribute in _PEER_METRICS:
            metric = CounterMetricFamily(
                f"diphase_kv_transfer_{ending}", help_text, labels=["transport", "peer"]
            )
            for labels, peer in counters.peers.items():
                metric.add_metric(labels, getattr(peer, attribute))
            yield metric
        failures = CounterMetricFamily(
            "diphase_failed_handoffs",
            "Hand-offs that failed as this side sees them",
            labels=["transport", "peer", "code"],
        )
        for labels, peer in counters.peers.items():
            for code, count in sorted(peer.failures.items()):
                failures.add_metric([*labels, code], count)
        refused = CounterMetricFamily(
            "diphase_refused_handoff_messages",
            "Hand-off messages and notices that changed nothing",
            labels=["reason"],
        )
        for reason, count in sorted(counters.refused.items()):
            refused.add_metric([reason], count)
        yield from (failures, refused)
        yield CounterMetricFamily(
            "diphase_digest_mismatches",
            "Parts whose bytes were not those sent",
            value=counters.digest_mismatches,
        )
        staging = GaugeMetricFamily(
            "diphase_kv_staging_bytes", "Bytes of staging buffers in use", labels=["use"]
        )
        for use, num_bytes in self._staging().items():
            staging.add_metric([use], num_bytes)
        yield staging


_PEER_METRICS = (
    ("handoffs", "Hand-offs that ended well", "transfers"),
    ("bytes", "KV bytes of hand-offs that ended well", "num_bytes"),
    ("wire_bytes", "Bytes of parts whose write was done", "wire_bytes"),
    ("segments", "Runs of bytes of hand-offs that ended well", "num_segments"),
    ("queued_seconds", "From a part's push to its write, summed", "queued_s"),
    ("wire_seconds", "From a part's write to its end, summed", "wire_s"),
    ("verify_seconds", "From a part's arrival to the end of its check, summed", "verify_s"),
    ("fences", "Fences asked for", "fences"),
    ("quarantined_blocks", "KV blocks that went into quarantine", "quarantined_blocks"),
)
