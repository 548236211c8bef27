"""Comparing arrangements of a cluster by goodput in several SLO regimes, all judged on the same runs.

A regime is a pair of multiples of the latency of an idle cluster, so that it means the same on any machine.
The unloaded latency is the 90th percentile over requests of the workload sent one by one: what 90 % of them,
which is what goodput asks for, meet when they are alone. (A mean would not do: of Azure's conversations 12 %
have a prompt of more than twice the mean length, and a TTFT objective of twice the mean could not be met by
90 % at any rate.)"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from ...proto.errors import InternalError
from ...proto.slo import Slo, Verdict
from .client import Outcome, RequestResult
from .report import LoadReport, goodput_text, judge, summarise
from .search import TARGET, Goodput, Point, goodput


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """Latency of requests that have the cluster to themselves, milliseconds."""

    ttft_ms: float
    """90th percentile, as tpot_ms."""
    tpot_ms: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    request_s: float
    """Mean time from sending to the last token, seconds."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Objectives as multiples of the unloaded latency."""

    ttft: float
    tpot: float

    def slo(self, unloaded: Unloaded) -> Slo:
        return Slo(ttft_ms=self.ttft * unloaded.ttft_ms, tpot_ms=self.tpot * unloaded.tpot_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One arrangement at one rate, judged in every regime."""

    arrangement: str
    round_index: int
    points: dict[str, Point]
    """By regime."""
    report: LoadReport
    """In the regime whose objectives the requests carried."""


def measure_unloaded(results: Sequence[RequestResult]) -> Unloaded:
    """From requests that were sent one by one.

    Raises:
        InternalError: one of them did not finish, or none had two tokens.
    """
    for result in results:
        if result.outcome is not Outcome.FINISHED:
            raise InternalError(f"a request to the idle cluster ended as {result.outcome}: {result.detail}")
    ttfts = [r.ttft_ms for r in results if r.ttft_ms is not None]
    tpots = [r.tpot_ms for r in results if r.tpot_ms is not None]
    if not ttfts or not tpots:
        raise InternalError("the unloaded latency needs a request of two tokens or more")
    return Unloaded(
        ttft_ms=float(np.percentile(ttfts, 90)),
        tpot_ms=float(np.percentile(tpots, 90)),
        ttft_p50_ms=float(np.percentile(ttfts, 50)),
        tpot_p50_ms=float(np.percentile(tpots, 50)),
        request_s=float(np.mean([r.last_s - r.sent_s for r in results])),
        count=len(results),
    )


def judge_run(
    results: Sequence[RequestResult],
    *,
    arrangement: str,
    round_index: int,
    rate: float,
    objectives: Mapping[str, Slo],
    carried: Slo,
) -> Run:
    """The run's point in every regime, and its report under the objectives its requests carried."""
    points = {
        name: Point(rate=rate, met=sum(judge(r, slo) is Verdict.MET for r in results), total=len(results))
        for name, slo in objectives.items()
    }
    return Run(
        arrangement=arrangement,
        round_index=round_index,
        points=points,
        report=summarise(results, carried, rate),
    )


def curves(runs: Iterable[Run], arrangement: str, regimes: Iterable[str]) -> dict[str, list[Point]]:
    """Points of one arrangement by regime."""
    own = [run for run in runs if run.arrangement == arrangement]
    return {regime: [run.points[regime] for run in own] for regime in regimes}


def goodputs(
    runs: Sequence[Run], arrangements: Iterable[str], regimes: Sequence[str]
) -> dict[str, dict[str, Goodput]]:
    """By regime, then arrangement; arrangements without a run are left out."""
    found: dict[str, dict[str, Goodput]] = {regime: {} for regime in regimes}
    for arrangement in arrangements:
        for regime, points in curves(runs, arrangement, regimes).items():
            if points:
                found[regime][arrangement] = goodput(points, TARGET)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One arrangement's goodput over the best of its rivals."""

    value: float | None
    """None where one of the two has none."""
    rival: str
    exact: bool
    """False when a goodput in it lies outside of the measured rates."""


def ratio(found: Mapping[str, Goodput], ours: str) -> Ratio | None:
    """None when nothing of ours, or no rival, was measured."""
    rivals = {name: value for name, value in found.items() if name != ours}
    if ours not in found or not rivals:
        return None
    best = max(rivals, key=lambda name: rivals[name].rate)
    mine, theirs = found[ours], rivals[best]
    value = mine.rate / theirs.rate if mine.rate > 0.0 and theirs.rate > 0.0 else None
    return Ratio(value=value, rival=best, exact=mine.bracketed and theirs.bracketed)


def comparison_table(
    found: Mapping[str, Mapping[str, Goodput]], ours: str, objectives: Mapping[str, Slo]
) -> Table:
    """Goodput of each arrangement in each regime, requests a second with 95 % intervals, and our ratio to the
    better rival."""
    arrangements = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    table = Table(
        "regime (TTFT, TPOT)", *arrangements, "ratio", title=f"goodput, requests/s at {TARGET:.0%} attainment"
    )
    for regime, by_name in found.items():
        slo = objectives[regime]
        cells = [goodput_text(by_name[name]) if name in by_name else "–" for name in arrangements]
        table.add_row(
            f"{regime} ({slo.ttft_ms:.0f} ms, {slo.tpot_ms:.0f} ms)",
            *cells,
            _ratio_text(ratio(by_name, ours)),
        )
    return table


def _ratio_text(found: Ratio | None) -> str:
    if found is None or found.value is None:
        return "–"
    return f"{'' if found.exact else '≈ '}{found.value:.2f} × {found.rival}"
