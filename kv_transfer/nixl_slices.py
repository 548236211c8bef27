"""From the segments of one job to descriptors that NIXL takes a slice at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Region, Segments

HOST, DEVICE = "DRAM", "VRAM"
"""NIXL's names for memory of the host and of an accelerator."""


@dataclass(frozen=True, slots=True)
class Bases:
    """Where one end's regions begin."""

    addresses: NDArray[np.int64]
    devices: NDArray[np.int64]
    """Index of the device; -1 for memory of the host."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Descriptors are [n, 3]: address, length, device."""

    kinds: tuple[str, str]
    """Of memory here and there."""
    local: NDArray[np.int64]
    remote: NDArray[np.int64]


def bases_of(regions: list[Region]) -> Bases:
    places = [place(region) for region in regions]
    return Bases(
        np.array([address for address, _ in places], dtype=np.int64),
        np.array([device for _, device in places], dtype=np.int64),
    )


def place(region: Region) -> tuple[int, int]:
    """Address and device of a region's first byte."""
    if region.device is not None:
        return region.device.pointer, region.device.device
    return int(np.frombuffer(region.host_bytes(), dtype=np.uint8).ctypes.data), -1


def coalesce(segments: Segments) -> Segments:
    """Neighbours at both ends become one; empty segments go."""
    segments = segments[segments[:, 4] > 0]
    if len(segments) < 2:
        return segments
    ends = segments[:-1, (1, 3)] + segments[:-1, 4:5]
    same = (segments[1:, (0, 2)] == segments[:-1, (0, 2)]).all(axis=1)
    joined = same & (segments[1:, (1, 3)] == ends).all(axis=1)
    first = np.concatenate(([True], ~joined))
    merged = segments[first]
    merged[:, 4] = np.add.reduceat(segments[:, 4], np.flatnonzero(first))
    return merged


def spans(segments: Segments, there: Bases) -> NDArray[np.int64]:
    """[n, 2]: begin and end of what coalesced segments write, ascending: addresses at the destination."""
    begins = there.addresses[segments[:, 2]] + segments[:, 3]
    found = np.stack((begins, begins + segments[:, 4]), axis=1)
    return found[begins.argsort()]


def overlap(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether two tables of spans, each without overlaps of its own, share a byte."""
    if not len(one) or not len(other) or one[-1, 1] <= other[0, 0] or other[-1, 1] <= one[0, 0]:
        return False
    after = np.searchsorted(other[:, 1], one[:, 0], side="right")  # the first that ends behind its begin
    hit = after < len(other)
    return bool((other[after[hit], 0] < one[hit, 1]).any())


def slices(segments: Segments, here: Bases, there: Bases, max_bytes: int, max_rows: int) -> list[Slice]:
    """Cuts coalesced segments into slices of so many bytes and rows at most, each of one pair of kinds."""
    counts = -(-segments[:, 4] // max_bytes)
    rows = np.repeat(segments, counts, axis=0)
    shift = (np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)) * max_bytes
    rows[:, 1] += shift
    rows[:, 3] += shift
    rows[:, 4] = np.minimum(rows[:, 4] - shift, max_bytes)
    codes = (here.devices[rows[:, 0]] >= 0) * 2 + (there.devices[rows[:, 2]] >= 0)
    found = []
    for code in np.unique(codes):
        part = rows[codes == code]
        kinds = (DEVICE if code & 2 else HOST, DEVICE if code & 1 else HOST)
        local, remote = _descriptors(part, 0, here), _descriptors(part, 2, there)
        filled = part[:, 4].cumsum()
        begin = 0
        while begin < len(part):
            before = filled[begin - 1] if begin else 0
            end = int(np.searchsorted(filled, before + max_bytes, side="right"))
            end = min(max(end, begin + 1), begin + max_rows)
            found.append(Slice(kinds, local[begin:end], remote[begin:end]))
            begin = end
    return found


def _descriptors(rows: Segments, column: int, bases: Bases) -> NDArray[np.int64]:
    regions = rows[:, column]
    found = np.empty((len(rows), 3), dtype=np.int64)
    found[:, 0] = bases.addresses[regions] + rows[:, column + 1]
    found[:, 1] = rows[:, 4]
    found[:, 2] = np.maximum(bases.devices[regions], 0)
    return found
