"""Machines by roofline, and placements on them, for tests of the planner."""

from __future__ import annotations

from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import Parallel, RooflineMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.placement import Kind, Placement, Pool


def roofline(model: str = "llama3.1-8b", hardware: str = "h100-sxm") -> RooflineMachine:
    return RooflineMachine(load_model_shape(model), load_hardware(hardware))


def pair(
    prefills: int, decodes: int, *, tp: tuple[int, int] = (1, 1), on: tuple[str, str] = ("", "")
) -> Placement:
    """So many workers of both phases; of each phase the tensor parallelism and the type of GPU."""
    counts, roles = (prefills, decodes), ("prefill", "decode")
    workers = (Kind(role, Parallel(ranks)) for role, ranks in zip(roles, tp, strict=True))
    return Placement(tuple(map(Pool, workers, counts, on)))


def colocated(count: int, *, tp: int = 1, pp: int = 1) -> Placement:
    return Placement((Pool(Kind("colocated", Parallel(tp, pp), 512), count),))
