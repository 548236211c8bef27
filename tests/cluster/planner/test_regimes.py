"""Which of colocated and separate pools serves more flips with the objectives, as published (TaiChi)."""

from __future__ import annotations

from pathlib import Path

from diphase.benchmarks.regimes import REGIMES, attainment, deployments, workload
from diphase.cluster.load.traces import load_trace

RATE = 9.0
"""One for both regimes: the highest that the benchmark has."""


def test_tight_tpot_favours_the_best_pools_and_tight_ttft_colocated_workers(data: Path) -> None:
    records, found = load_trace("arxiv", data), deployments(data)
    shares = {
        (regime, name): attainment(deployment, workload(records, 600, RATE), REGIMES[regime])
        for regime in ("tight TPOT", "tight TTFT")
        for name, deployment in found.items()
    }
    best = {
        regime: max(share for (own, name), share in shares.items() if own == regime and name != "colocated")
        for regime in REGIMES
        if regime != "balanced"
    }
    assert best["tight TPOT"] > 2 * shares["tight TPOT", "colocated"]
    assert shares["tight TTFT", "colocated"] > 2 * best["tight TTFT"]
