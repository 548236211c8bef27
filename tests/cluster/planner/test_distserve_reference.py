"""With DistServe's simplifications our simulator gives what its authors' simulator gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from diphase.benchmarks.distserve_reference import CASES, Pools, workload
from diphase.cluster.planner.goodput import Definition, Objectives, Pattern, served, simulate


def serves(data: Path, pools: Pools, lengths: str, slo: tuple[float, float], rate: float) -> bool:
    """Whether both percentiles are inside at so many requests a second and GPU."""
    load, objectives = workload(lengths, data), Objectives(ttft_ms=slo[0], tpot_ms=slo[1])
    deployment, pattern = pools.simplified(data), Pattern(0, load.least)
    result = simulate(deployment, load, objectives, rate * pools.gpus, pattern, whole=False)
    return served(result, objectives, Definition.EACH)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2]} {case[3][0]:.0f}")
def test_goodput_is_theirs_within_five_percent(
    data: Path,
    case: tuple[str, Pools, str, tuple[float, float], float],
) -> None:
    _, pools, lengths, slo, theirs = case
    if theirs:
        assert serves(data, pools, lengths, slo, 0.95 * theirs)
    assert not serves(data, pools, lengths, slo, 1.05 * theirs or 0.05)


@pytest.mark.parametrize(
    ("slo", "best", "rate"), [((200.0, 100.0), "2+1", 1.0), ((400.0, 100.0), "2+2", 1.53)]
)
def test_only_the_published_placement_of_six_serves_a_rate(
    data: Path, slo: tuple[float, float], best: str, rate: float
) -> None:
    six = {
        f"{tp_prefill}+{tp_decode}": Pools(prefill=1, decode=1, tp_prefill=tp_prefill, tp_decode=tp_decode)
        for tp_prefill in (1, 2)
        for tp_decode in (1, 2)
    }
    six |= {f"colocated {tp}": Pools(colocated=1, tp_prefill=tp) for tp in (1, 2)}
    assert [name for name, pools in six.items() if serves(data, pools, "azure-conv", slo, rate)] == [best]
