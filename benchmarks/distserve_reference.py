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
from dataclasses import dataclass, replace
from pathlib import Path

from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.planner.deployment import Deployment, WorkerSpec
from diphase.cluster.planner.goodput import Objectives, published_goodput
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import DistServeMachine, Parallel
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.phase_rates import FreeStepTime
from diphase.cluster.planner.search_distserve import simplified_deployment, simplified_worker
from diphase.cluster.planner.sim_workload import PublishedWorkload
from diphase.cluster.planner.topology import flat_topology
from diphase.decode_workers.config import ColocatedSchedulerConfig, DecodeSchedulerConfig
from diphase.prefill_workers.config import PrefillSchedulerConfig

ENDLESS = 2**31 - 1
BLOCK = 16
NVLINK = 300e9
"""Bytes a second between two A100 of a node, one direction."""
TO_WITHIN = 0.01
"""Requests/s a GPU."""
SCHEDULERS: dict[str, PrefillSchedulerConfig | DecodeSchedulerConfig] = {
    "prefill": PrefillSchedulerConfig(chunk_budget=2048, saturation_tokens=512, max_waiting=ENDLESS),
    "decode": DecodeSchedulerConfig(max_running=256, max_waiting=ENDLESS),
    "colocated": ColocatedSchedulerConfig(max_running=256, max_waiting=ENDLESS, prefill_budget=512),
}
"""Of workers without the simplifications."""
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

    def simplified(self, folder: Path) -> Deployment:
        def worker(role: str, tp: int, engine: str = "distserve") -> WorkerSpec:
            if role == self.free:
                return simplified_worker(role, FreeStepTime())
            return simplified_worker(role, machine(folder, engine).step_time(Parallel(tp)), tp)

        return simplified_deployment(
            *[worker("prefill", self.tp_prefill)] * self.prefill,
            *[worker("decode", self.tp_decode)] * self.decode,
            *[worker("colocated", self.tp_prefill, "vllm")] * self.colocated,
        )

    def whole(self, folder: Path) -> Deployment:
        """Without the simplifications."""
        simplified, opt = self.simplified(folder), machine(folder)
        workers = tuple(
            replace(
                spec,
                num_blocks=opt.kv_tokens(Parallel(spec.gpus)) // BLOCK,
                scheduler=SCHEDULERS[spec.role],
            )
            for spec in simplified.workers
        )
        sources, targets = range(self.prefill), range(self.prefill, self.prefill + self.decode)
        return replace(
            simplified,
            workers=workers,
            block_size=BLOCK,
            block_bytes=BLOCK * opt.kv_bytes_per_token,
            num_layers=opt.model.num_layers,
            topology=flat_topology(sources, targets, NVLINK),
        )

    @property
    def gpus(self) -> int:
        prefill = 0 if self.free == "prefill" else self.prefill * self.tp_prefill
        decode = 0 if self.free == "decode" else self.decode * self.tp_decode
        return prefill + decode + self.colocated * self.tp_prefill


def machine(folder: Path, engine: str = "distserve") -> DistServeMachine:
    """With the additions of their simulator, whose figures these are."""
    return DistServeMachine(
        load_model_shape("opt-13b"),
        load_hardware("a100-sxm-80gb"),
        "opt-13b",
        folder,
        engine,
        overheads=True,
    )


def workload(name: str, folder: Path) -> PublishedWorkload:
    """Their decode takes as many steps as there are output tokens, behind the token that the prefill
    gives."""
    return PublishedWorkload(
        tuple(
            (prompt, output + 1) for prompt, output in (FIXED if name == "512/64" else azure_lengths(folder))
        )
    )


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
    rows = []
    for name, pools, lengths, slo, published in CASES:
        load, objectives = workload(lengths, folder), Objectives(ttft_ms=slo[0], tpot_ms=slo[1])
        began = time.perf_counter()
        ours, whole = (
            published_goodput(deployment, load, objectives, step=TO_WITHIN, gpus=pools.gpus)
            for deployment in (pools.simplified(folder), pools.whole(folder))
        )
        took = time.perf_counter() - began
        rows.append(
            {
                "placement": name,
                "workload": lengths,
                "slo_ms": slo,
                "theirs": published,
                "ours": ours,
                "error": None if not published else ours / published - 1.0,
                "simplifications_off": whole,
                "seconds": took,
            }
        )
        print(rows[-1], flush=True)
    harness.write_result(options.output, {"cases": rows})


if __name__ == "__main__":
    main()
