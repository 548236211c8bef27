"""How the segments of one job are copied, a slice at a time. Knows arrays; no peers and no threads.

numpy lets go of the interpreter lock for each call. Long pieces are a call each. Short ones, at multiples of
a common grain, are rows of the two regions, and many of them take two calls: into a buffer that stays in the
cache, and out of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..base import Segments

Bytes = NDArray[np.uint8]
Slice = tuple[int, Callable[[], None]]
"""How many bytes, and what copies them."""

SLICE_BYTES = 2 * 1024 * 1024
"""Of a slice, about: copied before other peers get their turn, and before a copy that was given up ends."""
SHORT_BYTES = 64 * 1024
"""Pieces shorter than this on average are copied as rows, where they can be."""
MIN_GRAIN = 1024
"""Bytes of the shortest rows that are quicker than pieces."""
BUFFER_BYTES = 512 * 1024

_local = threading.local()


def slices(segments: Segments, sources: list[Bytes], targets: list[Bytes]) -> Iterator[Slice]:
    """All bytes of checked, coalesced segments."""
    num_bytes = int(segments[:, 4].sum())
    if num_bytes < SHORT_BYTES * len(segments) and not np.ptp(segments[:, (0, 2)], axis=0).any():
        grain = int(np.gcd.reduce(segments[:, (1, 3, 4)], axis=None))
        if grain >= MIN_GRAIN:
            local, remote = segments[0, 0], segments[0, 2]
            yield from _rows(segments, grain, sources[local], targets[remote])
            return
    yield from _pieces(segments.tolist(), sources, targets)


def _pieces(segments: list[list[int]], sources: list[Bytes], targets: list[Bytes]) -> Iterator[Slice]:
    found, size = [], 0
    for region, begin, target, target_begin, length in segments:
        done = 0
        while done < length:
            count = min(length - done, SLICE_BYTES - size)
            found.append(
                (
                    targets[target][target_begin + done : target_begin + done + count],
                    sources[region][begin + done : begin + done + count],
                )
            )
            done, size = done + count, size + count
            if size == SLICE_BYTES:
                yield size, partial(_put, found)
                found, size = [], 0
    if size:
        yield size, partial(_put, found)


def _put(pieces: list[tuple[Bytes, Bytes]]) -> None:
    for target, source in pieces:
        target[:] = source


def _rows(segments: Segments, grain: int, source: Bytes, target: Bytes) -> Iterator[Slice]:
    counts = segments[:, 4] // grain
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    source_rows = np.repeat(segments[:, 1] // grain, counts) + within
    target_rows = np.repeat(segments[:, 3] // grain, counts) + within
    source, target = _as_rows(source, grain), _as_rows(target, grain)
    step = max(1, SLICE_BYTES // grain)
    for i in range(0, len(within), step):
        numbers = source_rows[i : i + step], target_rows[i : i + step]
        yield len(numbers[0]) * grain, partial(_put_rows, source, target, *numbers)


def _put_rows(
    source: Bytes, target: Bytes, source_rows: NDArray[np.int64], target_rows: NDArray[np.int64]
) -> None:
    grain = source.shape[1]
    step = max(1, BUFFER_BYTES // grain)
    buffer = _buffer()[: step * grain].reshape(-1, grain)
    for i in range(0, len(source_rows), step):
        numbers = source_rows[i : i + step]
        held = buffer[: len(numbers)]
        np.take(source, numbers, axis=0, out=held, mode="clip")
        target[target_rows[i : i + step]] = held


def _as_rows(region: Bytes, grain: int) -> Bytes:
    return region[: len(region) // grain * grain].reshape(-1, grain)


def _buffer() -> Bytes:
    """This thread's own."""
    found: Bytes | None = getattr(_local, "buffer", None)
    if found is None:
        found = _local.buffer = np.empty(BUFFER_BYTES, dtype=np.uint8)
    return found
