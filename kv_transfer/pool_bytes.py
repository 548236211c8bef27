"""The KV bytes of this worker's pools in canonical order, however the pools are cut. Runs on the byte
worker's thread; knows blocks and layers, no hand-offs."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from ..proto.kv_layout import KvLayout, Sharding
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
        runs = canonical_runs(
            self.layout, self.sharding, blocks, first_layer=first_layer, num_layers=num_layers
        )
        begin = 0
        for region, offset, length in runs.tolist():
            out[begin : begin + length] = self._buffers[region][offset : offset + length]
            begin += length

    def scatter(self, data: memoryview, blocks: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Copies `data`, of size(), to these layers of `blocks`, on every rank that keeps them."""
        for copy in range(self.sharding.copies(self.layout)):
            runs = canonical_runs(
                self.layout,
                self.sharding,
                blocks,
                first_layer=first_layer,
                num_layers=num_layers,
                copy=copy,
            )
            begin = 0
            for region, offset, length in runs.tolist():
                self._buffers[region][offset : offset + length] = data[begin : begin + length]
                begin += length
