from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diphase.cluster.cli import main
from diphase.cluster.config import load
from diphase.cluster.planner.goodput import Objectives
from diphase.cluster.planner.machines import Parallel
from diphase.cluster.planner.placement import Kind, Placement, Pool
from diphase.cluster.planner.plan_command import add_arguments, parse_slo, task_from
from diphase.cluster.planner.plan_toml import plan_toml
from diphase.proto.clock import system_rng
from diphase.proto.errors import ConfigError

from .placements import colocated, pair, roofline

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
        (["--slo", "ttft=5,tpot=5", "--max-pp", "0", "--algorithm", "distserve-high"], "max_pp = 0"),
        (["--slo", "ttft=5,tpot=5", "--context-length", "-5"], "a context of -5 tokens"),
        (["--slo", "ttft=5,tpot=5", "--context-length", "0"], "a context of 0 tokens"),
        (["--slo", "ttft=5,tpot=5", "--context-length", "1"], "a context of 1 tokens"),
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
    assert "planned instead" in printed, "one colocated worker for each GPU serves more"
    assert "placement: 2 colocated" in printed
    assert "runner-up: 1 prefill (tp 1) + 1 decode (tp 1)" in printed
    assert "what binds" in printed


FLEET = [
    *COMMAND, "--slo", "ttft=200,tpot=20", "--hardware", "h100-sxm,a100-sxm-80gb",
]  # fmt: skip


def test_a_plan_for_several_types_and_its_files_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FLEET, "--gpus", "h100-sxm=1,a100-sxm-80gb=1", "--budget", "cost=7", "--seeds", "1"]
    arguments += ["--policy", "splitwise", "--slo", "ttft=800,tpot=20", "--mean-input", "4096"]
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    for said in (
        "fleet: ",
        "/h, ",
        " W (",
        "h100-sxm alone: ",
        "a100-sxm-80gb alone: ",
        "what binds",
        "rate: ",
    ):
        assert said in printed
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert plan["budget"] == {"of": "cost", "most": 7.0}
    assert plan["policy"] == "splitwise"
    assert plan["candidates"][0]["cost_per_hour"] <= 7.0
    assert f"fleet: {plan['candidates'][0]['placement']}; " in printed
    assert set(plan["alone"]) == {"h100-sxm", "a100-sxm-80gb"}
    assert (tmp_path / "a" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--output", str(tmp_path / "b")]) == 0
    for name in ("plan.json", "plan.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "2"], "need a --budget"),
        (["--gpus", "2", "--budget", "money=2"], "--budget money=2"),
        (["--gpus", "2", "--budget", "cost=x"], "'x' is no number"),
        (["--gpus", "2", "--budget", "cost=0"], "cost = 0"),
        (["--gpus", "2", "--budget", "power=-5"], "power = -5"),
        (
            ["--gpus", "2", "--budget", "cost=1"],
            "the least is: a worker of tp 1 on a100-sxm-80gb takes $2.20/h",
        ),
        (["--gpus", "h100-sxm=2", "--budget", "cost"], "none of a100-sxm-80gb"),
        (["--gpus", "h200-sxm=2", "--budget", "cost"], "'h200-sxm' is not of --hardware"),
        (["--gpus", "1.5", "--budget", "cost"], "no whole number"),
        (["--gpus", "inf", "--budget", "cost"], "no whole number"),
        (
            ["--gpus", "1", "--budget", "cost", "--algorithm", "distserve-low"],
            "--algorithm distserve-low is for",
        ),
        (["--gpus", "2", "--budget", "cost", "--hardware", "h100-sxm,"], "a name is empty"),
        (["--gpus", "2", "--budget", "cost", "--hardware", "h100-sxm,b100"], "no hardware is called 'b100'"),
        (["--gpus", "2", "--budget", "cost", "--hardware", "h200-sxm"], "h200-sxm has no price"),
        (["--gpus", "2", "--budget", "cost", "--prices", "h100-sxm=0"], "the price of h100-sxm is 0"),
        (["--gpus", "1", "--budget", "power", "--model", "llama3.1-70b"], "fits no type"),
        (["--gpus", "1", "--hardware", "h100-sxm", "--prices", "h100-sxm=2"], "--prices is for plans"),
        (["--gpus", "x", "--hardware", "h100-sxm"], "give a whole number"),
    ],
)
def test_wrong_options_of_fleets_are_named(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLEET, *more]) == 2
    assert message in capsys.readouterr().err


def test_types_without_objectives_they_can_meet_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLEET, "--slo", "ttft=5,tpot=20", "--gpus", "1", "--budget", "power"]) == 1
    printed = capsys.readouterr().out
    assert "h100-sxm: a lone prefill of 512 tokens takes" in printed
    assert "a100-sxm-80gb: a lone prefill of 512 tokens takes" in printed


def test_a_fleet_as_a_configuration(tmp_path: Path) -> None:
    h100, a100 = "h100-sxm", "a100-sxm-80gb"
    machines = {name: roofline(hardware=name) for name in (h100, a100)}
    objectives = Objectives(ttft_ms=1000.0, tpot_ms=50.0)
    fleet = pair(3, 1, tp=(2, 4), on=(h100, a100))
    file = tmp_path / "cluster.toml"
    file.write_text(plan_toml(fleet, machines, objectives, "llama3.1-8b", "splitwise"))
    config = load(file, [], system_rng())
    assert config.router.policy == "splitwise"
    assert config.pools.prefill.placement.resources == {"h100-sxm": 2}
    assert config.pools.decode.placement.resources == {"a100-sxm-80gb": 4}
    several = Placement((*fleet.pools, Pool(Kind("prefill", Parallel()), 1, a100)))
    with pytest.raises(ConfigError, match="prefill workers are of several kinds"):
        plan_toml(several, machines, objectives, "llama3.1-8b")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--precision", "fp8"], "the plan is for weights in fp8 and KV in bf16, and this cluster's workers"),
        (["--kv-precision", "fp8"], "the plan is for weights in bf16 and KV in fp8, and this cluster's"),
        (["--model", "opt-175b", "--gpus", "8"], "no repository is known for opt-175b"),
    ],
)
def test_no_configuration_is_written_that_would_not_serve_what_was_planned(
    more: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMAND, "--slo", "ttft=400,tpot=60", "--seeds", "1", "--outage", "0", *more]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert f"no cluster.toml: {why}" in capsys.readouterr().out
    assert not (tmp_path / "cluster.toml").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    model = "opt-175b" if "opt-175b" in more else "llama3.1-8b"
    weights, kv = ("fp8" if option in more else "bf16" for option in ("--precision", "--kv-precision"))
    assert (plan["model"], plan["step_times"]) == (model, "roofline")
    assert (plan["precision"], plan["kv_precision"]) == (weights, kv)


def test_the_policy_is_the_clusters_too(tmp_path: Path) -> None:
    arguments = [*COMMAND, "--slo", "ttft=200,tpot=20", "--policy", "distserve", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["policy"] == "distserve"
    assert load(tmp_path / "cluster.toml", [], system_rng()).router.policy == "distserve"


def test_objectives_are_read() -> None:
    assert parse_slo("tpot=40, ttft=400") == Objectives(ttft_ms=400.0, tpot_ms=40.0)


def test_a_disaggregated_placement_as_a_configuration(tmp_path: Path) -> None:
    machine = roofline("llama3.1-70b")
    objectives = Objectives(ttft_ms=1000.0, tpot_ms=50.0)
    file = tmp_path / "cluster.toml"
    file.write_text(plan_toml(pair(3, 1, tp=(2, 4)), {"": machine}, objectives, "llama3.1-70b"))
    config = load(file, [], system_rng())
    pools = config.pools
    for role, tp in (("prefill", 2), ("decode", 4)):
        tokens = config.engine_of(role).kv_cache_mib * 2**20 / machine.kv_bytes_per_token
        assert tokens == pytest.approx(machine.kv_tokens(Parallel(tp)), rel=1e-3)
    assert (pools.prefill.placement.workers, pools.prefill.placement.tensor_parallel) == (3, 2)
    assert (pools.decode.placement.workers, pools.decode.placement.gpus) == (1, 4)
    assert pools.prefill.scheduler.chunk_budget == 8192
    with pytest.raises(ConfigError, match="pipeline stages"):
        plan_toml(colocated(1, tp=2, pp=2), {"": machine}, objectives, "x")


def test_a_log_too_short_to_replay_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "short.csv"
    log.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,100,8\n")
    arguments = [*OWN, "--workload", str(log), "--arrivals", "trace", "--slo", "ttft=200,tpot=20"]
    assert main(arguments) == 2
    assert "has 1 requests to replay; a goodput needs 20" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--hardware"])
def test_names_of_any_length_are_names(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--slo", "ttft=200,tpot=20", option, "x" * 5000]) == 2
    assert "is called 'xxx" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_plan_that_is_told_to_end_leaves_no_processes(number: signal.Signals) -> None:
    words = ["--model", "llama3.1-70b", "--hardware", "h100-sxm", "--gpus", "16", "--slo", "ttft=400,tpot=40"]
    load = ["--workload", "fixed", "--mean-input", "1024", "--mean-output", "256", "--processes", "2"]
    command = [sys.executable, "-P", "-m", "diphase", "plan", *words, *load]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(started := children.read_text().split()) < 2:
            assert process.poll() is None
        ended = [os.pidfd_open(int(pid)) for pid in started]
        process.send_signal(number)
        assert process.wait() == -number
    for handle in ended:
        select.select([handle], [], [])
        os.close(handle)
