"""What the simulated router knows of its workers and requests is what a live one would."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.sim_worker import SimWorker
from diphase.cluster.planner.simulator import Simulation
from diphase.decode_workers.role import DecodeRole
from diphase.engine.base import ModelLimits
from diphase.proto import worker_pb2 as pb
from diphase.router.config import RouterConfig
from diphase.router.placement import Demand, Placement

from .deployments import CLUSTERS, MS, decode_worker, deployment, prefill_worker, requests

ROWS = [(7 * MS, 60 + 37 * i % 190, 20 + 11 * i % 50) for i in range(40)]
CLUSTER = deployment(prefill_worker(), decode_worker(60), decode_worker(60), bandwidth=2e7)
"""Hand-offs that take long, and little room for them."""


def live_load(simulation: Simulation, worker: SimWorker) -> pb.Load:
    """What a decode role reports that has this scheduler and these hand-offs."""
    here = [h for h in simulation._handoffs._here.values() if h.target is worker]
    receiver: Any = SimpleNamespace(
        reserved_blocks=sum(len(h.block_ids) for h in here if h.granted), in_flight=len(here)
    )
    assert worker.decode is not None
    role = DecodeRole(
        kind="decode",
        scheduler=worker.decode,
        blocks=worker.blocks,
        limits=ModelLimits(name="", context_length=1, vocab_size=1, eos_token_ids=()),
        open_receiver=lambda pool, events: receiver,
    )
    return role.load()


def reported(simulation: Simulation, check: Callable[[SimWorker, pb.Load], None]) -> list[pb.Load]:
    """Loads of the decode workers at many moments of the run."""
    seen: list[pb.Load] = []

    def look() -> None:
        simulation._pool.ready()
        for worker in simulation.workers:
            if worker.decode is not None:
                load = pb.Load()
                load.CopyFrom(simulation._pool.handle(worker).load)
                check(worker, load)
                seen.append(load)

    for i in range(300):
        simulation._events.at(i * 2 * MS + 17, look)
    simulation.run()
    return seen


def test_simulated_workers_report_the_load_that_live_ones_would() -> None:
    router = RouterConfig(local_prefill_tokens=0)
    exact, quick = (
        Simulation(CLUSTER, SimulationConfig(router=router, exact=exact), requests(ROWS))
        for exact in (True, False)
    )

    def same(worker: SimWorker, load: pb.Load) -> None:
        assert load == live_load(exact, worker)

    loads = reported(exact, same)
    assert any(load.blocks_reserved and load.blocks_running and load.handoffs > 1 for load in loads)
    assert any(load.running > 2 and load.running_context for load in loads)
    assert reported(quick, lambda worker, load: None) == loads


@pytest.mark.parametrize(("asked", "told"), [(None, 30), (500, 500)])
def test_policies_see_the_tokens_that_a_client_allows_not_those_that_come(
    asked: int | None, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(CLUSTERS["1P1D"], SimulationConfig(), requests([(0, 100, 30)]))
    simulation.requests[0].max_tokens = asked
    place, seen = simulation._dispatcher.policy.place, []

    def spy(demand: Demand, *args: Any) -> Placement | None:
        seen.append(demand.max_new_tokens)
        return place(demand, *args)

    monkeypatch.setattr(simulation._dispatcher.policy, "place", spy)
    result = simulation.run()
    assert seen == [told]
    assert simulation.requests[0].joined > 0
    assert result.truncated == 0
