"""Placements of `diphase profile` and `diphase validate`, and what their commands refuse."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diphase.cluster import validate_command
from diphase.cluster.cli import main
from diphase.cluster.load.report import write_json
from diphase.cluster.one_machine import OneMachine, placement_settings
from diphase.cluster.planner.deployment import SimulationConfig
from diphase.cluster.planner.profile import ServingCost, load_profile
from diphase.proto.errors import ConfigError
from diphase.router.config import RouterConfig

from .planner.deployments import CLUSTERS, run
from .planner.profiles import profile


def arguments(*settings: str, model: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(model=model, settings=[*settings], config=None)


def test_each_worker_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    pools = OneMachine(arguments(model="dummy:tiny"), "1p1d").config.pools
    assert (pools.prefill.placement.cores, pools.decode.placement.cores) == ([3], [5])
    alone = OneMachine(arguments(), "colocated").config.pools.placements()
    assert {role: pool.workers for role, pool in alone.items()} == {"prefill": 0, "decode": 0, "colocated": 1}
    assert alone["colocated"].cores == [3]


def test_too_few_cores_are_left_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not [setting for setting in placement_settings("1p1d", 1) if "cores" in setting]


def test_what_is_set_by_hand_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    machine = OneMachine(arguments("pools.decode.cores=[0]"), "1p1d")
    assert machine.config.pools.decode.placement.cores == [0]


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ConfigError, match="use 1p1d or colocated"):
        placement_settings("3p9d", 1)


@pytest.mark.parametrize("text", ["a", "1,x", "0", "-1"])
def test_rates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--rates"):
        validate_command.rates_from(text)


def test_rates_are_numbers_between_commas() -> None:
    assert validate_command.rates_from("0.5, 1,2") == [0.5, 1.0, 2.0]
    assert validate_command.rates_from("") == []


def test_what_is_refused_is_no_capacity() -> None:
    config = SimulationConfig(router=RouterConfig(max_queued_requests=4))
    result, _ = run(CLUSTERS["1P1D"], [(0, 100, 8)] * 40, config)
    served = 40 - result.rejected
    assert 4 <= served < 20
    rates = [share * served / result.duration_s for share in validate_command.SHARES]
    assert validate_command.rates_of(result) == pytest.approx(rates, abs=1e-3)
    nothing, _ = run(CLUSTERS["1P1D"], [(0, 50_000, 8)])
    with pytest.raises(ConfigError, match="serves no request"):
        validate_command.rates_of(nothing)


@pytest.mark.slow
def test_an_engine_is_profiled_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    words = ("--model", "dummy:tiny", "--rounds", "2", "--engine-only", "--output", str(output))
    settings = (
        "pools.prefill.chunk_budget=256",
        "pools.colocated.prefill_budget=256",
        "pools.decode.max_running=8",
        "pools.colocated.max_running=8",
    )
    assert main(["profile", *words, *(word for setting in settings for word in ("--set", setting))]) == 0
    found = load_profile(output)
    assert found.engine.model == "dummy:tiny"
    assert found.errors("decode").cells > 4
    assert max(cell.shape.decode_batch for cell in found.cells) == 8
    said = " ".join(capsys.readouterr().out.split())
    assert "held out median" in said
    assert f"all steps by one set of terms: {found.coefficients.base * 1e3:.2f} ms, " in said
    assert "serving and hand-offs: not measured" in said
    result = ("--output", str(tmp_path / "validate.json"))
    assert main(["validate", "--profile", str(output), "--model", "dummy:tiny", *result]) == 2
    assert "without --engine-only" in capsys.readouterr().err


def test_a_profile_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--profile", "/nowhere/profile.json"]) == 2
    assert "the profile /nowhere/profile.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["profile", "validate"])
def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, given = tmp_path / "profile.json", ["--model", "test"]
    write_json(there, replace(profile(), serving=ServingCost(first_token_s=0.01)).to_dict())
    given += ["--profile", str(there)] if command == "validate" else []
    for output, why in ((tmp_path, "Is a directory"), (there / "x", "File exists|Not a directory")):
        assert main([command, *given, "--output", str(output)]) == 2
        assert re.search(f"--output {output} cannot be written: ({why})", capsys.readouterr().err)


@pytest.mark.parametrize("rounds", ["1", "1000000000"])
def test_one_round_is_no_profile_and_a_billion_are_none_either(
    rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--rounds", rounds]) == 2
    assert f"--rounds {rounds} is out of range; use 2 to 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "there is no model 'test'"),
        (("--set", "model.dtype=fp32"), "the profile was made with dtype = bf16, and the cluster has fp32"),
        (("--model", "dummy:tiny"), "is of the model test, not of dummy:tiny"),
        (("--requests", "1000000000"), "--requests 1000000000 is out of range; use 1 to 10000"),
        (("--mean-input", "100000000"), "a mean of 1e+08 tokens cannot fit"),
        (("--rates", "1e9"), "above 0 and below a million"),
        (("--ttft-ms", "nan"), "slo.ttft_ms = nan"),
        (("--data", ""), "--data is empty"),
    ],
)
def test_what_cannot_be_validated_is_said_before_an_engine_is_started(
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(validate_command, "speed_probe", pytest.fail)
    there, log = tmp_path / "profile.json", tmp_path / "log.csv"
    write_json(there, replace(profile(), serving=ServingCost(first_token_s=0.01)).to_dict())
    log.write_text("prompt_tokens,output_tokens\n" + "100,10\n" * 20)
    given = ["--model", "test", "--profile", str(there), "--output", str(tmp_path / "out.json")]
    assert main(["validate", *given, "--trace", str(log), *more]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_loads_no_torch() -> None:
    script = "import sys; import diphase.cluster.cli; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
