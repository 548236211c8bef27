"""Tables of segments, wherever they come from. Pure."""

from __future__ import annotations

import numpy as np

from .base import Segments


def coalesce(segments: Segments) -> Segments:
    """Neighbours at both ends become one; empty segments go."""
    if len(segments) == 1 and segments[0, 4]:
        return segments
    columns = np.ascontiguousarray(segments.T)
    if len(segments) and not columns[4].all():
        segments = segments[columns[4] > 0]
        columns = np.ascontiguousarray(segments.T)
    source, begin, target, target_begin, length = columns
    joined = begin[1:] == begin[:-1] + length[:-1]
    joined &= target_begin[1:] == target_begin[:-1] + length[:-1]
    if not joined.any():
        return segments
    joined &= (source[1:] == source[:-1]) & (target[1:] == target[:-1])
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    merged = segments[first]
    merged[:, 4] = np.add.reduceat(length, first)
    return merged
