"""What a plan says: text for the terminal, JSON and pictures. Knows no search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..load.plot import COLOURS, draw_attainment
from ..load.search import TARGET
from .explain import Binding, Curve
from .failure_study import Outage
from .goodput import Answer
from .search import HOPELESS, Candidate, Found, Task

SHOWN = 3
"""Placements in the pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A search with its explanations."""

    task: Task
    found: Found
    workload: str = ""
    """What its log or trace is like."""
    infeasible: str = ""
    """Why nothing serves any rate; then all of the rest is empty."""
    binding: Binding | None = None
    curves: tuple[Curve, ...] = ()
    """Of the best candidates, in their order."""
    outages: tuple[Outage, ...] = ()
    """Of one worker of each pool of the best."""

    @property
    def best(self) -> Candidate:
        return self.found.candidates[0]


def text(plan: Plan) -> Iterator[str]:
    """Lines for the terminal."""
    objectives = plan.task.objectives
    asked = f"TTFT ≤ {objectives.ttft_ms:g} ms, TPOT ≤ {objectives.tpot_ms:g} ms for {TARGET:.0%}"
    if plan.infeasible:
        yield f"infeasible: {asked}: {plan.infeasible}"
        return
    best = plan.best
    if plan.found.sentence:
        yield plan.found.sentence
        if not plan.found.reached:
            yield f"{plan.task.rate:g} requests/s are out of reach; what serves most of them:"
    elif not plan.found.reached:
        yield (
            f"{plan.task.rate:g} requests/s are out of reach of {plan.task.gpus} GPUs; "
            f"what serves most of them:"
        )
    yield f"placement: {best.placement}; {best.placement.gpus} of {plan.task.gpus} GPUs"
    yield f"goodput ({asked}): {_estimates(best)}"
    shown = [best, *(plan.found.candidates[1:2] or plan.found.others[:1])]
    for runner_up in shown[1:]:
        yield f"runner-up: {runner_up.placement}; {runner_up.placement.gpus} GPUs, {_estimates(runner_up)}"
    yield from _other_kinds(plan, {candidate.placement.kind for candidate in shown})
    if plan.binding is not None:
        yield f"what binds: {plan.binding.what}; {plan.binding.sentence}"
        gains = ", ".join(f"{gain.what} {gain.said}" for gain in plan.binding.relaxations)
        yield f"each relaxed alone: {gains}"
    if plan.curves:
        yield from sensitivity(plan.curves[0])
    for outage in plan.outages:
        yield outage.sentence()


def _other_kinds(plan: Plan, shown: set[str]) -> Iterator[str]:
    """What colocated workers or separate pools come to, where neither the best nor the runner-up says it."""
    hopeless = {
        "colocated": "serves no rate within the objectives",
        "disaggregated": f"serves less than {HOPELESS:.0%} of what colocated workers do, or does not fit",
    }
    if plan.found.sentence:
        del hopeless["disaggregated"]  # what the algorithm chose, and its sentence is of it
    for kind, sentence in hopeless.items():
        if kind in shown:
            continue
        of_kind = (candidate for candidate in _known(plan) if candidate.placement.kind == kind)
        best = max(of_kind, key=lambda candidate: candidate.rate, default=None)
        if best is not None:
            yield f"{kind}: {best.placement}; {best.placement.gpus} GPUs, {_estimates(best)}"
        else:
            yield f"{kind}: {sentence}"


def _known(plan: Plan) -> tuple[Candidate, ...]:
    return (*plan.found.candidates, *plan.found.others)


def _estimates(candidate: Candidate) -> str:
    assert candidate.answer is not None  # candidates are simulated
    return estimates(candidate.answer, candidate.placement.gpus)


def estimates(answer: Answer, gpus: int) -> str:
    """The goodputs, with their intervals."""
    parts = []
    for definition, estimate in answer.estimates.items():
        low, high = estimate.interval
        spread = f" ({low:.3g} to {high:.3g})" if len(estimate.rates) > 1 else ""
        parts.append(f"{estimate.mean:.3g}{spread} requests/s by {definition.value}")
    return "; ".join(parts) + f"; {answer.rate / gpus:.3g} a GPU"


def sensitivity(curve: Curve) -> Iterator[str]:
    """How goodput moves with rate and objectives."""
    yield "rate: " + ", ".join(f"{point.rate:.3g}/s {point.attainment:.0%}" for point in curve.points)
    yield "objectives: " + ", ".join(
        f"×{factor:g} {'≥ ' if found.rate and not found.bracketed else ''}{found.rate:.3g}/s"
        for factor, found in curve.by_slo.items()
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in a fixed order; the same plan gives the same bytes."""
    task = plan.task
    content: dict[str, Any] = {
        "hardware": task.machine.hardware.name,
        "objectives": {"ttft_ms": task.objectives.ttft_ms, "tpot_ms": task.objectives.tpot_ms},
        "target": TARGET,
        "gpus": task.gpus,
        "policy": task.policy,
        "rate": task.rate,
        "rate_reached": plan.found.reached,
        "seeds": list(task.seeds),
        "workload": plan.workload or None,
        "algorithm": plan.found.sentence or None,
        "infeasible": plan.infeasible or None,
        "candidates": [_candidate(candidate) for candidate in plan.found.candidates],
        "others": [_candidate(candidate) for candidate in plan.found.others],
        "workers": [
            {
                "role": kind.role,
                "tp": kind.parallel.tp,
                "pp": kind.parallel.pp,
                "prompt_tokens_a_step": kind.budget or None,
                "bound": _finite(bound),
                "goodput": plan.found.phases.rates.get(kind),
            }
            for kind, bound in plan.found.phases.bounds.items()
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
            for name, floors in (
                ("ttft", plan.found.phases.ttft_floors),
                ("tpot", plan.found.phases.tpot_floors),
            )
            for parallel, floor in floors.items()
        ],
    }
    if plan.binding is not None:
        content["binds"] = binding_json(plan.binding)
    content["outages"] = [asdict(outage) for outage in plan.outages]
    content["curves"] = [
        curve_json(str(candidate.placement), curve)
        for candidate, curve in zip(_known(plan), plan.curves, strict=False)
    ]
    return content


def binding_json(binding: Binding) -> dict[str, Any]:
    """What binds."""
    return {
        "what": binding.what,
        "sentence": binding.sentence,
        "relaxed": {gain.what: gain.gain for gain in binding.relaxations},
        "relaxed_at_least": [gain.what for gain in binding.relaxations if gain.at_least],
    }


def curve_json(placement: str, curve: Curve) -> dict[str, Any]:
    """A curve's points."""
    return {
        "placement": placement,
        "attainment": [[point.rate, point.attainment] for point in curve.points],
        "goodput_by_slo": [[factor, found.rate, found.bracketed] for factor, found in curve.by_slo.items()],
    }


def goodput_json(answer: Answer) -> dict[str, Any]:
    """By definition."""
    return {
        definition.value: {
            "mean": estimate.mean,
            "interval": [_finite(bound) for bound in estimate.interval],
            "by_seed": list(estimate.rates),
        }
        for definition, estimate in answer.estimates.items()
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    pools = {
        role: {
            "workers": pool.count,
            "tp": pool.parallel.tp,
            "pp": pool.parallel.pp,
            "prompt_tokens_a_step": pool.budget or None,
        }
        for role, pool in candidate.placement.pools()
    }
    return {
        "placement": str(candidate.placement),
        "kind": candidate.placement.kind,
        "gpus": candidate.placement.gpus,
        "pools": pools,
        "rate_by_its_workers_alone": candidate.expected,
        "goodput": {} if candidate.answer is None else goodput_json(candidate.answer),
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def draw(path: Path, plan: Plan) -> None:
    """Of the best placements."""
    draw_curves(
        path,
        {
            str(candidate.placement): curve
            for candidate, curve in zip(_known(plan), plan.curves, strict=False)
        },
    )


def draw_curves(path: Path, labelled: Mapping[str, Curve]) -> None:
    """A PNG: attainment over rate, and goodput over objectives."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, which others need not wait
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rates, slos = figure.subplots(1, 2)
    draw_attainment(rates, {label: curve.points for label, curve in labelled.items()}, TARGET)
    rates.set_ylabel("requests that meet both objectives, %")
    rates.set_title("attainment", fontsize=10)
    rates.legend(fontsize=7, loc="lower left")
    for i, curve in enumerate(labelled.values()):
        factors: Sequence[float] = list(curve.by_slo)
        found = [goodput.rate for goodput in curve.by_slo.values()]
        slos.plot(factors, found, color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, linewidth=1.4)
    slos.set_xlabel("both objectives, times what was asked")
    slos.set_ylabel("goodput, requests/s")
    slos.set_title("goodput over objectives", fontsize=10)
    slos.set_ylim(bottom=0)
    slos.grid(alpha=0.25)
    canvas.print_png(str(path))
