"""DistServe's algorithms: what they choose, and how it is replicated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diphase.benchmarks.distserve_reference import machine, workload
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.machines import Parallel
from diphase.cluster.planner.plan_report import Plan, text
from diphase.cluster.planner.search import Task
from diphase.cluster.planner.search_distserve import (
    Published,
    PublishedTask,
    high_affinity,
    low_affinity,
    search_published,
)
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.proto.errors import ConfigError

from .placements import pair

ONE, TWO = Parallel(1), Parallel(2)


def published(data: Path, lengths: str, ttft_ms: float, tpot_ms: float) -> PublishedTask:
    """OPT-13B on a node of four A100, without pipelines."""
    return PublishedTask(
        machine=machine(data),
        workload=workload(lengths, data),
        objectives=Objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
        nodes=1,
        gpus_per_node=4,
        max_pp=1,
    )


def test_pairs_of_a_node_are_the_published_ones(data: Path) -> None:
    found = low_affinity(published(data, "azure-conv", 200.0, 100.0))
    assert found is not None
    assert (found.prefill, found.decode) == (TWO, ONE)
    assert found.prefill_rate / 3 == pytest.approx(1.042, rel=0.05)


def test_phases_alone_reach_the_published_limits(data: Path) -> None:
    found = high_affinity(published(data, "512/64", 400.0, 40.0))
    assert found is not None
    assert found.prefill == ONE
    assert found.prefill_rate == pytest.approx(11.60, rel=0.05)
    assert found.decode_rate / found.decode.gpus >= 0.95 * 13.83


def test_what_is_found_is_replicated_for_a_rate_or_to_fill_the_cluster() -> None:
    high = Published(prefill=TWO, decode=ONE, prefill_rate=2.0, decode_rate=3.0, paired=False)
    assert high.serving(4.5) == high.placement(3, 2)
    assert high.rate(high.placement(3, 2)) == 6.0
    assert high.filling(8) == high.placement(3, 2)
    assert high.filling(9) == high.placement(3, 2), "one more decode worker serves nothing more"
    assert high.filling(2) is None
    low = Published(prefill=TWO, decode=ONE, prefill_rate=2.0, decode_rate=2.0, paired=True)
    assert low.filling(8) == low.placement(2, 2)
    assert low.serving(4.5) == low.placement(3, 3)


def test_of_equals_a_gpu_the_fewest_gpus_are_chosen(data: Path) -> None:
    def all_alike(_: object, asked: Iterable[object]) -> Any:
        return [2.5 for _ in asked]

    task = published(data, "512/64", 400.0, 40.0)
    for algorithm, rate in ((low_affinity, 5.0), (high_affinity, 2.5)):
        found = algorithm(task, all_alike)
        assert found is not None
        assert (found.prefill, found.decode) == (ONE, ONE)
        assert (found.prefill_rate, found.decode_rate) == (rate, rate)


def test_nothing_is_found_where_nothing_serves(data: Path) -> None:
    task = published(data, "512/64", 1.0, 40.0)
    assert low_affinity(task) is None
    assert high_affinity(task) is None


def plan(data: Path, records: Sequence[TraceRecord] = ()) -> Task:
    config = WorkloadConfig(num_requests=60, mean_input=512, mean_output=16)
    return Task(
        machine=machine(data),
        workload=SimWorkload(config=config, records=records),
        objectives=Objectives(ttft_ms=400.0, tpot_ms=40.0),
        gpus=2,
        seeds=(0,),
    )


@pytest.mark.parametrize("algorithm", ["distserve-high", "distserve-low"])
def test_the_choice_is_judged_without_the_simplifications(data: Path, algorithm: str) -> None:
    found = search_published(plan(data), algorithm)
    chosen, colocated = found.candidates
    assert colocated.placement.kind == "colocated"
    assert chosen.placement == pair(1, 1)
    assert chosen.answer is not None
    assert 0.6 * chosen.expected < chosen.rate < 1.2 * chosen.expected
    assert f"{algorithm} chose" in found.sentence
    assert found.reached


@pytest.mark.parametrize("rate", [None, 2.0])
def test_colocated_workers_that_serve_more_are_planned_instead(data: Path, rate: float | None) -> None:
    """With a tight TTFT and a loose TPOT both GPUs have to compute prompts (test_regime_plans.py)."""
    task = replace(plan(data), objectives=Objectives(ttft_ms=200.0, tpot_ms=200.0), rate=rate)
    found = search_published(task, "distserve-high")
    best = found.candidates[0]
    assert best.placement.kind == "colocated"
    assert found.reached
    assert "distserve-high chose 1 prefill (tp 1) + 1 decode (tp 1)" in found.sentence
    assert "planned instead" in found.sentence
    said = "\n".join(text(Plan(task=task, found=found)))
    assert f"placement: {best.placement};" in said
    assert "runner-up: 1 prefill (tp 1) + 1 decode (tp 1)" in said


def test_a_rate_beyond_the_gpus_is_not_reached(data: Path) -> None:
    found = search_published(replace(plan(data), rate=100.0), "distserve-low")
    assert not found.reached
    assert found.candidates[0].placement.gpus == 2


def test_shared_prompts_and_impossible_values_are_refused(data: Path) -> None:
    records = [TraceRecord(arrival_s=0.0, input_tokens=512, output_tokens=16, hash_ids=(1,))] * 60
    with pytest.raises(ConfigError, match="share blocks"):
        search_published(plan(data, records), "distserve-low")
    with pytest.raises(ConfigError, match="nodes = 0"):
        replace(published(data, "512/64", 1.0, 1.0), nodes=0)
