"""Workers that crash, drain and change their role in the simulator: nothing is lost, stretches stay exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.incidents import Crash, Drain, Incident, RoleChange
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.simulator import Simulation
from diphase.router.config import POLICIES, RouterConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from .deployments import (
    CLUSTERS,
    ROWS,
    colocated_worker,
    decode_worker,
    deployment,
    fully_linked,
    prefill_worker,
    records,
    run,
)

HANDED_OVER = SimulationConfig(router=RouterConfig(local_prefill_tokens=0))
TWO_POOLS = deployment(prefill_worker(), prefill_worker(), decode_worker(), decode_worker())
SPECS = [prefill_worker(), decode_worker(), colocated_worker(60)]


def incidents(workers: int) -> st.SearchStrategy[list[Incident]]:
    """Up to five, while requests are there or soon after."""
    where = st.integers(0, workers - 1)
    when = st.integers(0, 2000).map(lambda ms: ms / 1000.0)
    soon = st.sampled_from([0.001, 0.05, 0.3, 2.0, 20.0])
    crash = st.builds(Crash, at_s=when, worker=where, hangs=st.booleans(), back_s=st.none() | soon)
    drain = st.builds(Drain, at_s=when, worker=where, timeout_s=soon)
    change = st.builds(
        RoleChange, at_s=when, worker=where, timeout_s=soon, successor=st.sampled_from(SPECS), start_s=soon
    )
    return st.lists(st.one_of(crash, crash, drain, change), min_size=1, max_size=5)


def check_nothing_is_left(simulation: Simulation, result: SimResult) -> None:
    served = [request for request in simulation.requests if request.last_token >= 0]
    assert all(bool(request.error) == (request.last_token < 0) for request in simulation.requests)
    assert len(served) + result.rejected + result.failed == len(simulation.requests)
    for worker in simulation.workers:
        if not worker.alive:
            continue
        counts = worker.blocks.counts()
        assert counts.free + counts.cached == counts.total
        assert worker.idle
        assert not worker.unscheduled
        assert not worker.draining  # it would have ended
    dispatcher = simulation._dispatcher
    assert not dispatcher.open
    assert (dispatcher._admission.queued_requests, dispatcher._admission.queued_tokens) == (0, 0)
    simulation._pool.ready()  # all report anew
    for worker in simulation._pool.workers:
        handle = simulation._pool.handle(worker)
        assert (handle.incoming, handle.waiting_requests) == ((0, 0), 0)
        assert handle.attached == worker.alive
    for request in served:
        stamps = [request.arrival, request.scheduled, request.token0, request.last_token]
        stamps[3:3] = [] if request.verified < 0 else [request.verified, request.joined]
        assert stamps == sorted(stamps)
        assert request.attempts >= 1
        assert request.interrupted < 0


@pytest.mark.parametrize("name", CLUSTERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=ROWS, hashes=st.booleans(), policy=st.sampled_from(list(POLICIES)))
def test_whatever_befalls_workers_stretches_are_exact_and_every_request_ends_once(
    name: str, data: st.DataObject, rows: list[tuple[int, int, int]], hashes: bool, policy: str
) -> None:
    cluster = fully_linked(CLUSTERS[name])
    befalls = data.draw(incidents(len(cluster.workers)))
    config = SimulationConfig(router=RouterConfig(policy=policy, wait_for_workers_s=1.0))
    results = []
    for exact in (True, False):
        result, simulation = run(cluster, rows, replace(config, exact=exact), hashes, befalls)
        check_nothing_is_left(simulation, result)
        use = [(worker.steps, worker.busy_ns) for worker in simulation.workers]
        results.append((records(simulation), use, result.duration_s))
    assert results[0] == results[1]
