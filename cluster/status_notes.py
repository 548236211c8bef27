"""Sentences below the table of `diphase status`: who takes its leave, and who cannot hand over to whom."""

from __future__ import annotations

from collections.abc import Iterator

from ..proto import cluster_pb2 as pb

MOST_MISMATCHES = 6


def notes(status: pb.GetStatusResponse) -> Iterator[str]:
    """One sentence a line, the workers in the table's order."""
    for worker in sorted(status.workers, key=lambda worker: worker.worker_id):
        if worker.state == "draining":
            yield _leaving(worker)
    for pair in status.mismatches[:MOST_MISMATCHES]:
        yield f"{pair.prefill} never hands over to {pair.decode}: {pair.reason}"
    if (more := len(status.mismatches) - MOST_MISMATCHES) > 0:
        yield f"and {more} more pairs that do not fit"


def _leaving(worker: pb.WorkerStatus) -> str:
    requests = worker.load.waiting_requests + worker.load.running
    leases = worker.load.handoffs
    if requests:
        return f"{worker.worker_id} drains: {_count(requests, 'request')}, {_count(leases, 'lease')} left"
    if leases:
        return f"{worker.worker_id} has drained but still serves its {_count(leases, 'lease')}"
    return f"{worker.worker_id} has drained"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
