"""Serving points that were measured on real clusters, simulated: TTFT and TPOT at a stated concurrency.

    .venv/bin/python -P benchmarks/measured_points.py [--data FOLDER] [--every N]

writes docs/results/measured_points.json. The points (measured/serving_points.csv) are of colocated serving of
dense models, one worker without stages, with a closed loop of clients: all begin at once, each sends its next
request when its last one has ended, ten requests a client. The scheduler is ours, set like the engine that
served: vLLM and TensorRT-LLM compute prompts beside decodes, 2,048 and 8,192 tokens a step, and the latter
starts only what fits the memory to its end; SGLang computes prompts first, 8,192 tokens a step. The points do
not say how the engines were configured: for vLLM, 8,192 tokens are simulated, too.

Step times: the roofline, and the step latency table of the same model, system and precision (of vLLM, whoever
served) where there is one. Neither knows what an engine does between two steps, and `diphase plan` plans
without it. "With host time" adds that here: so much a step and a sequence for each engine, fitted to the TPOT
of its other models and judged on the one left out, each in turn. Where an engine served one model only, the
points of one parallelism are left out instead. Errors are relative, of the means over all requests.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from diphase.benchmarks import harness
from diphase.benchmarks.latency_models import MODELS, SYSTEMS, Errors, errors, show
from diphase.cluster.load.traces import data_folder
from diphase.cluster.planner import step_latency
from diphase.cluster.planner.closed_loop import ClosedLoop
from diphase.cluster.planner.deployment import Deployment, SimulationConfig, WorkerSpec
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.model_shape import KNOWN_MODELS
from diphase.cluster.planner.roofline import RooflineStepTime, kv_capacity_tokens
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.step_latency import Row, Setup
from diphase.cluster.planner.table_files import existing, read_rows
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.router.config import RouterConfig
from diphase.router.step_time import Line, StepShape, StepTime

ROOT = Path(__file__).resolve().parents[1]
REQUESTS_PER_CLIENT = 10
INTAKE_S = 0.002
"""HTTP and tokeniser, of a request."""
BLOCK = 16
ROUTER = RouterConfig(max_queued_requests=10**8, max_queued_tokens=10**9, local_prefill_tokens=0)
HOST_STEP_S = np.arange(0.0, 4.01e-3, 1e-4)
HOST_SEQUENCE_S = np.arange(0.0, 6.01e-5, 2e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How it is configured when nobody says otherwise."""

    prompt_tokens: int
    """Most of a step."""
    prompts_first: bool = False
    whole_room: bool = False
    """Starts only sequences that fit the memory to their end, so that none is preempted."""
    usable_memory: float = 0.9
    max_running: int = 1024


ENGINES = {
    "vllm": Engine(prompt_tokens=2048),
    "sglang": Engine(prompt_tokens=8192, prompts_first=True, usable_memory=0.87),
    "trtllm": Engine(prompt_tokens=8192, whole_room=True),
}
OTHER_VLLM = Engine(prompt_tokens=8192)
"""What its server takes on an H100 if asked for nothing; the points do not say."""


class Host(NamedTuple):
    """What an engine does between two steps, in seconds."""

    step_s: float = 0.0
    sequence_s: float = 0.0


class Point(NamedTuple):
    model: str
    system: str
    backend: str
    precision: Literal["bf16", "fp8"]
    tp: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Point | None:
        """None for a point that no source covers: another model or system, disaggregated, with stages, or
        without its concurrency."""
        name = (
            row["model_path"].rpartition("/")[2].replace("-Instruct", "").lower().replace("llama-", "llama")
        )
        covered = name in MODELS.values() and row["system"] in SYSTEMS
        concurrency = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        if not covered or row["mode"] != "agg" or row["pp_size"] != "1" or concurrency is None:
            return None
        return cls(
            name,
            row["system"],
            row["backend"],
            "fp8" if "fp8" in row["precision"] + row["gemm_quant_mode"] else "bf16",
            int(row["tp_size"]),
            int(concurrency[1]),
            int(row["isl"]),
            int(row["osl"]),
            float(row["silicon_ttft_ms"]) / 1e3,
            float(row["silicon_tpot_ms"]) / 1e3,
        )

    @property
    def group(self) -> str:
        return f"{self.model} {self.system} {self.backend} {self.precision}"


class Served(NamedTuple):
    """A point's means, in seconds."""

    ttft_s: float
    tpot_s: float


class WithHost:
    """Step times of one stage, with the host's."""

    stages = 1

    def __init__(self, steps: StepTime, host: Host) -> None:
        self._steps, self._host = steps, host

    def stage_s(self, shape: StepShape) -> tuple[float, ...]:
        """See step_time.StepTime."""
        return (self.step_s(shape),)

    def step_s(self, shape: StepShape) -> float:
        """See step_time.StepTime."""
        return self._steps.step_s(shape) + self._host.step_s + self._host.sequence_s * shape.decode_batch

    def decode_line(self, batch: int, context: float) -> Line:
        """See step_time.StepTime."""
        line = self._steps.decode_line(batch, context)
        more = self._host.step_s + self._host.sequence_s * batch
        return Line(line.intercept_s + more, line.slope_s, line.until)


def sources(point: Point, tables: Mapping[Setup, list[Row]]) -> dict[str, StepTime]:
    """Step times by the name of what they come from."""
    found: dict[str, StepTime] = {
        "roofline": RooflineStepTime(
            KNOWN_MODELS[point.model],
            load_hardware(SYSTEMS[point.system]),
            tp=point.tp,
            precision=point.precision,
        )
    }
    model = next(name for name, short in MODELS.items() if short == point.model)
    rows = tables.get(Setup(model, point.system, "vllm", point.tp))
    if rows and point.precision == "bf16":
        found["table of vLLM"] = step_latency.table_of(rows)
    return found


def scheduler(point: Point, engine: Engine, kv_tokens: int) -> ColocatedSchedulerConfig:
    fit = max(1, kv_tokens // (point.input_tokens + point.output_tokens))
    return ColocatedSchedulerConfig(
        max_running=min(engine.max_running, fit) if engine.whole_room else engine.max_running,
        prefill_budget=engine.prompt_tokens,
        max_waiting=10**6,
        prompts_first=engine.prompts_first,
    )


def deployment(point: Point, steps: StepTime, engine: Engine) -> Deployment:
    kv_tokens = kv_capacity_tokens(
        KNOWN_MODELS[point.model],
        load_hardware(SYSTEMS[point.system]),
        tp=point.tp,
        precision=point.precision,
        usable_memory=engine.usable_memory,
    )
    worker = WorkerSpec(
        role="colocated",
        step_time=steps,
        num_blocks=kv_tokens // BLOCK,
        scheduler=scheduler(point, engine, kv_tokens),
        gpus=point.tp,
    )
    return Deployment(workers=(worker,), block_size=BLOCK)


def simulate(point: Point, steps: StepTime, engine: Engine | None = None) -> Served:
    lengths = [(point.input_tokens, point.output_tokens)] * (REQUESTS_PER_CLIENT * point.concurrency)
    clients = ClosedLoop(lengths, point.concurrency, intake_s=INTAKE_S)
    made = deployment(point, steps, engine or ENGINES[point.backend])
    result = Simulation(made, SimulationConfig(router=ROUTER), clients).run()
    return Served(float(result.ttft_ms.mean()) / 1e3, float(result.tpot_ms.mean()) / 1e3)


def fit_host(points: Sequence[Point], without: Sequence[Served]) -> Host:
    """The least median error of TPOT, if a token takes so much longer as its step does."""
    measured = np.array([point.tpot_s for point in points])
    found = np.array([served.tpot_s for served in without])
    batch = np.array([point.concurrency for point in points])

    def median_error(host: Host) -> float:
        more = host.step_s + host.sequence_s * batch
        return float(np.median(np.abs((found + more) / measured - 1.0)))

    hosts = [Host(float(step), float(sequence)) for step in HOST_STEP_S for sequence in HOST_SEQUENCE_S]
    return min(hosts, key=median_error)


def judged(points: Sequence[Point], served: Sequence[Served]) -> dict[str, Errors]:
    pairs = list(zip(points, served, strict=True))
    return {
        "TTFT": errors(found.ttft_s / point.ttft_s - 1.0 for point, found in pairs),
        "TPOT": errors(found.tpot_s / point.tpot_s - 1.0 for point, found in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the tables; DIPHASE_DATA or ../shared/data without it")
    parser.add_argument("--every", type=int, default=1, help="only every Nth point")
    options = parser.parse_args()
    data = data_folder(options.data, os.environ)
    path = existing(data, "measured/serving_points.csv", "the project's data folder")
    points = [point for point in read_rows(path, Point.of) if point is not None][:: options.every]
    tables = step_latency.read_step_latency(data)
    content: dict[str, Any] = {"requests per client": REQUESTS_PER_CLIENT, "intake_s": INTAKE_S}
    plain: dict[str, list[Served]] = {}
    for source in ("roofline", "table of vLLM"):
        covered = [(point, steps[source]) for point in points if source in (steps := sources(point, tables))]
        plain[source] = [simulate(point, steps) for point, steps in covered]
        content[source] = of_source(covered, plain[source])
        show({source: content[source]})
    other = [
        simulate(point, sources(point, tables)["roofline"], OTHER_VLLM) if point.backend == "vllm" else served
        for point, served in zip(points, plain["roofline"], strict=True)
    ]
    vllm = [i for i, point in enumerate(points) if point.backend == "vllm"]
    content["roofline, vllm with 8,192 tokens a step"] = {
        "those points": judged([points[i] for i in vllm], [other[i] for i in vllm]),
        "all": judged(points, other),
    }
    show(content["roofline, vllm with 8,192 tokens a step"])
    harness.write_result(ROOT / "docs" / "results" / "measured_points.json", content)


def held_out(points: Sequence[Point]) -> dict[str, tuple[list[int], list[int]]]:
    """Places of the points that are left out together, and of those of the same engine that are not."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for backend in sorted({point.backend for point in points}):
        own = [i for i, point in enumerate(points) if point.backend == backend]
        several = len({points[i].group for i in own}) > 1
        names = {i: points[i].group if several else f"{points[i].group} tp {points[i].tp}" for i in own}
        for name in sorted(set(names.values())):
            left_out = [i for i in own if names[i] == name]
            found[name] = left_out, [i for i in own if names[i] != name]
    return found


def of_source(covered: Sequence[tuple[Point, StepTime]], without: Sequence[Served]) -> dict[str, Any]:
    """Errors by group, without and with host times of points left out, and those of all points."""
    points = [point for point, _ in covered]
    with_host: list[Served] = [Served(0.0, 0.0)] * len(points)
    hosts: dict[str, Any] = {}
    for name, (left_out, others) in held_out(points).items():
        host = fit_host([points[i] for i in others], [without[i] for i in others])
        hosts[name] = host._asdict()
        for i in left_out:
            with_host[i] = simulate(points[i], WithHost(covered[i][1], host))
    found: dict[str, Any] = {"host times, by what was left out": hosts}
    for group in ["all", *sorted({point.group for point in points})]:
        chosen = [i for i, point in enumerate(points) if group in {"all", point.group}]
        those = [points[i] for i in chosen]
        found[group] = {
            "as it is": judged(those, [without[i] for i in chosen]),
            "with host time": judged(those, [with_host[i] for i in chosen]),
        }
    return found


if __name__ == "__main__":
    main()
