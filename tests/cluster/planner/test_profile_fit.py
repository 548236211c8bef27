"""The robust fit of a profile: finds the terms behind the times, whatever disturbed some of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diphase.cluster.planner.profile_fit import StepCell, fit_steps, robust_fit
from diphase.cluster.planner.regime_step_time import Regimes, kind_of
from diphase.proto.errors import ConfigError
from diphase.router.step_time import StepShape

from ...router.step_time_laws import check_grows, check_lines, check_stages
from .profiles import BOUNDARY, LARGE, MIXED, PREFILL, SMALL, cells, shapes, true_s


def test_the_terms_behind_exact_times_are_found() -> None:
    fit = fit_steps(cells())
    step_time = fit.step_time
    assert (step_time.prefill.boundary, step_time.decode.boundary, step_time.mixed.boundary) == (
        0,
        BOUNDARY,
        0,
    )
    for found, truth in (
        (step_time.prefill.large, PREFILL),
        (step_time.decode.small, SMALL),
        (step_time.decode.large, LARGE),
        (step_time.mixed.small, MIXED),
    ):
        assert found == pytest.approx(truth, rel=1e-6, abs=1e-12)
    assert max(map(abs, fit.errors)) < 1e-9
    assert max(map(abs, fit.hold_out)) < 1e-9


def test_one_regime_is_enough_where_one_line_is_behind_all() -> None:
    fit = fit_steps(cells(boundary=10**6, noise=(-0.01, 0.0, 0.02)))
    assert fit.step_time.decode.boundary == 0
    assert fit.step_time.decode.large == fit.step_time.decode.small


def test_a_disturbed_cell_moves_the_fit_little_and_shows_in_its_own_error() -> None:
    some = cells()
    at = shapes().index(StepShape(decode_batch=4, decode_context=4 * 256))
    some[at] = replace(some[at], seconds=(2.0 * some[at].median_s,))
    fit = fit_steps(some)
    others = [abs(error) for i, error in enumerate(fit.errors) if i != at]
    assert max(others) < 0.05
    assert fit.errors[at] == pytest.approx(-0.5, abs=0.05)
    plain = np.linalg.lstsq(
        np.array(
            [
                (1.0, c.shape.decode_batch, c.shape.decode_context)
                for c in some
                if kind_of(c.shape) == "decode"
            ]
        )
        / np.array([[c.median_s] for c in some if kind_of(c.shape) == "decode"]),
        np.ones(sum(kind_of(c.shape) == "decode" for c in some)),
        rcond=None,
    )[0]
    lone = StepShape(decode_batch=1, decode_context=64)
    assert abs(fit.step_time.step_s(lone) / true_s(lone) - 1.0) < abs(
        plain @ (1.0, *lone[2:]) / true_s(lone) - 1.0
    )


def test_a_stalled_run_of_a_cell_is_not_even_seen() -> None:
    assert max(map(abs, fit_steps(cells(noise=(0.0, 0.0, 5.0))).errors)) < 1e-9


def test_coefficients_are_never_negative() -> None:
    features = np.array([(1.0, n) for n in (1, 2, 4, 8)])
    found = robust_fit(features, np.array((8.0, 4.0, 2.0, 1.0)))
    assert (found >= 0.0).all()
    assert found[1] == 0.0


def test_the_held_out_error_is_of_a_fit_without_the_cell() -> None:
    some = cells()
    odd = replace(some[0], seconds=(1.5 * some[0].median_s,))
    fit = fit_steps([odd, *some[1:]])
    assert abs(fit.hold_out[0]) == pytest.approx(1 / 3, abs=0.02)
    assert abs(fit.hold_out[0]) >= abs(fit.errors[0])


def test_too_few_kinds_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 kinds of mixed steps; a fit needs 7"):
        fit_steps([cell for cell in cells() if kind_of(cell.shape) != "mixed"] + cells()[-2:])


@pytest.mark.parametrize("seconds", [(), (0.0,), (float("nan"),), (1.0, float("inf"))])
def test_times_that_are_none_are_refused(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="has no times, or some that are none"):
        StepCell(shape=StepShape(decode_batch=1, decode_context=1), seconds=seconds)


def test_fitted_step_times_keep_the_laws() -> None:
    step_time = fit_steps(cells()).step_time
    for batch in (1, 15, 16, 40):
        check_lines(step_time, batch, (batch * 64.0, batch * 900.0))
        check_stages(step_time, StepShape(decode_batch=batch, decode_context=batch * 64))
    check_grows(step_time, 4, 200.0, 300.0)
    check_stages(step_time, StepShape(64, 2048.0, 3, 300))


def test_more_work_and_a_slower_machine_take_what_they_say() -> None:
    step_time = fit_steps(cells()).step_time
    decode, mixed = StepShape(decode_batch=4, decode_context=900), StepShape(64, 2048.0, 3, 300)
    longer = step_time.plus(0.002, 0.0005)
    assert longer.step_s(decode) == pytest.approx(step_time.step_s(decode) + 0.004)
    assert longer.step_s(mixed) == pytest.approx(step_time.step_s(mixed) + 0.0035)
    slower = step_time.slowed(2.0, 1.5)
    assert slower.step_s(decode) == pytest.approx(1.5 * step_time.step_s(decode))
    assert slower.step_s(mixed) == pytest.approx(2.0 * step_time.step_s(mixed))


def test_coefficients_that_no_step_can_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="finite, not negative and not all 0"):
        Regimes(small=PREFILL, large=PREFILL._replace(base=-1.0), boundary=4)
