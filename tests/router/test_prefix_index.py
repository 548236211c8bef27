"""PrefixIndex: who has which blocks, from deltas and snapshots."""

from __future__ import annotations

from diphase.router.prefix_index import PrefixIndex
from hypothesis import given
from hypothesis import strategies as st


def hashes(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def test_only_the_leading_run_counts() -> None:
    index = PrefixIndex(100)
    index.snapshot("w", 0, hashes(1, 2, 4))
    assert index.cached_blocks("w", hashes(1, 2, 3, 4)) == 2
    assert index.cached_blocks("w", hashes(5, 1)) == 0
    assert index.cached_blocks("other", hashes(1)) == 0


def test_deltas_follow_a_snapshot() -> None:
    index = PrefixIndex(100)
    index.snapshot("w", 3, hashes(1, 2))
    assert index.delta("w", 4, hashes(3), hashes(1))
    assert index.cached_blocks("w", hashes(2, 3)) == 2
    assert index.cached_blocks("w", hashes(1)) == 0


def test_a_gap_asks_for_a_snapshot_once() -> None:
    index = PrefixIndex(100)
    index.snapshot("w", 3, hashes(1))
    assert not index.delta("w", 5, hashes(2), [])
    assert index.cached_blocks("w", hashes(1)) == 0
    assert index.delta("w", 6, hashes(3), [])  # the snapshot is under way
    index.snapshot("w", 6, hashes(1, 2, 3))
    assert index.delta("w", 7, hashes(4), [])
    assert index.cached_blocks("w", hashes(1, 2, 3, 4)) == 4


def test_a_delta_that_the_snapshot_includes_changes_nothing() -> None:
    index = PrefixIndex(100)
    index.snapshot("w", 5, hashes(1))
    assert index.delta("w", 5, hashes(9), hashes(1))
    assert index.cached_blocks("w", hashes(1)) == 1
    assert index.cached_blocks("w", hashes(9)) == 0


def test_an_unknown_worker_needs_a_snapshot() -> None:
    index = PrefixIndex(100)
    assert not index.delta("w", 1, hashes(1), [])
    assert index.delta("w", 2, hashes(2), [])
    index.expect_snapshot("v")
    assert index.delta("v", 1, hashes(1), [])
    assert index.num_blocks("v") == 0


def test_a_lost_workers_blocks_are_forgotten() -> None:
    index = PrefixIndex(100)
    index.snapshot("w", 0, hashes(1))
    index.remove("w")
    index.remove("w")
    assert index.num_blocks("w") == 0


@given(st.lists(st.lists(st.integers(0, 50), max_size=10), max_size=10), st.integers(1, 8))
def test_memory_is_bounded_and_the_youngest_stay(batches: list[list[int]], bound: int) -> None:
    index = PrefixIndex(bound)
    index.snapshot("w", 0, [])
    order: dict[int, None] = {}
    for sequence, batch in enumerate(batches, start=1):
        index.delta("w", sequence, hashes(*batch), [])
        for number in batch:
            order.pop(number, None)
            order[number] = None
        assert index.num_blocks("w") <= bound
    for number in list(order)[-bound:]:
        assert index.cached_blocks("w", hashes(number)) == 1
