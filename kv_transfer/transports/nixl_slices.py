"""From the segments of one job to descriptors that NIXL takes a slice at a time. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..base import Region, Segments

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

    @property
    def num_bytes(self) -> int:
        return int(self.local[:, 1].sum())


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


def spans(remote: NDArray[np.int64]) -> NDArray[np.int64]:
    """[2, n]: begins and ends of what descriptors without overlaps write, ascending."""
    begins, lengths = remote[:, 0], remote[:, 1]
    if len(begins) > 1 and (begins[1:] < begins[:-1]).any():
        order = begins.argsort()
        begins, lengths = begins[order], lengths[order]
    return np.stack((begins, begins + lengths))


def overlap(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether two tables of spans share a byte."""
    if not one.size or not other.size or one[1, -1] <= other[0, 0] or other[1, -1] <= one[0, 0]:
        return False
    if one.shape[1] > other.shape[1]:
        one, other = other, one
    after = other[1].searchsorted(one[0], side="right")  # the first that ends behind its begin
    hit = after < other.shape[1]
    return bool((other[0, after[hit]] < one[1, hit]).any())


def describe(segments: Segments, here: Bases, there: Bases, max_bytes: int) -> list[Slice]:
    """Descriptors of coalesced segments, none longer than `max_bytes`, for each pair of kinds."""
    if segments[:, 4].max(initial=0) > max_bytes:
        counts = -(-segments[:, 4] // max_bytes)
        shift = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        shift *= max_bytes
        segments = np.repeat(segments, counts, axis=0)
        segments[:, 1] += shift
        segments[:, 3] += shift
        segments[:, 4] = np.minimum(segments[:, 4] - shift, max_bytes)
    local, remote = _descriptors(segments, 0, here), _descriptors(segments, 2, there)
    if here.devices.max() < 0 and there.devices.max() < 0:
        return [Slice((HOST, HOST), local, remote)]
    codes = (here.devices[segments[:, 0]] >= 0) * 2 + (there.devices[segments[:, 2]] >= 0)
    return [
        Slice(
            (DEVICE if code & 2 else HOST, DEVICE if code & 1 else HOST),
            local[codes == code],
            remote[codes == code],
        )
        for code in np.unique(codes)
    ]


def cut(whole: Slice, max_bytes: int, max_rows: int) -> list[Slice]:
    """Slices of so many bytes and rows at most; no row is longer."""
    filled = whole.local[:, 1].cumsum()
    if 0 < len(filled) <= max_rows and filled[-1] <= max_bytes:
        return [whole]
    found, begin, before = [], 0, 0
    while begin < len(filled):
        end = min(int(filled.searchsorted(before + max_bytes, side="right")), begin + max_rows)
        found.append(Slice(whole.kinds, whole.local[begin:end], whole.remote[begin:end]))
        begin, before = end, filled[end - 1]
    return found


def _descriptors(rows: Segments, column: int, bases: Bases) -> NDArray[np.int64]:
    regions = rows[:, column]
    found = np.empty((len(rows), 3), dtype=np.int64)
    np.add(bases.addresses.take(regions), rows[:, column + 1], out=found[:, 0])
    found[:, 1] = rows[:, 4]
    found[:, 2] = bases.devices.clip(0).take(regions)
    return found
