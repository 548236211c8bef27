"""What a plan for several types of GPUs says: text for the terminal, JSON and pictures. Knows no search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..load.search import TARGET
from .explain import Binding, Curve, Part, curves_of, infeasible, relaxations, strongest
from .failure_study import Outage, outages
from .fleet import build_fleet
from .fleet_search import FleetCandidate, FleetFound, FleetTask, fleet_search
from .plan_report import SHOWN, binding_json, curve_json, draw_curves, estimates, goodput_json, sensitivity
from .search import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """A search with its explanations."""

    task: FleetTask
    found: FleetFound
    workload: str = ""
    """What the log is like."""
    infeasible: str = ""
    """Why nothing serves any rate; then all of the rest is empty."""
    binding: Binding | None = None
    curves: tuple[Curve, ...] = ()
    """Of the best candidates, in their order."""
    outages: tuple[Outage, ...] = ()

    @property
    def best(self) -> FleetCandidate:
        return self.found.candidates[0]


def make_fleet_plan(
    task: FleetTask, mapped: Callable[..., object] = map, *, away_s: float = 0.0
) -> FleetPlan:
    """Searches and explains. `away_s`: how long a lost worker is away; 0: none is lost.

    Raises:
        ConfigError: the model fits no type, or the budget no worker.
    """
    found = fleet_search(task, mapped)
    if not found.candidates:
        return FleetPlan(task=task, found=found, infeasible=_infeasible(task, found))
    shown = found.candidates[:SHOWN]
    parts = []
    for candidate in shown:
        fleet, times = candidate.fleet.part()
        parts.append(Part(deployment=build_fleet(fleet), times=times, count=candidate.answer.count))
    top = max(candidate.rate for candidate in shown)
    return FleetPlan(
        task=task,
        found=found,
        binding=strongest(relaxations(task, parts[0], shown[0].answer, mapped)),
        curves=tuple(curves_of(task, parts, top, mapped)),
        outages=outages(task, build_fleet(shown[0].fleet), shown[0].rate, away_s, mapped) if away_s else (),
    )


def _infeasible(task: FleetTask, found: FleetFound) -> str:
    """Each type's own reason."""
    reasons = []
    for name, phases in found.phases.items():
        alone = Task(
            machine=task.by_name[name].machine,
            workload=task.workload,
            objectives=task.objectives,
            gpus=task.affordable(task.by_name[name]),
            seeds=task.seeds,
            policy=task.policy,
        )
        reasons.append(f"{name}: {infeasible(alone, phases)}")
    reasons += [f"{name}: {why}" for name, why in found.left_out.items()]
    return "; ".join(reasons)


def fleet_text(plan: FleetPlan) -> Iterator[str]:
    """Lines for the terminal."""
    task, found = plan.task, plan.found
    objectives = task.objectives
    asked = f"TTFT ≤ {objectives.ttft_ms:g} ms, TPOT ≤ {objectives.tpot_ms:g} ms for {TARGET:.0%}"
    if plan.infeasible:
        yield f"infeasible: {asked}: {plan.infeasible}"
        return
    if not found.reached:
        yield f"{task.rate:g} requests/s are out of reach of budget and GPUs; what serves most of them:"
    yield f"fleet: {plan.best.fleet}; {_takes(plan, plan.best)}"
    yield f"goodput ({asked}): {_served(plan.best)}"
    for runner_up in found.candidates[1:2]:
        yield f"runner-up: {runner_up.fleet}; {_takes(plan, runner_up)}, {_served(runner_up)}"
    for name, alone in found.alone.items():
        said = "serves no rate within the objectives"
        if alone is not None:
            said = f"{alone.fleet}; {_takes(plan, alone)}, {_served(alone)}"
        yield f"{name} alone: {said}"
    for name, why in found.left_out.items():
        yield f"{name} left out: {why}"
    if len(found.phases) > 1 and not any(len(c.fleet.types) > 1 for c in found.candidates):
        yield "several types: no packing of them serves more, or the same for less"
    if plan.binding is not None:
        yield f"what binds: {plan.binding.what}; {plan.binding.sentence}"
        gains = ", ".join(f"{gain.what} {gain.said}" for gain in plan.binding.relaxations)
        yield f"each relaxed alone: {gains}"
    yield from sensitivity(plan.curves[0])
    for outage in plan.outages:
        yield outage.sentence()


def _takes(plan: FleetPlan, candidate: FleetCandidate) -> str:
    fleet, budget = candidate.fleet, plan.task.budget
    parts = [f"{fleet.gpus} GPUs"]
    if all(pool.gpu.price_per_hour is not None for pool in fleet.pools):
        parts.append(f"${fleet.takes('cost'):,.2f}/h")
    parts.append(f"{fleet.takes('power'):,.0f} W")
    share = f" ({candidate.takes / budget.most:.0%} of the budget)" if budget.most < float("inf") else ""
    return ", ".join(parts) + share


def _served(candidate: FleetCandidate) -> str:
    return estimates(candidate.answer, candidate.fleet.gpus)


def fleet_json(plan: FleetPlan) -> dict[str, Any]:
    """Everything, in a fixed order; the same plan gives the same bytes."""
    task, found = plan.task, plan.found
    content: dict[str, Any] = {
        "hardware": {
            gpu.name: {
                "available": gpu.available,
                "price_per_hour": gpu.price_per_hour,
                "power_w": gpu.hardware.power_w,
            }
            for gpu in task.types
        },
        "budget": {
            "of": task.budget.measure,
            "most": task.budget.most if task.budget.most < float("inf") else None,
        },
        "objectives": {"ttft_ms": task.objectives.ttft_ms, "tpot_ms": task.objectives.tpot_ms},
        "target": TARGET,
        "policy": task.policy,
        "rate": task.rate,
        "rate_reached": found.reached,
        "seeds": list(task.seeds),
        "workload": plan.workload or None,
        "infeasible": plan.infeasible or None,
        "candidates": [_candidate(candidate) for candidate in found.candidates],
        "alone": {name: c and _candidate(c) for name, c in found.alone.items()},
        "left_out": dict(found.left_out),
    }
    if plan.binding is not None:
        content["binds"] = binding_json(plan.binding)
    content["outages"] = [asdict(outage) for outage in plan.outages]
    content["curves"] = [
        curve_json(str(candidate.fleet), curve)
        for candidate, curve in zip(found.candidates, plan.curves, strict=False)
    ]
    return content


def _candidate(candidate: FleetCandidate) -> dict[str, Any]:
    fleet = candidate.fleet
    priced = all(pool.gpu.price_per_hour is not None for pool in fleet.pools)
    return {
        "fleet": str(fleet),
        "kind": fleet.kind,
        "gpus": fleet.gpus,
        "cost_per_hour": fleet.takes("cost") if priced else None,
        "power_w": fleet.takes("power"),
        "pools": [
            {
                "role": pool.role,
                "hardware": pool.gpu.name,
                "workers": pool.pool.count,
                "tp": pool.pool.parallel.tp,
                "pp": pool.pool.parallel.pp,
                "prompt_tokens_a_step": pool.pool.budget or None,
            }
            for pool in fleet.pools
        ],
        "goodput": goodput_json(candidate.answer),
    }


def draw_fleet(path: Path, plan: FleetPlan) -> None:
    """The picture of the best fleets."""
    labels = (str(candidate.fleet) for candidate in plan.found.candidates)
    draw_curves(path, dict(zip(labels, plan.curves, strict=False)))
