"""A model on GPUs whose step times were measured, by Splitwise or in step latency tables: a table for each
tensor parallelism, and memory by arithmetic. Knows no pools and no objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...router.step_time import StepTime
from . import splitwise, step_latency
from .hardware import load_hardware
from .host_time import WithHost
from .machines import GpuMachine, Parallel
from .model_shape import load_model_shape
from .table_files import missing

T = TypeVar("T")

BACKEND = "vllm"
"""Of the step latency tables: the one engine that all of them have."""

_SPLITWISE = {"a100-sxm-80gb": "a100-80gb", "h100-sxm": "h100-80gb"}
_SYSTEMS = {"a100-sxm-80gb": "a100_sxm", "h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
_MODELS = {
    "llama3.1-8b": "meta-llama/Meta-Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Meta-Llama-3.1-70B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}
"""What the tables call our hardware and models."""


@dataclass(frozen=True, kw_only=True)
class TableMachine(GpuMachine):
    """Workers without pipeline stages, of the tensor parallelisms that were measured."""

    by_tp: Mapping[int, StepTime]

    def parallels(self, gpus: int, max_pp: int) -> list[Parallel]:
        """See Machine."""
        return [Parallel(tp) for tp in sorted(self.by_tp) if tp <= min(gpus, self.hardware.gpus_per_node)]

    def step_time(self, parallel: Parallel) -> StepTime:
        """See Machine."""
        if parallel.pp > 1:
            raise missing("pp", parallel.pp, (1,))
        if parallel.tp not in self.by_tp:
            raise missing("tp", parallel.tp, self.by_tp)
        return self.by_tp[parallel.tp]


def splitwise_machine(folder: Path, *, model: str, hardware: str) -> TableMachine:
    """By Splitwise's measurements.

    Raises:
        ConfigError: they have no such model on such hardware, or their file is missing or malformed.
    """
    ours = {theirs: name for name, theirs in _SPLITWISE.items()}
    measured = {
        (setup.model, ours[setup.hardware], setup.tp): runs
        for setup, runs in splitwise.read_splitwise(folder).items()
        if setup.hardware in ours
    }
    return _machine(measured, splitwise.table_of, model, hardware)


def step_latency_machine(folder: Path, *, model: str, hardware: str) -> TableMachine:
    """By the step latency tables, which are of GPUs alone, and what an engine does between steps.

    Raises:
        ConfigError: they have no such model on such hardware, or a file is missing or malformed.
    """
    models = {theirs: name for name, theirs in _MODELS.items()}
    systems = {theirs: name for name, theirs in _SYSTEMS.items()}
    measured = {
        (models[setup.model], systems[setup.system], setup.tp): rows
        for setup, rows in step_latency.read_step_latency(folder).items()
        if setup.model in models and setup.system in systems and setup.backend == BACKEND
    }
    return _machine(measured, lambda rows: WithHost(step_latency.table_of(rows)), model, hardware)


def _machine(
    measured: Mapping[tuple[str, str, int], list[T]],
    table_of: Callable[[list[T]], StepTime],
    model: str,
    hardware: str,
) -> TableMachine:
    by_tp = {tp: table_of(rows) for (of, on, tp), rows in measured.items() if (of, on) == (model, hardware)}
    if not by_tp:
        known = (f"{of} on {on}" for of, on, _ in measured)
        raise missing("the model and hardware", f"{model} on {hardware}", known)
    return TableMachine(model=load_model_shape(model), hardware=load_hardware(hardware), by_tp=by_tp)
