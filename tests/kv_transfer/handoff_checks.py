"""What tests of sender and receiver ask of both at the end."""

from __future__ import annotations

from typing import Any

from diphase.kv_transfer.receiver import Ready, ReceiveFailed
from diphase.kv_transfer.sender import SendFailed


def idle(pair: Any) -> bool:
    """Nothing in flight, and every block free or cached or the taker's."""
    taken = sum(len(e.block_ids) for e in pair.received() if isinstance(e, Ready))
    p, d = pair.p.pool.counts(), pair.d.pool.counts()
    assert (p.used, p.quarantined) == (0, 0), p
    assert (d.used, d.quarantined) == (taken, 0), d
    assert pair.sender.in_flight == pair.receiver.in_flight == pair.receiver.reserved_blocks == 0
    return True


def error_codes(events: list[Any]) -> list[str]:
    return [event.error.code for event in events if isinstance(event, SendFailed | ReceiveFailed)]
