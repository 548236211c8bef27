"""What relaxing one thing at a time brings, and how that is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.explain import MOST_GAIN, Relaxation, binding, relaxations, strongest
from diphase.cluster.planner.goodput import Answer, Definition, Estimate, Objectives
from diphase.cluster.planner.machines import Parallel
from diphase.cluster.planner.phase_rates import bound_phases
from diphase.cluster.planner.search import Candidate, Task
from diphase.cluster.planner.sim_workload import SimWorkload

from .placements import colocated, roofline

TASK = Task(
    machine=roofline(),
    workload=SimWorkload(config=WorkloadConfig(num_requests=60, mean_input=512, mean_output=4)),
    objectives=Objectives(ttft_ms=200.0, tpot_ms=20.0),
    gpus=1,
    seeds=(0,),
)


SERVES_MORE = Candidate(
    placement=colocated(1),
    expected=0.5,
    answer=Answer(estimates={Definition.BOTH: Estimate(rates=(0.5,))}, count=60),
)
"""Far below what the worker serves: everything seems to double it."""


def test_a_gain_that_was_tried_no_further_is_a_lower_bound() -> None:
    gains = relaxations(TASK, SERVES_MORE)
    assert {gain.gain for gain in gains} == {MOST_GAIN}
    assert {gain.said for gain in gains} == {"≥ +100%"}
    assert strongest(gains).sentence == "25% more compute of prefill would serve ≥ +100% requests"


@pytest.mark.parametrize(("phase", "said"), [("TTFT", "a lone prefill"), ("TPOT", "a lone decode step")])
def test_a_floor_that_leaves_little_of_its_objective_binds(phase: str, said: str) -> None:
    phases = bound_phases(TASK.machine, TASK.workload, TASK.objectives, [Parallel()])
    floors = {"TTFT": phases.ttft_floors, "TPOT": phases.tpot_floors}[phase]
    for share, what in ((0.8, f"{phase} floor"), (0.7, "compute of prefill")):
        objective = {f"{phase.lower()}_ms": floors[Parallel()].quantile_ms / share}
        task = replace(TASK, objectives=replace(TASK.objectives, **objective))
        found = binding(task, phases, SERVES_MORE)
        assert found.what == what
        assert (said in found.sentence) == (share == 0.8)
        assert binding(task, None, SERVES_MORE).what == "compute of prefill"


def test_a_gain_that_was_found_is_said_as_it_is() -> None:
    gains = (Relaxation(what="memory", gain=0.126), Relaxation(what="compute of decode", gain=0.0))
    assert gains[0].said == "+13%"
    assert strongest(gains).sentence == "twice the KV memory would serve +13% requests"
