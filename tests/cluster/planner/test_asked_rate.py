"""How surely a rate is met: over seeds, at the rate itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.asked_rate import Attainment, attainment_at
from diphase.cluster.planner.goodput import Answer, Definition, Estimate, Objectives
from diphase.cluster.planner.machines import RooflineMachine
from diphase.cluster.planner.search import Candidate, Task
from diphase.cluster.planner.sim_workload import SimWorkload

from .placements import colocated, pair, roofline

TASK = Task(
    machine=roofline(),
    workload=SimWorkload(config=WorkloadConfig(num_requests=100, mean_input=512, mean_output=4)),
    objectives=Objectives(ttft_ms=100.0, tpot_ms=20.0),
    gpus=8,
    seeds=(0, 1, 2),
)


def candidate(workers: int) -> Candidate:
    answer = Answer(estimates={Definition.BOTH: Estimate(rates=(1.0,))}, count=100)
    return Candidate(placement=colocated(workers), expected=1.0, answer=answer)


def test_it_falls_with_the_rate_and_is_of_every_seed() -> None:
    easy, hard, hopeless = (attainment_at(TASK, rate, candidate(1)) for rate in (1.0, 80.0, 1000.0))
    assert easy.by_seed == (1.0, 1.0, 1.0)
    assert 1.0 > hard.mean > hopeless.mean
    assert len(set(hard.by_seed)) > 1


def test_a_placement_of_equal_parts_is_judged_by_one_at_its_share_of_the_rate() -> None:
    part, whole = attainment_at(TASK, 400.0, candidate(4)), attainment_at(TASK, 800.0, candidate(8))
    assert whole == replace(part, rate=800.0)
    assert 0.0 < whole.mean < 1.0


def test_a_part_hands_over_as_the_whole_must() -> None:
    """Two pairs fit a node, and eight, which are judged by two, do not."""
    slow = replace(roofline().hardware, inter_node_gb_per_s=1e-3)
    task = replace(TASK, machine=RooflineMachine(roofline().model, slow), gpus=16)
    two, eight = (attainment_at(task, 4.0 * n, replace(candidate(1), placement=pair(n, n))) for n in (2, 8))
    assert two.mean == 1.0
    assert eight.mean < 0.5


def test_the_interval_is_of_shares() -> None:
    three = Attainment(rate=20.0, by_seed=(0.88, 0.95, 1.0))
    low, high = three.interval
    assert low < 0.88
    assert high == 1.0
    assert three.sentence() == (
        f"at 20 requests/s: 94.3% ({low:.1%} to 100.0%) meet both objectives, at least 90% with 2 of 3 seeds"
    )
    one = Attainment(rate=20.0, by_seed=(0.5,))
    assert one.interval == (0.0, 1.0)
    assert one.sentence() == "at 20 requests/s: 50.0% meet both objectives, at least 90% with 0 of 1 seeds"
    assert three.mean == pytest.approx(0.9433, abs=1e-4)
