"""Names of metrics, of gateways and workers together: one database has them all."""

from __future__ import annotations

from diphase.engine.host_metrics import HostMetrics
from diphase.kv_transfer.counters import HandoffCollector, HandoffCounters
from prometheus_client import CollectorRegistry

from ..simulation.virtual_loop import run_virtually
from .fakes import fake_cluster


def names(registry: CollectorRegistry) -> set[str]:
    return {metric.name for metric in registry.collect()}


def worker_names() -> set[str]:
    return names(HostMetrics().registry) | {
        metric.name for metric in HandoffCollector(HandoffCounters()).collect()
    }


def test_no_name_means_one_thing_on_gateways_and_another_on_workers() -> None:
    async def main() -> None:
        with fake_cluster() as cluster:
            async with cluster.router() as router:
                ours, theirs = names(router.metrics.registry), worker_names()
                assert "diphase_handoff_seconds" in ours
                assert "diphase_worker_handoff_seconds" in theirs
                assert not ours & theirs

    run_virtually(main())
