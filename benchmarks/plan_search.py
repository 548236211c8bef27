"""How long the search for a placement takes, and what it finds, for two clusters; writes a JSON.

    python -P benchmarks/plan_search.py

OPT-66B on 8 A100 with DistServe's measurements, and Llama 3.1 70B on 32 H100 by roofline, both with the
lengths of Azure's conversations. Needs the traces (DIPHASE_DATA).
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from diphase.cluster.load.report import environment, write_json
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import DistServeMachine, Machine, RooflineMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.search import Task, search
from diphase.cluster.planner.sim_workload import LEAST_REQUESTS, SimWorkload

OUTPUT = Path("docs/results/plan_search.json")


def cases(data: Path) -> dict[str, tuple[Machine, Objectives, int]]:
    """(machine, objectives, GPUs) by name."""
    opt, llama = load_model_shape("opt-66b"), load_model_shape("llama3.1-70b")
    a100, h100 = load_hardware("a100-sxm-80gb"), load_hardware("h100-sxm")
    return {
        "opt-66b on 8 A100": (
            DistServeMachine(opt, a100, "opt-66b", data),
            Objectives(ttft_ms=1500.0, tpot_ms=100.0),
            8,
        ),
        "llama3.1-70b on 32 H100": (
            RooflineMachine(llama, h100),
            Objectives(ttft_ms=1000.0, tpot_ms=50.0),
            32,
        ),
    }


def timed(task: Task, processes: int) -> dict[str, Any]:
    """One search, its processes' start included."""
    start, used = time.perf_counter(), _cpu_s()
    with ProcessPoolExecutor(processes) as executor:
        found = search(task, executor.map)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": _cpu_s() - used,
        "gpus": task.gpus,
        "objectives": task.objectives,
        "candidates": [
            {
                "placement": str(candidate.placement),
                "gpus": candidate.placement.gpus,
                "requests_per_s": candidate.rate,
            }
            for candidate in (*found.candidates, *found.others)
        ],
    }


def _cpu_s() -> float:
    """Of this process and those that it has waited for: it does not depend on who else uses the machine."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def main() -> None:
    """Runs both and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    data = data_folder(None, os.environ)
    workload = SimWorkload(
        config=WorkloadConfig(num_requests=LEAST_REQUESTS), records=load_trace("azure-conv", data)
    )
    results: dict[str, Any] = {}
    for name, (machine, objectives, gpus) in cases(data).items():
        results[name] = timed(
            Task(machine=machine, workload=workload, objectives=objectives, gpus=gpus), args.processes
        )
        best = results[name]["candidates"][0]
        print(
            f"{name}: {results[name]['seconds']:.1f} s; {best['placement']}: {best['requests_per_s']:.3g}/s"
        )
    command = ".venv/bin/python -P benchmarks/plan_search.py"
    content = {"command": command, **environment(), "processes": args.processes, "searches": results}
    write_json(args.output, content)


if __name__ == "__main__":
    main()
