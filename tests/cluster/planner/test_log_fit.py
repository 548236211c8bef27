"""Fits of logs: what is found again, which public trace is nearest, and workloads in a log's likeness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.traces import TRACES, load_trace
from diphase.cluster.load.workload import Arrival, plan_arrivals
from diphase.cluster.planner.log_fit import fit_log, likeness, nearest, public_fits, sentence, synthetic
from diphase.proto.errors import ConfigError


def log(
    count: int = 4000, *, rate: float = 2.0, cv: float = 2.0, scale: float = 1.0, seed: int = 5
) -> list[TraceRecord]:
    """Gamma arrivals; lognormal lengths whose logarithms have a correlation of 0.6."""
    rng = np.random.default_rng(seed)
    times = np.concatenate(([0.0], np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count - 1))))
    lengths = np.exp(rng.multivariate_normal([6.0, 4.0], [[1.0, 0.3], [0.3, 0.25]], count)) * scale
    return [
        TraceRecord(arrival_s=float(at), input_tokens=int(a) + 1, output_tokens=int(b) + 1, hash_ids=(i,))
        for i, (at, (a, b)) in enumerate(zip(times, lengths, strict=True))
    ]


def as_records(arrivals: list[Arrival]) -> list[TraceRecord]:
    return [
        TraceRecord(arrival_s=a.arrival_s, input_tokens=a.input_tokens, output_tokens=a.output_tokens)
        for a in arrivals
    ]


def made_of(records: list[TraceRecord], count: int, rate: float, seed: int = 0) -> list[Arrival]:
    config, pairs = synthetic(fit_log(records), records, num_requests=count, seed=seed)
    return plan_arrivals(config, pairs, None, rate)


def without_times(records: list[TraceRecord]) -> list[TraceRecord]:
    return [replace(record, arrival_s=None) for record in records]


def test_a_fit_finds_what_a_log_was_made_of() -> None:
    fit = fit_log(log())
    assert fit.num_requests == 4000
    assert fit.arrivals is not None
    assert fit.arrivals.rate == pytest.approx(2.0, rel=0.1)
    assert fit.arrivals.cv == pytest.approx(2.0, rel=0.1)
    assert fit.arrivals.gamma_shape == pytest.approx(0.25, rel=0.2)
    assert fit.inputs.mean == pytest.approx(np.exp(6.5), rel=0.1)
    assert fit.inputs.percentile(50) == pytest.approx(np.exp(6.0), rel=0.05)
    assert fit.outputs.percentile(90) == pytest.approx(np.exp(4.0 + 1.2816 * 0.5), rel=0.05)
    assert fit.correlation == pytest.approx(0.6, abs=0.05)


def test_a_log_that_never_varies_has_a_fit_and_a_likeness() -> None:
    even = [TraceRecord(arrival_s=0.5 * i, input_tokens=100, output_tokens=7) for i in range(20)]
    fit = fit_log(even)
    assert fit.arrivals is not None
    assert fit.arrivals.rate == pytest.approx(2.0)
    assert fit.arrivals.cv == pytest.approx(0.0)
    assert (fit.inputs.cv, fit.correlation) == (0.0, 0.0)
    made = [a.arrival_s for a in made_of(even, 50, 2.0)]
    assert np.diff(made) == pytest.approx(np.full(49, 0.5), rel=0.1)


def test_a_log_without_times_or_of_one_moment_has_no_arrivals() -> None:
    at_once = [TraceRecord(arrival_s=0.0, input_tokens=5, output_tokens=5)] * 3
    for records in (without_times(log(50)), at_once):
        fit = fit_log(records)
        assert fit.arrivals is None
        with pytest.raises(ConfigError, match="no times to take the variation"):
            synthetic(fit, records, num_requests=5)


def test_a_fit_is_said_in_one_line() -> None:
    fit = fit_log(log())
    near = nearest(fit, {"far": fit_log(log(scale=8.0)), "near": fit_log(log(scale=2.0))})
    said = sentence(fit, near)
    assert "4,000 requests at 2" in said
    assert f"prompts P50 {fit.inputs.percentile(50):,.0f}, P90" in said
    assert "nearest public trace near, off by a factor of 1.58" in said  # 2 ** (2 / 3)
    assert "without times" in sentence(fit_log(without_times(log())))


def test_one_request_is_no_log() -> None:
    with pytest.raises(ConfigError, match="at least 2 requests, and the log has 1"):
        fit_log(log(1))


def test_likeness_says_by_which_factor_logs_differ() -> None:
    one, other = fit_log(log(cv=1.0)), fit_log(log(cv=4.0, scale=2.0))
    found = likeness(one, other)
    assert found == likeness(other, one)
    assert found.inputs == pytest.approx(np.log(2.0), abs=0.02)
    assert found.outputs == pytest.approx(np.log(2.0), abs=0.05)
    assert found.arrivals is not None
    assert found.arrivals == pytest.approx(np.log(4.0), abs=0.15)
    assert found.distance == pytest.approx((found.inputs + found.outputs + found.arrivals) / 3)
    assert likeness(one, one).distance == 0.0


def test_a_rate_makes_no_difference_and_missing_times_count_for_nothing() -> None:
    assert likeness(fit_log(log(rate=1.0)), fit_log(log(rate=9.0))).distance == pytest.approx(0.0, abs=1e-9)
    found = likeness(fit_log(log()), fit_log(without_times(log(scale=2.0))))
    assert found.arrivals is None
    assert found.distance == pytest.approx((found.inputs + found.outputs) / 2)


def test_the_nearest_comes_first_and_ties_go_by_name() -> None:
    fits = {"twice": fit_log(log(scale=2.0)), "same too": fit_log(log()), "same": fit_log(log())}
    assert [name for name, _ in nearest(fit_log(log()), fits)] == ["same", "same too", "twice"]


@pytest.mark.parametrize(("num_requests", "rate"), [(300, 0.5), (20_000, 40.0)])
def test_a_synthetic_workload_has_the_logs_likeness_at_any_size_and_rate(
    num_requests: int, rate: float
) -> None:
    records = log()
    fit = fit_log(records)
    made = made_of(records, num_requests, rate, seed=3)
    assert len(made) == num_requests
    pairs = {(r.input_tokens, r.output_tokens) for r in records}
    assert {(a.input_tokens, a.output_tokens) for a in made} <= pairs
    assert all(a.hash_ids == () for a in made)
    again = fit_log(as_records(made))
    assert again.arrivals is not None
    assert again.arrivals.rate == pytest.approx(rate)
    assert likeness(fit, again).distance < 0.15
    assert again.correlation == pytest.approx(fit.correlation, abs=0.1)


def test_a_synthetic_workload_is_a_function_of_the_seed() -> None:
    records = log(100)
    one, same, other = (made_of(records, 50, 1.0, seed) for seed in (1, 1, 2))
    assert one == same
    assert [a.arrival_s for a in one] != [a.arrival_s for a in other]
    assert [a.input_tokens for a in one] != [a.input_tokens for a in other]


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no public trace lies in"):
        public_fits(tmp_path)


def test_every_public_trace_is_recognised_by_half_of_itself(data: Path) -> None:
    fits = public_fits(data)
    assert set(fits) == set(TRACES)
    for name in TRACES:
        records = load_trace(name, data)
        assert nearest(fit_log(records[len(records) // 2 :]), fits)[0][0] == name
    for name, cv in (("azure-conv", 1.09), ("azure-code", 13.2)):
        arrivals = fits[name].arrivals
        assert arrivals is not None
        assert arrivals.cv == pytest.approx(cv, rel=0.005)
