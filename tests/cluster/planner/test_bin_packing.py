from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from diphase.cluster.planner.bin_packing import Bin, pack
from diphase.proto.errors import ConfigError


def _cheapest(bins: Sequence[Bin], slices: int) -> Iterator[tuple[float, dict[str, int]]]:
    """Every way to put every slice on a bin, with what it costs and takes."""
    buckets = [load for load in range(len(bins[0].loads)) for _ in range(slices)]
    for choice in product(range(len(bins)), repeat=len(buckets)):
        loads = [0.0] * len(bins)
        for bucket, chosen in zip(buckets, choice, strict=True):
            loads[chosen] += bins[chosen].loads[bucket] / slices
        if any(math.isinf(load) for load in loads):
            continue
        counts = [math.ceil(load - 1e-9) for load in loads]
        taken: dict[str, int] = {}
        for one, count in zip(bins, counts, strict=True):
            taken[one.hardware] = taken.get(one.hardware, 0) + count * one.gpus
        yield sum(one.cost * count for one, count in zip(bins, counts, strict=True)), taken


def _random_bins(rng: np.random.Generator, kinds: int, buckets: int) -> list[Bin]:
    return [
        Bin(
            hardware=f"type{i % 2}",
            gpus=int(rng.integers(1, 3)),
            cost=float(rng.integers(1, 20)),
            loads=tuple(
                math.inf if i and rng.random() < 0.2 else float(rng.uniform(0.1, 3.0)) for _ in range(buckets)
            ),
        )
        for i in range(kinds)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_phase_is_packed_at_the_cost_that_brute_force_finds(seed: int) -> None:
    bins = _random_bins(np.random.default_rng(seed), 3, 3)
    packing = pack([bins], {}, slices=2)
    assert packing is not None
    assert packing.cost == pytest.approx(min(cost for cost, _ in _cheapest(bins, 2)))


@pytest.mark.parametrize("seed", range(12))
def test_two_phases_share_what_is_scarce_as_brute_force_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phases = [_random_bins(rng, 2, 2) for _ in range(2)]
    available = {"type0": int(rng.integers(2, 7)), "type1": int(rng.integers(2, 7))}
    best = math.inf
    ways = [list(_cheapest(bins, 2)) for bins in phases]
    for (first, took), (second, took_too) in product(*ways):
        if all(took[name] + took_too[name] <= available[name] for name in available):
            best = min(best, first + second)
    packing = pack(phases, available, slices=2)
    if math.isinf(best):
        assert packing is None
    else:
        assert packing is not None
        assert packing.cost == pytest.approx(best)


def test_cheap_gpus_take_short_requests_and_a_large_one_the_long() -> None:
    # Mélange's case: a small GPU is the cheaper one for short requests, and cannot hold the longest at all.
    small = Bin(hardware="small", gpus=1, cost=1.01, loads=(0.9, 1.1, 0.9, math.inf))
    large = Bin(hardware="large", gpus=1, cost=3.67, loads=(0.3, 0.4, 0.4, 0.8))
    packing = pack([[small, large]], {})
    assert packing is not None
    assert packing.counts == ((3, 1),)
    assert packing.cost == pytest.approx(3 * 1.01 + 3.67)
    alone = pack([[large]], {})
    assert alone is not None
    assert alone.cost == pytest.approx(2 * 3.67)
    assert pack([[small]], {}) is None


def test_the_cheapest_of_equals_has_fewer_gpus() -> None:
    many = Bin(hardware="a", gpus=4, cost=8.0, loads=(1.0,))
    few = Bin(hardware="b", gpus=2, cost=8.0, loads=(1.0,))
    for bins in ([many, few], [few, many]):
        packing = pack([bins], {})
        assert packing is not None
        assert packing.counts[0][bins.index(few)] == 1


def test_a_load_of_whole_workers_needs_no_further_one() -> None:
    thirds = Bin(hardware="a", gpus=1, cost=1.0, loads=(0.1,) * 30)
    packing = pack([[thirds]], {})
    assert packing is not None
    assert packing.counts == ((3,),)


def test_wrong_bins_are_named() -> None:
    one, two = (Bin(hardware="a", gpus=1, cost=1.0, loads=(1.0,) * n) for n in (1, 2))
    with pytest.raises(ConfigError, match="differ in length"):
        pack([[one, two]], {})
    with pytest.raises(ConfigError, match="costs 0"):
        Bin(hardware="a", gpus=1, cost=0.0, loads=(1.0,))
    with pytest.raises(ConfigError, match="slices = 0"):
        pack([[one]], {}, slices=0)
