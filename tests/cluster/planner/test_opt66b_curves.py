"""With the simplifications off the simulated curves are nearer to the measured ones than the authors'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diphase.benchmarks.opt66b_curves import (
    MARKS,
    PER_GPU,
    SYSTEMS,
    curve_of,
    error,
    humaneval,
    published,
    requests,
)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_curve_is_nearer_than_the_authors_simulators(data: Path, system: str) -> None:
    curve = {rate: float(np.mean(values)) for rate, values in curve_of(data, system, "ours").items()}
    assert error(curve, published(data)[system]) < MARKS[system]


def test_all_rates_of_a_seed_have_the_same_requests_in_the_same_pattern(data: Path) -> None:
    lengths = humaneval(data)
    slow, fast = (requests(lengths, 8 * PER_GPU, rate, seed=0) for rate in (1.0, 4.0))
    assert [r.prompt_tokens for r in slow] == [r.prompt_tokens for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([4 * r.arrival for r in fast], abs=4)
    assert [r.prompt_tokens for r in requests(lengths, 400, 1.0, seed=1)] != [r.prompt_tokens for r in slow]
