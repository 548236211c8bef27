"""Bounds checks and copies of segments between regions, shared by the transports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..proto.errors import TransferError
from .base import Region, Segments


def check_segments(segments: Segments, local_sizes: Sequence[int], remote_sizes: Sequence[int] | None) -> int:
    """Returns the total length in bytes. `remote_sizes` None: the far end is not known yet.

    Raises:
        TransferError: wrong shape or dtype, or a segment lies outside a region.
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


def copy_segments(segments: Segments, sources: Sequence[Region], targets: Sequence[Region]) -> None:
    """Copies checked segments within this process's address space."""
    source = [np.frombuffer(region.buffer, dtype=np.uint8) for region in sources]
    target = [np.frombuffer(region.buffer, dtype=np.uint8) for region in targets]
    for from_region, from_offset, to_region, to_offset, length in segments.tolist():
        target[to_region][to_offset : to_offset + length] = source[from_region][
            from_offset : from_offset + length
        ]
