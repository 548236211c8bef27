"""How many prefill GPUs a decode GPU needs, over objectives: rate matching moves with them.

    .venv/bin/python -P benchmarks/pd_ratio.py   # writes docs/results/pd_ratio.json and .png; minutes

Llama 3.1 70B by roofline on 32 H100, with the lengths of Azure's code and conversation traces. For each pair
of objectives: the workers of each phase that serve most a GPU, alone, whose rates give the matched ratio; and
the placement of separate pools that serves most when the few best are simulated jointly. NVIDIA's study
("Beyond the Buzz", arXiv 2506.05508) found ratios of 0.5 to 3.5 over objectives. Needs the traces
(DIPHASE_DATA).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from diphase.benchmarks import harness
from diphase.cluster.load.plot import COLOURS
from diphase.cluster.load.traces import data_folder, load_trace
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import RooflineMachine, feasible_parallels
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.phase_rates import measure_phases
from diphase.cluster.planner.search import Task, proposals, simulated
from diphase.cluster.planner.sim_workload import LEAST_REQUESTS, SimWorkload
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MODEL, HARDWARE, GPUS = "llama3.1-70b", "h100-sxm", 32
TRACES = ("azure-code", "azure-conv")
TTFT_MS, TPOT_MS = 1000.0, 50.0
"""What stays while the other one moves."""
TTFTS_MS = (300.0, 500.0, 1000.0, 2000.0, 4000.0)
TPOTS_MS = (12.0, 15.0, 20.0, 30.0, 50.0, 100.0)
JOINT = 4
"""Placements that are simulated jointly, the best by the rates of their workers alone."""
NVIDIA = (0.5, 3.5)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "pd_ratio.json"


def study(trace: str, objectives: Objectives, folder: Path) -> dict[str, Any]:
    machine = RooflineMachine(load_model_shape(MODEL), load_hardware(HARDWARE))
    config = WorkloadConfig(num_requests=LEAST_REQUESTS)
    workload = SimWorkload(config=config, records=load_trace(trace, folder))
    task = Task(machine=machine, workload=workload, objectives=objectives, gpus=GPUS, seeds=(0,))
    parallels = feasible_parallels(machine, GPUS)
    phases = measure_phases(machine, workload, objectives, parallels, roles=("prefill", "decode"))
    row: dict[str, Any] = {"trace": trace, "ttft_ms": objectives.ttft_ms, "tpot_ms": objectives.tpot_ms}
    per_gpu: dict[str, float] = {}
    for role in ("prefill", "decode"):
        rates = {kind.parallel: rate / kind.parallel.gpus for kind, rate in phases.of_role(role).items()}
        best = max(rates, key=lambda parallel: rates[parallel], default=None)
        if best is None:
            return {**row, "infeasible": role}
        per_gpu[role] = rates[best]
        row[role] = {"worker": str(best), "requests_s_a_gpu": rates[best]}
    row["matched_ratio"] = per_gpu["decode"] / per_gpu["prefill"]
    pool = sorted(proposals(phases, GPUS, None), key=lambda c: (-c.expected, c.placement.gpus))
    joint = simulated(task, pool[:JOINT], map, floor=0.0)
    best_of_all = max(joint, key=lambda c: (c.rate, -c.placement.gpus))
    gpus = {pool.worker.role: pool.gpus for pool in best_of_all.placement.pools}
    if best_of_all.rate > 0.0:
        row["placement"] = str(best_of_all.placement)
        row["requests_s"] = best_of_all.rate
        row["ratio"] = gpus["prefill"] / gpus["decode"]
    return row


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """The ratio over each objective."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, moves, values, stays, value in (
        (panels[0], "tpot_ms", TPOTS_MS, "ttft_ms", TTFT_MS),
        (panels[1], "ttft_ms", TTFTS_MS, "tpot_ms", TPOT_MS),
    ):
        panel.axhspan(*NVIDIA, color="0.9", label="NVIDIA: 0.5 to 3.5")
        for colour, trace in zip(COLOURS, TRACES, strict=False):
            of_trace = [row for row in rows if row["trace"] == trace and row[stays] == value]
            of_trace.sort(key=lambda row: float(row[moves]))
            for name, style, label in (
                ("matched_ratio", "--", "rates matched"),
                ("ratio", "o-", "simulated"),
            ):
                points = [(row[moves], row[name]) for row in of_trace if name in row]
                panel.plot(*zip(*points, strict=True), style, color=colour, label=f"{trace}, {label}")
        panel.set(xscale="log", yscale="log", xlabel=f"{moves[:4].upper()} objective, ms")
        panel.set_xticks(values, [f"{each:g}" for each in values])
        panel.set_xticks([], minor=True)
        panel.set_title(f"{stays[:4].upper()} {value:g} ms", fontsize=10)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("prefill GPUs for each decode GPU")
    panels[0].legend(fontsize=7)
    canvas.print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = data_folder(None, os.environ)
    pairs = dict.fromkeys([(TTFT_MS, tpot) for tpot in TPOTS_MS] + [(ttft, TPOT_MS) for ttft in TTFTS_MS])
    rows = []
    for trace in TRACES:
        for ttft_ms, tpot_ms in pairs:
            rows.append(study(trace, Objectives(ttft_ms=ttft_ms, tpot_ms=tpot_ms), folder))
            print(rows[-1], flush=True)
    content = {"model": MODEL, "hardware": HARDWARE, "gpus": GPUS, "rows": rows}
    harness.write_result(options.output, content)
    draw(options.output.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
