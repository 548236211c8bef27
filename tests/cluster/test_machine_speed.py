"""How fast a machine is, beside what a profile says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diphase.cluster.machine_speed import Slower, between, shape_of, slower
from diphase.cluster.planner.profile import Profile
from diphase.engine.profiler import REFERENCE_CELLS
from diphase.proto.errors import ConfigError

from .planner.profiles import profile


def measured() -> Profile:
    """One that has timed the steps of reference, far from what its fit says of them."""
    one = profile()
    times = {shape_of(cell): 2.0 + i for i, cell in enumerate(REFERENCE_CELLS.values())}
    cells = {cell.shape: cell for cell in one.cells} | {
        shape: replace(one.cells[0], shape=shape, median_s=seconds) for shape, seconds in times.items()
    }
    return replace(one, cells=tuple(cells.values()))


def test_a_step_is_compared_with_what_the_same_step_took() -> None:
    assert slower({"prefill": 3.0, "decode": 2.25}, measured()) == Slower(1.5, 0.75)


def test_a_profile_without_the_steps_of_reference_is_refused() -> None:
    one = replace(profile(), cells=profile().cells[:1] + profile().cells[-1:])
    with pytest.raises(
        ConfigError, match=r"the profile has no step of .*make one anew with `diphase profile`"
    ):
        slower({"prefill": 3.0, "decode": 2.4}, one)


def test_between_two_looks_a_machine_is_as_fast_as_their_mean() -> None:
    assert between([Slower(1.0, 2.0), Slower(2.0, 1.0)]) == Slower(1.5, 1.5)
