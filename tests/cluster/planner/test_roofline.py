"""Step times and capacities by arithmetic: laws, bounds by hand, what is refused, and how near they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diphase.benchmarks import latency_models
from diphase.cluster.planner.hardware import load_hardware
from diphase.cluster.planner.model_shape import KNOWN_MODELS
from diphase.cluster.planner.roofline import Efficiency, RooflineStepTime, kv_capacity_tokens, stage_layers
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape
from hypothesis import given
from hypothesis import strategies as st

from ...router.shapes import prompt_shape
from ...router.step_time_laws import check_grows, check_lines, check_stages

H100 = load_hardware("h100-sxm")
SMALL, LARGE = KNOWN_MODELS["llama3.1-8b"], KNOWN_MODELS["llama3.1-70b"]
IDEAL = Efficiency(
    matrix=1.0,
    attention=1.0,
    weights=1.0,
    kv=1.0,
    link=1.0,
    all_reduce_s=0.0,
    layer_s=0.0,
    step_s=0.0,
    activation_passes=0.0,
)


@given(st.sampled_from([1, 2, 8]), st.sampled_from([1, 3, 8]), st.integers(1, 300), st.floats(1, 1e5))
def test_the_laws_hold_for_every_parallelism(tp: int, pp: int, batch: int, context: float) -> None:
    model = RooflineStepTime(LARGE, H100, tp=tp, pp=pp)
    check_lines(model, batch, [context])
    check_grows(model, batch, context, 100.0)
    check_stages(model, StepShape(512, 512 * 256, batch, context))


def test_a_small_batch_reads_weights_and_kv() -> None:
    model = RooflineStepTime(SMALL, H100, efficiency=IDEAL)
    weights = 2 * (SMALL.parameters - SMALL.vocab_parameters)  # the embedding is looked up, not read
    kv = 1000 * SMALL.kv_bytes_per_token()
    step_s = model.step_s(StepShape(decode_batch=1, decode_context=1000))
    assert step_s == pytest.approx((weights + kv) / 3350e9, rel=1e-9)


def test_a_long_prompt_computes() -> None:
    model = RooflineStepTime(SMALL, H100, efficiency=IDEAL)
    tokens = 8192
    matrices = 2 * tokens * SMALL.num_layers * SMALL.layer_parameters
    # Queries with keys and weights with values, of each token with those before it: half a square.
    attention = 2 * 2 * SMALL.num_layers * SMALL.num_q_heads * SMALL.head_dim * tokens**2 / 2
    vocab_s = 2 * SMALL.vocab_parameters / 3350e9
    assert model.step_s(prompt_shape(tokens)) == pytest.approx((matrices + attention) / 989e12 + vocab_s)


def test_tensor_parallel_ranks_share_work_and_pay_the_link() -> None:
    ideal = RooflineStepTime(SMALL, H100, tp=4, efficiency=IDEAL)
    alone = RooflineStepTime(SMALL, H100, efficiency=IDEAL)
    ring_s = SMALL.num_layers * 2 * 2 * 3 / 4 * 8192 * SMALL.hidden_size * 2 / 450e9
    assert ideal.step_s(prompt_shape(8192)) == pytest.approx(alone.step_s(prompt_shape(8192)) / 4 + ring_s)


def test_tensor_parallelism_across_nodes_uses_the_network() -> None:
    pair = replace(H100, gpus_per_node=2)
    shape = prompt_shape(2048)
    within, across = (RooflineStepTime(LARGE, hardware, tp=4).step_s(shape) for hardware in (H100, pair))
    assert across > 2 * within
    two = [RooflineStepTime(LARGE, hardware, tp=2).step_s(shape) for hardware in (H100, pair)]
    assert two[0] == two[1]


def test_kv_heads_are_copied_to_ranks_beyond_their_number() -> None:
    narrow = replace(LARGE, num_kv_heads=2)
    two, eight = (RooflineStepTime(narrow, H100, tp=tp).decode_line(1, 0.0).slope_s for tp in (2, 8))
    assert two == eight


def test_eight_bit_weights_are_read_and_multiplied_faster() -> None:
    plain, eight_bit = RooflineStepTime(LARGE, H100), RooflineStepTime(LARGE, H100, precision="fp8")
    for shape in (prompt_shape(8192), StepShape(decode_batch=1, decode_context=100)):
        assert 1.5 < plain.step_s(shape) / eight_bit.step_s(shape) < 2.0


def test_eight_bit_kv_is_read_faster_and_takes_half_the_room() -> None:
    plain, eight_bit = RooflineStepTime(LARGE, H100), RooflineStepTime(LARGE, H100, kv_precision="fp8")
    assert eight_bit.decode_line(8, 0.0).slope_s == pytest.approx(plain.decode_line(8, 0.0).slope_s / 2)
    assert eight_bit.step_s(prompt_shape(512)) == plain.step_s(prompt_shape(512))
    room, twice = kv_capacity_tokens(SMALL, H100), kv_capacity_tokens(SMALL, H100, kv_precision="fp8")
    assert twice == pytest.approx(2 * room, abs=1)


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp = 3 does not divide 64 query heads"):
        RooflineStepTime(LARGE, H100, tp=3)
    with pytest.raises(ConfigError, match="tp = 0"):
        RooflineStepTime(LARGE, H100, tp=0)
    with pytest.raises(ConfigError, match="pp = 81; it must be from 1 to the model's 80 layers"):
        RooflineStepTime(LARGE, H100, pp=81)
    with pytest.raises(ConfigError, match="A100-SXM-80GB has no fp8_tflops"):
        RooflineStepTime(LARGE, load_hardware("a100-sxm-80gb"), precision="fp8")
    with pytest.raises(ConfigError, match=r"would hold 131\.4 GiB of weights and has 73\.6 GiB"):
        kv_capacity_tokens(LARGE, H100)


def test_layers_that_do_not_divide_go_to_the_first_stages() -> None:
    assert stage_layers(LARGE, 1, 3) == (27, 27, 26)


def test_kv_capacity_grows_with_gpus_and_with_smaller_weights() -> None:
    one, two, four = (kv_capacity_tokens(SMALL, H100, tp=tp) for tp in (1, 2, 4))
    assert 2 * one < two < 2.5 * one
    assert kv_capacity_tokens(SMALL, H100, tp=2, pp=2) == pytest.approx(four, rel=0.02)
    assert 1.05 * one < kv_capacity_tokens(SMALL, H100, precision="fp8") < 1.3 * one


@pytest.fixture(scope="module")
def found(data: Path) -> dict[str, Any]:
    return latency_models.of_roofline(data)


def test_kv_capacities_are_distserves_within_two_percent(found: dict[str, Any]) -> None:
    """All but the tightest few, where little is left beside the weights."""
    errors = found["KV capacity against DistServe's"]
    assert errors["points"] == 76
    assert errors["p95"] <= 0.02


def test_models_on_hardware_it_was_not_calibrated_on_are_within_a_tenth(found: dict[str, Any]) -> None:
    errors = found["models on hardware not calibrated on"]
    assert errors["prefill"]["median"] <= 0.06
    assert errors["decode"]["median"] <= 0.08


@pytest.mark.parametrize("model", ["llama3.1-8b", "llama3.1-70b"])
def test_on_a100_within_a_fifth(found: dict[str, Any], model: str) -> None:
    """The farthest from where it was calibrated: less of the bandwidth is reached there."""
    for phase in ("prefill", "decode"):
        assert found[f"{model} a100_sxm vllm"][phase]["median"] <= 0.20
