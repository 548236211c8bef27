from __future__ import annotations

import math

import numpy as np
import pytest
from diphase.cluster.planner.bounds import (
    decode_rate,
    fitting,
    lone_prefill_s,
    prefill_rate,
    saturating_tokens,
    tpot_floor,
    ttft_floor,
)
from diphase.router.two_regime_step_time import DecodeTerms, PrefillTerms, TwoRegimeStepTime

from .deployments import colocated_worker, deployment, run


def linear(stages: int = 1) -> TwoRegimeStepTime:
    terms = DecodeTerms(0.01, 1e-7, 1e-4)
    return TwoRegimeStepTime(
        prefill=PrefillTerms(0.01, 1e-4, 0.0), small=terms, large=terms, large_batch=95, stages=stages
    )


def test_a_lone_prompt_takes_its_chunks() -> None:
    assert lone_prefill_s(linear(), 1000, 8192) == pytest.approx(0.11)
    assert lone_prefill_s(linear(), 1000, 500) == pytest.approx(0.12)


def test_chunks_of_a_prompt_may_overlap_in_a_pipeline() -> None:
    # Two chunks of 30 ms on each of two stages: the second follows the first by one stage.
    assert lone_prefill_s(linear(stages=2), 1000, 500) == pytest.approx(0.09)


def test_the_floor_is_of_the_ninetieth_percentile() -> None:
    lengths = [(100, 2)] * 9 + [(10_000, 2)]
    floor = ttft_floor(linear(), lengths, 10_000, ttft_ms=50.0)
    assert floor.quantile_ms == pytest.approx(20.0)
    assert floor.tokens == 100
    assert floor.feasible == pytest.approx(0.9)


def test_one_token_has_no_tpot() -> None:
    assert tpot_floor(linear(), [(100, 1)] * 10, 1.0).feasible == 1.0
    assert math.isinf(decode_rate(linear(), [(100, 1)] * 10, 1.0, 10_000))


def test_rates_are_of_the_best_batch() -> None:
    # 8,192 tokens a step take 829 ms; of the requests only 90 % have to be served.
    assert prefill_rate(linear(), [(1000, 10)] * 10, 8192) == pytest.approx(8192 / 0.8292 / 1000 / 0.9)
    # Steps of 20 ms have about 50 sequences of this context.
    assert decode_rate(linear(), [(1000, 11)] * 10, 20.0, 10**6) == pytest.approx(250 / 0.9, rel=0.1)


def test_memory_bounds_the_batch() -> None:
    roomy, tight = (decode_rate(linear(), [(1000, 11)] * 10, 20.0, tokens) for tokens in (10**6, 5_000))
    assert tight < roomy / 5
    assert decode_rate(linear(), [(1000, 11)] * 10, 5.0, 10**6) == 0.0  # no step is so quick


@pytest.mark.parametrize(("prompt", "output"), [(100, 60), (100, 61), (159, 1), (160, 1), (158, 2), (159, 2)])
def test_a_request_fits_that_a_pool_serves(prompt: int, output: int) -> None:
    result, _ = run(deployment(colocated_worker(10)), [(0, prompt, output)])
    assert fitting([(prompt, output)], 160) == np.isfinite(result.ttft_ms).all()
    assert fitting([(prompt, output), (1, 1)], 160) >= 0.5


def test_saturation_is_where_most_of_the_speed_is() -> None:
    # tokens / (10 ms + 0.1 ms tokens) reaches four fifths of its value at 8,192 at about 380.
    assert saturating_tokens(linear(), 8192) == 512
