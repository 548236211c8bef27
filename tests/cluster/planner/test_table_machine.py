"""Machines of measured tables: what a plan is given of them, and what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diphase.cluster.cli import main
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.host_time import SERVING
from diphase.cluster.planner.machines import Parallel, RooflineMachine, feasible_parallels
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.splitwise import splitwise_step_time
from diphase.cluster.planner.step_latency import step_latency_time
from diphase.cluster.planner.table_machine import splitwise_machine, step_latency_machine
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from ...router.shapes import prompt_shape

SHAPES = (prompt_shape(1000), StepShape(decode_batch=24, decode_context=24 * 900))


def test_splitwises_workers_have_its_times_and_the_rooflines_memory(data: Path) -> None:
    machine = splitwise_machine(data, model="llama2-70b", hardware="h100-sxm")
    assert feasible_parallels(machine, 8, 4) == [Parallel(2), Parallel(4), Parallel(8)]
    arithmetic = RooflineMachine(load_model_shape("llama2-70b"), load_hardware("h100-sxm"))
    for tp in (2, 4, 8):
        theirs = splitwise_step_time(data, model="llama2-70b", hardware="h100-80gb", tp=tp)
        for shape in SHAPES:
            assert machine.step_time(Parallel(tp)).step_s(shape) == theirs.step_s(shape)
        assert machine.kv_tokens(Parallel(tp)) == arithmetic.kv_tokens(Parallel(tp))
    bloom = splitwise_machine(data, model="bloom-176b", hardware="a100-sxm-80gb")
    assert feasible_parallels(bloom, 8) == [Parallel(8)]


def test_step_latencys_workers_have_the_times_of_vllm_and_the_hosts(data: Path) -> None:
    machine = step_latency_machine(data, model="llama3.1-8b", hardware="h200-sxm")
    for tp in (1, 8):
        theirs = step_latency_time(data, model="Meta-Llama-3.1-8B", system="h200", backend="vllm", tp=tp)
        for shape in SHAPES:
            host_s = SERVING.step_s + SERVING.sequence_s * shape.decode_batch
            assert machine.step_time(Parallel(tp)).step_s(shape) == theirs.step_s(shape) + host_s


def test_what_was_not_measured_is_named_with_what_was(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"opt-13b on h100-sxm was not measured; .*llama2-70b on h100-sxm"):
        splitwise_machine(data, model="opt-13b", hardware="h100-sxm")
    with pytest.raises(ConfigError, match=r"qwen3-32b on h100-sxm was not .* qwen3-32b on h200-sxm"):
        step_latency_machine(data, model="qwen3-32b", hardware="h100-sxm")
    machine = splitwise_machine(data, model="llama2-70b", hardware="h100-sxm")
    with pytest.raises(ConfigError, match="pp 2 was not measured"):
        machine.step_time(Parallel(2, 2))
    with pytest.raises(ConfigError, match="tp 1 was not measured; there is 2, 4, 8"):
        machine.step_time(Parallel(1))
    with pytest.raises(ConfigError, match="gpus = 1 are fewer than any known worker takes"):
        feasible_parallels(machine, 1)


@pytest.mark.parametrize(
    ("source", "model", "gpus"), [("splitwise", "llama2-70b", "2"), ("step-latency", "llama3.1-8b", "1")]
)
def test_plans_are_made_with_them(
    source: str, model: str, gpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "plan", "--step-times", source, "--model", model, "--hardware", "h100-sxm", "--gpus", gpus,
        "--workload", "fixed", "--mean-input", "512", "--mean-output", "4", "--slo", "ttft=2000,tpot=200",
        "--processes", "1", "--seeds", "1", "--requests", "50", "--outage", "0",
    ]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert f"placement: 1 colocated (tp {gpus}" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["model"], plan["step_times"], plan["precision"]) == (model, source, None)
    assert main([*arguments, "--precision", "fp8"]) == 2
    assert f"--precision fp8 is not for --step-times {source}" in capsys.readouterr().err
