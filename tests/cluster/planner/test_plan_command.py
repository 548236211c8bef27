from __future__ import annotations

import json
from pathlib import Path

import pytest
from diphase.cluster.cli import main
from diphase.cluster.config import load
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.machines import Parallel, RooflineMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.placement import Placement, Pool
from diphase.cluster.planner.plan_command import parse_slo
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
    for said in ("placement: 1 colocated", "goodput", "what binds", "rate: ", "objectives: "):
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
        (["--slo", "ttft=5,tpot=5", "--step-times", "distserve"], "a100-sxm-80gb"),
    ],
)
def test_wrong_options_are_named(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *more]) == 2
    assert message in capsys.readouterr().err


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
    pools = load(file, [], system_rng()).pools
    assert (pools.prefill.placement.workers, pools.prefill.placement.tensor_parallel) == (3, 2)
    assert (pools.decode.placement.workers, pools.decode.placement.gpus) == (1, 4)
    assert pools.prefill.scheduler.chunk_budget == 8192
    with pytest.raises(ConfigError, match="pipeline stages"):
        plan_toml(
            Placement(colocated=Pool(count=1, parallel=Parallel(2, 2), budget=512)), machine, objectives, "x"
        )
