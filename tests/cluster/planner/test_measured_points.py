"""Serving points that were measured, simulated at their concurrency: a sample of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diphase.benchmarks.measured_points import (
    BEYOND_PROMPT,
    CALIBRATED_ON,
    ENGINES,
    OTHERS,
    REQUESTS_PER_CLIENT,
    SHORTEST,
    Point,
    Served,
    fit_host,
    judged,
    read_points,
    scheduler,
    simulate,
    sources,
)
from diphase.cluster.planner.host_time import SERVING, WithHost
from diphase.cluster.planner.step_latency import read_step_latency

POINT = Point("qwen3-32b", "h100_sxm", "vllm", "bf16", 4, 16, 1024, 128, 0.1, 0.02)


@pytest.fixture(scope="module")
def points(data: Path) -> list[Point]:
    return read_points(data)[0]


@pytest.mark.parametrize(
    ("group", "ttft", "tpot"),
    [
        ("qwen3-32b h100_sxm sglang bf16", 0.25, 0.08),
        ("qwen3-32b h100_sxm vllm bf16", 0.20, 0.10),
        ("llama3.1-8b h100_sxm trtllm bf16", 0.50, 0.10),
    ],
)
def test_points_are_near_what_was_measured(
    data: Path, points: list[Point], group: str, ttft: float, tpot: float
) -> None:
    chosen = [point for point in points if point.group == group and point.concurrency <= 64][::7]
    tables = read_step_latency(data)
    served = [simulate(point, WithHost(sources(point, tables)["roofline"])) for point in chosen]
    found = judged(chosen, served)
    assert found["TTFT"]["median"] <= ttft
    assert found["TPOT"]["median"] <= tpot


def test_the_page_quotes_what_was_kept_of_all_points() -> None:
    """The sample above says nothing of the marks; the kept run of all points does."""
    docs = Path(__file__).parents[3] / "docs"
    kept = json.loads((docs / "results" / "measured_points.json").read_text())
    page = (docs / "planner.md").read_text()
    for source in ("roofline", "table of vLLM"):
        for name, found in kept[source].items():
            ways = [found[way][what] for way in ("with host time", "without") for what in ("TTFT", "TPOT")]
            medians = " | ".join(f"{errors['median']:.1%}" for errors in ways)
            label = f"all, {source}" if name == "all" else name
            if source == "roofline" or name == "all":
                assert f"| {label} | {ways[0]['points']} | {medians} |" in page
    for name, other in kept["other configurations"].items():
        for which, found in other.items():
            values = " | ".join(f"{found[what]['median']:.1%}" for what in ("TTFT", "TPOT"))
            assert f"| {name}: {which} | {found['TTFT']['points']} | {values} | | |" in page
    everything = kept["roofline"]["all"]["with host time"]
    assert everything["TTFT"]["points"] == 572
    assert everything["TTFT"]["median"] <= 0.25
    assert everything["TPOT"]["median"] <= 0.10


def test_points_are_judged_or_calibrated_on(data: Path) -> None:
    """Those without their concurrency are left out, and those of weights in four bits."""
    judged_on, to_calibrate = read_points(data)
    assert (len(judged_on), len(to_calibrate)) == (572, 132)
    assert {point.system for point in judged_on} == {"h100_sxm"}
    assert {(point.system, point.model, point.precision) for point in to_calibrate} == {
        (CALIBRATED_ON, "llama3.1-70b", "fp8")
    }
    assert {point.input_tokens for point in judged_on} == {1024, 2048, 4096, 8192}


def test_a_host_time_that_is_in_the_points_is_found() -> None:
    point = POINT._replace(system=CALIBRATED_ON, model="llama3.1-70b", precision="fp8")
    weights_s = point.shape.num_layers * point.shape.layer_parameters / 8000e9
    without, measured = [], []
    for tp in (1, 2, 8):
        for batch in (8, 16, 32, 64, 128):
            served = Served(0.1, 0.010 + 1e-5 * batch)
            more = 1.2e-3 + 2e-5 * batch + 0.1 * weights_s / tp
            without.append(served)
            measured.append(point._replace(concurrency=batch, tp=tp, tpot_s=served.tpot_s + more))
    host, slower, error = fit_host(measured, without)
    assert host == pytest.approx((1.2e-3, 2e-5))
    assert slower == pytest.approx(0.1)
    assert error < 1e-6


def test_the_planners_host_time_fits_what_it_was_calibrated_on(data: Path) -> None:
    """The quickest of them; `--calibrate` takes all."""
    chosen = [
        point
        for point in read_points(data)[1]
        if point.output_tokens == point.input_tokens and point.tp > 1 and point.concurrency <= 32
    ]
    served = [simulate(point, WithHost(sources(point, {})["roofline"], SERVING)) for point in chosen]
    assert judged(chosen, served)["TPOT"]["median"] <= 0.09


def test_lengths_vary_where_the_client_drew_them() -> None:
    fixed = POINT.lengths()
    assert fixed == [(1024, 128)] * (REQUESTS_PER_CLIENT * 16)
    drawn = POINT._replace(model="llama3.1-70b").lengths()
    assert len(drawn) == len(fixed)
    assert {int(SHORTEST * 1024) <= prompt <= 1024 and 102 <= output <= 128 for prompt, output in drawn} == {
        True
    }
    assert len(set(drawn)) > 100
    assert drawn == POINT._replace(model="llama3.1-70b").lengths()


def test_steps_are_as_large_as_the_engines_configuration_says() -> None:
    room = 10**6
    assert scheduler(POINT, ENGINES["vllm"], room).prefill_budget == 1024 + BEYOND_PROMPT - 16
    assert scheduler(POINT, ENGINES["trtllm"], room).prefill_budget == 8192
    other = OTHERS["TensorRT-LLM by aiconfigurator's rule"]["trtllm"]
    assert scheduler(POINT, other, room).prefill_budget == 2048
    assert POINT._replace(model="llama3.1-70b").engine.beyond_prompt is False


def test_only_some_have_kv_of_eight_bits() -> None:
    assert POINT.kv_precision == POINT._replace(precision="fp8").kv_precision == "bf16"
    assert POINT._replace(precision="fp8", backend="trtllm").kv_precision == "fp8"
    assert POINT._replace(precision="fp8", system=CALIBRATED_ON).kv_precision == "fp8"
