"""Small deployments and workloads for tests of the simulator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.incidents import Incident
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.sim_request import SimRequest
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.tables import PrefillPoint, TableStepTime
from diphase.cluster.planner.topology import Topology, flat_topology
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.router.latency_model import Coefficients
from diphase.router.step_time import StepTime
from diphase.router.two_regime_step_time import DecodeTerms, PrefillTerms, TwoRegimeStepTime
from hypothesis import strategies as st

MS = 1_000_000
"""Nanoseconds."""

STEPS = Coefficients(3.1e-3, 1.7e-5, 3.3e-9, 1.3e-4, 7.7e-8)


def two_regimes(stages: int = 1) -> StepTime:
    """Another line from three sequences on."""
    return TwoRegimeStepTime(
        prefill=PrefillTerms(2e-3, 2e-5, 1e-9),
        small=DecodeTerms(4e-3, 3e-7, 1e-4),
        large=DecodeTerms(5e-3, 1e-7, 3e-5),
        large_batch=3,
        stages=stages,
        prefill_hop_s=1e-3 * stages,
        overhead_s=5e-4,
    )


def table() -> StepTime:
    """Of measured points, between which it is linear: many short lines."""
    decode = {
        (batch, context): 2e-3 + 1.1e-4 * batch + 3.7e-8 * batch * context**1.1
        for batch in (1, 2, 4, 8)
        for context in (1.0, 37.0, 80.0, 160.0, 400.0)
    }
    prefill = [PrefillPoint(n, n * n / 2, 2e-3 + 2e-5 * n + 1e-9 * n * n) for n in (1, 16, 64, 300)]
    return TableStepTime(decode, prefill)


def prefill_worker(num_blocks: int = 200, steps: StepTime = STEPS, chunk: int = 64) -> WorkerSpec:
    scheduler = PrefillSchedulerConfig(chunk_budget=chunk, saturation_tokens=chunk)
    return WorkerSpec(role="prefill", step_time=steps, num_blocks=num_blocks, scheduler=scheduler)


def decode_worker(num_blocks: int = 200, steps: StepTime = STEPS, **scheduler: int) -> WorkerSpec:
    config = replace(DecodeSchedulerConfig(max_running=8), **scheduler)  # type: ignore[arg-type]
    return WorkerSpec(role="decode", step_time=steps, num_blocks=num_blocks, scheduler=config)


def colocated_worker(num_blocks: int = 200, steps: StepTime = STEPS, **scheduler: int) -> WorkerSpec:
    config = replace(ColocatedSchedulerConfig(max_running=8, prefill_budget=64), **scheduler)  # type: ignore[arg-type]
    return WorkerSpec(role="colocated", step_time=steps, num_blocks=num_blocks, scheduler=config)


def deployment(*workers: WorkerSpec, bandwidth: float = 1e9, latency_s: float = 1e-3) -> Deployment:
    """Blocks of 16 tokens, 64 KiB each, in eight layers."""
    sources = [i for i, spec in enumerate(workers) if spec.role == "prefill"]
    targets = [i for i, spec in enumerate(workers) if spec.role == "decode"]
    topology = Topology(bandwidths=(), paths={})
    if sources:
        topology = flat_topology(sources, targets, bandwidth, latency_s)
    return Deployment(workers=workers, block_bytes=65536, num_layers=8, topology=topology)


def fully_linked(cluster: Deployment) -> Deployment:
    """The same with a link between any two workers, for those that change their role."""
    everybody = range(len(cluster.workers))
    return replace(cluster, topology=flat_topology(everybody, everybody, 1e9, 1e-3))


def requests(rows: Iterable[tuple[int, int, int]], hashes: bool = False) -> list[SimRequest]:
    """Rows are (nanoseconds after the one before, prompt tokens, output tokens). With hashes, prompts of
    equal length are equal."""
    found, at = [], 0
    for index, (gap, prompt, output) in enumerate(rows):
        at += gap
        names = [b"%d/%d" % (prompt, i) for i in range(prompt // 16)] if hashes else []
        found.append(
            SimRequest(index=index, arrival=at, prompt_tokens=prompt, output_tokens=output, hashes=names)
        )
    return found


def run(
    cluster: Deployment,
    rows: Iterable[tuple[int, int, int]],
    config: SimulationConfig | None = None,
    hashes: bool = False,
    incidents: Iterable[Incident] = (),
) -> tuple[SimResult, Simulation]:
    simulation = Simulation(cluster, config or SimulationConfig(), requests(rows, hashes), tuple(incidents))
    return simulation.run(), simulation


CLUSTERS: dict[str, Deployment] = {
    "colocated": deployment(colocated_worker()),
    "colocated, prompts first": deployment(colocated_worker(prompts_first=True)),
    "two colocated, little memory": deployment(colocated_worker(40), colocated_worker(40)),
    "1P1D": deployment(prefill_worker(), decode_worker()),
    "1P1D, little memory": deployment(prefill_worker(24), decode_worker(24)),
    "1P1D, slow link": deployment(prefill_worker(), decode_worker(), bandwidth=5e7),
    "2P2D": deployment(prefill_worker(), prefill_worker(), decode_worker(), decode_worker()),
    "1P2D, two regimes": deployment(
        prefill_worker(steps=two_regimes()), decode_worker(steps=two_regimes()), decode_worker()
    ),
    "1P1D, tables": deployment(prefill_worker(), decode_worker(steps=table()), decode_worker(steps=table())),
    "bounded contexts": deployment(prefill_worker(), decode_worker(max_step_context=400)),
    "pipelines": deployment(
        prefill_worker(steps=two_regimes(2)), decode_worker(steps=two_regimes(3)), latency_s=0.0
    ),
    "mixed": deployment(prefill_worker(), decode_worker(), colocated_worker()),
}

ROWS = st.lists(
    st.tuples(
        st.integers(0, 60 * MS),
        st.integers(1, 300),
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=25,
)


def records(simulation: Simulation) -> list[tuple[object, ...]]:
    return [
        (
            request.scheduled,
            request.token0,
            request.verified,
            request.joined,
            request.last_token,
            request.prefill_worker,
            request.decode_worker,
            request.cached_tokens,
            request.attempts,
            request.stall,
            request.error,
        )
        for request in simulation.requests
    ]
