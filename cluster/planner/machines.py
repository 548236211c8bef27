"""What a worker of some parallelism is: step time and room for KV of one model on one kind of GPU. Each
source of step times becomes one class here; measured tables are in table_machine.py, profiles in
profile_machine.py. Knows no pools and no objectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ...proto.errors import ConfigError
from ...router.step_time import StepTime
from .distserve import check_measured, distserve_kv_capacities, distserve_step_time
from .hardware import Hardware, Node
from .host_time import WithHost
from .model_shape import ModelShape
from .roofline import BYTES, Precision, RooflineStepTime, kv_capacity_tokens


@dataclass(frozen=True, slots=True, order=True)
class Parallel:
    """How one worker is spread over GPUs."""

    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp {self.tp}" if self.pp == 1 else f"tp {self.tp} pp {self.pp}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every worker is configured with, beside what its pool decides."""

    block_size: int = 16
    """Tokens of a KV block."""
    chunk_budget: int = 8192
    """Prompt tokens of a prefill step."""
    max_running: int = 512
    context_length: int = 2**31 - 1
    """Tokens that a prompt and its completion may have."""


class Machine(Protocol):
    """One model on one kind of GPU."""

    @property
    def hardware(self) -> Node: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def num_layers(self) -> int:
        """That a hand-off pushes one by one, and pipeline stages share."""
        ...

    @property
    def first_token_s(self) -> float:
        """What lies around a first token, from the client to the worker and back."""
        ...

    def parallels(self, gpus: int, max_pp: int) -> list[Parallel]:
        """Ways to spread a worker over at most so many GPUs, whether it then fits or not."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        ...

    def step_time(self, parallel: Parallel) -> StepTime:
        """
        Raises:
            ConfigError: it is not known.
        """
        ...

    def kv_tokens(self, parallel: Parallel) -> int:
        """
        Raises:
            ConfigError: the model does not fit.
        """
        ...


@dataclass(frozen=True)
class GpuMachine:
    """A model on GPUs, whatever its step times come from: what follows from its shape and the data sheet."""

    model: ModelShape
    hardware: Hardware
    limits: Limits = field(default=Limits(), kw_only=True)
    first_token_s: float = field(default=0.0, kw_only=True)

    @property
    def num_layers(self) -> int:
        """See Machine."""
        return self.model.num_layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers, in 16 bits."""
        return self.model.kv_bytes_per_token()

    def parallels(self, gpus: int, max_pp: int) -> list[Parallel]:
        """See Machine. Tensor parallelism divides the heads and a node, stages divide the layers; a pipeline
        longer than a node takes whole nodes."""
        model, node = self.model, self.hardware.gpus_per_node
        return [
            Parallel(tp, pp)
            for tp in divisors(node, min(node, gpus))
            if not model.num_q_heads % tp and not (model.num_kv_heads % tp and tp % model.num_kv_heads)
            for pp in divisors(model.num_layers, min(max_pp, gpus // tp))
            if tp * pp <= node or tp * pp % node == 0
        ]

    def kv_tokens(self, parallel: Parallel) -> int:
        """See Machine. Weights and KV in 16 bits."""
        return self._kv_tokens(parallel)

    def _kv_tokens(
        self, parallel: Parallel, precision: Precision = "bf16", kv_precision: Precision = "bf16"
    ) -> int:
        check_parallel(self.model, parallel)
        return kv_capacity_tokens(
            self.model,
            self.hardware,
            tp=parallel.tp,
            pp=parallel.pp,
            precision=precision,
            kv_precision=kv_precision,
        )


@dataclass(frozen=True)
class RooflineMachine(GpuMachine):
    """Step times and memory by arithmetic, and what an engine does between steps."""

    precision: Precision = "bf16"
    kv_precision: Precision = "bf16"

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        return self.model.kv_bytes_per_token(BYTES[self.kv_precision])

    def step_time(self, parallel: Parallel) -> StepTime:
        """See Machine."""
        return _roofline(self, parallel)

    def kv_tokens(self, parallel: Parallel) -> int:
        """See Machine."""
        return self._kv_tokens(parallel, self.precision, self.kv_precision)


@lru_cache(maxsize=256)
def _roofline(machine: RooflineMachine, parallel: Parallel) -> StepTime:
    """One object for equal workers: what is derived of it is derived once."""
    check_parallel(machine.model, parallel)
    return WithHost(
        RooflineStepTime(
            machine.model,
            machine.hardware,
            tp=parallel.tp,
            pp=parallel.pp,
            precision=machine.precision,
            kv_precision=machine.kv_precision,
        )
    )


@dataclass(frozen=True)
class DistServeMachine(GpuMachine):
    """DistServe's measurements of OPT on A100-80G, with its KV capacities where they are published and
    arithmetic where they are not."""

    name: str
    folder: Path
    engine: str = "distserve"
    overheads: bool = False
    """Whether its released simulator's additions are on, which the measurements have in them already."""

    def __post_init__(self) -> None:
        # Now: of one parallelism among others a search takes an error for "does not fit".
        check_measured(self.folder, model=self.name, engine=self.engine)

    def step_time(self, parallel: Parallel) -> StepTime:
        """See Machine."""
        return _distserve(self, parallel)

    def kv_tokens(self, parallel: Parallel) -> int:
        """See Machine."""
        check_parallel(self.model, parallel)
        published = distserve_kv_capacities(self.folder, model=self.name)
        tokens = published.get((parallel.tp, parallel.pp))
        return super().kv_tokens(parallel) if tokens is None else tokens


@lru_cache(maxsize=256)
def _distserve(machine: DistServeMachine, parallel: Parallel) -> StepTime:
    check_parallel(machine.model, parallel)
    return distserve_step_time(
        machine.folder,
        model=machine.name,
        tp=parallel.tp,
        pp=parallel.pp,
        engine=machine.engine,
        overheads=machine.overheads,
    )


def check_parallel(model: ModelShape, parallel: Parallel) -> None:
    """
    Raises:
        ConfigError: the model's heads or layers cannot be divided so.
    """
    tp, pp = parallel.tp, parallel.pp
    if tp < 1 or model.num_q_heads % tp:
        raise ConfigError(
            f"tp = {tp} does not divide the model's {model.num_q_heads} heads; use one of "
            f"{', '.join(map(str, divisors(model.num_q_heads, 16)))}"
        )
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise ConfigError(f"tp = {tp} does not fit the model's {model.num_kv_heads} key-value heads")
    if pp < 1 or model.num_layers % pp:
        raise ConfigError(
            f"pp = {pp} does not divide the model's {model.num_layers} layers; use one of "
            f"{', '.join(map(str, divisors(model.num_layers, 16)))}"
        )


def divisors(number: int, most: int) -> list[int]:
    """Of `number`, up to `most`."""
    return [i for i in range(1, min(number, most) + 1) if number % i == 0]


def feasible_parallels(machine: Machine, gpus: int, max_pp: int = 1) -> list[Parallel]:
    """Every parallelism of one worker that fits `gpus` GPUs, by ascending GPUs.

    Raises:
        ConfigError: none fits; the message says why.
    """
    if gpus < 1:
        raise ConfigError(f"gpus = {gpus}; plan for at least 1 GPU")
    if max_pp < 1:
        raise ConfigError(f"max_pp = {max_pp}; a worker has at least 1 pipeline stage")
    found: list[Parallel] = []
    error: ConfigError | None = None
    for parallel in machine.parallels(gpus, max_pp):
        try:
            machine.kv_tokens(parallel)
            machine.step_time(parallel)
        except ConfigError as exc:
            error = exc  # the largest is what one can do nothing more about
            continue
        found.append(parallel)
    if not found:
        if error is None:
            raise ConfigError(f"gpus = {gpus} are fewer than any known worker takes; plan for more")
        raise ConfigError(f"gpus = {gpus} cannot hold the model: {error.message}")
    return sorted(found, key=lambda parallel: (parallel.gpus, parallel.pp))
