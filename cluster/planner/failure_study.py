"""What the loss of one worker comes to: how many requests miss their objectives while it is away, how long
that lasts, and what is served without it. Knows how to ask the simulator, nothing of files.

The whole placement is simulated, not a part of it: the load of a lost worker is shared by all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import ConfigError
from ..load.search import TARGET
from .deployment import Deployment
from .events import NS
from .goodput import Mapped, Objectives, Pattern, Question, answer, run_length, simulate
from .incidents import Crash
from .records import SimResult
from .search import COARSE, Asked
from .sim_workload import Workload

DEFAULT_AWAY_S = 30.0
MOST_ARRIVALS = 6000
"""Of a run, unless the worker is away for longer."""
MOST_EVER = 60_000
"""Arrivals of a run, however long the worker is away: it may then end before."""
HEADROOM = 0.8
"""Share of the goodput at which a worker is lost when no rate was asked for: at the goodput itself every loss
is a miss."""
LEAST_AWAY_S, MOST_AWAY_S = 0.2, 3600.0
RUN = 4.0
"""Times that a worker is away, of which a run has the arrivals."""
LEAST_RUN = 1.5
"""The same at high rates, of which that would be too many."""
WINDOW = 30
"""Requests whose attainment is looked at when it is asked whether all is well again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A worker of a pool is killed while the placement serves a rate, and a new one serves after a time."""

    role: str
    rate: float
    """Requests/s."""
    away_s: float
    undisturbed: float
    """Attainment of the requests that arrive while it is away, if it were not."""
    attainment: float
    """Of the same requests."""
    retried: int
    failed: int
    stall_ms: float
    """The longest that a request waited for its next token."""
    recovered_s: float | None
    """From the kill until requests are served as without it; None: not within the run."""
    run_s: float
    """From the kill to the last arrival."""
    cut: bool
    """The worker was still away then: the run has all requests that a run may have, or all there are. What
    is said of the time while it is away is of that time alone."""
    goodput: float
    """Requests/s, while it is away for good."""

    def sentence(self) -> str:
        """For the terminal."""
        if self.recovered_s is None:
            again = f"not well again within {self.run_s:.0f} s"
        elif self.recovered_s:
            again = f"well again for who comes {self.recovered_s:.1f} s after the loss"
        else:
            again = "never worse than wanted"
        if self.cut:
            again += f" (the run ends {self.run_s:.1f} s after the loss, before the worker is back)"
        return (
            f"one {self.role} worker lost at {self.rate:.3g} requests/s and back after {self.away_s:g} s: "
            f"{self.attainment:.0%} meet the objectives meanwhile ({self.undisturbed:.0%} without the loss), "
            f"{self.retried} go on elsewhere after {self.stall_ms:.0f} ms at most, {self.failed} fail; "
            f"{again}; goodput without it {self.goodput:.3g} requests/s"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageQuestion:
    """Can be sent to another process."""

    deployment: Deployment
    workload: Workload
    objectives: Objectives
    policy: str
    rate: float
    goodput: float
    """Of the whole deployment."""
    worker: int
    """Its place in the deployment."""
    away_s: float
    seed: int


def check_away(away_s: float) -> None:
    """
    Raises:
        ConfigError: a worker cannot be away for so long.
    """
    if away_s and not LEAST_AWAY_S <= away_s <= MOST_AWAY_S:
        raise ConfigError(
            f"--outage {away_s:g} is out of range; use {LEAST_AWAY_S:g} to {MOST_AWAY_S:g} s, or 0"
        )


def outages(
    asked: Asked, deployment: Deployment, goodput: float, away_s: float, mapped: Mapped = map
) -> tuple[Outage, ...]:
    """Of one worker of each role of the deployment, which serves `goodput` requests/s."""
    rate = HEADROOM * goodput if asked.rate is None or asked.rate > goodput else asked.rate
    roles = [spec.role for spec in deployment.workers]
    questions = [
        OutageQuestion(
            deployment=deployment,
            workload=asked.workload,
            objectives=asked.objectives,
            policy=asked.policy,
            rate=rate,
            goodput=goodput,
            worker=roles.index(role),
            away_s=away_s,
            seed=asked.seeds[0],
        )
        for role in dict.fromkeys(roles)
    ]
    return tuple(mapped(outage, questions))


def outage(question: OutageQuestion) -> Outage:
    """Simulates it, and the same requests without it."""
    rate, objectives = question.rate, question.objectives
    lead = run_length(question.workload, objectives, rate)
    wanted, least = (lead + math.ceil(rate * question.away_s * times) for times in (RUN, LEAST_RUN))
    count = question.workload.most(min(MOST_EVER, wanted, max(MOST_ARRIVALS, least)))
    pattern = Pattern(question.seed, count)
    ask = (question.deployment, question.workload, objectives, rate, pattern)
    calm = simulate(*ask, policy=question.policy)
    arrivals = np.array([request.arrival for request in calm.requests]) / NS
    at_s = float(arrivals[min(lead, count) // 2])
    crash = Crash(at_s=at_s, worker=question.worker, back_s=question.away_s)
    hit = simulate(*ask, incidents=(crash,), policy=question.policy)
    away = (arrivals >= at_s) & (arrivals < at_s + question.away_s)
    run_s = float(arrivals[-1]) - at_s
    met, met_calm = _met(hit, objectives), _met(calm, objectives)
    return Outage(
        role=question.deployment.workers[question.worker].role,
        rate=rate,
        away_s=question.away_s,
        undisturbed=float(met_calm[away].mean()),
        attainment=float(met[away].mean()),
        retried=hit.retried,
        failed=hit.failed,
        stall_ms=float(hit.stall_ms.max()),
        recovered_s=recovery(arrivals - at_s, met, met_calm),
        run_s=run_s,
        cut=run_s < question.away_s,
        goodput=_goodput_without(question),
    )


def recovery(since_s: Sequence[float] | NDArray[np.float64], met: Seen, calm: Seen) -> float | None:
    """When requests began to arrive, in seconds since the kill, of which every WINDOW in a row meet their
    objectives as often as is wanted, or as without it; None: no such time within the run. Where fewer come,
    all of them are the window."""
    first = int(np.searchsorted(since_s, 0.0))
    width = min(WINDOW, len(met) - first)
    last_bad = None
    for start in range(first, len(met) - width + 1):
        share, wanted = met[start : start + width].mean(), calm[start : start + width].mean()
        if share < min(TARGET, wanted):
            last_bad = start
    if last_bad is None:
        return 0.0
    if last_bad == len(met) - width:
        return None
    # Of the last window that was bad, its last request that missed is the last that was hit.
    window = np.flatnonzero(~met[last_bad : last_bad + width])
    return float(since_s[last_bad + int(window[-1])])


Seen = NDArray[np.bool_]
"""By request, whether it met both objectives."""


def _met(result: SimResult, objectives: Objectives) -> Seen:
    met: Seen = (result.ttft_ms <= objectives.ttft_ms) & (result.tpot_ms <= objectives.tpot_ms)
    return met


def _goodput_without(question: OutageQuestion) -> float:
    gone = Crash(at_s=0.0, worker=question.worker, noticed_after_s=0.0)
    asked = Question(
        deployment=question.deployment,
        workload=question.workload,
        objectives=question.objectives,
        guess=question.goodput,
        ceiling=question.goodput,
        seeds=(question.seed,),
        tolerance=COARSE,
        policy=question.policy,
        incidents=(gone,),
    )
    return answer(asked).rate
