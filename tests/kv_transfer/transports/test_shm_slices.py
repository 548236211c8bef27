"""Slices of a job: every byte once, whichever way it is copied."""

from __future__ import annotations

import numpy as np
import pytest
from diphase.kv_transfer.base import Segments
from diphase.kv_transfer.segments import coalesce
from diphase.kv_transfer.transports import shm_slices
from diphase.kv_transfer.transports.shm_slices import BUFFER_BYTES, MIN_GRAIN, SLICE_BYTES, slices
from hypothesis import given

from ..segment_tables import SIZE, tables


def copied(segments: Segments, num_bytes: int, regions: int) -> list[tuple[int, int]]:
    """Copies slice by slice and compares with copies of each segment; (bytes, pieces or rows) of slices."""
    rng = np.random.default_rng(1)
    sources = [rng.integers(1, 256, num_bytes, dtype=np.uint8) for _ in range(regions)]
    targets = [np.zeros(num_bytes, dtype=np.uint8) for _ in range(regions)]
    expected = [target.copy() for target in targets]
    for a, b, c, d, n in segments.tolist():
        expected[c][d : d + n] = sources[a][b : b + n]
    sizes = []
    before = 0
    for size, put in slices(segments, sources, targets):
        put()
        written = sum(int(np.count_nonzero(target)) for target in targets)
        sizes.append((size, written - before))
        before = written
    for target, wanted in zip(targets, expected, strict=True):
        np.testing.assert_array_equal(target, wanted)
    return sizes


@given(tables())
def test_any_segments_of_several_regions(table: Segments) -> None:
    segments = coalesce(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shm_slices, "SLICE_BYTES", 7)
        sizes = copied(segments, SIZE, 3)
    assert all(size == written <= 7 for size, written in sizes)


@pytest.mark.parametrize("grain", [MIN_GRAIN - 1, MIN_GRAIN, 3 * 4096, BUFFER_BYTES + 1])
@pytest.mark.parametrize("tail", [0, 5])
def test_short_and_long_pieces_on_a_grid_and_beside_it(grain: int, tail: int) -> None:
    rng = np.random.default_rng(grain)
    count = 3 * SLICE_BYTES // grain
    grid = 2 * count
    source, target = (rng.permutation(grid)[:count] for _ in range(2))
    segments = np.zeros((count, 5), dtype=np.int64)
    segments[:, 1], segments[:, 3], segments[:, 4] = source * grain, target * grain, grain
    segments[-1, 4] -= tail  # then nothing is a multiple of the grain
    sizes = copied(segments, grid * grain + 77, 1)
    assert sum(size for size, _ in sizes) == count * grain - tail
    assert all(size == written <= max(SLICE_BYTES, grain) for size, written in sizes)


def test_pieces_of_several_lengths_are_rows_of_their_common_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("they were copied piece by piece")

    monkeypatch.setattr(shm_slices, "_put", fail)
    lengths = np.array([2, 3, 1, 4]) * 4096
    segments = np.zeros((4, 5), dtype=np.int64)
    segments[:, 1] = np.array([9, 0, 14, 4]) * 4096
    segments[:, 3] = np.array([0, 5, 15, 10]) * 4096
    segments[:, 4] = lengths
    assert copied(segments, 16 * 4096, 1) == [(10 * 4096, 10 * 4096)]


def test_nothing_is_no_slice() -> None:
    assert copied(np.empty((0, 5), dtype=np.int64), 10, 1) == []
