"""Sentences below the table of `diphase status`: who takes its leave, how far steps are from
their predictions, and who cannot hand over to whom."""

from __future__ import annotations

from collections.abc import Iterator

from ..proto import cluster_pb2 as pb

MOST_MISMATCHES = 6


def notes(status: pb.GetStatusResponse) -> Iterator[str]:
    """One sentence a line, the workers in the table's order."""
    workers = sorted(status.workers, key=lambda worker: worker.worker_id)
    for worker in workers:
        if worker.state == "draining":
            yield _leaving(worker)
    if drifts := [_drift(worker) for worker in workers if worker.predicted_steps]:
        yield f"steps beside their prediction: {', '.join(drifts)}"
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


def _drift(worker: pb.WorkerStatus) -> str:
    """The mean error, and where the steps lie: +4 % take longer than predicted."""
    return f"{worker.worker_id} ±{worker.step_error:.0%} ({worker.step_bias:+.0%})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
