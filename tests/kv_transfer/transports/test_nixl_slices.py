"""Descriptors for NIXL: every byte once, in slices of bounded size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nixl_cu13")

from diphase.kv_transfer.base import DeviceMemory, Region, Segments
from diphase.kv_transfer.segments import coalesce
from diphase.kv_transfer.transports.nixl_slices import (
    DEVICE,
    HOST,
    Bases,
    bases_of,
    cut,
    describe,
    overlap,
    spans,
)

from ..segment_tables import SIZE, moved, tables

HERE = Bases(np.array([1000, 5000, 9000]), np.array([-1, 2, -1]))
THERE = Bases(np.array([20_000, 60_000, 70_000]), np.array([0, -1, 1]))


class TestSlices:
    @given(tables(), st.integers(1, 40), st.integers(1, 5))
    def test_every_byte_is_in_one_slice_of_the_right_kind(
        self, table: Segments, max_bytes: int, max_rows: int
    ) -> None:
        found = {}
        whole = describe(coalesce(table), HERE, THERE, max_bytes)
        for part in (part for each in whole for part in cut(each, max_bytes, max_rows)):
            assert 1 <= len(part.local) == len(part.remote) <= max_rows
            assert part.local[:, 1].sum() <= max_bytes
            for (source, n, device), (target, m, other) in zip(
                part.local.tolist(), part.remote.tolist(), strict=True
            ):
                assert n == m > 0
                assert part.kinds == (
                    DEVICE if 5000 <= source < 9000 else HOST,
                    HOST if 60_000 <= target < 70_000 else DEVICE,
                )
                assert device == (2 if 5000 <= source < 9000 else 0)
                assert other == (1 if target >= 70_000 else 0)
                for i in range(n):
                    assert target + i not in found
                    found[target + i] = source + i
        assert found == {
            int(THERE.addresses[d]) + at: int(HERE.addresses[a]) + source
            for (d, at), (a, source) in moved(table).items()
        }


class TestOverlap:
    @given(tables(), tables())
    def test_it_is_told_exactly(self, one: Segments, other: Segments) -> None:
        first, second = (
            [spans(each.remote) for each in describe(coalesce(table), HERE, THERE, SIZE)]
            for table in (one, other)
        )
        shared = bool(moved(one).keys() & moved(other).keys())
        assert any(overlap(a, b) for a in first for b in second) == shared
        assert any(overlap(b, a) for a in first for b in second) == shared


def test_regions_of_host_and_device_say_where_they_are() -> None:
    data: Any = np.zeros(10, dtype=np.uint8)
    device = DeviceMemory(device=3, pointer=0x7F0000000000, num_bytes=5)
    bases = bases_of([Region(buffer=memoryview(data)), Region(buffer=None, device=device)])
    assert bases.addresses.tolist() == [data.ctypes.data, 0x7F0000000000]
    assert bases.devices.tolist() == [-1, 3]
