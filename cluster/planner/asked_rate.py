"""How surely a placement serves the rate that was asked for: the attainment at that rate, over seeds. Knows
no search and no files."""

from __future__ import annotations

from dataclasses import dataclass

from ..load.search import TARGET
from .deployment import Deployment
from .goodput import Estimate, Mapped, Objectives, Pattern, run_length, simulate
from .placement import build_part
from .search import Asked, Candidate
from .sim_workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Shares of the requests that meet both objectives at one rate."""

    rate: float
    """Requests/s."""
    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return Estimate(rates=self.by_seed).mean

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean; everything for one seed."""
        low, high = Estimate(rates=self.by_seed).interval
        return low, min(1.0, high)

    def sentence(self) -> str:
        """For the terminal."""
        low, high = self.interval
        spread = f" ({low:.1%} to {high:.1%})" if len(self.by_seed) > 1 else ""
        enough = sum(share >= TARGET for share in self.by_seed)
        return (
            f"at {self.rate:.3g} requests/s: {self.mean:.1%}{spread} meet both objectives, "
            f"at least {TARGET:.0%} with {enough} of {len(self.by_seed)} seeds"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Can be sent to another process."""

    deployment: Deployment
    workload: Workload
    objectives: Objectives
    rate: float
    pattern: Pattern
    policy: str


def _attained(run: _Run) -> float:
    result = simulate(run.deployment, run.workload, run.objectives, run.rate, run.pattern, policy=run.policy)
    return result.attainment(run.objectives.ttft_ms, run.objectives.tpot_ms)


def attainment_at(asked: Asked, rate: float, best: Candidate, mapped: Mapped = map) -> Attainment:
    """Of a simulated candidate, with each seed."""
    assert best.answer is not None  # it was simulated
    deployment, times = build_part(best.placement, asked.machines)
    count = max(best.answer.count, run_length(asked.workload, asked.objectives, rate / times))
    runs = [
        _Run(
            deployment=deployment,
            workload=asked.workload,
            objectives=asked.objectives,
            rate=rate / times,
            pattern=Pattern(seed, count),
            policy=asked.policy,
        )
        for seed in asked.seeds
    ]
    return Attainment(rate=rate, by_seed=tuple(mapped(_attained, runs)))
