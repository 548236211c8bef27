"""The KV bytes of this worker's pools in canonical order, however the pools are cut. Runs on the byte
worker's thread; knows blocks and layers, no hand-offs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from ..kernels.kv_gather_cpu import Bytes, blocks_of, gather_blocks, scatter_blocks
from ..proto.kv_layout import KvLayout, Sharding
from .codecs.codec import KvSpec
from .reshard import canonical_runs


class PoolBytes:
    """`buffers` are the pools of all ranks, in order."""

    def __init__(self, layout: KvLayout, sharding: Sharding, buffers: Sequence[memoryview]) -> None:
        self.layout = layout
        self.sharding = sharding
        self._buffers = list(buffers)

    def size(self, num_blocks: int, num_layers: int) -> int:
        """Bytes of a range of layers of so many blocks, in canonical order."""
        return num_blocks * num_layers * self.layout.layer_bytes

    def spec(self, num_tokens: int, first_layer: int, num_layers: int) -> KvSpec:
        """What a codec is told of a range of layers of so many tokens' blocks."""
        return KvSpec(
            layout=self.layout,
            num_blocks=self.layout.num_blocks_for(num_tokens),
            num_tokens=num_tokens,
            first_layer=first_layer,
            num_layers=num_layers,
        )

    def digests(self, blocks: Sequence[int], first_layer: int, num_layers: int) -> list[int]:
        """xxh3_64 of each block's bytes of these layers: equal for equal KV, however the pools are cut."""
        runs = canonical_runs(
            self.layout, self.sharding, blocks, first_layer=first_layer, num_layers=num_layers
        )
        found = []
        for rows in runs.reshape(len(blocks), -1, 3).tolist():
            if len(rows) == 1:
                region, offset, length = rows[0]
                found.append(xxhash.xxh3_64_intdigest(self._buffers[region][offset : offset + length]))
                continue
            digest = xxhash.xxh3_64()
            for region, offset, length in rows:
                digest.update(self._buffers[region][offset : offset + length])
            found.append(digest.intdigest())
        return found

    def gather(self, out: memoryview, blocks: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Copies these layers of `blocks` to `out`, which has their size()."""
        ids = np.asarray(blocks, dtype=np.int64)
        for copy, part, pool in self._parts(out, first_layer, num_layers):
            if copy == 0:
                gather_blocks(part, pool, ids)

    def scatter(self, data: memoryview, blocks: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Copies `data`, of size(), to these layers of `blocks`, on every rank that keeps them."""
        ids = np.asarray(blocks, dtype=np.int64)
        for _copy, part, pool in self._parts(data, first_layer, num_layers):
            scatter_blocks(pool, part, ids)

    def _parts(
        self, piece: memoryview, first_layer: int, num_layers: int
    ) -> Iterator[tuple[int, Bytes, Bytes]]:
        """For each rank that keeps some of these layers: which copy of its heads it has, its part of the
        piece, and the layers of its pool."""
        whole = blocks_of(piece, replace(self.layout, num_layers=num_layers))
        end = first_layer + num_layers
        for rank, buffer in enumerate(self._buffers):
            layers, heads = self.sharding.layers(self.layout, rank), self.sharding.heads(self.layout, rank)
            first, last = max(first_layer, layers.start), min(end, layers.stop)
            if first >= last:
                continue
            pool = blocks_of(buffer, self.sharding.rank_layout(self.layout, rank))
            yield (
                rank % self.sharding.tp % self.sharding.copies(self.layout),
                whole[:, first - first_layer : last - first_layer, :, heads.start : heads.stop],
                pool[:, first - layers.start : last - layers.start],
            )
