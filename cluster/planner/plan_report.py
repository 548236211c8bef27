"""What a plan says: text for the terminal, JSON and pictures. Knows no search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..load.plot import COLOURS, draw_attainment
from ..load.search import TARGET
from .asked_rate import Attainment
from .explain import Binding, Curve
from .failure_study import Outage
from .fleet_search import FleetTask
from .goodput import Answer
from .phase_rates import PhaseRates
from .placement import Pool
from .search import HOPELESS, Candidate, Found, Task

SHOWN = 3
"""Placements in the pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A search with its explanations."""

    task: Task | FleetTask
    found: Found
    workload: str = ""
    """What its log or trace is like."""
    infeasible: str = ""
    """Why nothing serves any rate; then all of the rest is empty."""
    at_rate: Attainment | None = None
    """Of the best, at the rate that was asked for."""
    binding: Binding | None = None
    curves: tuple[Curve, ...] = ()
    """Of the best candidates, in their order."""
    outages: tuple[Outage, ...] = ()
    """Of one worker of each pool of the best."""

    @property
    def best(self) -> Candidate:
        return self.found.candidates[0]

    @property
    def labelled(self) -> list[tuple[str, Curve]]:
        """The curves with their placements."""
        return [(str(c.placement), curve) for c, curve in zip(self.found.known, self.curves, strict=False)]


def text(plan: Plan) -> Iterator[str]:
    """Lines for the terminal."""
    objectives = plan.task.objectives
    asked = f"TTFT ≤ {objectives.ttft_ms:g} ms, TPOT ≤ {objectives.tpot_ms:g} ms for {TARGET:.0%}"
    if plan.infeasible:
        yield f"infeasible: {asked}: {plan.infeasible}"
        return
    if isinstance(plan.task, FleetTask):
        yield from _fleets(plan.task, plan.found, asked, plan.at_rate)
    else:
        yield from _placements(plan.task, plan.found, asked, plan.at_rate)
    if plan.binding is not None:
        yield f"what binds: {plan.binding.what}; {plan.binding.sentence}"
        gains = ", ".join(f"{gain.what} {gain.said}" for gain in plan.binding.relaxations)
        yield f"each relaxed alone: {gains}"
    for curve in plan.curves[:1]:
        yield from _sensitivity(curve)
    for outage in plan.outages:
        yield outage.sentence()


def _placements(task: Task, found: Found, asked: str, at_rate: Attainment | None) -> Iterator[str]:
    best, *more = found.known
    if found.sentence:
        yield found.sentence
    if not found.reached:
        of = "" if found.sentence else f" of {task.gpus} GPUs"
        yield f"{task.rate:g} requests/s are out of reach{of}; what serves most of them:"
    yield f"placement: {best.placement}; {best.placement.gpus} of {task.gpus} GPUs"
    yield f"goodput ({asked}): {_estimates(best)}"
    if at_rate is not None:
        yield at_rate.sentence()
    for runner_up in more[:1]:
        yield f"runner-up: {runner_up.placement}; {runner_up.placement.gpus} GPUs, {_estimates(runner_up)}"
    yield from _other_kinds(found)


def _other_kinds(found: Found) -> Iterator[str]:
    """What colocated workers or separate pools come to, where neither the best nor the runner-up says it."""
    hopeless = {
        "colocated": "serves no rate within the objectives",
        "disaggregated": f"serves less than {HOPELESS:.0%} of what colocated workers do, or does not fit",
    }
    if found.sentence:
        del hopeless["disaggregated"]  # what the algorithm chose, and its sentence is of it
    shown = {candidate.placement.kind for candidate in found.known[:2]}
    for kind, sentence in hopeless.items():
        if kind in shown:
            continue
        of_kind = (candidate for candidate in found.known if candidate.placement.kind == kind)
        best = max(of_kind, key=lambda candidate: candidate.rate, default=None)
        if best is not None:
            yield f"{kind}: {best.placement}; {best.placement.gpus} GPUs, {_estimates(best)}"
        else:
            yield f"{kind}: {sentence}"


def _fleets(task: FleetTask, found: Found, asked: str, at_rate: Attainment | None) -> Iterator[str]:
    if not found.reached:
        yield f"{task.rate:g} requests/s are out of reach of budget and GPUs; what serves most of them:"
    best, *more = found.candidates
    yield f"fleet: {best.placement}; {_takes(task, best)}"
    yield f"goodput ({asked}): {_estimates(best)}"
    if at_rate is not None:
        yield at_rate.sentence()
    for runner_up in more[:1]:
        yield f"runner-up: {_whole(task, runner_up)}"
    for name, alone in found.alone.items():
        said = "serves no rate within the objectives" if alone is None else _whole(task, alone)
        yield f"{name} alone: {said}"
    for name, why in found.left_out.items():
        yield f"{name} left out: {why}"
    if len(found.phases) > 1 and not any(len(c.placement.hardware) > 1 for c in found.candidates):
        yield "several types: no packing of them serves more, or the same for less"


def _whole(task: FleetTask, candidate: Candidate) -> str:
    return f"{candidate.placement}; {_takes(task, candidate)}, {_estimates(candidate)}"


def _takes(task: FleetTask, candidate: Candidate) -> str:
    placement, budget = candidate.placement, task.budget
    parts = [f"{placement.gpus} GPUs"]
    if (cost := task.cost(placement)) is not None:
        parts.append(f"${cost:,.2f}/h")
    parts.append(f"{task.takes(placement, 'power'):,.0f} W")
    share = f" ({task.takes(placement) / budget.most:.0%} of the budget)" if budget.most < math.inf else ""
    return ", ".join(parts) + share


def _estimates(candidate: Candidate) -> str:
    """The goodputs, with their intervals."""
    assert candidate.answer is not None  # candidates are simulated
    parts = []
    for definition, estimate in candidate.answer.estimates.items():
        low, high = estimate.interval
        spread = f" ({low:.3g} to {high:.3g})" if len(estimate.rates) > 1 else ""
        parts.append(f"{estimate.mean:.3g}{spread} requests/s by {definition.value}")
    return "; ".join(parts) + f"; {candidate.rate / candidate.placement.gpus:.3g} a GPU"


def _sensitivity(curve: Curve) -> Iterator[str]:
    """How goodput moves with rate and objectives."""
    yield "rate: " + ", ".join(f"{point.rate:.3g}/s {point.attainment:.0%}" for point in curve.points)
    yield "objectives: " + ", ".join(
        f"×{factor:g} {'≥ ' if found.rate and not found.bracketed else ''}{found.rate:.3g}/s"
        for factor, found in curve.by_slo.items()
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in a fixed order; the same plan gives the same bytes."""
    task, found = plan.task, plan.found
    content: dict[str, Any] = _hardware(task)
    content["objectives"] = {"ttft_ms": task.objectives.ttft_ms, "tpot_ms": task.objectives.tpot_ms}
    content["target"] = TARGET
    if isinstance(task, Task):
        content["gpus"] = task.gpus
    content["policy"] = task.policy
    content["rate"] = task.rate
    content["rate_reached"] = found.reached
    content["seeds"] = list(task.seeds)
    content["workload"] = plan.workload or None
    if isinstance(task, Task):
        content["algorithm"] = found.sentence or None
    content["infeasible"] = plan.infeasible or None
    content["candidates"] = [_candidate(task, candidate) for candidate in found.candidates]
    if isinstance(task, Task):
        content["others"] = [_candidate(task, candidate) for candidate in found.others]
        content |= _phases(found.phases[""])
    else:
        content["alone"] = {name: c and _candidate(task, c) for name, c in found.alone.items()}
        content["left_out"] = dict(found.left_out)
    if plan.at_rate is not None:
        content["at_rate"] = {
            "rate": plan.at_rate.rate,
            "attainment": plan.at_rate.mean,
            "interval": list(plan.at_rate.interval),
            "by_seed": list(plan.at_rate.by_seed),
        }
    if plan.binding is not None:
        content["binds"] = _binding(plan.binding)
    content["outages"] = [asdict(outage) for outage in plan.outages]
    content["curves"] = [_curve(label, curve) for label, curve in plan.labelled]
    return content


def _hardware(task: Task | FleetTask) -> dict[str, Any]:
    if isinstance(task, Task):
        return {"hardware": task.machine.hardware.name}
    return {
        "hardware": {
            gpu.name: {
                "available": gpu.available,
                "price_per_hour": gpu.price_per_hour,
                "power_w": gpu.hardware.power_w,
            }
            for gpu in task.types
        },
        "budget": {"of": task.budget.measure, "most": _finite(task.budget.most)},
    }


def _phases(phases: PhaseRates) -> dict[str, Any]:
    return {
        "workers": [
            {
                "role": kind.role,
                "tp": kind.parallel.tp,
                "pp": kind.parallel.pp,
                "prompt_tokens_a_step": kind.budget or None,
                "bound": _finite(bound),
                "goodput": phases.rates.get(kind),
            }
            for kind, bound in phases.bounds.items()
        ],
        "floors": [
            {
                "objective": name,
                "tp": parallel.tp,
                "pp": parallel.pp,
                "p90_ms": floor.quantile_ms,
                "tokens": floor.tokens,
                "feasible": floor.feasible,
            }
            for name, floors in (("ttft", phases.ttft_floors), ("tpot", phases.tpot_floors))
            for parallel, floor in floors.items()
        ],
    }


def _binding(binding: Binding) -> dict[str, Any]:
    """What binds."""
    return {
        "what": binding.what,
        "sentence": binding.sentence,
        "relaxed": {gain.what: gain.gain for gain in binding.relaxations},
        "relaxed_at_least": [gain.what for gain in binding.relaxations if gain.at_least],
    }


def _curve(placement: str, curve: Curve) -> dict[str, Any]:
    """A curve's points."""
    return {
        "placement": placement,
        "attainment": [[point.rate, point.attainment] for point in curve.points],
        "goodput_by_slo": [[factor, found.rate, found.bracketed] for factor, found in curve.by_slo.items()],
    }


def _goodput(answer: Answer) -> dict[str, Any]:
    """By definition."""
    return {
        definition.value: {
            "mean": estimate.mean,
            "interval": [_finite(bound) for bound in estimate.interval],
            "by_seed": list(estimate.rates),
        }
        for definition, estimate in answer.estimates.items()
    }


def _candidate(task: Task | FleetTask, candidate: Candidate) -> dict[str, Any]:
    placement = candidate.placement
    content: dict[str, Any] = {
        "placement": str(placement),
        "kind": placement.kind,
        "gpus": placement.gpus,
    }
    if isinstance(task, FleetTask):
        content["cost_per_hour"] = task.cost(placement)
        content["power_w"] = task.takes(placement, "power")
        content["pools"] = [
            {"role": pool.worker.role, "hardware": pool.hardware, **_pool(pool)} for pool in placement.pools
        ]
    else:
        content["pools"] = {pool.worker.role: _pool(pool) for pool in placement.pools}
        content["rate_by_its_workers_alone"] = candidate.expected
    content["goodput"] = {} if candidate.answer is None else _goodput(candidate.answer)
    return content


def _pool(pool: Pool) -> dict[str, Any]:
    return {
        "workers": pool.count,
        "tp": pool.worker.parallel.tp,
        "pp": pool.worker.parallel.pp,
        "prompt_tokens_a_step": pool.worker.budget or None,
    }


def _finite(value: float) -> float | None:
    return value if value < math.inf else None


def draw(path: Path, plan: Plan) -> None:
    """A PNG of the best placements: attainment over rate, and goodput over objectives."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which others need not wait
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rates, slos = figure.subplots(1, 2)
    draw_attainment(rates, {label: curve.points for label, curve in plan.labelled}, TARGET)
    rates.set_ylabel("requests that meet both objectives, %")
    rates.set_title("attainment", fontsize=10)
    rates.legend(fontsize=7, loc="lower left")
    for i, (_, curve) in enumerate(plan.labelled):
        factors: Sequence[float] = list(curve.by_slo)
        found = [goodput.rate for goodput in curve.by_slo.values()]
        slos.plot(factors, found, color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, linewidth=1.4)
    slos.set_xlabel("both objectives, times what was asked")
    slos.set_ylabel("goodput, requests/s")
    slos.set_title("goodput over objectives", fontsize=10)
    slos.set_ylim(bottom=0)
    slos.grid(alpha=0.25)
    canvas.print_png(str(path))
