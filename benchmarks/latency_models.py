"""How near each source of step times comes to what was measured.

    .venv/bin/python -P benchmarks/latency_models.py [--data FOLDER] [--calibrate]

writes docs/results/latency_models.json. All errors are relative, |predicted / measured - 1|:

- step_latency: each table's points, by a table that lacks them: one point, a whole batch, a whole context,
  all prefill steps of as many tokens; and by the points' own table (what smoothing does to them);
- splitwise: every run's token time by its own table, by batch; by a table that lacks the batch; prompt
  times. Runs that did not run as one batch stand apart;
- roofline, without host time: the step latency of models on hardware that it was not calibrated on, and the
  KV capacities of DistServe.

What serving with such step times comes to is in measured_points.py.

--calibrate finds roofline.Efficiency again and prints it; nothing is written then.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from diphase.benchmarks import harness
from diphase.cluster.load.traces import data_folder
from diphase.cluster.planner import distserve, splitwise, step_latency
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.model_shape import KNOWN_MODELS
from diphase.cluster.planner.roofline import Efficiency, RooflineStepTime, kv_capacity_tokens
from diphase.cluster.planner.step_latency import Row, Setup
from diphase.cluster.planner.tables import TableStepTime
from diphase.router.step_time import StepShape, StepTime

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"a100_sxm": "a100-sxm-80gb", "h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm"}
MODELS = {
    "meta-llama/Meta-Llama-3.1-8B": "llama3.1-8b",
    "meta-llama/Meta-Llama-3.1-70B": "llama3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
}
CALIBRATED_ON = {("llama3.1-8b", "h200_sxm", "vllm"), ("llama3.1-70b", "h200_sxm", "vllm")}
START = Efficiency(
    matrix=0.7,
    attention=0.7,
    weights=0.7,
    kv=0.7,
    link=0.7,
    all_reduce_s=1e-5,
    layer_s=1e-5,
    step_s=1e-4,
    activation_passes=10.0,
)
"""Where the calibration sets out: round numbers."""
SHARES = ("matrix", "attention", "weights", "kv", "link")
"""No more than a whole peak is reached."""
Errors = dict[str, float]


def errors(values: Iterable[float]) -> Errors:
    """Of relative differences with their sign."""
    signed = np.array(list(values))
    size = np.abs(signed)
    return {
        "points": int(size.size),
        "mean": round(float(size.mean()), 5),
        "median": round(float(np.median(size)), 5),
        "p95": round(float(np.percentile(size, 95)), 5),
        "worst": round(float(size.max()), 5),
        "bias": round(float(signed.mean()), 5),
    }


def shape_of(row: Row) -> StepShape:
    """What the row's step works on."""
    if row.phase == "decode":
        return StepShape(decode_batch=row.batch, decode_context=float(row.batch * row.isl))
    point = row.prefill_point
    return StepShape(point.tokens, point.context)


def error_of(model: StepTime, row: Row) -> float:
    return model.step_s(shape_of(row)) / row.seconds - 1.0


def held_out(rows: list[Row], phase: str, key: Callable[[Row], Any], inner: bool = True) -> list[float]:
    """Each group of rows with the same key, by a table without it; the first and last group stay in."""
    keys = sorted({key(row) for row in rows if row.phase == phase})
    found: list[float] = []
    for value in keys[1:-1] if inner else keys:
        out = [row for row in rows if row.phase == phase and key(row) == value]
        table = step_latency.table_of([row for row in rows if row not in out])
        found += [error_of(table, row) for row in out]
    return found


def interpolation(data: Path) -> dict[str, Errors]:
    """Of the tables of step latency, all setups together."""
    found: dict[str, list[float]] = defaultdict(list)
    for rows in step_latency.read_step_latency(data).values():
        table = step_latency.table_of(rows)
        for row in rows:
            found[f"own table, {row.phase}"].append(error_of(table, row))
        found["without its batch, decode"] += held_out(rows, "decode", lambda row: row.batch)
        found["without its context, decode"] += held_out(rows, "decode", lambda row: row.isl)
        found["without its number of tokens, prefill"] += held_out(
            rows, "prefill", lambda row: row.prefill_point.tokens
        )
        decode = [row for row in rows if row.phase == "decode"]
        longest = {row.batch: row.isl for row in sorted(decode, key=lambda row: row.isl)}
        shortest, batches = min(row.isl for row in decode), sorted(longest)
        points = [row for row in decode if shortest < row.isl < longest[row.batch]][::7]
        for row in points:
            if batches[0] < row.batch < batches[-1]:
                table = step_latency.table_of([other for other in rows if other != row])
                found["without it (every seventh), decode"].append(error_of(table, row))
        tokens = sorted(row.prefill_point.tokens for row in rows if row.phase == "prefill")
        for row in rows:
            if row.phase == "prefill" and tokens[0] < row.prefill_point.tokens < tokens[-1]:
                table = step_latency.table_of([other for other in rows if other != row])
                found["without it, prefill"].append(error_of(table, row))
    return {name: errors(values) for name, values in sorted(found.items())}


def token_error(table: TableStepTime, run: splitwise.Run) -> float:
    batch = run.batch_size
    return table.step_s(StepShape(decode_batch=batch, decode_context=batch * run.context)) / run.token_s - 1.0


def of_splitwise(data: Path) -> dict[str, Any]:
    """Token times by batch, in sample and without the batch, and prompt times."""
    tokens: dict[int, list[float]] = defaultdict(list)
    without: dict[int, list[float]] = defaultdict(list)
    prompts: list[float] = []
    apart: list[float] = []
    for runs in splitwise.read_splitwise(data).values():
        table = splitwise.table_of(runs)
        batches = sorted({run.batch_size for run in runs if run.as_one_batch})
        for run in runs:
            if not run.as_one_batch:
                apart.append(token_error(table, run))
                continue
            tokens[run.batch_size].append(token_error(table, run))
            size = run.batch_size * run.prompt_size
            prompts.append(table.step_s(StepShape(size, size * run.prompt_size / 2.0)) / run.prompt_s - 1.0)
        for batch in batches[1:-1]:
            table = splitwise.table_of([run for run in runs if run.batch_size != batch])
            without[batch] += [
                token_error(table, r) for r in runs if r.batch_size == batch and r.as_one_batch
            ]
    return {
        "token time, all batches": errors(value for values in tokens.values() for value in values),
        "token time, by batch": {str(batch): errors(tokens[batch]) for batch in sorted(tokens)},
        "token time without the batch, by batch": {str(b): errors(without[b]) for b in sorted(without)},
        "prompt time": errors(prompts),
        "token time of runs that did not run as one batch": errors(apart),
    }


def roofline_for(setup: Setup, efficiency: Efficiency | None = None) -> RooflineStepTime:
    hardware = load_hardware(SYSTEMS[setup.system])
    return RooflineStepTime(KNOWN_MODELS[MODELS[setup.model]], hardware, tp=setup.tp, efficiency=efficiency)


def of_roofline(data: Path) -> dict[str, Any]:
    """Against step latency by model, system and backend, and against DistServe's KV capacities."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for setup, rows in step_latency.read_step_latency(data).items():
        model = roofline_for(setup)
        group = found[MODELS[setup.model], setup.system, setup.backend]
        for row in rows:
            group[row.phase].append(error_of(model, row))
    unseen: dict[str, list[float]] = defaultdict(list)
    for name, group in found.items():
        if name[:2] not in {seen[:2] for seen in CALIBRATED_ON}:
            for phase, values in group.items():
                unseen[phase] += values
    result: dict[str, Any] = {
        " ".join(name): {
            "calibrated on": name in CALIBRATED_ON,
            **{phase: errors(values) for phase, values in group.items()},
        }
        for name, group in sorted(found.items())
    }
    result["models on hardware not calibrated on"] = {p: errors(v) for p, v in unseen.items()}
    a100 = load_hardware("a100-sxm-80gb")
    ratios = [
        kv_capacity_tokens(KNOWN_MODELS[name.rpartition("/")[2]], a100, tp=tp, pp=pp) / tokens - 1.0
        for name, capacities in distserve.read_kv_capacities(data).items()
        for (tp, pp), tokens in capacities.items()
    ]
    result["KV capacity against DistServe's"] = errors(ratios)
    return result


def calibrate(data: Path) -> Efficiency:
    """Coordinate descent from START on the mean relative error over CALIBRATED_ON."""
    tables = [
        (setup, [(shape_of(row), row.seconds) for row in rows])
        for setup, rows in step_latency.read_step_latency(data).items()
        if (MODELS[setup.model], setup.system, setup.backend) in CALIBRATED_ON
    ]

    def loss(efficiency: Efficiency) -> float:
        models = [(roofline_for(setup, efficiency), rows) for setup, rows in tables]
        return float(np.mean([abs(m.step_s(shape) / s - 1.0) for m, rows in models for shape, s in rows]))

    best = START
    least, step = loss(best), 0.2
    while step > 0.01:
        before = least
        for name in asdict(best):
            for factor in (1.0 + step, 1.0 / (1.0 + step)):
                trial = replace(best, **{name: getattr(best, name) * factor})
                share = getattr(trial, name) if name in SHARES else 0.0
                if share <= 1.0 and (value := loss(trial)) < least:
                    best, least = trial, value
        if least > before - 1e-5:
            step /= 2.0
    print(f"mean relative error {least:.4f}")
    return best


def show(content: Mapping[str, Any], indent: int = 0) -> None:
    for name, value in content.items():
        if isinstance(value, dict) and "median" not in value:
            print(" " * indent + name)
            show(value, indent + 2)
        else:
            print(" " * indent + f"{name}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the tables; DIPHASE_DATA or ../shared/data without it")
    parser.add_argument("--calibrate", action="store_true", help="find roofline.Efficiency, write nothing")
    options = parser.parse_args()
    data = data_folder(options.data, os.environ)
    if options.calibrate:
        print(calibrate(data))
        return
    content: dict[str, Any] = {
        "step_latency": interpolation(data),
        "splitwise": of_splitwise(data),
        "roofline": of_roofline(data),
    }
    show(content)
    harness.write_result(ROOT / "docs" / "results" / "latency_models.json", content)


if __name__ == "__main__":
    main()
