"""Reports: percentiles, verdicts and rates of results whose answer is known, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from diphase.cluster.load.client import Outcome, RequestResult
from diphase.cluster.load.plot import attainment_plot
from diphase.cluster.load.report import (
    Spread,
    environment,
    goodput_text,
    judge,
    run_table,
    summarise,
    sweep_table,
    to_json,
    write_json,
)
from diphase.cluster.load.search import Goodput, Point
from diphase.proto.slo import Slo, Verdict
from rich.console import Console

SLO = Slo(ttft_ms=500.0, tpot_ms=100.0)


def result(index: int, due: float, tokens: list[float], outcome: Outcome = Outcome.FINISHED) -> RequestResult:
    return RequestResult(
        index=index,
        due_s=due,
        sent_s=due + 0.01,
        token_s=tokens,
        outcome=outcome,
        detail="" if outcome is Outcome.FINISHED else "why",
        prompt_tokens=100,
        stages={"ttft_ms": 80.0} if outcome is Outcome.FINISHED else {},
        workers=("p0", "d0"),
        server_verdict="met",
    )


RESULTS = [
    result(0, 0.0, [0.1, 0.15, 0.2]),  # met
    result(1, 1.0, [1.6, 1.65]),  # ttft 600 ms
    result(2, 2.0, [2.1, 2.4]),  # tpot 300 ms
    result(3, 3.0, [3.9, 4.5]),  # both
    result(4, 4.0, [4.2]),  # one token: judged on ttft alone
    result(5, 5.0, [], Outcome.REJECTED),
    result(6, 6.0, [6.1, 6.2], Outcome.FAILED),
    result(7, 7.0, [7.1, 8.0], Outcome.TIMED_OUT),
]


def test_verdicts_come_from_the_clients_own_times() -> None:
    assert [judge(r, SLO) for r in RESULTS] == [
        Verdict.MET,
        Verdict.TTFT,
        Verdict.TPOT,
        Verdict.BOTH,
        Verdict.MET,
        Verdict.REJECTED,
        Verdict.ERROR,
        Verdict.ERROR,
    ]


def test_rejected_and_failed_requests_count_against_attainment() -> None:
    report = summarise(RESULTS, SLO)
    assert report.attainment == 2 / 8
    assert report.point == Point(rate=report.rate, met=2, total=8)
    assert report.outcomes == {"finished": 5, "rejected": 1, "failed": 1, "timed_out": 1}
    assert report.errors == {"why": 3}


def test_rates_are_over_first_arrival_to_last_token() -> None:
    report = summarise(RESULTS, SLO)
    assert report.rate == pytest.approx(1.0)
    assert report.duration_s == pytest.approx(8.0)
    assert report.requests_per_s == pytest.approx(5 / 8)
    assert report.good_requests_per_s == pytest.approx(2 / 8)
    assert report.input_tokens_per_s == pytest.approx(500 / 8)
    assert report.output_tokens_per_s == pytest.approx(14 / 8)
    assert summarise(RESULTS, SLO, rate=3.0).rate == 3.0


def test_the_servers_account_stands_beside_the_clients() -> None:
    report = summarise(RESULTS, SLO)
    assert report.stages_ms["ttft_ms"].p50 == 80.0
    assert report.server_verdicts == {"met": 5}
    assert report.workers == {"p0 > d0": 5}
    assert report.lateness_ms is not None
    assert report.lateness_ms.max == pytest.approx(10.0)
    assert report.beyond_server_ms is not None
    # The quickest of the finished: 100 ms from due, 10 of them late, 80 the server's.
    assert report.beyond_server_ms.count == 5
    assert report.beyond_server_ms.p50 == pytest.approx(110.0)


def test_percentiles_interpolate_between_order_statistics() -> None:
    spread = Spread.of([float(i) for i in range(101)])
    assert spread == Spread(p50=50.0, p90=90.0, p99=99.0, mean=50.0, max=100.0, count=101)
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(p50=3.0, p90=3.0, p99=3.0, mean=3.0, max=3.0, count=1)


def test_a_run_in_which_nothing_came_back_still_has_a_report() -> None:
    report = summarise([result(0, 0.0, [], Outcome.FAILED)], SLO, rate=1.0)
    assert report.ttft_ms is None
    assert report.attainment == 0.0
    text = printed(run_table(report, SLO), sweep_table([report]))
    assert "0.0%" in text


def test_tables_show_the_numbers() -> None:
    report = summarise(RESULTS, SLO, rate=1.5)
    text = printed(run_table(report, SLO), sweep_table([report]))
    for expected in ("TTFT", "TPOT", "ITL", "sent late", "server: ttft", "25.0%", "rejected 1", "1.5"):
        assert expected in text


def printed(*things: object) -> str:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    with console.file:
        for thing in things:
            console.print(thing)
        return console.export_text()


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Goodput(rate=1.234, low=1.1, high=1.4, bracketed=True), "1.23 (1.10–1.40)"),
        (Goodput(rate=1.234, low=1.1, high=math.inf, bracketed=True), "1.23 (1.10–∞)"),
        (Goodput(rate=4.0, low=3.0, high=math.inf, bracketed=False), "≥ 4.00"),
        (Goodput(rate=0.0, low=0.0, high=1.0, bracketed=False), "below the lowest rate"),
    ],
)
def test_goodput_says_how_sure_it_is(found: Goodput, text: str) -> None:
    assert goodput_text(found) == text


def test_json_is_plain_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    content = {"run": summarise(RESULTS, SLO), "slo": SLO, "open": math.inf, **environment()}
    write_json(path, content)
    read = json.loads(path.read_text())
    assert read["run"]["ttft_ms"]["count"] == 7
    assert read["slo"]["ttft_ms"] == 500.0
    assert read["open"] is None
    assert read["versions"]["grpcio"]
    assert read["machine"]["cores"] >= 1
    assert read["date"].endswith("+00:00")
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_nested_values_become_plain() -> None:
    assert to_json({"a": (Point(rate=1.0, met=1, total=2),), 3: float("nan")}) == {
        "a": [{"rate": 1.0, "met": 1, "total": 2}],
        "3": None,
    }


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    falling = [Point(rate=float(r), met=100 - 10 * r, total=100) for r in range(1, 6)]
    path = tmp_path / "new" / "plot.png"
    attainment_plot(path, {"one": {"a": falling, "b": []}, "two": {"a": falling[:1], "b": falling}}, 0.9)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
