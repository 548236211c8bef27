"""What relaxing one thing at a time brings, and how that is said."""

from __future__ import annotations

from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.explain import MOST_GAIN, Relaxation, relaxations, strongest
from diphase.cluster.planner.goodput import Answer, Definition, Estimate, Objectives
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


def test_a_gain_that_was_tried_no_further_is_a_lower_bound() -> None:
    # Far below what the worker serves: everything seems to double it.
    answer = Answer(estimates={Definition.BOTH: Estimate(rates=(0.5,))}, count=60)
    gains = relaxations(TASK, Candidate(placement=colocated(1), expected=0.5, answer=answer))
    assert {gain.gain for gain in gains} == {MOST_GAIN}
    assert {gain.said for gain in gains} == {"≥ +100%"}
    assert strongest(gains).sentence == "25% more compute of prefill would serve ≥ +100% requests"


def test_a_gain_that_was_found_is_said_as_it_is() -> None:
    gains = (Relaxation(what="memory", gain=0.126), Relaxation(what="compute of decode", gain=0.0))
    assert gains[0].said == "+13%"
    assert strongest(gains).sentence == "twice the KV memory would serve +13% requests"
