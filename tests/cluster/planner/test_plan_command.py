from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from diphase.cluster.cli import main
from diphase.cluster.config import load
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import Parallel, RooflineMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.placement import Placement, Pool
from diphase.cluster.planner.plan_command import add_arguments, parse_slo, task_from
from diphase.cluster.planner.plan_toml import plan_toml
from diphase.proto.clock import system_rng
from diphase.proto.errors import ConfigError

COMMAND = [
    "plan", "--model", "llama3.1-8b", "--hardware", "h100-sxm", "--gpus", "1", "--workload", "fixed",
    "--mean-input", "512", "--mean-output", "4", "--processes", "1", "--seeds", "2", "--requests", "50",
]  # fmt: skip


def test_a_plan_and_its_files_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMAND, "--slo", "ttft=200,tpot=20"]
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    for said in (
        "placement: 1 colocated",
        "goodput",
        "what binds",
        "rate: ",
        "objectives: ",
        "one colocated worker lost",
    ):
        assert said in printed
    config = load(tmp_path / "a" / "cluster.toml", [], system_rng())
    assert config.pools.colocated.placement.workers == 1
    assert config.pools.decode.placement.workers == 0
    assert config.slo.ttft_ms == 200.0
    assert (tmp_path / "a" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--output", str(tmp_path / "b")]) == 0
    for name in ("plan.json", "plan.png", "cluster.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("slo", "term"),
    [
        ("ttft=5,tpot=20", "a lone prefill of 512 tokens takes"),
        ("ttft=200,tpot=2", "a lone decode step with a context of 514 tokens takes"),
    ],
)
def test_an_infeasible_objective_is_named(
    slo: str, term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--slo", slo, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "infeasible" in printed
    assert term in printed
    assert term in json.loads((tmp_path / "plan.json").read_text())["infeasible"]
    assert not (tmp_path / "cluster.toml").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slo", "ttft=5"], "give both"),
        (["--slo", "ttft=5,tpot=x"], "tpot = 'x'"),
        (["--slo", "ttft=5,ttft=6"], "ttft=400,tpot=40"),
        (["--slo", "ttft=5,tpot=5", "--gpus", "0"], "gpus = 0"),
        (["--slo", "ttft=5,tpot=5", "--seeds", "0"], "--seeds 0"),
        (["--slo", "ttft=5,tpot=5", "--requests", "5"], "--requests 5"),
        (["--slo", "ttft=5,tpot=5", "--max-pp", "0"], "max_pp = 0"),
        (["--slo", "ttft=5,tpot=5", "--outage", "-1"], "--outage -1"),
        (["--slo", "ttft=5,tpot=5", "--step-times", "distserve"], "a100-sxm-80gb"),
    ],
)
def test_wrong_options_are_named(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def own_log(tmp_path: Path) -> str:
    path = tmp_path / "log.csv"
    rows = [f"{370 * (i + i % 5 // 4)},{300 + 7 * (i % 40)},{2 + i % 5}" for i in range(200)]
    path.write_text("\n".join(["timestamp,input_length,output_length", *rows]))
    return str(path)


OWN = [*COMMAND[: COMMAND.index("--mean-input")], *COMMAND[COMMAND.index("--mean-output") + 2 :]]


def test_a_log_is_said_in_a_line_and_a_likeness_of_it_planned_for(
    own_log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*OWN, "--workload", own_log, "--slo", "ttft=200,tpot=20"]
    assert main([*arguments, "--like", "--requests", "400"]) == 0
    printed = capsys.readouterr().out
    assert "workload: 200 requests at 2." in printed
    assert "gaps vary by" in printed
    assert "nearest public trace" in printed
    assert main([*arguments, "--data", str(tmp_path)]) == 0
    assert "no public trace lies in" in capsys.readouterr().out
    assert main([*arguments, "--like", "--cv", "2"]) == 2
    assert "leave out --arrivals and --cv" in capsys.readouterr().err


def test_a_likeness_has_the_logs_pairs_of_lengths_and_its_gaps(own_log: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [*OWN[1:], "--workload", own_log, "--slo", "ttft=200,tpot=20", "--requests", "500", "--like"]
    workload = task_from(parser.parse_args(given)).workload
    lengths = workload.lengths(0, 500)
    assert len(set(lengths)) == 40
    assert all((prompt - 300) % 7 == 0 and 2 <= output <= 6 for prompt, output in lengths)
    gaps = np.diff([request.arrival for request in workload.requests(1.0, 0, 500)])
    assert gaps.std() / gaps.mean() == pytest.approx(0.632, rel=0.1)


def test_distserves_algorithms_are_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMAND, "--gpus", "2", "--slo", "ttft=200,tpot=20"]
    assert main([*arguments, "--algorithm", "distserve-low", "--requests", "300"]) == 0
    printed = capsys.readouterr().out
    assert "distserve-low chose 1 prefill (tp 1) + 1 decode (tp 1) for" in printed
    assert "placement: 1 prefill" in printed
    assert "what binds" in printed


def test_objectives_are_read() -> None:
    assert parse_slo("tpot=40, ttft=400") == Objectives(ttft_ms=400.0, tpot_ms=40.0)


def test_a_disaggregated_placement_as_a_configuration(tmp_path: Path) -> None:
    machine = RooflineMachine(load_model_shape("llama3.1-70b"), load_hardware("h100-sxm"))
    objectives = Objectives(ttft_ms=1000.0, tpot_ms=50.0)
    placement = Placement(
        prefill=Pool(count=3, parallel=Parallel(2)), decode=Pool(count=1, parallel=Parallel(4))
    )
    file = tmp_path / "cluster.toml"
    file.write_text(plan_toml(placement, machine, objectives, "llama3.1-70b"))
    config = load(file, [], system_rng())
    pools = config.pools
    for role, tp in (("prefill", 2), ("decode", 4)):
        tokens = config.engine_of(role).kv_cache_mib * 2**20 / machine.kv_bytes_per_token
        assert tokens == pytest.approx(machine.kv_tokens(Parallel(tp)), rel=1e-3)
    assert (pools.prefill.placement.workers, pools.prefill.placement.tensor_parallel) == (3, 2)
    assert (pools.decode.placement.workers, pools.decode.placement.gpus) == (1, 4)
    assert pools.prefill.scheduler.chunk_budget == 8192
    with pytest.raises(ConfigError, match="pipeline stages"):
        plan_toml(
            Placement(colocated=Pool(count=1, parallel=Parallel(2, 2), budget=512)), machine, objectives, "x"
        )
