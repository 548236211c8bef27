"""Host times: what they add to a step, and who has them."""

from __future__ import annotations

import pytest
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.host_time import SERVING, Host, WithHost
from diphase.cluster.planner.machines import Parallel, RooflineMachine
from diphase.cluster.planner.model_shape import load_model_shape
from diphase.cluster.planner.roofline import RooflineStepTime
from diphase.router.step_time import StepShape

from ...router.step_time_laws import check_grows, check_lines, check_stages
from .deployments import table

MODEL, H100 = load_model_shape("llama3.1-8b"), load_hardware("h100-sxm")


def test_host_time_adds_to_each_step_and_keeps_the_laws() -> None:
    steps = WithHost(table(), Host(1e-3, 2e-5))
    shape = StepShape(decode_batch=4, decode_context=400.0)
    assert steps.step_s(shape) - table().step_s(shape) == pytest.approx(1e-3 + 4 * 2e-5)
    check_lines(steps, 3, [0.0, 50.0, 700.0])
    check_stages(steps, StepShape(64, 2048.0, 3, 150.0))


def test_of_several_stages_the_first_waits_for_the_host() -> None:
    device = RooflineStepTime(MODEL, H100, pp=4)
    steps = WithHost(device, Host(1e-3, 2e-5))
    shape = StepShape(64, 2048.0, 3, 150.0)
    first, *others = (
        mine - theirs for mine, theirs in zip(steps.stage_s(shape), device.stage_s(shape), strict=True)
    )
    assert first == pytest.approx(1e-3 + 3 * 2e-5)
    assert others == [0.0] * 3
    check_stages(steps, shape)
    check_grows(steps, 3, 150.0, 100.0)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(2, 2)])
def test_plans_by_roofline_have_it(parallel: Parallel) -> None:
    machine = RooflineMachine(MODEL, H100)
    device = RooflineStepTime(MODEL, H100, tp=parallel.tp, pp=parallel.pp)
    shape = StepShape(decode_batch=64, decode_context=64e3)
    more = machine.step_time(parallel).step_s(shape) - device.step_s(shape)
    assert more == pytest.approx(SERVING.step_s + 64 * SERVING.sequence_s)


def test_kv_of_eight_bits_is_half_of_a_machines_kv() -> None:
    machine, eight_bit = RooflineMachine(MODEL, H100), RooflineMachine(MODEL, H100, kv_precision="fp8")
    assert 2 * eight_bit.kv_bytes_per_token == machine.kv_bytes_per_token
    assert eight_bit.kv_tokens(Parallel()) == pytest.approx(2 * machine.kv_tokens(Parallel()), abs=1)
    shape = StepShape(decode_batch=64, decode_context=64e3)
    assert eight_bit.step_time(Parallel()).step_s(shape) < machine.step_time(Parallel()).step_s(shape)
