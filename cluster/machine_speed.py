"""How fast this machine is just now, beside when a profile was made: the speed of a shared one wanders by far
more than a prediction may be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from ..engine.config import EngineConfig
from ..engine.neighbour import Neighbour, neighbour
from ..engine.profiler import REFERENCE_CELLS, Cell
from ..router.step_time import StepShape
from .config import ClusterConfig
from .one_machine import FREE_MEMORY_MIB, cores_of_worker
from .planner.profile import Profile


class Slower(NamedTuple):
    """Factors on the times of steps that have prompts, and of those that have none; below 1: faster."""

    prefill: float
    decode: float


class SpeedProbe:
    """An engine that idles but for the second or two in which it times its steps."""

    def __init__(self, engine: Neighbour, cores: Mapping[str, Sequence[int]]) -> None:
        self._engine = engine
        self._cores = cores

    def slower_than(self, profile: Profile) -> Slower:
        """What the times of now are, in times of the profile. Nothing else may compute meanwhile.

        Raises:
            ConfigError: the profile lacks the steps that are timed.
            InternalError: the engine has ended.
        """
        return slower(self._engine.time(self._cores), profile)


@contextmanager
def speed_probe(config: ClusterConfig) -> Iterator[SpeedProbe]:
    """Loads an engine of the configuration, to be timed where its workers compute, and ends it.

    Raises:
        InternalError: it cannot be loaded.
    """
    threads = config.engine.threads
    workers = sum(pool.workers for pool in config.pools.placements().values())
    # Of two workers the first computes prompts and the second decodes (one_machine.PLACEMENTS).
    cores = {kind: cores_of_worker(min(i, workers - 1), threads) for i, kind in enumerate(Slower._fields)}
    with neighbour(small_engine(config), cores["prefill"]) as engine:
        yield SpeedProbe(engine, cores)


def small_engine(config: ClusterConfig) -> EngineConfig:
    """The configuration's engine, with a pool for a few sequences."""
    engine = config.engine
    return replace(
        engine,
        model=config.model.name,
        dtype=config.model.dtype,
        kv_cache_mib=min(engine.kv_cache_mib, FREE_MEMORY_MIB),
    )


def slower(times: Mapping[str, float], profile: Profile) -> Slower:
    """`times` of REFERENCE_CELLS, seconds; beside what the same steps took when the profile was made, as a
    fit's error in just these two would count for all.

    Raises:
        ConfigError: see SpeedProbe.slower_than().
    """
    return Slower(
        *(times[kind] / profile.measured_s(shape_of(REFERENCE_CELLS[kind])) for kind in Slower._fields)
    )


def between(measured: Sequence[Slower]) -> Slower:
    """The mean, of what was measured before and after something."""
    return Slower(*(sum(column) / len(measured) for column in zip(*measured, strict=True)))


def shape_of(cell: Cell) -> StepShape:
    tokens = cell.prompt_tokens
    return StepShape(
        prefill_tokens=cell.prompts * tokens,
        prefill_context=cell.prompts * tokens * (cell.prompt_context + tokens / 2),
        decode_batch=cell.decode_batch,
        decode_context=cell.decode_batch * cell.decode_context,
    )
