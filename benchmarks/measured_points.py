"""Serving points that were measured on real clusters, simulated: TTFT and TPOT at a stated concurrency.

    .venv/bin/python -P benchmarks/measured_points.py [--data FOLDER] [--every N] [--calibrate]

writes docs/results/measured_points.json. The points (measured/serving_points.csv) are of colocated serving
of dense models on H100, one worker without stages, with a closed loop of clients: all begin at once, each
sends its next request when its last one has ended, ten requests a client. The scheduler is ours, set like the
engine that served: vLLM and TensorRT-LLM compute prompts beside decodes, SGLang computes prompts first.

The points do not say how engines were configured. What was published says it in part:

- Llama-3.1-70B: by their lengths, clients and date these are runs of InferenceMAX, whose README (of 2025) has
  vLLM compute 8,192 tokens a step, and lengths uniform from 0.8 of what is stated up to that.
- All others were measured for aiconfigurator (github.com/ai-dynamo/aiconfigurator), whose client
  (src/aiconfigurator/eval/benchmarks/genai_perf_runner.py) sends what is stated. Its generator has vLLM and
  TensorRT-LLM compute 2,012 tokens a step more than a prompt has (src/aiconfigurator/generator/rule_plugin:
  1,500 and a batch of 512). That is taken for vLLM; TensorRT-LLM and SGLang have their own default of 8,192.
- TensorRT-LLM's fp8 has KV of 8 bits: more clients fit one GPU than KV of 16 bits leaves room for.

Which of two configurations an engine had is a choice made with its points known; "other configurations" has
what else they come to: vLLM's default of 8,192 tokens, and aiconfigurator's rule for TensorRT-LLM.

Step times: what `diphase plan` plans with, the roofline and the step latency table of the same model, system
and precision (of vLLM, whoever served) where there is one, both with host times; beside them without. Errors
are relative, of the means over all requests.

--calibrate finds host_time.SERVING again and prints it; nothing is written then. It simulates other points:
Llama-3.1-70B in fp8 on B200, by vLLM and TensorRT-LLM, with KV of 8 bits, as InferenceMAX says of vLLM there
and as long contexts show of both. How much slower than its data sheet a B200 reads weights is fitted beside,
and forgotten.
"""

from __future__ import annotations

import argparse
import os
import random
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
from diphase.cluster.planner.hardware import Hardware, load_hardware
from diphase.cluster.planner.host_time import Host, WithHost
from diphase.cluster.planner.model_shape import KNOWN_MODELS, ModelShape
from diphase.cluster.planner.roofline import BYTES, Precision, RooflineStepTime, kv_capacity_tokens
from diphase.cluster.planner.simulator import Simulation
from diphase.cluster.planner.step_latency import Row, Setup
from diphase.cluster.planner.table_files import existing, read_rows
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.router.config import RouterConfig
from diphase.router.step_time import StepTime

ROOT = Path(__file__).resolve().parents[1]
POINTS = "measured/serving_points.csv"
REQUESTS_PER_CLIENT = 10
INTAKE_S = 0.002
"""HTTP and tokeniser, of a request."""
SHORTEST = 0.8
"""Of the stated length, where lengths vary."""
BEYOND_PROMPT = 2012
BLOCK = 16
ROUTER = RouterConfig(max_queued_requests=10**8, max_queued_tokens=10**9, local_prefill_tokens=0)
CALIBRATED_ON = "b200_sxm"
HARDWARE = {**SYSTEMS, CALIBRATED_ON: "b200-sxm"}
HOST_STEP_S = np.arange(0.0, 3.01e-3, 1e-4)
HOST_SEQUENCE_S = np.arange(0.0, 6.01e-5, 2e-6)
SLOWER = np.arange(-0.2, 0.61, 0.05)
"""Time for reading weights, as a share of what the data sheet's bandwidth takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How it is configured."""

    prompt_tokens: int = 8192
    """Most of a step."""
    beyond_prompt: bool = False
    """Instead: tokens of a step, those of decodes among them, are a prompt and BEYOND_PROMPT."""
    whole_prompts: bool = False
    """A step then has no chunks."""
    prompts_first: bool = False
    whole_room: bool = False
    """Starts only sequences that fit the memory to their end, so that none is preempted."""
    usable_memory: float = 0.9
    max_running: int = 1024


ENGINES = {
    "vllm": Engine(beyond_prompt=True),
    "sglang": Engine(prompts_first=True, usable_memory=0.87),
    "trtllm": Engine(whole_room=True),
}
INFERENCE_MAX = {"vllm": Engine(), "trtllm": Engine(whole_room=True)}
OTHERS = {
    "vLLM with 8,192 tokens a step": {"vllm": Engine()},
    "TensorRT-LLM by aiconfigurator's rule": {
        "trtllm": Engine(whole_room=True, beyond_prompt=True, whole_prompts=True)
    },
}
"""Configurations that may have been meant instead."""


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
        """None for a point that no source covers: another model or system, precisions of less than 8 bits,
        disaggregated, with stages, or without its concurrency."""
        name = (
            row["model_path"].rpartition("/")[2].replace("-Instruct", "").lower().replace("llama-", "llama")
        )
        precision = row["precision"] + row["gemm_quant_mode"]
        covered = name in MODELS.values() and row["system"] in HARDWARE and "fp4" not in precision
        concurrency = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        if not covered or row["mode"] != "agg" or row["pp_size"] != "1" or concurrency is None:
            return None
        return cls(
            name,
            row["system"],
            row["backend"],
            "fp8" if "fp8" in precision else "bf16",
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

    @property
    def shape(self) -> ModelShape:
        return KNOWN_MODELS[self.model]

    @property
    def hardware(self) -> Hardware:
        return load_hardware(HARDWARE[self.system])

    @property
    def of_inference_max(self) -> bool:
        return self.model == "llama3.1-70b"

    @property
    def engine(self) -> Engine:
        return (INFERENCE_MAX if self.of_inference_max else ENGINES)[self.backend]

    @property
    def kv_precision(self) -> Precision:
        eight_bits = self.system == CALIBRATED_ON or (self.backend, self.precision) == ("trtllm", "fp8")
        return "fp8" if eight_bits else "bf16"

    def lengths(self) -> list[tuple[int, int]]:
        """Of all requests."""
        count = REQUESTS_PER_CLIENT * self.concurrency
        if not self.of_inference_max:
            return [(self.input_tokens, self.output_tokens)] * count
        rng = random.Random(0)
        return [(_drawn(rng, self.input_tokens), _drawn(rng, self.output_tokens)) for _ in range(count)]


def _drawn(rng: random.Random, most: int) -> int:
    return rng.randint(int(SHORTEST * most), most)


class Served(NamedTuple):
    """A point's means, in seconds."""

    ttft_s: float
    tpot_s: float


def read_points(data: Path) -> tuple[list[Point], list[Point]]:
    """Those that are judged, and those to calibrate on."""
    path = existing(data, POINTS, "the project's data folder")
    found = [point for point in read_rows(path, Point.of) if point is not None]
    return (
        [point for point in found if point.system != CALIBRATED_ON],
        [point for point in found if point.system == CALIBRATED_ON],
    )


def sources(point: Point, tables: Mapping[Setup, list[Row]]) -> dict[str, StepTime]:
    """Step times of GPUs alone by the name of what they come from."""
    found: dict[str, StepTime] = {
        "roofline": RooflineStepTime(
            point.shape,
            point.hardware,
            tp=point.tp,
            precision=point.precision,
            kv_precision=point.kv_precision,
        )
    }
    model = next(name for name, short in MODELS.items() if short == point.model)
    rows = tables.get(Setup(model, point.system, "vllm", point.tp))
    if rows and point.precision == "bf16":
        found["table of vLLM"] = step_latency.table_of(rows)
    return found


def scheduler(point: Point, engine: Engine, kv_tokens: int) -> ColocatedSchedulerConfig:
    fit = max(1, kv_tokens // (point.input_tokens + point.output_tokens))
    prompt_tokens = engine.prompt_tokens
    if engine.beyond_prompt:
        prompt_tokens = point.input_tokens + BEYOND_PROMPT - point.concurrency
    if engine.whole_prompts:
        prompt_tokens -= prompt_tokens % point.input_tokens
    return ColocatedSchedulerConfig(
        max_running=min(engine.max_running, fit) if engine.whole_room else engine.max_running,
        prefill_budget=prompt_tokens,
        max_waiting=10**6,
        prompts_first=engine.prompts_first,
    )


def deployment(point: Point, steps: StepTime, engine: Engine) -> Deployment:
    kv_tokens = kv_capacity_tokens(
        point.shape,
        point.hardware,
        tp=point.tp,
        precision=point.precision,
        kv_precision=point.kv_precision,
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
    clients = ClosedLoop(point.lengths(), point.concurrency, intake_s=INTAKE_S)
    made = deployment(point, steps, engine or point.engine)
    result = Simulation(made, SimulationConfig(router=ROUTER), clients).run()
    return Served(float(result.ttft_ms.mean()) / 1e3, float(result.tpot_ms.mean()) / 1e3)


def judged(points: Sequence[Point], served: Sequence[Served]) -> dict[str, Errors]:
    pairs = list(zip(points, served, strict=True))
    return {
        "TTFT": errors(found.ttft_s / point.ttft_s - 1.0 for point, found in pairs),
        "TPOT": errors(found.tpot_s / point.tpot_s - 1.0 for point, found in pairs),
    }


def by_group(points: Sequence[Point], served: Mapping[str, Sequence[Served]]) -> dict[str, Any]:
    """Errors of all and of each group, by what was simulated."""
    found: dict[str, Any] = {}
    for group in ["all", *sorted({point.group for point in points})]:
        chosen = [i for i, point in enumerate(points) if group in {"all", point.group}]
        found[group] = {
            name: judged([points[i] for i in chosen], [values[i] for i in chosen])
            for name, values in served.items()
        }
    return found


def otherwise(
    points: Sequence[Point], served: Sequence[Served], engines: Mapping[str, Engine]
) -> dict[str, dict[str, Errors]]:
    """With these engines where they served aiconfigurator's points."""
    other = list(served)
    changed = [i for i, point in enumerate(points) if point.backend in engines and not point.of_inference_max]
    for i in changed:
        steps = WithHost(sources(points[i], {})["roofline"])
        other[i] = simulate(points[i], steps, engines[points[i].backend])
    return {
        "those points": judged([points[i] for i in changed], [other[i] for i in changed]),
        "all": judged(points, other),
    }


def calibrate(points: Sequence[Point]) -> tuple[Host, float, float]:
    """(host times, slower reading, median error): the least of TPOT, if a token takes so much longer as its
    step does."""
    without = [simulate(point, sources(point, {})["roofline"]) for point in points]
    return fit_host(points, without)


def fit_host(points: Sequence[Point], without: Sequence[Served]) -> tuple[Host, float, float]:
    """See calibrate()."""
    measured = np.array([point.tpot_s for point in points])
    found = np.array([served.tpot_s for served in without])
    batch = np.array([point.concurrency for point in points])
    reading = np.array(
        [
            point.shape.num_layers
            * point.shape.layer_parameters
            * BYTES[point.precision]
            / (point.tp * point.hardware.hbm_gb_per_s * 1e9)
            for point in points
        ]
    )

    def median_error(tried: tuple[Host, float]) -> float:
        host, slower = tried
        more = host.step_s + host.sequence_s * batch + slower * reading
        return float(np.median(np.abs((found + more) / measured - 1.0)))

    best = min(
        (
            (Host(float(step), float(sequence)), float(slower))
            for slower in SLOWER
            for step in HOST_STEP_S
            for sequence in HOST_SEQUENCE_S
        ),
        key=median_error,
    )
    return *best, median_error(best)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the tables; DIPHASE_DATA or ../shared/data without it")
    parser.add_argument("--every", type=int, default=1, help="only every Nth point")
    parser.add_argument("--calibrate", action="store_true", help="find host times, write nothing")
    options = parser.parse_args()
    data = data_folder(options.data, os.environ)
    points, to_calibrate = (found[:: options.every] for found in read_points(data))
    if options.calibrate:
        host, slower, error = calibrate(to_calibrate)
        print(f"{host}, {slower:.2f} slower reading: median error {error:.4f} at {len(to_calibrate)} points")
        return
    tables = step_latency.read_step_latency(data)
    content: dict[str, Any] = {"requests per client": REQUESTS_PER_CLIENT, "intake_s": INTAKE_S}
    served: list[Served] = []
    for source in ("table of vLLM", "roofline"):
        covered = [(point, steps[source]) for point in points if source in (steps := sources(point, tables))]
        served = [simulate(point, WithHost(steps)) for point, steps in covered]
        without = [simulate(point, steps) for point, steps in covered]
        content[source] = by_group(
            [point for point, _ in covered], {"with host time": served, "without": without}
        )
        show({source: content[source]})
    content["other configurations"] = {
        name: otherwise(points, served, engines) for name, engines in OTHERS.items()
    }
    show(content["other configurations"])
    harness.write_result(ROOT / "docs" / "results" / "measured_points.json", content)


if __name__ == "__main__":
    main()
