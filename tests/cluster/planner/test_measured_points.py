"""Serving points that were measured, simulated at their concurrency: a sample of them, without host times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diphase.benchmarks.measured_points import (
    Host,
    Point,
    Served,
    WithHost,
    fit_host,
    held_out,
    judged,
    simulate,
    sources,
)
from diphase.cluster.planner.step_latency import read_step_latency
from diphase.cluster.planner.table_files import read_rows
from diphase.router.step_time import StepShape

from ...router.step_time_laws import check_lines, check_stages
from .deployments import table

POINT = Point("qwen3-32b", "h100_sxm", "vllm", "bf16", 4, 16, 1024, 128, 0.1, 0.02)


@pytest.fixture(scope="module")
def points(data: Path) -> list[Point]:
    rows = read_rows(data / "measured" / "serving_points.csv", Point.of)
    return [point for point in rows if point is not None]


@pytest.mark.parametrize(
    ("group", "ttft", "tpot"),
    [
        ("qwen3-32b h100_sxm sglang bf16", 0.25, 0.12),
        ("qwen3-32b h100_sxm vllm bf16", 0.30, 0.20),
        ("llama3.1-8b h100_sxm trtllm bf16", 0.50, 0.15),
    ],
)
def test_points_are_near_what_was_measured(
    data: Path, points: list[Point], group: str, ttft: float, tpot: float
) -> None:
    chosen = [point for point in points if point.group == group and point.concurrency <= 64][::7]
    tables = read_step_latency(data)
    found = judged(chosen, [simulate(point, sources(point, tables)["roofline"]) for point in chosen])
    assert found["TTFT"]["median"] <= ttft
    assert found["TPOT"]["median"] <= tpot


def test_the_page_quotes_what_was_kept_of_all_points() -> None:
    """The sample above says nothing of the marks; the kept run of all points does."""
    docs = Path(__file__).parents[3] / "docs"
    kept = json.loads((docs / "results" / "measured_points.json").read_text())
    page = (docs / "planner.md").read_text()
    roofline, other = kept["roofline"], kept["roofline, vllm with 8,192 tokens a step"]
    for name, found in roofline.items():
        if "as it is" in found:
            values = [found[way][what] for way in ("as it is", "with host time") for what in ("TTFT", "TPOT")]
            label = "all, roofline" if name == "all" else name
            medians = " | ".join(f"{value['median']:.1%}" for value in values)
            assert f"| {label} | {values[0]['points']} | {medians} |" in page
    for found in other.values():
        assert f"{found['TTFT']['median']:.1%}" in page
    everything = roofline["all"]
    assert everything["as it is"]["TTFT"]["points"] == 572
    assert everything["as it is"]["TTFT"]["median"] <= 0.25
    for way in ("as it is", "with host time"):
        assert everything[way]["TPOT"]["median"] > 0.10, "the mark is reached: the page says that it is not"


def test_a_point_without_its_concurrency_is_left_out(points: list[Point]) -> None:
    assert len(points) == 572
    assert {point.input_tokens for point in points} == {1024, 2048, 4096, 8192}


def test_host_times_are_judged_on_models_that_they_have_not_seen(points: list[Point]) -> None:
    folds = held_out(points)
    assert sorted(i for left_out, _ in folds.values() for i in left_out) == list(range(len(points)))
    for left_out, others in folds.values():
        assert others
        assert not {points[i] for i in left_out} & {points[i] for i in others}
        assert {points[i].backend for i in others} == {points[i].backend for i in left_out}
        seen = {(points[i].group, points[i].tp) for i in others}
        assert not seen & {(points[i].group, points[i].tp) for i in left_out}


def test_host_time_adds_to_each_step_and_keeps_the_laws() -> None:
    steps = WithHost(table(), Host(1e-3, 2e-5))
    shape = StepShape(decode_batch=4, decode_context=400.0)
    assert steps.step_s(shape) - table().step_s(shape) == pytest.approx(1e-3 + 4 * 2e-5)
    check_lines(steps, 3, [0.0, 50.0, 700.0])
    check_stages(steps, StepShape(64, 2048.0, 3, 150.0))


def test_a_host_time_that_is_in_the_points_is_found() -> None:
    batches = (8, 16, 32, 64, 128)
    without = [Served(0.1, 0.010 + 1e-5 * batch) for batch in batches]
    measured = [
        POINT._replace(concurrency=batch, tpot_s=served.tpot_s + 1.2e-3 + 2e-5 * batch)
        for batch, served in zip(batches, without, strict=True)
    ]
    assert fit_host(measured, without) == pytest.approx((1.2e-3, 2e-5))
