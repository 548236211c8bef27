"""Checks of segments and tags, and copies between regions, shared by the transports."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...proto.errors import TransferError
from ..base import MAX_TAG_BYTES, Region, Segments

FEW = 32
"""Segments that are checked faster one by one."""


def check_tag(tag: bytes) -> None:
    """
    Raises:
        TransferError: it is too long.
    """
    if len(tag) > MAX_TAG_BYTES:
        raise TransferError(f"a tag of {len(tag)} bytes is longer than {MAX_TAG_BYTES}")


def check_segments(segments: Segments, local_sizes: Sequence[int], remote_sizes: Sequence[int] | None) -> int:
    """Returns the total length in bytes. `remote_sizes` None: the far end is not known yet.

    Raises:
        TransferError: wrong shape or dtype, a segment lies outside a region, or two of them overlap at the
            far end.
    """
    if segments.ndim != 2 or segments.shape[1] != 5 or segments.dtype != np.int64:
        raise TransferError(f"segments are {segments.dtype}{list(segments.shape)}, not int64[n, 5]")
    if len(segments) <= FEW:
        return _check_rows(segments.tolist(), local_sizes, remote_sizes)
    lengths = segments[:, 4]
    _check_end("local", segments[:, 0], segments[:, 1], lengths, local_sizes)
    if remote_sizes is not None:
        _check_end("remote", segments[:, 2], segments[:, 3], lengths, remote_sizes)
    _check_overlaps(segments[:, 2], segments[:, 3], lengths)
    return int(lengths.sum())


def _check_rows(rows: list[list[int]], local_sizes: Sequence[int], remote_sizes: Sequence[int] | None) -> int:
    """The same for so few that numpy would take longer."""
    spans = []
    for i, (local, local_offset, remote, remote_offset, length) in enumerate(rows):
        _check_row("local", i, (local, local_offset, length), local_sizes)
        if remote_sizes is not None:
            _check_row("remote", i, (remote, remote_offset, length), remote_sizes)
        if length:
            spans.append((remote, remote_offset, remote_offset + length, i))
    spans.sort()
    for (region, begin, end, i), (other_region, other_begin, other_end, j) in pairwise(spans):
        if region == other_region and other_begin < end:
            raise _overlap(region, (i, begin, end), (j, other_begin, other_end))
    return sum(row[4] for row in rows)


def _check_row(end: str, i: int, row: tuple[int, int, int], sizes: Sequence[int]) -> None:
    region, offset, length = row
    if length < 0:
        raise TransferError(f"segment {i} has a negative length: {length}")
    if not 0 <= region < len(sizes):
        raise TransferError(f"segment {i} names {end} region {region}, outside of 0 to {len(sizes) - 1}")
    if not 0 <= offset <= sizes[region] - length:
        raise TransferError(
            f"segment {i} ({length} bytes at {offset}) lies outside of {end} region {region} "
            f"of {sizes[region]} bytes"
        )


def _check_end(
    end: str,
    regions: NDArray[np.int64],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sizes: Sequence[int],
) -> None:
    known = (regions >= 0) & (regions < len(sizes))
    limits = np.asarray([*sizes, 0], dtype=np.int64)[np.where(known, regions, len(sizes))]
    # Not offset + length > limit: the sum could overflow.
    wrong = ~known | (lengths < 0) | (lengths > limits) | (offsets < 0) | (offsets > limits - lengths)
    if wrong.any():
        i = int(wrong.argmax())
        _check_row(end, i, (int(regions[i]), int(offsets[i]), int(lengths[i])), sizes)


def _check_overlaps(
    regions: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
) -> None:
    """Two segments that write the same byte would leave it to chance which one does."""
    order = np.flatnonzero(lengths)
    if bool((regions != regions[0]).any()):
        order = order[np.lexsort((offsets[order], regions[order]))]
    elif bool((np.diff(offsets[order]) <= 0).any()):
        order = order[np.argsort(offsets[order])]
    begins, ends, of = offsets[order], offsets[order] + lengths[order], regions[order]
    wrong = (of[1:] == of[:-1]) & (begins[1:] < ends[:-1])
    if wrong.any():
        i = int(wrong.argmax())
        first, second = ((int(order[k]), int(begins[k]), int(ends[k])) for k in (i, i + 1))
        raise _overlap(int(of[i]), first, second)


def _overlap(region: int, one: tuple[int, int, int], other: tuple[int, int, int]) -> TransferError:
    """Of segments given as index, begin, end."""
    (i, *first), (j, *second) = sorted((one, other))
    return TransferError(
        f"segments {i} and {j} overlap in remote region {region}: "
        f"{first[0]} to {first[1]} and {second[0]} to {second[1]}"
    )


def cut_segments(segments: Segments, num_parts: int, align: int) -> list[Segments]:
    """Cuts a table into at most so many parts of about the same bytes, each but the last a multiple of
    `align` bytes."""
    ends = np.cumsum(segments[:, 4])
    starts, total = ends - segments[:, 4], int(ends[-1])
    step = -(-total // (num_parts * align)) * align
    parts = []
    for begin in range(0, total, step):
        end = min(begin + step, total)
        first, last = int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(starts, end, "left"))
        part = segments[first:last].copy()
        part[0, [1, 3]] += begin - starts[first]
        part[0, 4] -= begin - starts[first]
        part[-1, 4] -= ends[last - 1] - end
        parts.append(part)
    return parts


def copy_segments(segments: Segments, sources: Sequence[Region], targets: Sequence[Region]) -> None:
    """Copies checked segments within this process's address space."""
    source = [np.frombuffer(region.host_bytes(), dtype=np.uint8) for region in sources]
    target = [np.frombuffer(region.host_bytes(), dtype=np.uint8) for region in targets]
    for from_region, from_offset, to_region, to_offset, length in segments.tolist():
        target[to_region][to_offset : to_offset + length] = source[from_region][
            from_offset : from_offset + length
        ]
