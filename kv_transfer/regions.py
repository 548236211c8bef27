"""Checks of segments and tags, and copies between regions, shared by the transports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..proto.errors import TransferError
from .base import MAX_TAG_BYTES, Region, Segments


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
    if len(segments) == 0:
        return 0
    lengths = segments[:, 4]
    if lengths.min() < 0:
        raise TransferError("a segment has a negative length")
    _check_end("local", segments[:, 0], segments[:, 1], lengths, local_sizes)
    if remote_sizes is not None:
        _check_end("remote", segments[:, 2], segments[:, 3], lengths, remote_sizes)
    if len(segments) > 1:
        _check_overlaps(segments[:, 2], segments[:, 3], lengths)
    return int(lengths.sum())


def _check_end(
    end: str,
    regions: NDArray[np.int64],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sizes: Sequence[int],
) -> None:
    if regions.min() < 0 or regions.max() >= len(sizes):
        raise TransferError(f"a segment names a {end} region outside of 0 to {len(sizes) - 1}")
    limits = np.asarray(sizes, dtype=np.int64)[regions]
    # Not offset + length > limit: the sum could overflow.
    wrong = (offsets < 0) | (lengths > limits) | (offsets > limits - lengths)
    if wrong.any():
        i = int(wrong.argmax())
        raise TransferError(
            f"segment {i} ({int(lengths[i])} bytes at {int(offsets[i])}) lies outside of {end} region "
            f"{int(regions[i])} of {int(limits[i])} bytes"
        )


def _check_overlaps(
    regions: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
) -> None:
    """Two segments that write the same byte would leave it to chance which one does."""
    order = np.flatnonzero(lengths)
    ordered = bool((regions == regions[0]).all())
    if not ordered or not bool((offsets[order][1:] > offsets[order][:-1]).all()):
        order = order[np.lexsort((offsets[order], regions[order]))]
    starts, ends, of = offsets[order], offsets[order] + lengths[order], regions[order]
    wrong = (of[1:] == of[:-1]) & (starts[1:] < ends[:-1])
    if wrong.any():
        i = int(wrong.argmax())
        first, second = sorted((int(order[i]), int(order[i + 1])))
        raise TransferError(
            f"segments {first} and {second} overlap in remote region {int(of[i])}: "
            f"{int(starts[i])} to {int(ends[i])} and {int(starts[i + 1])} to {int(ends[i + 1])}"
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
