"""The simulator: the same results step by step and in stretches, nothing lost, and times that can be checked
by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.sim_request import sequence_of
from diphase.decode_workers.config import DecodeSchedulerConfig
from diphase.proto.errors import ConfigError
from diphase.proto.slo import Slo
from diphase.router.config import RouterConfig
from diphase.router.latency_model import Coefficients
from hypothesis import given, settings
from hypothesis import strategies as st

from .deployments import (
    CLUSTERS,
    MS,
    ROWS,
    STEPS,
    colocated_worker,
    decode_worker,
    deployment,
    prefill_worker,
    records,
    requests,
    run,
    two_regimes,
)


@pytest.mark.parametrize("name", CLUSTERS)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS, hashes=st.booleans(), local=st.sampled_from([0, 64]))
def test_stretches_give_what_single_steps_give_and_nothing_is_lost(
    name: str, rows: list[tuple[int, int, int]], hashes: bool, local: int
) -> None:
    config = SimulationConfig(router=RouterConfig(local_prefill_tokens=local))
    results = []
    for exact in (True, False):
        result, simulation = run(CLUSTERS[name], rows, replace(config, exact=exact), hashes)
        assert result.rejected == 0
        assert all(request.last_token >= 0 for request in simulation.requests)
        for request in simulation.requests:
            stamps = [request.arrival, request.scheduled, request.token0, request.last_token]
            stamps[3:3] = [] if request.verified < 0 else [request.verified, request.joined]
            assert stamps == sorted(stamps)
        for worker in simulation.workers:
            counts = worker.blocks.counts()
            assert counts.free + counts.cached == counts.total
        results.append((records(simulation), [worker.steps for worker in simulation.workers]))
    assert results[0] == results[1]


def test_a_run_repeats_exactly() -> None:
    rows = [(7 * MS, 40 + 13 * i % 200, 5 + i % 40) for i in range(60)]
    first, second = (run(CLUSTERS["2P2D"], rows)[0] for _ in range(2))
    assert first.ttft_ms.tobytes() == second.ttft_ms.tobytes()
    assert first.tpot_ms.tobytes() == second.tpot_ms.tobytes()


def test_a_lone_request_takes_its_steps_its_bytes_and_the_hand_off_s_latency() -> None:
    result, simulation = run(CLUSTERS["1P1D"], [(0, 48, 3)])
    (request,) = simulation.requests
    prefill = 3.1e-3 + 48 * 1.7e-5 + 3.3e-9 * 48 * 24
    assert request.token0 == pytest.approx(prefill * 1e9, abs=1)
    # Seven of eight layers went while the last one was computed; the eighth's bytes and the latency follow.
    tail = 3 * 65536 / 8 / 1e9
    assert request.verified - request.token0 == pytest.approx((tail + 1e-3) * 1e9, abs=2)
    first, second = (3.1e-3 + 1.3e-4 + 7.7e-8 * context for context in (49, 50))
    assert request.joined == request.verified
    assert request.last_token - request.joined == pytest.approx((first + second) * 1e9, abs=2)
    assert result.ttft_ms[0] == pytest.approx(prefill * 1e3, rel=1e-5)


def test_a_slow_link_delays_the_second_token_alone() -> None:
    fast = run(CLUSTERS["1P1D"], [(0, 256, 8)])[1].requests[0]
    slow = run(CLUSTERS["1P1D, slow link"], [(0, 256, 8)])[1].requests[0]
    assert slow.token0 == fast.token0
    bytes_s = 16 * 65536 / 5e7
    assert slow.verified == pytest.approx((bytes_s + 1e-3) * 1e9, rel=0.02)


def test_short_prompts_are_pushed_whole_when_they_are_computed() -> None:
    cluster = replace(CLUSTERS["1P1D"], layerwise_tokens=256)
    layerwise, whole = (run(cluster, [(0, prompt, 8)])[1].requests[0] for prompt in (256, 255))
    size = 16 * 65536
    assert layerwise.verified - layerwise.token0 == pytest.approx((size / 8 / 1e9 + 1e-3) * 1e9, rel=1e-6)
    assert whole.verified - whole.token0 == pytest.approx((size / 1e9 + 1e-3) * 1e9, rel=1e-6)


def test_transfers_share_a_link() -> None:
    cluster = deployment(prefill_worker(chunk=64), decode_worker(), bandwidth=5e6)
    config = SimulationConfig(router=RouterConfig(local_prefill_tokens=0))
    alone = run(cluster, [(0, 32, 4)], config)[1].requests[0]
    _, *both = run(cluster, [(0, 64, 1), (1, 32, 4), (0, 32, 4)], config)[1].requests
    assert both[0].token0 == both[1].token0  # computed in one step
    assert all(r.verified - r.scheduled > 1.5 * (alone.verified - alone.scheduled) for r in both)


def test_pipeline_stages_work_on_several_steps() -> None:
    one, two = (
        deployment(prefill_worker(steps=two_regimes(stages), chunk=256), decode_worker(), latency_s=0.0)
        for stages in (1, 2)
    )
    rows = [(0, 256, 1)] * 8
    makespan = [max(r.token0 for r in run(cluster, rows)[1].requests) for cluster in (one, two)]
    first = [run(cluster, rows[:1])[1].requests[0].token0 for cluster in (one, two)]
    assert makespan[1] < 0.8 * makespan[0]
    assert first[1] > first[0]  # a lone prompt goes through all stages, and each hop costs


def test_a_prefix_that_is_cached_is_neither_computed_nor_sent() -> None:
    rows = [(0, 160, 4), (500 * MS, 160, 4)]
    first, second = run(CLUSTERS["1P1D"], rows, hashes=True)[1].requests
    assert (first.cached_tokens, second.cached_tokens) == (0, 144)
    assert second.token0 - second.arrival < 0.8 * (first.token0 - first.arrival)


def test_admission_by_slo_refuses_what_cannot_be_met() -> None:
    router = RouterConfig(admission="slo")
    config = SimulationConfig(router=router, ttft_ms=1.0, tpot_ms=100.0)
    result, simulation = run(CLUSTERS["1P1D"], [(0, 200, 4)], config)
    assert result.rejected == 1
    assert simulation.requests[0].token0 == -1
    assert np.isinf(result.ttft_ms[0])
    assert result.attainment(1e9, 1e9) == 0.0


def test_a_prompt_that_no_pool_can_hold_is_refused() -> None:
    result, _ = run(CLUSTERS["1P1D, little memory"], [(0, 5000, 4), (0, 20, 4)])
    assert result.rejected == 1
    assert np.isfinite(result.ttft_ms[1])


def test_a_prompt_that_the_decode_pool_cannot_hold_keeps_nobody_waiting() -> None:
    cluster = deployment(prefill_worker(200), decode_worker(20))
    result, simulation = run(cluster, [(0, 800, 4), (0, 100, 4)])
    assert [request.error for request in simulation.requests] == ["prompt_too_long", ""]
    assert simulation.requests[1].last_token > 0
    assert result.rejected == 1


def test_a_prompt_that_fills_the_decode_pool_keeps_nobody_waiting() -> None:
    cluster = deployment(prefill_worker(200), decode_worker(20))
    result, simulation = run(cluster, [(0, 20 * 16, 4), (0, 100, 4)])
    assert [request.error for request in simulation.requests] == ["prompt_too_long", ""]
    assert simulation.requests[0].verified == -1
    assert simulation.requests[1].last_token > 0
    assert result.rejected == 1


def test_what_outgrows_its_pool_ends_though_no_step_follows() -> None:
    # Live, such a sequence is refused before it comes here; a scheduler must not depend on that.
    simulation = run(deployment(prefill_worker(200), decode_worker(20)), [(0, 100, 4)])[1]
    gone: list[str] = []
    worker = simulation.workers[1]
    worker._on_outgrown = lambda _, sequences: gone.extend(s.key.request_id for s in sequences)
    sequence = sequence_of(requests([(0, 20 * 16, 4)])[0], Slo(), generated=1)
    sequence.block_table = worker.blocks.allocate(20)
    sequence.num_computed = 20 * 16
    assert worker.decode is not None
    worker.decode.admit(sequence)
    worker.start()
    assert gone == [sequence.key.request_id]
    assert worker.idle


def test_a_prompt_that_leaves_no_room_to_generate_is_refused() -> None:
    for cluster in (deployment(prefill_worker(24), decode_worker(24)), deployment(colocated_worker(24))):
        result, simulation = run(cluster, [(0, 24 * 16, 4)])
        assert simulation.requests[0].error == "prompt_too_long"
        assert result.rejected == 1


@pytest.mark.parametrize("pair", [True, False])
def test_a_request_that_the_pool_cuts_has_missed_its_objectives(pair: bool) -> None:
    workers = (prefill_worker(24), decode_worker(24)) if pair else (colocated_worker(24),)
    room = 24 * 16
    # Without room for a second token; cut after some tokens; exactly as long as there is room for.
    rows = [(0, room - 1, 4), (900 * MS, room - 20, 400), (900 * MS, room - 20, 20)]
    result, simulation = run(deployment(*workers), rows)
    first, second, third = simulation.requests
    assert first.last_token == first.token0 > 0
    assert second.last_token > second.token0
    assert [request.truncated for request in simulation.requests] == [True, True, False]
    assert (result.truncated, result.rejected, result.failed) == (2, 0, 0)
    assert np.isinf(result.ttft_ms[:2]).all()
    assert np.isinf(result.tpot_ms[:2]).all()
    assert np.isfinite(result.tpot_ms[2])
    assert result.attainment(1e9, 1e9) == pytest.approx(1 / 3)
    assert third.last_token > 0


def test_a_run_ends_early_when_too_many_are_cut() -> None:
    cluster = deployment(colocated_worker(24))
    config = SimulationConfig(most_missed=1)
    simulation = run(cluster, [(900 * MS, 300, 400)] * 5, config)[1]
    assert [request.truncated for request in simulation.requests] == [True, True, False, False, False]


@pytest.mark.parametrize("bandwidth", [1e-12, 1e-308])
def test_what_would_take_an_age_is_not_served(bandwidth: float) -> None:
    slow = deployment(prefill_worker(), decode_worker(), bandwidth=bandwidth)
    result, _ = run(slow, [(0, 100, 1), (0, 100, 5), (2**63, 100, 1)])
    assert np.isfinite(result.ttft_ms).tolist() == [True, False, False]
    age = deployment(colocated_worker(steps=Coefficients(1e10, 0.0, 0.0, 0.0, 0.0)))
    result, _ = run(age, [(0, 100, 5)])
    assert np.isinf(result.ttft_ms).all()


def test_deployments_that_cannot_serve_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="without workers"):
        Deployment(workers=())
    with pytest.raises(ConfigError, match="decode worker"):
        deployment(prefill_worker())
    with pytest.raises(ConfigError, match="ColocatedSchedulerConfig"):
        WorkerSpec(role="colocated", step_time=STEPS, num_blocks=1, scheduler=DecodeSchedulerConfig())
    with pytest.raises(ConfigError, match="verifier"):
        WorkerSpec(role="verifier", step_time=STEPS, num_blocks=1, scheduler=DecodeSchedulerConfig())
    with pytest.raises(ConfigError, match="block_size"):
        Deployment(workers=(colocated_worker(),), block_size=0)
    with pytest.raises(ConfigError, match="0 KV blocks"):
        decode_worker(0)
