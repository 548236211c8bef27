"""Neighbours become one segment, and every byte stays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from diphase.kv_transfer.base import Segments
from diphase.kv_transfer.segments import coalesce
from hypothesis import given

from .segment_tables import moved, tables


def table(rows: Sequence[tuple[int, int, int]]) -> Segments:
    """Rows of source offset, target offset, length, in region 0."""
    return np.array([(0, a, 0, b, n) for a, b, n in rows], dtype=np.int64).reshape(-1, 5)


@given(tables())
def test_neighbours_are_joined_and_every_byte_stays(table: Segments) -> None:
    joined = coalesce(table)
    assert moved(joined) == moved(table)
    for one, other in pairwise(joined.tolist()):
        assert [one[0], one[1] + one[4], one[2], one[3] + one[4]] != other[:4]


@pytest.mark.parametrize(
    ("segments", "runs"),
    [
        ([(0, 100, 10), (10, 110, 5), (15, 115, 1)], [(0, 100, 16)]),
        ([(0, 100, 10), (10, 111, 5)], [(0, 100, 10), (10, 111, 5)]),
        ([(0, 100, 10), (11, 110, 5)], [(0, 100, 10), (11, 110, 5)]),
        ([(0, 100, 10), (7, 7, 0), (10, 110, 5)], [(0, 100, 15)]),
        ([(0, 0, 0)], []),
        ([(5, 6, 7)], [(5, 6, 7)]),
        ([(10, 110, 5), (0, 100, 10)], [(10, 110, 5), (0, 100, 10)]),
    ],
)
def test_segments_that_follow_each_other_at_both_ends_are_one_run(
    segments: list[tuple[int, int, int]], runs: list[tuple[int, int, int]]
) -> None:
    np.testing.assert_array_equal(coalesce(table(segments)), table(runs))


@pytest.mark.parametrize("end", [0, 2])
def test_segments_of_different_regions_are_different_runs(end: int) -> None:
    segments = table([(0, 100, 10), (10, 110, 5)])
    segments[1, end] = 1
    np.testing.assert_array_equal(coalesce(segments), segments)
