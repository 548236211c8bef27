"""Which of colocated and separate pools a plan recommends is what its simulation says, not a preference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import DistServeMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.plan_report import Plan, text
from diphase.cluster.planner.search import Found, Task, search
from diphase.cluster.planner.sim_workload import SimWorkload

QUICK, SLOW = 25.0, 0.4
"""GB/s between nodes."""


def planned(data: Path, link: float, ttft_ms: float, tpot_ms: float) -> tuple[Found, str]:
    """OPT-13B, as DistServe measured it, on two nodes of one A100, with prompts of 512 tokens and 64 more."""
    hardware = replace(load_hardware("a100-sxm-80gb"), gpus_per_node=1, inter_node_gb_per_s=link)
    task = Task(
        machine=DistServeMachine(load_model_shape("opt-13b"), hardware, "opt-13b", data),
        workload=SimWorkload(config=WorkloadConfig(num_requests=60, mean_input=512, mean_output=64)),
        objectives=Objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
        gpus=2,
        seeds=(0,),
    )
    found = search(task)
    return found, "\n".join(text(Plan(task=task, found=found)))


def rates(found: Found) -> dict[str, float]:
    """The best of each kind, requests/s."""
    best: dict[str, float] = {}
    for candidate in (*found.candidates, *found.others):
        kind = candidate.placement.kind
        best[kind] = max(best.get(kind, 0.0), candidate.rate)
    return best


def test_tight_tpot_is_given_separate_pools(data: Path) -> None:
    found, said = planned(data, QUICK, 400.0, 40.0)
    by_kind = rates(found)
    assert by_kind["disaggregated"] > 1.2 * by_kind["colocated"]
    assert found.candidates[0].placement.kind == "disaggregated"
    assert "placement: 1 prefill (tp 1) + 1 decode (tp 1)" in said
    assert "runner-up: 2 colocated" in said


def test_tight_ttft_and_loose_tpot_are_given_colocated_workers(data: Path) -> None:
    found, said = planned(data, QUICK, 200.0, 200.0)
    by_kind = rates(found)
    assert by_kind["colocated"] > 1.2 * by_kind["disaggregated"]
    assert found.candidates[0].placement.kind == "colocated"
    assert "placement: 2 colocated (tp 1" in said
    assert "disaggregated: 1 prefill (tp 1) + 1 decode (tp 1); 2 GPUs" in said


def test_slow_links_turn_the_plan_away_from_separate_pools(data: Path) -> None:
    """What tight TPOT recommends is no longer recommended when hand-offs take their time."""
    found, said = planned(data, SLOW, 400.0, 40.0)
    assert found.candidates[0].placement.kind == "colocated"
    assert rates(found).get("disaggregated", 0.0) < found.candidates[0].rate
    assert "placement: 2 colocated" in said
    assert "disaggregated: serves less than 50% of what colocated workers do" in said
