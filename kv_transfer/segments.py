"""From blocks to the segments of one transport write: neighbours at both ends become one run of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..proto.kv_layout import KvLayout
from .base import Segments


def block_segments(
    layout: KvLayout,
    local_blocks: Sequence[int],
    remote_blocks: Sequence[int],
    *,
    first_layer: int,
    num_layers: int,
    local_region: int,
    remote_region: int,
) -> Segments:
    """Segments that copy a range of layers of each local block into the remote block of the same position.

    Whole blocks that are consecutive at both ends are coalesced; layers of different blocks never are
    adjacent.
    """
    local = np.asarray(local_blocks, dtype=np.int64)
    remote = np.asarray(remote_blocks, dtype=np.int64)
    if num_layers == layout.num_layers and len(local) > 1:
        breaks = np.flatnonzero((np.diff(local) != 1) | (np.diff(remote) != 1)) + 1
        starts = np.concatenate(([0], breaks))
        counts = np.diff(np.concatenate((starts, [len(local)])))
    else:
        starts, counts = np.arange(len(local)), np.ones(len(local), dtype=np.int64)
    segments = np.empty((len(starts), 5), dtype=np.int64)
    segments[:, 0] = local_region
    segments[:, 1] = local[starts] * layout.block_bytes + first_layer * layout.layer_bytes
    segments[:, 2] = remote_region
    segments[:, 3] = remote[starts] * layout.block_bytes + first_layer * layout.layer_bytes
    segments[:, 4] = counts * (num_layers * layout.layer_bytes)
    return segments


def block_runs(
    layout: KvLayout, blocks: Sequence[int], *, first_layer: int, num_layers: int
) -> NDArray[np.int64]:
    """[num_blocks, 2]: offset and length in the pool of a range of layers of each block."""
    runs = np.empty((len(blocks), 2), dtype=np.int64)
    runs[:, 0] = np.asarray(blocks, dtype=np.int64) * layout.block_bytes + first_layer * layout.layer_bytes
    runs[:, 1] = num_layers * layout.layer_bytes
    return runs
