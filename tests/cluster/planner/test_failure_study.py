"""What a plan says of the loss of a worker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diphase.cluster.load.workload import Arrivals, WorkloadConfig
from diphase.cluster.planner import failure_study
from diphase.cluster.planner.failure_study import WINDOW, OutageQuestion, outage, outages, recovery
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.placement import build
from diphase.cluster.planner.search import Task
from diphase.cluster.planner.sim_workload import SimWorkload

from .deployments import colocated_worker, decode_worker, deployment, prefill_worker
from .placements import pair, roofline

WORKLOAD = SimWorkload(
    config=WorkloadConfig(num_requests=100, arrivals=Arrivals.POISSON, mean_input=100, mean_output=20, seed=3)
)
OBJECTIVES = Objectives(ttft_ms=150.0, tpot_ms=12.0)
QUESTION = OutageQuestion(
    deployment=deployment(*[prefill_worker(2000)] * 2, *[decode_worker(2000)] * 2),
    workload=WORKLOAD,
    objectives=OBJECTIVES,
    rate=115.0,
    goodput=130.0,
    policy="goodput",
    worker=2,
    away_s=2.0,
    seed=0,
)


def test_a_crowded_placement_misses_while_a_worker_is_away_and_recovers() -> None:
    found = outage(QUESTION)
    assert found.undisturbed > 0.95
    assert 0.0 <= found.attainment < found.undisturbed
    assert found.retried > 0
    assert found.failed == 0
    assert found.stall_ms > 100.0  # the detection
    assert found.recovered_s is not None
    assert 0.0 < found.recovered_s < found.run_s
    assert 0.0 < found.goodput < QUESTION.goodput
    assert outage(QUESTION) == found
    assert "one decode worker lost at 115 requests/s and back after 2 s" in found.sentence()


def test_a_run_outlasts_the_outage_at_any_rate_or_says_that_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failure_study, "MOST_ARRIVALS", 150)
    whole = outage(QUESTION)
    assert whole.run_s > QUESTION.away_s
    assert not whole.cut
    assert "before the worker is back" not in whole.sentence()
    monkeypatch.setattr(failure_study, "MOST_EVER", 150)
    cut = outage(QUESTION)
    assert cut.run_s < QUESTION.away_s
    assert cut.cut
    assert f"the run ends {cut.run_s:.1f} s after the loss, before the worker is back" in cut.sentence()


def test_headroom_absorbs_a_loss() -> None:
    found = outage(replace(QUESTION, rate=10.0))
    assert found.attainment == pytest.approx(found.undisturbed, abs=0.05)
    assert found.recovered_s == 0.0
    assert "never worse than wanted" in found.sentence()


def test_nothing_is_served_while_the_only_worker_is_away() -> None:
    alone = deployment(colocated_worker(2000))
    found = outage(replace(QUESTION, deployment=alone, worker=0, rate=5.0, goodput=20.0, away_s=9.0))
    assert found.goodput == 0.0
    assert found.attainment < 0.1
    assert found.failed > 0  # who had waited for longer than router.wait_for_workers_s


def test_well_again_is_when_no_window_is_bad_any_more() -> None:
    since = np.arange(-10.0, 190.0)
    calm = np.ones(200, dtype=bool)
    assert recovery(since, calm, calm) == 0.0
    hit = calm.copy()
    hit[10:40] = False  # the last of these came 29 s after the loss
    assert recovery(since, hit, calm) == 29.0
    assert recovery(since, hit, hit) == 0.0  # as without the loss
    hit[-WINDOW:] = False
    assert recovery(since, hit, calm) is None
    assert recovery(since[180:] - 175.0, hit[180:], calm[180:]) is None  # less than a window
    few = calm.copy()
    few[50] = few[120] = False  # one of a window is within the objective
    assert recovery(since, few, calm) == 0.0


def test_each_pool_loses_a_worker_at_the_rate_that_was_asked_for() -> None:
    task = Task(
        machine=roofline(), workload=WORKLOAD, objectives=Objectives(ttft_ms=500.0, tpot_ms=30.0), gpus=2
    )
    served = build(pair(1, 1), task.machines)
    assert [(o.role, o.rate) for o in outages(task, served, 10.0, 1.0)] == [("prefill", 8.0), ("decode", 8.0)]
    assert {o.rate for o in outages(replace(task, rate=5.0), served, 10.0, 1.0)} == {5.0}
