"""When to disaggregate: the sign that TaiChi (arXiv 2508.01989, section 3) reports has to flip here, too.

    .venv/bin/python -P benchmarks/regimes.py   # writes docs/results/regimes.json

Eight workers of four A100 each serve Llama-2-70B (step times as Splitwise measured them) on summaries of
arXiv papers with Poisson arrivals: all colocated with chunks of 512 tokens, or in pools. Tight TPOT with
loose TTFT has to favour the pools, tight TTFT with loose TPOT the colocated workers. TaiChi measured, at its
rate, 7 % against 98 % in the first regime (aggregated against disaggregated) and 97 % against 42 % in the
second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diphase.benchmarks import harness
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.sim_request import SimRequest
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.splitwise import splitwise_step_time
from diphase.cluster.planner.topology import flat_topology
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.router.config import RouterConfig

REGIMES = {"tight TPOT": (16_000.0, 60.0), "tight TTFT": (5_000.0, 250.0), "balanced": (6_000.0, 100.0)}
"""TTFT and TPOT, ms: TaiChi's."""
WORKERS = 8
GPUS = 4
BLOCK = 16
KV_TOKENS = 400_000
"""Of a worker: 320 GB less 138 GB of weights, at 320 KiB a token."""
KV_BYTES = 320 * 1024
LAYERS = 80
LINK = 25e9
"""Bytes a second of a worker: 200 Gb/s."""
ROUTER = RouterConfig(max_queued_requests=10**8, max_queued_tokens=10**9)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "regimes.json"


def deployments(folder: Path) -> dict[str, Deployment]:
    steps = splitwise_step_time(folder, model="llama2-70b", hardware="a100-80gb", tp=GPUS)

    def worker(role: str, scheduler: PrefillSchedulerConfig | DecodeSchedulerConfig) -> WorkerSpec:
        return WorkerSpec(
            role=role, step_time=steps, num_blocks=KV_TOKENS // BLOCK, scheduler=scheduler, gpus=GPUS
        )

    colocated = worker("colocated", ColocatedSchedulerConfig(max_running=256, prefill_budget=512))
    prefill = worker("prefill", PrefillSchedulerConfig(chunk_budget=8192, saturation_tokens=2048))
    decode = worker("decode", DecodeSchedulerConfig(max_running=256))
    found = {"colocated": Deployment(workers=(colocated,) * WORKERS, block_size=BLOCK)}
    for count in (4, 5):
        found[f"{count}P{WORKERS - count}D"] = Deployment(
            workers=(prefill,) * count + (decode,) * (WORKERS - count),
            block_size=BLOCK,
            block_bytes=BLOCK * KV_BYTES,
            num_layers=LAYERS,
            topology=flat_topology(range(count), range(count, WORKERS), LINK, 5e-3),
        )
    return found


def workload(records: Sequence[TraceRecord], count: int, rate: float) -> list[SimRequest]:
    return SimWorkload(config=WorkloadConfig(num_requests=count), records=records).requests(rate, 0, count)


def attainment(deployment: Deployment, requests: list[SimRequest], slo: tuple[float, float]) -> float:
    config = SimulationConfig(router=ROUTER, ttft_ms=slo[0], tpot_ms=slo[1])
    return Simulation(deployment, config, requests).run().attainment(*slo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 5.0, 6.0, 7.0, 9.0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = data_folder(None, {})
    records = load_trace("arxiv", folder)
    rows = []
    for rate in options.rates:
        for regime, slo in REGIMES.items():
            shares = {
                name: attainment(deployment, workload(records, options.requests, rate), slo)
                for name, deployment in deployments(folder).items()
            }
            rows.append({"rate": rate, "regime": regime, "slo_ms": slo, "attainment": shares})
            print(rows[-1], flush=True)
    harness.write_result(options.output, {"requests": options.requests, "rows": rows})


if __name__ == "__main__":
    main()
