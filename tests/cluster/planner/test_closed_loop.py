"""Closed loops: a stated concurrency, one request after the other of each client, in virtual time."""

from __future__ import annotations

import numpy as np
import pytest
from diphase.cluster.planner.closed_loop import ClosedLoop
from diphase.cluster.planner.deployment import Deployment, SimulationConfig
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.simulator import Simulation
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape
from hypothesis import given, settings
from hypothesis import strategies as st

from .deployments import MS, STEPS, colocated_worker, decode_worker, deployment, prefill_worker

CLUSTERS = {
    "colocated": deployment(colocated_worker()),
    "colocated, little memory": deployment(colocated_worker(24)),
    "1P1D": deployment(prefill_worker(), decode_worker()),
}


def serve(
    cluster: Deployment,
    lengths: list[tuple[int, int]],
    clients: int,
    intake_s: float = 0.0,
    config: SimulationConfig | None = None,
) -> SimResult:
    loop = ClosedLoop(lengths, clients, intake_s=intake_s)
    return Simulation(cluster, config or SimulationConfig(), loop).run()


def ended(result: SimResult) -> list[int]:
    return [request.last_token for request in result.requests]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(CLUSTERS)),
    lengths=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=25),
    clients=st.integers(1, 8),
    intake_s=st.sampled_from([0.0, 0.003]),
)
def test_all_are_served_and_no_more_than_the_clients_are_under_way(
    name: str, lengths: list[tuple[int, int]], clients: int, intake_s: float
) -> None:
    result = serve(CLUSTERS[name], lengths, clients, intake_s)
    assert [(r.prompt_tokens, r.output_tokens) for r in result.requests] == lengths
    assert result.rejected == 0
    for request in result.requests:
        begun = sum(other.arrival <= request.arrival for other in result.requests)
        over = sum(end <= request.arrival for end in ended(result))
        assert begun - over <= clients
    later = sorted(request.arrival for request in result.requests)[clients:]
    assert later == sorted(ended(result))[: len(later)]


@pytest.mark.parametrize("name", CLUSTERS)
def test_stretches_give_what_single_steps_give(name: str) -> None:
    lengths = [(20 + 13 * i % 170, 1 + 7 * i % 50) for i in range(40)]
    config = SimulationConfig(exact=True)
    stretched, exact = (
        serve(CLUSTERS[name], lengths, 5, 0.001, config) for config in (SimulationConfig(), config)
    )
    assert ended(stretched) == ended(exact)
    assert (stretched.ttft_ms == exact.ttft_ms).all()


def test_a_lone_client_waits_for_its_intake_and_its_own_steps() -> None:
    result = serve(CLUSTERS["colocated"], [(32, 1)] * 3, clients=1, intake_s=0.005)
    alone = 5.0 + STEPS.step_s(StepShape(32, 32 * 32 / 2)) * 1e3
    assert result.ttft_ms == pytest.approx(np.full(3, alone), abs=1e-3)


def test_requests_are_taken_in_one_after_the_other() -> None:
    """Three send at once: the third's turn comes 15 ms later, while the first two are computed."""
    result = serve(CLUSTERS["colocated"], [(1, 1)] * 3, clients=3, intake_s=0.005)
    assert [request.arrival for request in result.requests] == [0, 0, 0]
    assert [request.scheduled for request in result.requests] == [5 * MS, 10 * MS, 15 * MS]


def test_a_client_whose_request_is_refused_goes_on() -> None:
    eight_blocks = deployment(colocated_worker(8))
    result = serve(eight_blocks, [(150, 4), (20, 4), (150, 4), (20, 4)], clients=1)
    assert [request.rejected for request in result.requests] == [True, False, True, False]


def test_what_loads_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match="0 clients with 1 requests"):
        ClosedLoop([(1, 1)], 0)
    with pytest.raises(ConfigError, match="2 clients with 0 requests"):
        ClosedLoop([], 2)
    with pytest.raises(ConfigError, match="intake_s = -1"):
        ClosedLoop([(1, 1)], 1, intake_s=-1.0)


def test_a_loop_serves_one_run() -> None:
    loop = ClosedLoop([(8, 2)], 1)
    Simulation(CLUSTERS["colocated"], SimulationConfig(), loop).run()
    with pytest.raises(ConfigError, match="one run"):
        Simulation(CLUSTERS["colocated"], SimulationConfig(), loop).run()
