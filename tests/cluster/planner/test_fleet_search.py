from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.fleet import Budget, GpuType
from diphase.cluster.planner.fleet_loads import buckets, load_kinds, rate_bound
from diphase.cluster.planner.fleet_search import FleetTask, Shape, fleet_search
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.machines import Parallel
from diphase.cluster.planner.phase_rates import PhaseRates, measure_phases
from diphase.cluster.planner.placement import build
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.proto.errors import ConfigError

from .placements import pair, roofline


def gpu(name: str, available: int = 4, model: str = "llama3.1-8b") -> GpuType:
    machine = roofline(model, name)
    price = machine.hardware.price_per_hour
    return GpuType(name=name, machine=machine, available=available, price_per_hour=price)


H100, A100 = gpu("h100-sxm"), gpu("a100-sxm-80gb")
TIGHT = Objectives(ttft_ms=200.0, tpot_ms=20.0)
LENGTHS = [(512, 4)] * 8 + [(6000, 4)] * 2
"""A long prompt takes an A100 longer than the objective, an H100 not."""
RECORDS = [
    TraceRecord(arrival_s=float(i), input_tokens=p, output_tokens=o) for i, (p, o) in enumerate(LENGTHS)
]
WORKLOAD = SimWorkload(config=WorkloadConfig(num_requests=50), records=RECORDS)
TASK = FleetTask(
    types=(H100, A100),
    workload=WORKLOAD,
    objectives=TIGHT,
    budget=Budget(measure="cost", most=7.0),
    seeds=(0,),
)
ONE = Parallel()
BOTH = (H100.name, A100.name)
PAIR = pair(2, 1, on=BOTH)


def test_a_fleet_costs_what_its_gpus_do() -> None:
    assert TASK.takes(PAIR) == pytest.approx(2 * 4.75 + 2.20)
    assert TASK.takes(PAIR, "power") == 2 * 700.0 + 400.0
    assert TASK.cost(PAIR) == TASK.takes(PAIR)
    unpriced = replace(TASK, types=(*TASK.types, gpu("h200-sxm")), budget=Budget(measure="power"))
    assert unpriced.cost(pair(1, 1, on=("h100-sxm", "h200-sxm"))) is None
    assert (PAIR.gpus, PAIR.workers, PAIR.kind, PAIR.hardware) == (
        3,
        3,
        "disaggregated",
        ("h100-sxm", "a100-sxm-80gb"),
    )


def test_each_worker_has_its_types_step_time_and_link() -> None:
    deployment = build(PAIR, TASK.machines)
    first, _, third = deployment.workers
    assert first.step_time is H100.machine.step_time(ONE)
    assert third.step_time is A100.machine.step_time(ONE)
    assert first.num_blocks == H100.machine.kv_tokens(ONE) // 16
    assert third.num_blocks == A100.machine.kv_tokens(ONE) // 16
    fast, slow = (deployment.topology.bandwidths[link] for link in deployment.topology.paths[0, 2])
    assert fast == 2 * slow  # 400 and 200 Gb/s ports
    assert set(deployment.topology.paths) == {(0, 2), (1, 2)}


def test_a_fleet_of_one_type_is_the_placement() -> None:
    placement = pair(2, 1, tp=(2, 1))
    plain = build(placement, {"": H100.machine})
    assert build(placement.on(H100.name), TASK.machines) == plain
    prefill, decode = (plain.topology.bandwidths[link] for link in plain.topology.paths[0, 2])
    assert prefill == 2 * decode == 2 * 450e9 * H100.hardware.link_share  # its own GPUs together
    assert set(plain.topology.paths) == {(0, 2), (1, 2)}


def test_equal_parts_of_a_fleet_are_simulated_once() -> None:
    assert pair(4, 8, on=BOTH).part() == (pair(2, 4, on=BOTH), 2)
    assert PAIR.part() == (PAIR, 1)


@pytest.fixture(scope="module")
def phases() -> dict[str, PhaseRates]:
    return {of.name: measure_phases(of.machine, WORKLOAD, TIGHT, [ONE]) for of in (H100, A100)}


def test_buckets_are_of_like_lengths() -> None:
    prefill = buckets(LENGTHS, "prefill")
    assert [(bucket.share, bucket.prompt) for bucket in prefill] == [(0.8, 512), (0.2, 6000)]
    assert len(buckets([(512, 1), (512, 900)], "prefill")) == 1
    assert len(buckets([(512, 1), (512, 900)], "colocated")) == 2


def test_loads_sum_to_what_the_worker_alone_serves(phases: dict[str, PhaseRates]) -> None:
    kinds = load_kinds(TASK.by_name, phases, WORKLOAD.lengths(0, 50), TIGHT, "prefill")
    fast = next(kind for kind in kinds if kind.gpu is H100)
    slow = next(kind for kind in kinds if kind.gpu is A100)
    assert sum(fast.loads) == pytest.approx(1.0 / phases["h100-sxm"].rates[fast.worker])
    assert math.isinf(slow.loads[-1])  # the long prompts
    assert not math.isinf(slow.loads[0])
    assert slow.loads[0] > fast.loads[0]


def test_no_mixture_is_bounded_below_its_parts(phases: dict[str, PhaseRates]) -> None:
    lengths = WORKLOAD.lengths(0, 50)
    kinds = load_kinds(TASK.by_name, phases, lengths, TIGHT, "decode")
    assert len(kinds) == 2
    for kind in kinds:
        assert rate_bound([(kind, 3)], lengths) == pytest.approx(3 * kind.bound)
    assert rate_bound([(kind, 1) for kind in kinds], lengths) >= sum(kind.bound for kind in kinds) * (
        1 - 1e-9
    )


def test_too_many_hopeless_requests_make_no_load(phases: dict[str, PhaseRates]) -> None:
    hopeless = [(512, 4)] * 8 + [(200_000, 4)] * 2
    assert load_kinds(TASK.by_name, phases, hopeless, TIGHT, "prefill") == []


def test_a_packing_stays_within_budget_and_numbers(phases: dict[str, PhaseRates]) -> None:
    lengths = WORKLOAD.lengths(0, 50)
    roles = ("prefill", "decode")
    shape = Shape(
        phases=tuple(tuple(load_kinds(TASK.by_name, phases, lengths, TIGHT, role)) for role in roles),
        margins=(1.0, 1.0),
    )
    task = replace(TASK, budget=Budget(measure="power"))
    packing = shape.packed(task, 10.0)
    assert packing is not None
    assert packing.cost == task.takes(shape.placement(packing))
    assert shape.packed(replace(task, budget=Budget(measure="power", most=packing.cost - 1.0)), 10.0) is None
    assert shape.packed(task, 1e5) is None  # more than the GPUs that there are


def test_a_budget_buys_the_fleet_that_serves_most() -> None:
    found = fleet_search(TASK)
    best = found.candidates[0]
    assert TASK.takes(best.placement) <= 7.0
    assert set(found.alone) == {"h100-sxm", "a100-sxm-80gb"}
    for other in found.candidates:
        assert TASK.takes(other.placement) <= 7.0
        assert best.rate >= 0.97 * other.rate
    # Seven dollars are one H100, three A100, which are too slow for long prompts, or one of each.
    assert set(best.placement.hardware) == {"h100-sxm", "a100-sxm-80gb"}
    alone = found.alone["h100-sxm"]
    assert alone is not None
    assert best.rate > 1.2 * alone.rate
    assert found.alone["a100-sxm-80gb"] is None


def test_a_rate_is_served_for_the_least() -> None:
    few = (gpu("h100-sxm", 1), gpu("a100-sxm-80gb", 1))
    task = replace(TASK, types=few, rate=15.0, budget=Budget(measure="cost"))
    found = fleet_search(task)
    assert found.reached
    best = found.candidates[0]
    assert best.rate >= 15.0
    takes = [task.takes(c.placement) for c in found.candidates if c.rate >= 15.0]
    assert task.takes(best.placement) == min(takes) == 4.75
    both = fleet_search(replace(task, rate=27.0))  # more than either GPU serves alone
    assert both.reached
    assert len(both.candidates[0].placement.hardware) == 2
    beyond = fleet_search(replace(task, rate=1e3))
    assert not beyond.reached
    assert beyond.candidates[0].rate >= 27.0


def test_a_budget_below_one_worker_is_told_the_least() -> None:
    with pytest.raises(ConfigError, match=r"\$2\.00/h is too small.*tp 1 on a100-sxm-80gb takes \$2\.20/h"):
        fleet_search(replace(TASK, budget=Budget(measure="cost", most=2.0)))


def test_a_type_beyond_the_budget_is_left_out() -> None:
    found = fleet_search(replace(TASK, types=(H100, A100), budget=Budget(measure="cost", most=3.0)))
    assert "$4.75/h" in found.left_out["h100-sxm"]
    assert list(found.phases) == ["a100-sxm-80gb"]


def test_a_model_that_fits_nowhere_is_named() -> None:
    large = tuple(gpu(name, 1, "llama3.1-70b") for name in ("h100-sxm", "a100-sxm-80gb"))
    with pytest.raises(ConfigError, match=r"fits no type: .*131\.4 GiB.*131\.4 GiB"):
        fleet_search(replace(TASK, types=large, budget=Budget(measure="power")))


def test_wrong_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match="h200-sxm has no price"):
        replace(TASK, types=(gpu("h200-sxm"),))
    with pytest.raises(ConfigError, match="named 2 times"):
        replace(TASK, types=(H100, H100))
    with pytest.raises(ConfigError, match="cost = 0"):
        Budget(measure="cost", most=0.0)
    with pytest.raises(ConfigError, match="power = -1"):
        Budget(measure="power", most=-1.0)
    with pytest.raises(ConfigError, match="h100-sxm = 0"):
        gpu("h100-sxm", 0)
    with pytest.raises(ConfigError, match="rate = 0"):
        replace(TASK, rate=0.0)
