"""Plans for workers that were profiled."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from diphase.cluster.cli import main
from diphase.cluster.config import load
from diphase.cluster.load.report import write_json
from diphase.cluster.planner.hardware import MOST
from diphase.cluster.planner.machines import Parallel, feasible_parallels
from diphase.cluster.planner.placement import build
from diphase.cluster.planner.prediction import deployment_of
from diphase.cluster.planner.profile import Profile, ServingCost, Slowdown, load_profile
from diphase.cluster.planner.profile_machine import ProfileMachine
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from .placements import pair
from .profiles import profile, true_s

SERVING = ServingCost(first_token_s=0.005, step_s=0.001, handoff_s=0.004, handoff_bytes_per_s=2e9)
FELT = Slowdown(
    factors={"prefill": {"prefill": 1.6, "decode": 1.5}, "decode": {"prefill": 1.4, "decode": 1.1}}
)
COMMAND = [
    "plan", "--model", "test", "--step-times", "profile", "--gpus", "2", "--workload", "fixed",
    "--mean-input", "256", "--mean-output", "16", "--processes", "1", "--seeds", "1", "--requests", "40",
]  # fmt: skip
LOOSE = ["--slo", "ttft=2000,tpot=100"]
DECODE = StepShape(decode_batch=4, decode_context=800)


def profiled(cores: int = 2, serving: ServingCost = SERVING) -> Profile:
    machine = {"machine": {"cpu": "Some CPU", "cores": cores}}
    return replace(profile(), slowdown=FELT, serving=serving, machine=machine)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    write_json(path, profiled().to_dict())
    return str(path)


def test_a_plan_from_a_profile_is_a_configuration_that_the_profile_holds_for(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *LOOSE, "--profile", file, "--output", str(tmp_path / "plan")]) == 0
    assert "of 2 GPUs" in capsys.readouterr().out
    toml = tmp_path / "plan" / "cluster.toml"
    assert main(["config", "--config", str(toml)]) == 0
    config = load(toml, [], random.Random(0))
    assert (config.model.name, config.model.dtype) == ("test", "bf16")
    assert config.engine.kv_cache_mib == 512
    predicted = deployment_of(config, load_profile(Path(file)))
    [best, *_] = json.loads((tmp_path / "plan" / "plan.json").read_text())["candidates"]
    assert len(predicted.workers) == sum(pool["workers"] for pool in best["pools"].values())


def test_what_is_simulated_is_what_the_validation_simulates() -> None:
    machine = ProfileMachine(profiled(cores=1), slots=2)
    ours = build(pair(1, 1), {"": machine})
    config = load(None, ["pools.prefill.workers=1"], random.Random(0))
    theirs = deployment_of(config, profiled())
    # Plans hand every prompt over whole.
    theirs = replace(theirs, num_layers=1, layerwise_tokens=0)
    assert replace(ours, workers=theirs.workers) == theirs
    for one, other in zip(ours.workers, theirs.workers, strict=True):
        assert (one.role, one.num_blocks) == (other.role, other.num_blocks)
        assert one.step_time.step_s(DECODE) == other.step_time.step_s(DECODE)
    # No larger steps than were measured.
    assert machine.limits.chunk_budget == 512
    assert machine.limits.max_running == 64


def test_all_slots_of_a_machine_slow_each_other_down() -> None:
    for cores, slots, factor in ((2, 1, 1.0), (2, 2, 1.4), (2, 8, 1.4), (4, 8, 2.2), (1, 8, 1.0)):
        step_time = ProfileMachine(profiled(cores), slots).step_time(Parallel())
        assert step_time.step_s(DECODE) == pytest.approx(factor * true_s(DECODE) + 0.001)
    beside = replace(SERVING, first_token_beside_s=0.009)
    assert ProfileMachine(profiled(2, beside), 2).first_token_s == 0.009
    assert ProfileMachine(profiled(2, beside), 1).first_token_s == 0.005


def test_a_worker_takes_one_slot() -> None:
    machine = ProfileMachine(profiled(), slots=8)
    assert feasible_parallels(machine, 8, max_pp=4) == [Parallel()]
    with pytest.raises(ConfigError, match="tp 2"):
        machine.kv_tokens(Parallel(2))


def test_bytes_that_took_no_time_go_over_the_quickest_link() -> None:
    quick = ProfileMachine(profiled(serving=replace(SERVING, handoff_bytes_per_s=float("inf"))), slots=2)
    assert quick.hardware.inter_node_gb_per_s == MOST


def test_a_profile_without_serving_is_refused() -> None:
    with pytest.raises(ConfigError, match="--engine-only"):
        ProfileMachine(profiled(serving=ServingCost()), slots=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--step-times profile needs --profile"),
        (
            ["--profile", "FILE", "--hardware", "h100-sxm"],
            "--hardware h100-sxm is not for --step-times profile",
        ),
        (["--profile", "FILE", "--precision", "bf16"], "--precision bf16 is not for --step-times"),
        (["--profile", "FILE", "--kv-precision", "fp8"], "--kv-precision fp8 is not for --step-times"),
        (["--profile", "FILE", "--model", "smollm2"], "is of the model test, not of smollm2"),
        (["--profile", "FILE", "--step-times", "roofline"], "profile.json is not for --step-times roofline"),
        (["--profile", "FILE", "--gpus", "0"], "gpus = 0"),
        (["--step-times", "roofline"], "--step-times roofline needs --hardware"),
    ],
)
def test_options_that_do_not_fit_are_named(
    more: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *LOOSE, *(file if word == "FILE" else word for word in more)]) == 2
    assert message in capsys.readouterr().err
