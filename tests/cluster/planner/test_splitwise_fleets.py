"""The study of Splitwise's fleets: what its slowdowns and its budgets mean."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from diphase.benchmarks.splitwise_fleets import A100, CAPPED, H100, NO_LIMIT, Split, Study
from diphase.cluster.planner.goodput import Pattern, simulate

ONE = Split(prompt=A100, token=A100, prompts=1, tokens=0)


def test_a_lone_request_on_an_a100_is_not_slowed(data: Path) -> None:
    study = Study(folder=data, model="llama2-70b", trace="azure-conv")
    deployment = study.deployment(ONE)
    result = simulate(deployment, study.workload, NO_LIMIT, 0.01, Pattern(0, 40), policy="splitwise")
    slow = study.slowdowns(result)
    for name in ("TTFT", "TBT", "E2E"):  # prompts of more than 2,048 tokens are in chunks here
        assert slow[name][0] == pytest.approx(1.0, rel=0.05)


def test_an_overloaded_fleet_is_slowed_beyond_the_objectives(data: Path) -> None:
    study = Study(folder=data, model="bloom-176b", trace="azure-code")
    split = Split(prompt=H100, token=CAPPED, prompts=1, tokens=1)
    deployment = study.deployment(split)
    assert [spec.role for spec in deployment.workers] == ["prefill", "decode"]
    result = simulate(deployment, study.workload, NO_LIMIT, 50.0, Pattern(0, 100), policy="splitwise")
    assert study.slowdowns(result)["TTFT"][2] > 6.0


def test_forty_h100_draw_what_seventy_a100_do() -> None:
    assert math.floor(40 * H100.power / A100.power) == 70
    pair = Split(prompt=H100, token=A100, prompts=2, tokens=3)
    assert pair.power == pytest.approx(2 * 44.0 + 3 * 24.8)
    assert pair.dollars == pytest.approx(2 * 38.0 + 3 * 17.6)
    assert CAPPED.power == pytest.approx(0.7 * H100.power)
