"""Who may hand over to whom, as the registry and the workers' hellos tell it. Pure.

The workers refuse each other as well when they shake hands; by then a request has been placed. Unequal
sharding is no obstacle: the hand-off maps one onto the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .worker_handle import WorkerHandle


class Mismatch(NamedTuple):
    """A prefill and a decode worker that are never placed together."""

    prefill: str
    decode: str
    reason: str


def obstacle(prefill: WorkerHandle, decode: WorkerHandle) -> str:
    """Why `prefill` cannot hand over to `decode`; empty when it can, or nothing is known yet."""
    if not prefill.layout_hash or not decode.layout_hash:
        return ""
    if prefill.protocol_version != decode.protocol_version:
        return (
            f"protocol {prefill.protocol_version} (diphase {prefill.package_version or '?'}) and "
            f"{decode.protocol_version} (diphase {decode.package_version or '?'})"
        )
    if prefill.layout_hash != decode.layout_hash:
        return f"KV layouts {_layout(prefill)} and {_layout(decode)}"
    return ""


def mismatches(workers: Sequence[WorkerHandle]) -> Iterator[Mismatch]:
    """Every pair of a prefill and a decode worker that is never placed, with the reason."""
    for prefill in workers:
        for decode in workers:
            if prefill.role == "prefill" and decode.role == "decode" and (why := obstacle(prefill, decode)):
                yield Mismatch(prefill.worker_id, decode.worker_id, why)


def _layout(worker: WorkerHandle) -> str:
    size = f" (blocks of {worker.block_size})" if worker.attached else ""
    return f"{worker.layout_hash}{size}"
