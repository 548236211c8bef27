"""Our simulator with the simplifications of DistServe's, beside what its authors' simulator gives.

    .venv/bin/python -P benchmarks/distserve_reference.py   # writes docs/results/distserve_reference.json

The simplifications: hand-offs take no time, memory has no end, a decode step takes sequences of 50,000 tokens
of context together (the others take turns), a prefill step takes all prompts that wait, and their vLLM
computes prompts before it goes on with decodes. Goodput is the rate per GPU at which P90 of TTFT and P90 of
TPOT are each inside the objective, by bisection over 300 requests with the arrivals of seed 0. The published
figures are those that its authors' simulator gives for the same requests. Then the same placements with the
simplifications off: hand-offs over NVLink, the KV pools that were measured, and our own scheduling.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.distserve import distserve_kv_capacity, distserve_step_time
from diphase.cluster.planner.events import to_ns
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.sim_request import SimRequest
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.topology import flat_topology, free_topology
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig
from diphase.router.config import RouterConfig
from diphase.router.latency_model import Coefficients

MODEL = "opt-13b"
ENDLESS = 2**31 - 1
STEP_CONTEXT = 50_000
BLOCK = 16
NO_TIME = Coefficients(1e-9, 0.0, 0.0, 0.0, 0.0)
KV_BYTES = 2 * 40 * 5120 * 2
"""Of a token of OPT-13B: keys and values, layers, hidden size, fp16."""
LAYERS = 40
NVLINK = 300e9
"""Bytes a second between two A100 of a node, one direction."""
ROUTER = RouterConfig(max_queued_requests=10**8, max_queued_tokens=10**9, local_prefill_tokens=0)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "distserve_reference.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """A placement: workers and their tensor parallelism. A phase that is `free` takes no time and no GPUs,
    which shows the limit of the other."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0
    tp_prefill: int = 1
    tp_decode: int = 1
    free: str = ""
    """prefill or decode."""

    def deployment(self, folder: Path, simplified: bool) -> Deployment:
        memory = ENDLESS if simplified else 0

        def worker(role: str, tp: int, engine: str) -> WorkerSpec:
            blocks = 10**5 if memory else distserve_kv_capacity(folder, model=MODEL, tp=tp) // BLOCK
            steps = distserve_step_time(folder, model=MODEL, tp=tp, engine=engine)
            return WorkerSpec(
                role=role,
                step_time=NO_TIME if role == self.free else steps,
                num_blocks=blocks,
                scheduler=scheduler(role, simplified),
                gpus=tp,
            )

        workers = (
            [worker("prefill", self.tp_prefill, "distserve")] * self.prefill
            + [worker("decode", self.tp_decode, "distserve")] * self.decode
            + [worker("colocated", self.tp_prefill, "vllm")] * self.colocated
        )
        sources, targets = range(self.prefill), range(self.prefill, self.prefill + self.decode)
        return Deployment(
            workers=tuple(workers),
            block_size=BLOCK,
            block_bytes=BLOCK * KV_BYTES,
            num_layers=LAYERS,
            topology=free_topology(sources, targets)
            if simplified
            else flat_topology(sources, targets, NVLINK),
        )

    @property
    def gpus(self) -> int:
        prefill = 0 if self.free == "prefill" else self.prefill * self.tp_prefill
        decode = 0 if self.free == "decode" else self.decode * self.tp_decode
        return prefill + decode + self.colocated * self.tp_prefill


def scheduler(role: str, simplified: bool) -> PrefillSchedulerConfig | DecodeSchedulerConfig:
    if role == "prefill":
        if simplified:
            return PrefillSchedulerConfig(
                chunk_budget=ENDLESS, saturation_tokens=ENDLESS, max_waiting=ENDLESS
            )
        return PrefillSchedulerConfig(chunk_budget=2048, saturation_tokens=512, max_waiting=ENDLESS)
    if role == "decode":
        return DecodeSchedulerConfig(
            max_running=ENDLESS if simplified else 256,
            max_waiting=ENDLESS,
            max_step_context=STEP_CONTEXT if simplified else 0,
        )
    return ColocatedSchedulerConfig(
        max_running=ENDLESS if simplified else 256,
        max_waiting=ENDLESS,
        max_step_context=STEP_CONTEXT if simplified else 0,
        prefill_budget=ENDLESS if simplified else 512,
        prompts_first=simplified,
    )


def arrivals(lengths: Sequence[tuple[int, int]], rate: float, seed: int = 0) -> list[SimRequest]:
    """Poisson as their simulator draws it. Their decode takes as many steps as there are output tokens,
    behind the token that the prefill gives."""
    # Their generator: seed 0 has to give their arrivals.
    gaps = np.random.RandomState(seed).gamma(1.0, 1.0 / rate, size=len(lengths) - 1)
    times = np.concatenate(([0.0], np.cumsum(gaps)))
    return [
        SimRequest(
            index=i,
            arrival=to_ns(float(at)),
            prompt_tokens=prompt,
            output_tokens=output + 1,
            hashes=[],
        )
        for i, (at, (prompt, output)) in enumerate(zip(times, lengths, strict=True))
    ]


def simulate(
    deployment: Deployment, requests: list[SimRequest], slo: tuple[float, float], exact: bool = False
) -> SimResult:
    config = SimulationConfig(router=ROUTER, ttft_ms=slo[0], tpot_ms=slo[1], exact=exact)
    return Simulation(deployment, config, requests).run()


def goodput(
    deployment: Deployment,
    lengths: Sequence[tuple[int, int]],
    slo: tuple[float, float],
    gpus: int,
    to_within: float = 0.01,
) -> float:
    """Requests a second and GPU."""
    low, high = 0.0, 32.0
    while high - low > to_within:
        rate = (low + high) / 2
        result = simulate(deployment, arrivals(lengths, rate * gpus), slo)
        low, high = (rate, high) if result.percentiles_inside(*slo) else (low, rate)
    return low


FIXED = [(512, 64)] * 300
CASES = (
    # name, placement, lengths, objectives in ms, what their simulator gives
    ("colocated", Pools(colocated=1), "512/64", (400.0, 40.0), 1.656),
    ("2P1D", Pools(prefill=2, decode=1), "512/64", (400.0, 40.0), 4.596),
    ("1P1D", Pools(prefill=1, decode=1), "512/64", (400.0, 40.0), 5.801),
    ("prefill limit", Pools(prefill=1, decode=1, free="decode"), "512/64", (400.0, 40.0), 11.60),
    ("decode limit", Pools(prefill=1, decode=1, free="prefill"), "512/64", (400.0, 40.0), 13.83),
    ("colocated TP1", Pools(colocated=1), "azure-conv", (200.0, 100.0), 0.0),
    (
        "prefill TP2 + decode TP1",
        Pools(prefill=1, decode=1, tp_prefill=2),
        "azure-conv",
        (200.0, 100.0),
        1.042,
    ),
    ("colocated TP1", Pools(colocated=1), "azure-conv", (400.0, 100.0), 1.344),
    (
        "prefill TP2 + decode TP2",
        Pools(prefill=1, decode=1, tp_prefill=2, tp_decode=2),
        "azure-conv",
        (400.0, 100.0),
        1.539,
    ),
)


def azure_lengths(folder: Path) -> list[tuple[int, int]]:
    return [(r.input_tokens, r.output_tokens) for r in load_trace("azure-conv", folder)[:300]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = data_folder(None, {})
    lengths = {"512/64": FIXED, "azure-conv": azure_lengths(folder)}
    rows = []
    for name, pools, workload, slo, published in CASES:
        began = time.perf_counter()
        ours = goodput(pools.deployment(folder, simplified=True), lengths[workload], slo, pools.gpus)
        took = time.perf_counter() - began
        without = goodput(pools.deployment(folder, simplified=False), lengths[workload], slo, pools.gpus)
        rows.append(
            {
                "placement": name,
                "workload": workload,
                "slo_ms": slo,
                "theirs": published,
                "ours": ours,
                "error": None if not published else ours / published - 1.0,
                "simplifications_off": without,
                "seconds": took,
            }
        )
        print(rows[-1], flush=True)
    harness.write_result(options.output, {"cases": rows})


if __name__ == "__main__":
    main()
