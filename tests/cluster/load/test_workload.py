"""Plans: arrival statistics, lengths, prompts; all a function of the seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.workload import (
    Arrivals,
    ModelShape,
    WorkloadConfig,
    fit_mean,
    plan_arrivals,
    plan_load,
)
from diphase.proto.errors import ConfigError

MODEL = ModelShape(context_length=8192, vocab_size=49_152)
FIXED = WorkloadConfig(num_requests=4000, mean_input=4, mean_output=2, seed=3)


def long_tailed(count: int = 3000) -> list[TraceRecord]:
    rng = np.random.default_rng(11)
    return [
        TraceRecord(arrival_s=i * 0.5, input_tokens=int(a) + 1, output_tokens=int(b) + 1)
        for i, (a, b) in enumerate(rng.lognormal(6.0, 1.2, size=(count, 2)))
    ]


def without_times() -> list[TraceRecord]:
    return [dataclasses.replace(record, arrival_s=None) for record in long_tailed()]


def gaps(config: WorkloadConfig, rate: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.diff([p.arrival_s for p in plan_load(config, [], MODEL, rate)])


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [(Arrivals.POISSON, 1.0), (Arrivals.GAMMA, 0.5), (Arrivals.GAMMA, 1.0), (Arrivals.GAMMA, 3.0)],
)
def test_gaps_have_the_asked_mean_exactly_and_the_asked_variation(arrivals: Arrivals, cv: float) -> None:
    found = gaps(dataclasses.replace(FIXED, arrivals=arrivals, cv=cv), 5.0)
    assert found.mean() == pytest.approx(0.2)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.1)


def test_poisson_gaps_are_exponential() -> None:
    found = np.sort(gaps(FIXED, 1.0))
    # Kolmogorov–Smirnov distance from the exponential distribution; 1 % critical value for n gaps.
    distance = np.abs(1 - np.exp(-found) - np.arange(1, len(found) + 1) / len(found)).max()
    assert distance < 1.63 / np.sqrt(len(found))


def test_poisson_ignores_cv() -> None:
    assert (gaps(FIXED, 1.0) == gaps(dataclasses.replace(FIXED, cv=9.0), 1.0)).all()


def test_plans_of_two_rates_are_one_pattern_stretched() -> None:
    slow, fast = plan_load(FIXED, [], MODEL, 1.0), plan_load(FIXED, [], MODEL, 4.0)
    assert [p.arrival_s for p in slow] == pytest.approx([4 * p.arrival_s for p in fast])
    assert [p.prompt for p in slow] == [p.prompt for p in fast]


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    config = WorkloadConfig(num_requests=50, mean_input=256, mean_output=48, seed=7)
    trace = long_tailed()
    plan = plan_load(config, trace, MODEL, 2.0)
    assert plan == plan_load(config, trace, MODEL, 2.0)
    other = plan_load(dataclasses.replace(config, seed=8), trace, MODEL, 2.0)
    assert [p.arrival_s for p in other] != [p.arrival_s for p in plan]
    assert [p.input_tokens for p in other] != [p.input_tokens for p in plan]


def test_salt_changes_the_prompts_and_nothing_else() -> None:
    config = WorkloadConfig(num_requests=20, mean_input=64, mean_output=8)
    first, second = (plan_load(config, long_tailed(), MODEL, 2.0, salt) for salt in (0, 1))
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    assert [dataclasses.replace(p, prompt="") for p in first] == [
        dataclasses.replace(p, prompt="") for p in second
    ]


def test_trace_lengths_are_scaled_to_the_means_and_fit_the_context() -> None:
    config = WorkloadConfig(num_requests=300, mean_input=256, mean_output=48)
    plan = plan_load(config, long_tailed(), ModelShape(context_length=2048, vocab_size=1000), 1.0)
    assert np.mean([p.input_tokens for p in plan]) == pytest.approx(256, rel=0.01)
    assert np.mean([p.output_tokens for p in plan]) == pytest.approx(48, rel=0.02)
    assert all(p.input_tokens >= 1 and p.output_tokens >= 1 for p in plan)
    assert all(p.input_tokens + p.output_tokens <= 2048 for p in plan)
    assert all(len(p.prompt) == p.input_tokens for p in plan)
    assert len({p.input_tokens for p in plan}) > 50


def test_without_means_one_factor_makes_the_longest_fit() -> None:
    records = [
        TraceRecord(arrival_s=float(i), input_tokens=size, output_tokens=size // 10)
        for i, size in enumerate([100, 1000, 10_000])
    ]
    config = WorkloadConfig(num_requests=3, arrivals=Arrivals.TRACE)
    shrunk = plan_load(config, records, ModelShape(context_length=1100, vocab_size=1000), None)
    assert [(p.input_tokens, p.output_tokens) for p in shrunk] == [(10, 1), (100, 10), (1000, 100)]
    whole = plan_load(config, records, ModelShape(context_length=20_000, vocab_size=1000), None)
    assert [p.input_tokens for p in whole] == [100, 1000, 10_000]


def test_means_beyond_the_context_are_refused() -> None:
    config = WorkloadConfig(num_requests=10, mean_input=3000, mean_output=10)
    with pytest.raises(ConfigError, match="mean of 3000 tokens cannot fit"):
        plan_load(config, long_tailed(), ModelShape(context_length=2048, vocab_size=1000), 1.0)
    with pytest.raises(ConfigError, match=r"3000 \+ 10 tokens do not fit"):
        plan_load(config, [], ModelShape(context_length=2048, vocab_size=1000), 1.0)


def test_fitting_keeps_the_order_and_the_caps() -> None:
    lengths = np.array([1.0, 10.0, 100.0, 1000.0])
    fitted, factor = fit_mean(lengths, 50.0, np.full(4, 120))
    assert fitted.mean() == pytest.approx(50.0, abs=0.5)
    assert fitted[-1] == 120
    assert list(fitted) == sorted(fitted)
    assert factor > 0.0


def test_trace_arrivals_keep_their_pattern_at_any_rate() -> None:
    records = [
        TraceRecord(arrival_s=at, input_tokens=5, output_tokens=5) for at in (0.0, 1.0, 1.0, 4.0, 10.0)
    ]
    config = WorkloadConfig(num_requests=5, arrivals=Arrivals.TRACE)
    assert [p.arrival_s for p in plan_load(config, records, MODEL, None)] == [0.0, 1.0, 1.0, 4.0, 10.0]
    assert [p.arrival_s for p in plan_load(config, records, MODEL, 4.0)] == pytest.approx(
        [0.0, 0.1, 0.1, 0.4, 1.0]
    )


@pytest.mark.parametrize("context_length", [-5, 0, 1])
def test_a_context_without_room_for_a_completion_is_refused(context_length: int) -> None:
    records = [TraceRecord(arrival_s=0.0, input_tokens=512, output_tokens=16)]
    with pytest.raises(ConfigError, match=f"a context of {context_length} tokens"):
        plan_arrivals(WorkloadConfig(num_requests=1), records, context_length, 1.0)


def test_a_part_of_a_trace_starts_at_zero_and_stays_together() -> None:
    config = WorkloadConfig(num_requests=40, arrivals=Arrivals.TRACE, seed=5)
    plan = plan_load(config, long_tailed(), MODEL, None)
    assert [p.arrival_s for p in plan] == pytest.approx([0.5 * i for i in range(40)])


def test_equal_hash_ids_share_exactly_their_prefix() -> None:
    hashes = [(0, 1, 2), (0, 1, 3), (4, 5, 6)]
    records = [
        TraceRecord(arrival_s=float(i), input_tokens=1500, output_tokens=100, hash_ids=ids)
        for i, ids in enumerate(hashes)
    ]
    config = WorkloadConfig(num_requests=3, mean_input=150, mean_output=10)
    a, b, c = (p.prompt for p in plan_load(config, records, MODEL, 1.0))
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    # Two of three blocks of 512 tokens, at a tenth of the trace's scale.
    assert shared == pytest.approx(2 * 51.2, abs=1)
    assert a[0] != c[0]


@pytest.mark.parametrize("vocab_size", [2, 300, 49_152])
def test_token_ids_stay_inside_the_vocabulary(vocab_size: int) -> None:
    config = WorkloadConfig(num_requests=5, mean_input=500, mean_output=2)
    plan = plan_load(config, [], ModelShape(context_length=8192, vocab_size=vocab_size), 1.0)
    ids = [i for p in plan for i in p.prompt if isinstance(i, int)]
    assert len(ids) == 5 * 500
    assert all(0 <= i < vocab_size for i in ids)
    assert vocab_size < 10_000 or min(ids) >= 1000


def test_text_prompts_are_words_as_many_as_tokens() -> None:
    config = WorkloadConfig(num_requests=5, mean_input=30, mean_output=2, text=True)
    prompts = [p.prompt for p in plan_load(config, [], MODEL, 1.0)]
    assert all(isinstance(prompt, str) and len(prompt.split(" ")) == 30 for prompt in prompts)
    assert len(set(map(str, prompts))) == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_requests": 0}, "requests = 0"),
        ({"cv": 0.0}, "cv = 0"),
        ({"cv": float("nan")}, "cv = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"mean_output": None}, "both means"),
        ({"mean_input": 0}, "mean input = 0"),
        ({"arrivals": Arrivals.TRACE, "speedup": 0.0}, "speedup = 0"),
        ({"arrivals": Arrivals.TRACE, "speedup": float("nan")}, "speedup = nan"),
        ({"speedup": 2.0}, "is for trace arrivals, not poisson"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(FIXED, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_absurd_rates_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate ="):
        plan_load(FIXED, [], MODEL, rate)


def test_arrivals_that_the_trace_cannot_give_are_refused() -> None:
    trace = dataclasses.replace(FIXED, arrivals=Arrivals.TRACE)
    with pytest.raises(ConfigError, match="need a trace"):
        plan_load(trace, [], MODEL, 1.0)
    with pytest.raises(ConfigError, match="has 3000 requests"):
        plan_load(trace, long_tailed(), MODEL, None)
    with pytest.raises(ConfigError, match="need a rate"):
        plan_load(FIXED, [], MODEL, None)
    with pytest.raises(ConfigError, match="has lengths only; use poisson or gamma"):
        plan_load(dataclasses.replace(trace, num_requests=9), without_times(), MODEL, None)
    with pytest.raises(ConfigError, match="no trace to take the number from"):
        plan_load(dataclasses.replace(FIXED, num_requests=None), [], MODEL, 1.0)
    with pytest.raises(ConfigError, match=r"speedup = 2\.0 and rate = 1\.0 are two answers"):
        plan_load(dataclasses.replace(trace, num_requests=9, speedup=2.0), long_tailed(), MODEL, 1.0)
    at_once = [TraceRecord(arrival_s=0.0, input_tokens=5, output_tokens=5)] * 9
    with pytest.raises(ConfigError, match="at one time"):
        plan_load(dataclasses.replace(trace, num_requests=9), at_once, MODEL, 1.0)


def test_one_request_is_due_at_once() -> None:
    assert plan_load(dataclasses.replace(FIXED, num_requests=1), [], MODEL, 2.0)[0].arrival_s == 0.0


@pytest.mark.parametrize("arrivals", [Arrivals.POISSON, Arrivals.GAMMA, Arrivals.TRACE])
@pytest.mark.parametrize("means", [{}, {"mean_input": 256, "mean_output": 48}])
def test_a_load_and_its_simulation_see_equal_arrivals(arrivals: Arrivals, means: dict[str, int]) -> None:
    config = WorkloadConfig(num_requests=60, arrivals=arrivals, cv=3.0, seed=4, **means)  # type: ignore[arg-type]
    sent = plan_load(config, long_tailed(), MODEL, 2.0)
    simulated = plan_arrivals(config, long_tailed(), MODEL.context_length, 2.0)
    assert [(p.arrival_s, p.input_tokens, p.output_tokens) for p in sent] == [
        (a.arrival_s, a.input_tokens, a.output_tokens) for a in simulated
    ]


def test_a_whole_trace_without_a_context_keeps_every_record_as_it_is() -> None:
    records = [
        TraceRecord(arrival_s=0.75 * i, input_tokens=10**6 + i, output_tokens=i + 1, hash_ids=(0, i))
        for i in range(50)
    ]
    config = WorkloadConfig(num_requests=None, arrivals=Arrivals.TRACE)
    plan = plan_arrivals(config, records, None, None)
    assert [
        TraceRecord(
            arrival_s=a.arrival_s,
            input_tokens=a.input_tokens,
            output_tokens=a.output_tokens,
            hash_ids=a.hash_ids,
        )
        for a in plan
    ] == records
    assert {a.hash_block_tokens for a in plan} == {512}
    shrunk = plan_arrivals(config, records, 2**17, None)
    assert max(a.input_tokens + a.output_tokens for a in shrunk) <= 2**17
    assert {a.hash_block_tokens for a in shrunk} == {round(512 * 2**17 / (10**6 + 99))}


def test_a_trace_is_replayed_at_any_speed_up() -> None:
    config = WorkloadConfig(num_requests=None, arrivals=Arrivals.TRACE, speedup=4.0)
    assert [a.arrival_s for a in plan_arrivals(config, long_tailed(9), None, None)] == [
        0.125 * i for i in range(9)
    ]


def test_means_without_a_context_are_met_exactly_enough() -> None:
    config = WorkloadConfig(num_requests=500, mean_input=100_000, mean_output=20_000)
    plan = plan_arrivals(config, long_tailed(), None, 1.0)
    assert np.mean([a.input_tokens for a in plan]) == pytest.approx(100_000, rel=1e-3)
    assert np.mean([a.output_tokens for a in plan]) == pytest.approx(20_000, rel=1e-3)


def test_lengths_alone_make_a_load_of_any_rate() -> None:
    plan = plan_arrivals(WorkloadConfig(num_requests=None), without_times(), None, 5.0)
    assert [(a.input_tokens, a.output_tokens) for a in plan] == [
        (r.input_tokens, r.output_tokens) for r in long_tailed()
    ]
    assert plan[-1].arrival_s == pytest.approx((len(plan) - 1) / 5.0)
