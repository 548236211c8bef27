"""What the simulator is told of a cluster on one machine, and what it then says."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from diphase.cluster.config import ClusterConfig, load
from diphase.cluster.load.workload import Arrival, WorkloadConfig, plan_arrivals
from diphase.cluster.planner.prediction import Busy, deployment_of, predict
from diphase.cluster.planner.profile import Profile, ServingCost, Slowdown
from diphase.cluster.planner.sim_workload import requests_of
from diphase.cluster.planner.validation import (
    Figures,
    Parts,
    Validation,
    figures_of,
    figures_of_simulation,
    verdict_of,
)
from diphase.proto.errors import ConfigError
from diphase.proto.slo import Slo
from diphase.router.step_time import StepShape

from .profiles import profile, true_s

LONE = StepShape(prefill_tokens=256, prefill_context=256 * 128)
SLO = Slo(ttft_ms=2000.0, tpot_ms=100.0)
FELT = Slowdown(
    factors={"prefill": {"prefill": 1.6, "decode": 1.5}, "decode": {"prefill": 1.4, "decode": 1.1}}
)
SERVING = ServingCost(first_token_s=0.005, step_s=0.001, handoff_s=0.004, handoff_bytes_per_s=2e9)


def config(*settings: str) -> ClusterConfig:
    return load(None, settings, random.Random(0))


COLOCATED = ("pools.prefill.workers=0", "pools.decode.workers=0", "pools.colocated.workers=1")


def arrivals(rate: float, count: int = 60) -> list[Arrival]:
    workload = WorkloadConfig(num_requests=count, mean_input=256, mean_output=48)
    return plan_arrivals(workload, [], 8192, rate)


def served(slowdown: Slowdown | None = None, serving: ServingCost | None = None) -> Profile:
    found = profile()
    return replace(found, slowdown=slowdown or found.slowdown, serving=serving or found.serving)


def test_workers_have_the_configurations_schedulers_and_the_profiles_memory() -> None:
    settings = ("pools.decode.max_running=7", "pools.prefill.chunk_budget=128")
    deployment = deployment_of(config(*settings), profile())
    prefill, decode = deployment.workers
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert prefill.scheduler == config(*settings).pools.prefill.scheduler
    assert decode.scheduler == config(*settings).pools.decode.scheduler
    assert {worker.num_blocks for worker in deployment.workers} == {1000}
    assert deployment.topology.paths.keys() == {(0, 1)}
    assert (deployment.num_layers, deployment.layerwise_tokens) == (30, 1024)


def test_serving_and_busy_neighbours_lengthen_steps() -> None:
    given = served(FELT, SERVING)
    shape = StepShape(decode_batch=4, decode_context=800)
    alone = deployment_of(config(), given).workers[1].step_time.step_s(shape)
    assert alone == pytest.approx(true_s(shape) + 0.001)
    beside = deployment_of(config(), given, [Busy(prefill=0.5), Busy(decode=1.0)])
    assert beside.workers[1].step_time.step_s(shape) == pytest.approx(1.2 * true_s(shape) + 0.001)
    assert beside.workers[0].step_time.step_s(LONE) == pytest.approx(1.5 * true_s(LONE) + 0.001)


def test_a_lone_request_takes_its_steps_and_what_serving_adds() -> None:
    result = predict(config("router.local_prefill_tokens=0"), served(serving=SERVING), arrivals(0.1, 2), SLO)
    assert result.ttft_ms == pytest.approx((true_s(LONE) + 0.001 + 0.005) * 1000.0, rel=1e-4)
    steps = sum(true_s(StepShape(decode_batch=1, decode_context=256 + i)) + 0.001 for i in range(1, 48))
    handoff = 0.004 + 16 * 16 * 23_040 / 2e9
    assert result.tpot_ms == pytest.approx((steps + handoff) / 47 * 1000.0, rel=1e-4)


def test_neighbours_are_felt_the_more_the_busier_they_are() -> None:
    slower = []
    for rate in (0.5, 4.0):
        with_, without = (predict(config(), given, arrivals(rate), SLO) for given in (served(FELT), served()))
        slower.append(float(np.median(with_.tpot_ms / without.tpot_ms)))
    assert 1.01 < slower[0] < slower[1] < 1.6
    one = config(*COLOCATED)
    assert predict(one, served(FELT), arrivals(1.0), SLO).tpot_ms == pytest.approx(
        predict(one, served(), arrivals(1.0), SLO).tpot_ms
    ), "a worker alone has no neighbour"


def test_a_traces_shared_blocks_are_shared_in_the_simulation() -> None:
    def arrival(*ids: int) -> Arrival:
        return Arrival(arrival_s=0.0, input_tokens=70, output_tokens=2, hash_ids=ids, hash_block_tokens=32)

    first, second, none = requests_of(
        [arrival(1, 2, 3), arrival(1, 2, 9), replace(arrival(), hash_ids=())], block_size=16
    )
    assert len(first.hashes) == len(second.hashes) == 4
    assert first.hashes == second.hashes, "the first 64 tokens are the same"
    assert len(set(first.hashes)) == 4
    assert none.hashes == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("engine.block_size=32", "made with block_size = 16, and the cluster has 32"),
        ('model.dtype="fp32"', "made with dtype = bf16, and the cluster has fp32"),
        ("pools.decode.kv_cache_mib=64", "kv_cache_mib = 512, and the decode workers have 64"),
        ("pools.decode.tensor_parallel=2", r"pools\.decode\.tensor_parallel = 2"),
    ],
)
def test_a_profile_of_another_engine_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict(config(setting), profile(), arrivals(1.0), SLO)


def test_errors_are_of_the_prediction_beside_the_measurement() -> None:
    measured = figures_of(
        [100.0, 200.0], [10.0, 20.0], [Parts(0.0, 90.0, 10.0), Parts(60.0, 120.0, 20.0)], met=1, total=4
    )
    assert measured.parts_ms == {"queue": 30.0, "prefill": 105.0, "around": 15.0}
    assert measured.ttft_ms == pytest.approx({"p50": 150.0, "p90": 190.0, "p99": 199.0})
    predicted = Figures(
        ttft_ms={"p50": 165.0, "p90": 171.0, "p99": 199.0}, tpot_ms=None, parts_ms={}, attainment=0.2
    )
    found = Validation(rate=1.0, requests=4, measured=measured, predicted=predicted)
    assert found.errors == pytest.approx({"ttft_ms_p50": 0.1, "ttft_ms_p90": -0.1, "ttft_ms_p99": 0.0})
    assert found.attainment_points == pytest.approx(-5.0)
    verdict = verdict_of([found])
    assert verdict.median_error == pytest.approx(0.1)
    assert verdict.median_points == pytest.approx(5.0)
    nothing = Figures(ttft_ms=None, tpot_ms=None, parts_ms={}, attainment=0.2)
    assert not verdict_of([replace(found, predicted=nothing)]).inside


def test_figures_of_a_simulation_leave_refused_requests_out_of_percentiles_only() -> None:
    result = predict(config(), profile(), arrivals(1.0, 10), SLO)
    refused = replace(
        result,
        ttft_ms=np.concatenate(([np.inf], result.ttft_ms[1:])),
        tpot_ms=np.concatenate(([np.inf], result.tpot_ms[1:])),
    )
    figures = figures_of_simulation([refused], SLO)
    assert figures.ttft_ms is not None
    assert figures.ttft_ms["p99"] < 2000.0
    assert figures.attainment == pytest.approx(0.9)
    assert figures.busy is not None
    assert set(figures.busy) == {"prefill", "decode"}
