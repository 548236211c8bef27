"""Which of colocated and separate pools serves more flips with the objectives, as published (TaiChi)."""

from __future__ import annotations

import pytest
from diphase.benchmarks.regimes import REGIMES, attainment, deployments, workload
from diphase.cluster.load.traces import data_folder, load_trace

FOLDER = data_folder(None, {})


def test_tight_tpot_favours_pools_and_tight_ttft_colocated_workers() -> None:
    if not (FOLDER / "splitwise_perf").is_dir():
        pytest.skip(f"Splitwise's measurements are not in {FOLDER}")
    records, found = load_trace("arxiv", FOLDER), deployments(FOLDER)
    shares = {
        (regime, name): attainment(found[name], workload(records, 600, rate), REGIMES[regime])
        for regime, rate in (("tight TPOT", 4.0), ("tight TTFT", 7.0))
        for name in ("colocated", "4P4D")
    }
    assert shares["tight TPOT", "4P4D"] > 2 * shares["tight TPOT", "colocated"]
    assert shares["tight TTFT", "colocated"] > 1.5 * shares["tight TTFT", "4P4D"]
