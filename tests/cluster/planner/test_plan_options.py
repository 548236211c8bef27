"""Options of `diphase plan` that say nothing, too much or contradict each other: one sentence, quickly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from diphase.cluster.cli import main
from diphase.cluster.planner import goodput
from diphase.cluster.planner.deployment import Deployment
from diphase.cluster.planner.phase_rates import FirstTokens
from diphase.cluster.planner.records import SimResult
from diphase.cluster.planner.sim_workload import Workload

COMMAND = [
    "plan", "--model", "llama3.1-8b", "--hardware", "h100-sxm", "--gpus", "1", "--workload", "fixed",
    "--mean-input", "512", "--mean-output", "4", "--processes", "1", "--seeds", "1", "--requests", "50",
    "--slo", "ttft=200,tpot=20", "--outage", "0",
]  # fmt: skip
BUDGET = ["--budget", "cost"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cv", "2"], "--cv 2 is for gamma arrivals; add --arrivals gamma"),
        (["--cv", "2", "--arrivals", "poisson"], "--cv 2 is for gamma arrivals"),
        (["--output", ""], "--output is empty; name a folder"),
        (["--output", "/proc"], "--output /proc/plan.json cannot be written"),
        (["--data", ""], "--data is empty; name the folder"),
        (
            ["--processes", "1024"],
            f"--processes 1024 is out of range; use 1 to {max(16, os.cpu_count() or 1)}",
        ),
        (["--gpus", "1025"], "--gpus 1025: plan for at most 1024"),
        (["--gpus", "9" * 30], "plan for at most 1024"),
        (["--gpus", "h100-sxm=1e300", *BUDGET], "--gpus h100-sxm=1e300: plan for at most 1024"),
        (["--prices", "", *BUDGET], "--prices : '' is not of --hardware h100-sxm"),
        (
            ["--prices", "h100-sxm=1e300", *BUDGET],
            "h100-sxm is 1e+300; use 0.001 to 1,000,000 dollars an hour",
        ),
        (["--prices", "h100-sxm=1e-300", *BUDGET], "the price of h100-sxm is 1e-300; use 0.001 to"),
        (["--slo", "ttft=600001,tpot=20"], "ttft is above 0 and at most 600000, in milliseconds"),
        (["--slo", "ttft=200,tpot=10001"], "tpot is above 0 and at most 10000, in milliseconds"),
        (["--rate", "1e300"], "rate = 1e+300 requests/s is out of range; use 0.001 to 1,000,000"),
        (["--rate", "1e-300"], "rate = 1e-300 requests/s is out of range"),
        (["--rate", "nan"], "rate = nan requests/s is out of range"),
        (["--context-length", "9" * 20], "is more than the 2147483647 tokens of a worker"),
        (
            ["--algorithm", "distserve-low"],
            "gpus = 1: distserve-low plans prefill workers and decode workers, which take at least 2 GPUs",
        ),
        (
            ["--algorithm", "distserve-high", "--model", "llama3.1-70b", "--gpus", "3"],
            "which take at least 4 GPUs",
        ),
        (["--model", "/proc/self/mem"], "/proc/self/mem cannot be read: Input/output error"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *more]) == 2
    assert message in capsys.readouterr().err


def test_where_a_file_cannot_be_written_is_said_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.png").mkdir()
    assert main([*COMMAND, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f"--output {tmp_path}/plan.png cannot be written: Is a directory" in said.err
    assert not said.out


def test_a_log_of_one_moment_has_no_gaps_to_be_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.csv"
    log.write_text("timestamp,input_length,output_length\n" + "5,300,4\n" * 30)
    words = [word for word in COMMAND if word not in ("--mean-input", "512", "--mean-output", "4")]
    assert main([*words, "--workload", str(log), "--like"]) == 2
    assert "all requests of the log arrive at one time" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["search", "distserve-high"])
@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (["512", "4000000"], "of the workload's requests 0% fit the"),
        (["4000000", "4"], " tokens of KV of the roomiest worker (tp 2), 90% are to"),
    ],
)
def test_that_no_pool_can_hold_the_requests_is_known_before_they_are_simulated(
    lengths: list[str],
    said: str,
    algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    simulate = goodput.simulate

    def only_prompts(deployment: Deployment, workload: Workload, *more: Any, **options: Any) -> SimResult:
        assert isinstance(workload, FirstTokens)
        return simulate(deployment, workload, *more, **options)

    monkeypatch.setattr(goodput, "simulate", only_prompts)
    more = ["--mean-input", lengths[0], "--mean-output", lengths[1], "--gpus", "2", "--algorithm", algorithm]
    assert main([*COMMAND, *more, "--slo", "ttft=600000,tpot=10000"]) == 1
    assert said in capsys.readouterr().out


def test_a_plan_for_a_rate_says_how_surely_it_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--rate", "40", "--seeds", "3", "--output", str(tmp_path)]
    assert main([*COMMAND, *more]) == 0
    at_rate = json.loads((tmp_path / "plan.json").read_text())["at_rate"]
    low, high = at_rate["interval"]
    assert at_rate["rate"] == 40.0
    assert len(at_rate["by_seed"]) == 3
    assert low <= at_rate["attainment"] <= high <= 1.0
    assert at_rate["attainment"] > 0.9
    assert (
        f"at 40 requests/s: {at_rate['attainment']:.1%} ({low:.1%} to {high:.1%})" in capsys.readouterr().out
    )
