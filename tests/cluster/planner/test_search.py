from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Answer, Definition, Estimate, Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import Parallel, RooflineMachine, check_parallel, feasible_parallels
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.phase_rates import Kind, PhaseRates, measure_phases
from diphase.cluster.planner.placement import Placement, Pool, build
from diphase.cluster.planner.search import Candidate, Task, part_of, proposals, ranked, search
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.proto.errors import ConfigError

SMALL = RooflineMachine(load_model_shape("llama3.1-8b"), load_hardware("h100-sxm"))
LARGE = RooflineMachine(load_model_shape("llama3.1-70b"), load_hardware("h100-sxm"))
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
PHASES = PhaseRates(rates={PREFILL: 2.0, DECODE: 6.0, COLOCATED: 1.0})


def test_colocated_wins_where_its_own_simulation_says_so() -> None:
    found = search(TASK)
    best = found.candidates[0]
    assert best.rate > 0.0
    assert best.placement.gpus <= TASK.gpus
    for other in (*found.candidates, *found.others):
        assert best.rate >= 0.9 * other.rate
    # One worker computes prompts most of the time here, the other would idle.
    assert best.placement.kind == "colocated"
    pairs = [c.rate for c in (*found.candidates, *found.others) if c.placement.kind == "disaggregated"]
    assert 0.0 < max(pairs) < best.rate


def test_the_same_task_has_the_same_result() -> None:
    assert search(replace(TASK, gpus=1, seeds=(0,))) == search(replace(TASK, gpus=1, seeds=(0,)))


def test_joint_simulations_are_of_the_policy_asked_for() -> None:
    with pytest.raises(ConfigError, match=r'router\.policy = "nobody"'):
        search(replace(TASK, gpus=1, seeds=(0,), policy="nobody"))


def test_splitwises_three_pools_are_planned() -> None:
    found = search(replace(TASK, gpus=4, seeds=(0,), policy="splitwise"))
    judged = (*found.candidates, *found.others)
    mixed = [candidate for candidate in judged if candidate.placement.kind == "mixed"]
    assert mixed
    assert all(candidate.rate > 0.0 and candidate.placement.colocated for candidate in mixed)


def test_pools_are_matched_by_their_rates() -> None:
    best = max(proposals(PHASES, 8, None), key=lambda c: (c.expected, -c.placement.gpus))
    assert best.placement.prefill is not None
    assert best.placement.decode is not None
    assert (best.placement.prefill.count, best.placement.decode.count) == (6, 2)
    assert best.expected == 12.0


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
    pool = Pool(count=1, parallel=Parallel())
    pair = Placement(prefill=pool, decode=pool)
    three = Placement(colocated=Pool(count=3, parallel=Parallel(), budget=512))
    two = Placement(colocated=Pool(count=2, parallel=Parallel(), budget=512))
    order = ranked([_candidate(three, 10.1), _candidate(pair, 10.0), _candidate(two, 10.0)], None)
    assert [candidate.placement for candidate in order] == [two, pair, three]
    assert ranked([_candidate(three, 11.0), _candidate(pair, 10.0)], None)[0].placement == three
    # For a wanted rate, what serves it with the fewest GPUs is best, however much more others serve.
    assert ranked([_candidate(three, 20.0), _candidate(pair, 10.0)], 9.0)[0].placement == pair
    assert ranked([_candidate(three, 20.0), _candidate(pair, 10.0)], 12.0)[0].placement == three


def test_equal_parts_are_simulated_once() -> None:
    pool = Pool(count=8, parallel=Parallel())
    part, times = part_of(Placement(prefill=pool, decode=pool))
    assert (part.workers, times) == (4, 4)
    part, times = part_of(Placement(prefill=Pool(count=3, parallel=Parallel()), decode=pool))
    assert (part.workers, times) == (11, 1)


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
    placement = Placement(
        prefill=Pool(count=1, parallel=Parallel(4)), decode=Pool(count=1, parallel=Parallel(2))
    )
    first, second = build(placement, LARGE).workers
    assert first.num_blocks == LARGE.kv_tokens(Parallel(4)) // 16
    assert second.num_blocks == LARGE.kv_tokens(Parallel(2)) // 16
    assert first.num_blocks > 2 * second.num_blocks
