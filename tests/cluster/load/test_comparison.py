"""Comparisons: regimes as multiples, one set of runs judged in each, ratios that do not claim too much."""

from __future__ import annotations

import io
import math

import pytest
from diphase.cluster.load.client import Outcome, RequestResult
from diphase.cluster.load.comparison import (
    Regime,
    Run,
    Unloaded,
    comparison_table,
    curves,
    goodputs,
    judge_run,
    measure_unloaded,
    ratio,
)
from diphase.cluster.load.search import Goodput
from diphase.proto.errors import InternalError
from diphase.proto.slo import Slo
from rich.console import Console

OBJECTIVES = {"tight": Slo(ttft_ms=100.0, tpot_ms=20.0), "loose": Slo(ttft_ms=1000.0, tpot_ms=200.0)}


def result(
    ttft_ms: float, tpot_ms: float, tokens: int = 3, outcome: Outcome = Outcome.FINISHED
) -> RequestResult:
    first = ttft_ms / 1000.0
    return RequestResult(
        index=0, due_s=0.0, token_s=[first + i * tpot_ms / 1000.0 for i in range(tokens)], outcome=outcome
    )


def run_of(arrangement: str, rate: float, tight: int, loose: int) -> Run:
    """A run of 100 requests of which so many meet each regime."""
    results = [result(50.0, 10.0)] * tight
    results += [result(500.0, 10.0)] * (loose - tight)
    results += [result(5000.0, 10.0)] * (100 - loose)
    return judge_run(
        results,
        arrangement=arrangement,
        round_index=0,
        rate=rate,
        objectives=OBJECTIVES,
        carried=OBJECTIVES["loose"],
    )


def test_unloaded_latency_is_what_nine_of_ten_lone_requests_meet() -> None:
    unloaded = measure_unloaded([result(float(i), 10.0 + i / 10) for i in range(101)])
    assert unloaded.ttft_ms == pytest.approx(90.0)
    assert unloaded.tpot_ms == pytest.approx(19.0)
    assert unloaded.ttft_p50_ms == pytest.approx(50.0)
    assert unloaded.tpot_p50_ms == pytest.approx(15.0)
    assert unloaded.request_s == pytest.approx(0.050 + 2 * 0.015)
    assert unloaded.count == 101


def test_an_unloaded_latency_needs_requests_that_finish_with_two_tokens() -> None:
    with pytest.raises(InternalError, match="ended as failed"):
        measure_unloaded([result(1.0, 1.0), result(1.0, 1.0, outcome=Outcome.FAILED)])
    with pytest.raises(InternalError, match="two tokens"):
        measure_unloaded([result(1.0, 1.0, tokens=1)])


def test_a_regime_multiplies_the_unloaded_latency() -> None:
    unloaded = Unloaded(
        ttft_ms=200.0, tpot_ms=20.0, ttft_p50_ms=1.0, tpot_p50_ms=1.0, request_s=1.0, count=30
    )
    slo = Regime(ttft=10.0, tpot=1.5).slo(unloaded)
    assert (slo.ttft_ms, slo.tpot_ms) == (2000.0, 30.0)


def test_one_run_is_a_point_in_every_regime() -> None:
    run = run_of("a", 2.0, tight=60, loose=95)
    assert {name: (p.rate, p.met, p.total) for name, p in run.points.items()} == {
        "tight": (2.0, 60, 100),
        "loose": (2.0, 95, 100),
    }
    assert run.report.attainment == 0.95


def test_goodputs_are_by_regime_and_arrangement() -> None:
    runs = [
        run_of("a", 1.0, tight=100, loose=100),
        run_of("a", 2.0, tight=80, loose=100),
        run_of("a", 3.0, tight=0, loose=80),
        run_of("b", 1.0, tight=80, loose=100),
        run_of("b", 2.0, tight=0, loose=0),
    ]
    assert [p.met for p in curves(runs, "b", OBJECTIVES)["tight"]] == [80, 0]
    found = goodputs(runs, ["a", "b", "never run"], list(OBJECTIVES))
    assert found["tight"]["a"].rate == pytest.approx(1.5)
    assert found["loose"]["a"].rate == pytest.approx(2.5)
    assert found["loose"]["b"].rate == pytest.approx(1.1)
    assert not found["tight"]["b"].bracketed
    assert "never run" not in found["tight"]


def known(rate: float, bracketed: bool = True) -> Goodput:
    return Goodput(rate=rate, low=rate, high=math.inf, bracketed=bracketed)


def test_the_ratio_is_to_the_better_rival() -> None:
    found = ratio({"ours": known(3.0), "x": known(1.0), "y": known(2.0)}, "ours")
    assert found is not None
    assert (found.value, found.rival, found.exact) == (1.5, "y", True)


def test_a_ratio_with_an_open_end_says_so() -> None:
    found = ratio({"ours": known(3.0, bracketed=False), "x": known(1.0)}, "ours")
    assert found is not None
    assert not found.exact
    nothing = ratio({"ours": known(0.0, bracketed=False), "x": known(1.0)}, "ours")
    assert nothing is not None
    assert nothing.value is None


@pytest.mark.parametrize("found", [{}, {"ours": known(1.0)}, {"x": known(1.0)}])
def test_without_both_sides_there_is_no_ratio(found: dict[str, Goodput]) -> None:
    assert ratio(found, "ours") is None


def test_the_table_has_every_arrangement_and_the_ratio() -> None:
    table = comparison_table(
        {"tight": {"ours": known(3.0), "x": known(2.0)}, "loose": {}}, "ours", OBJECTIVES
    )
    terminal = io.StringIO()
    Console(file=terminal, width=160).print(table)
    text = terminal.getvalue()
    for expected in ("ours", "tight (100 ms, 20 ms)", "3.00 (3.00–∞)", "1.50 × x", "loose"):
        assert expected in text
