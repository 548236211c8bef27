"""What one side of the hand-off has counted since it started: plain numbers that whoever exports metrics
reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
