from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Answer, Definition, Estimate, Objectives
from diphase.cluster.planner.machines import Parallel, RooflineMachine, check_parallel, feasible_parallels
from diphase.cluster.planner.phase_rates import PhaseRates, measure_phases
from diphase.cluster.planner.placement import Kind, Placement, build
from diphase.cluster.planner.search import Candidate, Task, proposals, ranked, search, simulated
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.proto.errors import ConfigError

from .placements import colocated, pair, roofline

SMALL, LARGE = roofline("llama3.1-8b"), roofline("llama3.1-70b")
WORKLOAD = SimWorkload(config=WorkloadConfig(num_requests=60, mean_input=1024, mean_output=4))
TASK = Task(
    machine=SMALL,
    workload=WORKLOAD,
    objectives=Objectives(ttft_ms=200.0, tpot_ms=20.0),
    gpus=2,
    seeds=(0, 1),
)
PREFILL, DECODE = Kind("prefill", Parallel()), Kind("decode", Parallel())
COLOCATED = Kind("colocated", Parallel(), 512)
PHASES = PhaseRates(
    rates={PREFILL: 2.0, DECODE: 6.0, COLOCATED: 1.0}, bounds={PREFILL: 3.0, DECODE: 7.0, COLOCATED: 2.0}
)


def test_colocated_wins_where_its_own_simulation_says_so() -> None:
    found = search(TASK)
    best = found.candidates[0]
    assert best.rate > 0.0
    assert best.placement.gpus <= TASK.gpus
    for other in found.known:
        assert best.rate >= 0.9 * other.rate
    # One worker computes prompts most of the time here, the other would idle.
    assert best.placement.kind == "colocated"
    pairs = [c.rate for c in found.known if c.placement.kind == "disaggregated"]
    assert 0.0 < max(pairs) < best.rate


def test_the_same_task_has_the_same_result() -> None:
    assert search(replace(TASK, gpus=1, seeds=(0,))) == search(replace(TASK, gpus=1, seeds=(0,)))


def test_joint_simulations_are_of_the_policy_asked_for() -> None:
    with pytest.raises(ConfigError, match=r'router\.policy = "nobody"'):
        search(replace(TASK, gpus=1, seeds=(0,), policy="nobody"))


def test_splitwises_three_pools_are_planned() -> None:
    found = search(replace(TASK, gpus=4, seeds=(0,), policy="splitwise"))
    mixed = [candidate for candidate in found.known if candidate.placement.kind == "mixed"]
    assert mixed
    assert all(candidate.rate > 0.0 and len(candidate.placement.pools) == 3 for candidate in mixed)


def test_pools_are_matched_by_their_rates() -> None:
    best = max(proposals(PHASES, 8, None), key=lambda c: (c.expected, -c.placement.gpus))
    assert best.placement == pair(6, 2)
    assert (best.expected, best.bound) == (12.0, 14.0)


def test_shared_prompts_that_come_at_once_do_not_make_a_rate_infinite() -> None:
    records = [
        TraceRecord(arrival_s=0.1 * i, input_tokens=2048, output_tokens=20, hash_ids=(1, 2, 3, 4))
        for i in range(100)
    ]
    shared = SimWorkload(config=WorkloadConfig(num_requests=100), records=records)
    patient = Objectives(ttft_ms=30_000.0, tpot_ms=40.0)
    phases = measure_phases(SMALL, shared, patient, [Parallel()])
    assert set(phases.rates) >= {PREFILL, DECODE}
    assert all(math.isfinite(rate) for rate in phases.rates.values())
    assert {c.placement.kind for c in proposals(phases, 4, None)} >= {"colocated", "disaggregated"}


def test_proposals_stay_within_the_budget() -> None:
    assert all(candidate.placement.gpus <= 5 for candidate in proposals(PHASES, 5, None))
    kinds = {candidate.placement.kind for candidate in proposals(PHASES, 5, None)}
    assert kinds == {"colocated", "disaggregated", "mixed"}


def _candidate(placement: Placement, rate: float) -> Candidate:
    answer = Answer(estimates={Definition.BOTH: Estimate(rates=(rate,))}, count=300)
    return Candidate(placement=placement, expected=rate, answer=answer)


def test_ties_go_to_fewer_gpus_then_to_no_hand_off() -> None:
    three, two, one_each = colocated(3), colocated(2), pair(1, 1)
    order = ranked([_candidate(three, 10.1), _candidate(one_each, 10.0), _candidate(two, 10.0)], None)
    assert [candidate.placement for candidate in order] == [two, one_each, three]
    assert ranked([_candidate(three, 11.0), _candidate(one_each, 10.0)], None)[0].placement == three
    # For a wanted rate, what serves it with the fewest GPUs is best, however much more others serve.
    assert ranked([_candidate(three, 20.0), _candidate(one_each, 10.0)], 9.0)[0].placement == one_each
    assert ranked([_candidate(three, 20.0), _candidate(one_each, 10.0)], 12.0)[0].placement == three


def test_equal_parts_are_simulated_once() -> None:
    assert pair(8, 8).part() == (pair(2, 2), 4)
    assert pair(4, 8).part() == (pair(2, 4), 2)
    assert pair(3, 8).part() == (pair(3, 8), 1)


def test_equal_parts_serve_together_what_each_does_up_to_their_bound() -> None:
    alone, eight = (
        Candidate(placement=colocated(count), expected=0.5 * count, bound=1.0 * count) for count in (1, 8)
    )
    one, all_of_them = simulated(TASK, [alone, eight], map)
    assert (one.rate, all_of_them.rate) == (1.0, 8.0)  # far below what they could serve


def test_a_part_hands_over_as_the_whole_must() -> None:
    """A part of two pairs fits a node, eight pairs do not."""
    slow = replace(SMALL.hardware, inter_node_gb_per_s=1e-3)
    task = replace(TASK, machine=RooflineMachine(SMALL.model, slow))
    two, eight = (Candidate(placement=pair(n, n), expected=n, bound=10.0 * n) for n in (2, 8))
    inside, between = simulated(task, [two, eight], map)
    assert inside.rate > 0.0
    assert between.rate == 0.0


def test_parallelism_that_fits() -> None:
    assert [p.tp for p in feasible_parallels(LARGE, 8)] == [2, 4, 8]
    assert Parallel(2, 2) in feasible_parallels(LARGE, 8, max_pp=2)


@pytest.mark.parametrize(
    ("parallel", "field"), [(Parallel(3), "tp = 3"), (Parallel(1, 3), "pp = 3"), (Parallel(0), "tp = 0")]
)
def test_impossible_parallelism_is_named(parallel: Parallel, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_parallel(LARGE.model, parallel)


def test_too_few_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match=r"gpus = 1 cannot hold the model.*131\.4 GiB"):
        feasible_parallels(LARGE, 1)
    with pytest.raises(ConfigError, match="gpus = 0"):
        replace(TASK, gpus=0)
    with pytest.raises(ConfigError, match="rate = -1"):
        replace(TASK, rate=-1.0)


def test_every_pool_has_the_room_of_its_own_workers() -> None:
    first, second = build(pair(1, 1, tp=(4, 2)), {"": LARGE}).workers
    assert first.num_blocks == LARGE.kv_tokens(Parallel(4)) // 16
    assert second.num_blocks == LARGE.kv_tokens(Parallel(2)) // 16
    assert first.num_blocks > 2 * second.num_blocks
