"""Where KV bytes are in pools that are cut by tensor and pipeline parallelism, and how they get from one such
pool to another. Pure: knows layouts and block ids, no transports and no requests.

The canonical order of KV is `[block][layer][k|v][kv_head][slot][head_dim]` with all heads and layers of the
model, whatever the pool looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..proto.kv_layout import ITEM_BYTES, UNSHARDED, KvLayout, Sharding
from .base import Segments
from .segments import coalesce


def canonical_runs(
    layout: KvLayout,
    sharding: Sharding,
    blocks: Sequence[int],
    *,
    first_layer: int,
    num_layers: int,
    base_region: int = 0,
    copy: int = 0,
) -> NDArray[np.int64]:
    """[n, 3]: region, offset, length of the runs that hold a range of layers of `blocks`, in canonical order.

    Every block has the same number of runs, one after the other: `runs.reshape(len(blocks), -1, 3)`.

    Args:
        base_region: id of rank 0's region.
        copy: which copy of heads that several ranks keep, 0 to `sharding.copies(layout)` - 1.
    """
    shape = _block_runs(layout, sharding, first_layer, num_layers)
    runs = np.empty((len(blocks), len(shape), 3), dtype=np.int64)
    runs[:, :, 0] = shape[:, 0] + (base_region + copy)
    runs[:, :, 1] = np.asarray(blocks, dtype=np.int64)[:, None] * shape[:, 1] + shape[:, 2]
    runs[:, :, 2] = shape[:, 3]
    return runs.reshape(-1, 3)


def reshard_segments(
    layout: KvLayout,
    source: Sharding,
    target: Sharding,
    local_blocks: Sequence[int],
    remote_blocks: Sequence[int],
    *,
    first_layer: int,
    num_layers: int,
    local_region: int = 0,
    remote_region: int = 0,
) -> Segments:
    """Segments that copy a range of layers of each local block into the remote block of the same position.

    What lies side by side at both ends is one segment. Of heads that several source ranks keep, each is read
    from one of them, by turns of blocks; every target rank that keeps a head gets it.

    Args:
        local_region, remote_region: ids of rank 0's regions.
    """
    local = np.asarray(local_blocks, dtype=np.int64)
    remote = np.asarray(remote_blocks, dtype=np.int64)
    if not len(local):
        return np.empty((0, 5), dtype=np.int64)
    tables = [np.empty((0, 5), dtype=np.int64)]
    for lane in _lanes(layout, source, target, first_layer, num_layers):
        table = np.empty((len(local), len(lane.moves), 5), dtype=np.int64)
        table[:, :, 0] = lane.source_ranks(len(local))[:, None] + local_region
        table[:, :, 1] = local[:, None] * lane.source_bytes + lane.moves[:, 0]
        table[:, :, 2] = lane.target_rank + remote_region
        table[:, :, 3] = remote[:, None] * lane.target_bytes + lane.moves[:, 1]
        table[:, :, 4] = lane.moves[:, 2]
        tables.append(coalesce(table.reshape(-1, 5)))
    return np.concatenate(tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    """What one target rank gets from the ranks of the source that keep the same part of the model."""

    first_source_rank: int
    source_copies: int
    target_rank: int
    target_copy: int
    target_copies: int
    source_bytes: int
    """Of a block in a source rank's pool."""
    target_bytes: int
    moves: NDArray[np.int64]
    """[n, 3]: offset in the source's block, offset in the target's block, length."""

    def source_ranks(self, num_blocks: int) -> NDArray[np.int64]:
        """The rank that each block is read from. All blocks of all target copies in a row are cut into as
        many equal parts as there are source copies: then equal shardings pair rank by rank, and runs stay
        long."""
        places = self.target_copy * num_blocks + np.arange(num_blocks, dtype=np.int64)
        return self.first_source_rank + places * self.source_copies // (self.target_copies * num_blocks)


@lru_cache(maxsize=1024)
def _lanes(
    layout: KvLayout, source: Sharding, target: Sharding, first_layer: int, num_layers: int
) -> tuple[_Lane, ...]:
    wanted = range(first_layer, first_layer + num_layers)
    source_copies, target_copies = source.copies(layout), target.copies(layout)
    lanes = []
    for target_rank in range(target.num_ranks):
        for source_rank in range(0, source.num_ranks, source_copies):
            layers = _common(wanted, source.layers(layout, source_rank), target.layers(layout, target_rank))
            heads = _common(source.heads(layout, source_rank), target.heads(layout, target_rank))
            if not layers or not heads:
                continue
            here = _PoolPart(layout, source, source_rank)
            there = _PoolPart(layout, target, target_rank)
            lanes.append(
                _Lane(
                    first_source_rank=source_rank,
                    source_copies=source_copies,
                    target_rank=target_rank,
                    target_copy=target_rank % target.tp % target_copies,
                    target_copies=target_copies,
                    source_bytes=here.layout.block_bytes,
                    target_bytes=there.layout.block_bytes,
                    moves=_moves(here, there, layers, heads),
                )
            )
    return tuple(lanes)


class _PoolPart:
    """One rank's pool: offsets inside a block of it."""

    def __init__(self, layout: KvLayout, sharding: Sharding, rank: int) -> None:
        self.layout = sharding.rank_layout(layout, rank)
        self.heads = sharding.heads(layout, rank)
        self._layers = sharding.layers(layout, rank)
        self.head_bytes = layout.block_size * layout.head_dim * ITEM_BYTES[layout.dtype]

    def offset(self, layer: int, kind: int, head: int) -> int:
        """Of a head of a layer, counted as in the whole model; `kind`: 0 for K, 1 for V."""
        row = ((layer - self._layers.start) * 2 + kind) * len(self.heads) + head - self.heads.start
        return row * self.head_bytes


def _moves(here: _PoolPart, there: _PoolPart, layers: range, heads: range) -> NDArray[np.int64]:
    if heads == here.heads == there.heads:  # K and V and layers follow each other at both ends
        places = [(layers.start, 0)]
        length = len(layers) * here.layout.layer_bytes
    else:
        places = [(layer, kind) for layer in layers for kind in (0, 1)]
        length = len(heads) * here.head_bytes
    rows = [(here.offset(*p, heads.start), there.offset(*p, heads.start), length) for p in places]
    return np.array(rows, dtype=np.int64)


@lru_cache(maxsize=1024)
def _block_runs(layout: KvLayout, sharding: Sharding, first_layer: int, num_layers: int) -> NDArray[np.int64]:
    """[n, 4]: rank, bytes of its blocks, offset in a block, length; the runs of one block."""
    # The canonical order is that of a pool that is not cut at all.
    lanes = _lanes(layout, sharding, UNSHARDED, first_layer, num_layers)
    rows = [
        (target, lane.first_source_rank, lane.source_bytes, offset, length)
        for lane in lanes
        for offset, target, length in lane.moves.tolist()
    ]
    return np.array(sorted(rows), dtype=np.int64).reshape(-1, 5)[:, 1:]


def _common(*ranges: range) -> range:
    return range(max(r.start for r in ranges), min(r.stop for r in ranges))
