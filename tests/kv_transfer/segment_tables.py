"""Tables of segments for tests, and what they say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from diphase.kv_transfer.base import Segments
from hypothesis import strategies as st

SIZE = 64
"""Bytes of each of three regions."""


@st.composite
def tables(draw: st.DrawFn) -> Segments:
    """Rows in any regions, no byte written twice."""
    rows: list[list[int]] = []
    for region in range(3):
        cuts = sorted(draw(st.sets(st.integers(0, SIZE), min_size=2, max_size=10)))
        for begin, end in pairwise(cuts):
            if draw(st.booleans()):
                source = draw(st.integers(0, 2)), draw(st.integers(0, SIZE - (end - begin)))
                if draw(st.booleans()) and rows and rows[-1][2] == region:  # a neighbour of the last
                    source = rows[-1][0], min(rows[-1][1] + rows[-1][4], SIZE - (end - begin))
                rows.append([*source, region, begin, end - begin])
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def moved(table: Segments) -> dict[tuple[int, int], tuple[int, int]]:
    """Byte there to the byte here that it gets."""
    return {(d, e + i): (a, b + i) for a, b, d, e, n in table.tolist() for i in range(n)}
