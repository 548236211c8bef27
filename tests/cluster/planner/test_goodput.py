from __future__ import annotations

import math
from dataclasses import replace

import pytest
from diphase.cluster.load.workload import WorkloadConfig
from diphase.cluster.planner.deployment import Deployment, WorkerSpec
from diphase.cluster.planner.goodput import (
    LIVES,
    Definition,
    Estimate,
    Objectives,
    Pattern,
    Question,
    answer,
    largest_rate,
    served,
    simulate,
)
from diphase.cluster.planner.sim_workload import SimWorkload
from diphase.decode_workers.config import ColocatedSchedulerConfig
from diphase.proto.errors import ConfigError
from diphase.router.two_regime_step_time import DecodeTerms, PrefillTerms, TwoRegimeStepTime

STEP_TIME = TwoRegimeStepTime(
    prefill=PrefillTerms(0.01, 1e-4, 0.0),
    small=DecodeTerms(0.01, 0.0, 1e-4),
    large=DecodeTerms(0.01, 0.0, 1e-4),
    large_batch=95,
)
SPEC = WorkerSpec(
    role="colocated", step_time=STEP_TIME, num_blocks=4000, scheduler=ColocatedSchedulerConfig()
)
ONE = Deployment(workers=(SPEC,))
WORKLOAD = SimWorkload(config=WorkloadConfig(num_requests=300, mean_input=256, mean_output=8))
OBJECTIVES = Objectives(ttft_ms=200.0, tpot_ms=50.0)
QUESTION = Question(deployment=ONE, workload=WORKLOAD, objectives=OBJECTIVES, guess=10.0)


def test_the_goodput_is_served_and_a_little_more_is_not() -> None:
    found = answer(QUESTION)
    pattern = Pattern(0, found.count)
    good = simulate(ONE, WORKLOAD, OBJECTIVES, found.rate, pattern)
    assert served(good, OBJECTIVES, Definition.BOTH)
    more = simulate(ONE, WORKLOAD, OBJECTIVES, found.rate * (1.0 + QUESTION.tolerance), pattern)
    assert not served(more, OBJECTIVES, Definition.BOTH)


def test_the_guess_hardly_matters() -> None:
    rates = [answer(replace(QUESTION, guess=guess, count=300)).rate for guess in (0.5, 10.0, 200.0)]
    assert max(rates) <= min(rates) * (1.0 + 2 * QUESTION.tolerance)


def test_percentiles_are_the_weaker_definition() -> None:
    both = (Definition.BOTH, Definition.EACH)
    estimates = answer(replace(QUESTION, definitions=both)).estimates
    assert estimates[Definition.EACH].mean >= estimates[Definition.BOTH].mean > 0.0


def test_a_run_that_is_cut_short_has_the_same_verdict() -> None:
    for rate in (5.0, 20.0, 80.0):
        whole, cut = (
            simulate(ONE, WORKLOAD, OBJECTIVES, rate, Pattern(0, 300), whole=whole) for whole in (True, False)
        )
        for definition in Definition:
            assert served(whole, OBJECTIVES, definition) == served(cut, OBJECTIVES, definition)
    assert cut.duration_s < whole.duration_s


def test_seeds_give_an_interval() -> None:
    estimate = answer(replace(QUESTION, seeds=(0, 1, 2))).estimates[Definition.BOTH]
    low, high = estimate.interval
    assert 0.0 < low < estimate.mean < high < math.inf
    assert Estimate(rates=(2.0,)).interval == (0.0, math.inf)


def test_largest_rate_keeps_its_tolerance_and_its_ends() -> None:
    assert 7.0 / 1.02 <= largest_rate(lambda rate: rate <= 7.0, 1.0, math.inf, 0.02) <= 7.0
    assert largest_rate(lambda rate: True, 1.0, 5.0, 0.02) == 5.0
    assert largest_rate(lambda rate: False, 1.0, 5.0, 0.02) == 0.0


def test_without_a_bound_runs_become_long_enough_for_the_rate_that_they_show() -> None:
    # The worker computes some 30 prompts a second: 300 that come at once are served within the objective.
    life_s = 9.0
    patient = Objectives(ttft_ms=life_s * 1e3, tpot_ms=math.inf)
    at_once = simulate(ONE, WORKLOAD, patient, 1e6, Pattern(0, 300))
    assert served(at_once, patient, Definition.BOTH)
    found = answer(replace(QUESTION, objectives=patient, guess=1.0))
    assert 20.0 < found.rate < 60.0
    assert found.count >= LIVES * found.rate * life_s
    # As long as it is asked to be, but never a rate that nobody can tell from any other.
    assert answer(replace(QUESTION, objectives=patient, guess=1.0, count=300)).rate == 300 / life_s


def test_below_the_floor_nothing_is_tried() -> None:
    tried: list[float] = []

    def good(rate: float) -> bool:
        tried.append(rate)
        return rate <= 0.7

    assert largest_rate(good, 4.0, 5.0, 0.02, floor=1.0) == 0.0
    assert min(tried) == 1.0
    assert largest_rate(good, 4.0, 5.0, 0.02, floor=0.5) == pytest.approx(0.7, rel=0.02)


def test_wrong_objectives_and_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match="tpot_ms"):
        Objectives(ttft_ms=1.0, tpot_ms=0.0)
    with pytest.raises(ConfigError, match="0"):
        replace(QUESTION, guess=0.0)
    with pytest.raises(ConfigError, match="finite"):
        replace(QUESTION, objectives=Objectives(ttft_ms=math.inf, tpot_ms=math.inf))
