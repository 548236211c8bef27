"""A plan: the search that a task asks for, and why its best placement is what it is. Knows no files."""

from __future__ import annotations

from .explain import binding, curves, infeasible
from .failure_study import outages
from .fleet_search import FleetTask, fleet_search
from .goodput import Mapped
from .placement import build
from .plan_report import SHOWN, Plan
from .search import Found, Task, search
from .search_distserve import search_published

SEARCH = "search"
"""The algorithm that is no publication's."""


def make_plan(
    task: Task | FleetTask,
    algorithm: str = SEARCH,
    mapped: Mapped = map,
    *,
    away_s: float = 0.0,
) -> Plan:
    """Searches and explains.

    Args:
        algorithm: on GPUs of one type.
        away_s: how long a lost worker is away; 0: none is lost.

    Raises:
        ConfigError: the model does not fit, or the budget has no worker.
    """
    if isinstance(task, FleetTask):
        found = fleet_search(task, mapped)
    else:
        found = search(task, mapped) if algorithm == SEARCH else search_published(task, algorithm, mapped)
    if not found.candidates:
        return Plan(task=task, found=found, infeasible=found.sentence or _why_not(task, found))
    best = found.candidates[0]
    deployment = build(best.placement, task.machines)
    return Plan(
        task=task,
        found=found,
        binding=binding(task, found.phases.get(""), best, mapped),
        curves=tuple(curves(task, found.known[:SHOWN], mapped)),
        outages=outages(task, deployment, best.rate, away_s, mapped) if away_s else (),
    )


def _why_not(task: Task | FleetTask, found: Found) -> str:
    """Each type's own reason."""
    reasons = {name: infeasible(task, name, phases) for name, phases in found.phases.items()}
    return "; ".join(f"{name}: {why}" if name else why for name, why in {**reasons, **found.left_out}.items())
