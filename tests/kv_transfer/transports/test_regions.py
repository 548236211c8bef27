"""Checks of segments, few and many alike, and how a table is cut into stripes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.base import Segments
from diphase.kv_transfer.transports.regions import FEW, check_segments, cut_segments
from diphase.proto.errors import TransferError
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = [100, 200]


def verdict(segments: Segments) -> str:
    try:
        return f"{check_segments(segments, SIZES, SIZES)} bytes"
    except TransferError as error:
        return error.message


def oracle(rows: list[list[int]]) -> bool:
    """Byte by byte: within the regions and no byte written twice."""
    written: set[tuple[int, int]] = set()
    for local, local_offset, remote, remote_offset, length in rows:
        for region, offset in ((local, local_offset), (remote, remote_offset)):
            if not 0 <= region < 2 or length < 0 or offset < 0 or offset + length > SIZES[region]:
                return False
        for i in range(length):
            if (remote, remote_offset + i) in written:
                return False
            written.add((remote, remote_offset + i))
    return True


ROW = st.tuples(
    st.integers(-1, 2), st.integers(-1, 210), st.integers(-1, 2), st.integers(-1, 210), st.integers(-1, 60)
)
GOOD_ROW = st.tuples(st.just(0), st.integers(0, 90), st.integers(0, 1), st.integers(0, 90), st.integers(0, 9))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.one_of(ROW, GOOD_ROW), max_size=4) | st.lists(GOOD_ROW, max_size=6))
def test_the_verdict_is_right_and_the_same_in_a_short_and_a_long_table(rows: list[Any]) -> None:
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    padding = np.zeros((FEW + 1, 5), dtype=np.int64)
    wanted = f"{table[:, 4].sum()} bytes" if oracle(table.tolist()) else "refused"
    for each in (table, np.concatenate([table, padding])):
        assert verdict(each) == wanted if wanted != "refused" else verdict(each).startswith("segment")


@pytest.mark.parametrize("padding", [0, FEW + 1])
@pytest.mark.parametrize(
    "row", [[0, 2**63 - 1, 0, 0, 1], [0, 0, 0, 2**63 - 8, 16], [0, 0, 0, 0, 2**63 - 1], [2**62, 0, 0, 0, 1]]
)
def test_numbers_that_would_overflow_are_out_of_bounds(row: list[int], padding: int) -> None:
    table = np.array([row, *[[0] * 5] * padding], dtype=np.int64)
    with pytest.raises(TransferError, match="segment 0"):
        check_segments(table, SIZES, SIZES)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20).filter(any),
    st.integers(1, 8),
    st.sampled_from([1, 7, 64]),
)
def test_parts_of_a_cut_table_are_the_table_in_order(lengths: list[int], parts: int, align: int) -> None:
    table = np.zeros((len(lengths), 5), dtype=np.int64)
    table[:, 4] = lengths
    table[:, 1] = np.cumsum(lengths) * 3
    table[:, 3] = np.cumsum(lengths) * 5
    before = table.copy()
    found = cut_segments(table, parts, align)
    np.testing.assert_array_equal(table, before)
    assert 1 <= len(found) <= parts
    sums = [int(part[:, 4].sum()) for part in found]
    assert all(total % align == 0 for total in sums[:-1])
    assert max(sums) == sums[0]

    def cells(tables: list[Segments]) -> list[tuple[int, int]]:
        return [(a + i, b + i) for part in tables for _, a, _, b, n in part.tolist() for i in range(n)]

    assert cells(found) == cells([table])
