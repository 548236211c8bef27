"""The simulator places by the policy that is configured, with the live router's object."""

from __future__ import annotations

import pytest
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.sim_request import SimRequest
from diphase.router.config import POLICIES, RouterConfig

from .deployments import CLUSTERS, MS, colocated_worker, decode_worker, deployment, prefill_worker, run

THREE_POOLS = deployment(prefill_worker(4000, chunk=512), decode_worker(4000), colocated_worker(4000))
COLOCATED, DECODE = 2, 1
"""Indices in THREE_POOLS."""


def config(name: str, exact: bool = False) -> SimulationConfig:
    return SimulationConfig(router=RouterConfig(policy=name), exact=exact)


def places(requests: list[SimRequest]) -> list[tuple[int, int]]:
    return [(request.prefill_worker, request.decode_worker) for request in requests]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cluster", [CLUSTERS["2P2D"], THREE_POOLS], ids=["2P2D", "1P1D1C"])
def test_every_policy_serves_all_and_repeats_itself(name: str, cluster: object) -> None:
    rows = [(3 * MS, 20 + 37 * i % 250, 1 + 11 * i % 40) for i in range(120)]
    runs = [run(cluster, rows, config(name, exact)) for exact in (False, False, True)]  # type: ignore[arg-type]
    for result, simulation in runs:
        assert result.rejected == 0
        assert all(request.last_token >= 0 for request in simulation.requests)
        for worker in simulation.workers:
            counts = worker.blocks.counts()
            assert counts.free + counts.cached == counts.total
    first, *others = runs
    for result, simulation in others:
        assert result.ttft_ms.tobytes() == first[0].ttft_ms.tobytes()
        assert result.tpot_ms.tobytes() == first[0].tpot_ms.tobytes()
        assert places(simulation.requests) == places(first[1].requests)


def test_the_policies_place_differently() -> None:
    """A long prompt is one request but many tokens, and few tokens may stay on the decode worker."""
    rows = [(0, 2000, 2), (0, 1500, 2), (0, 20, 2), (0, 20, 2)]
    cluster = deployment(*[prefill_worker(400)] * 2, decode_worker(400))
    prefills = {
        name: [request.prefill_worker for request in run(cluster, rows, config(name))[1].requests]
        for name in POLICIES
    }
    assert prefills["distserve"] == [0, 1, 0, 1]
    assert prefills["splitwise"] == [0, 1, 1, 1]
    assert prefills["goodput"] == [0, 1, 2, 2]


def test_a_request_of_one_token_is_not_counted_when_it_is_over() -> None:
    cluster = deployment(prefill_worker(), decode_worker(), decode_worker())
    requests = run(cluster, [(0, 20, 1), (100 * MS, 20, 4)], config("distserve"))[1].requests
    assert [request.decode_worker for request in requests] == [1, 1]


def test_a_burst_goes_to_the_mixed_pool_and_what_comes_later_to_the_two_pools() -> None:
    burst = [(0, 1500, 4)] * 24
    requests = run(THREE_POOLS, [*burst, (20_000 * MS, 1500, 4)], config("splitwise"))[1].requests
    pools, both = (0, DECODE), (COLOCATED, COLOCATED)
    taken = places(requests)
    assert taken[:6] == [pools] * 5 + [both]  # 7,500 tokens wait; a sixth prompt would pass 8,192
    assert taken.count(both) >= 5
    assert taken.count((DECODE, DECODE)) >= 5  # borrowed, when the mixed pool is crowded as well
    assert taken[-1] == pools


def test_a_full_token_pool_spills_into_the_mixed_one() -> None:
    cluster = deployment(prefill_worker(), decode_worker(40), colocated_worker(200))
    requests = run(cluster, [(0, 300, 30), (40 * MS, 300, 30), (MS, 300, 30)], config("splitwise"))[
        1
    ].requests
    assert places(requests) == [(0, 1), (2, 2), (2, 2)]


def test_pairs_alone_serve_for_distserve_and_all_that_can_for_goodput() -> None:
    burst = [(0, 1500, 4)] * 24
    assert set(places(run(THREE_POOLS, burst, config("distserve"))[1].requests)) == {(0, DECODE)}
    assert (COLOCATED, COLOCATED) in places(run(THREE_POOLS, burst, config("goodput"))[1].requests)
