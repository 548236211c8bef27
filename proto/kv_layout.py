"""Where KV bytes lie in a pool, the same for the engine that fills it and the hand-off that moves it.

A pool is `[block][layer][k|v][kv_head][slot][head_dim]`: a whole block is one run of bytes, a range of layers
of a block is one run, and a range of heads is one run inside K and inside V. The slot of a token is its
position modulo block_size. A worker of several ranks cuts it by layers and heads; each rank's pool is such a
pool again, of its own layers and heads. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import xxhash

from .errors import ConfigError

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of one worker's KV pool. Two workers pair only when `fingerprint()` is equal."""

    model: str
    """Identity of the weights (name and content fingerprint): KV of other weights is worthless."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens a block."""
    dtype: str
    """bf16, fp16 or fp32."""

    @property
    def layer_bytes(self) -> int:
        """K and V of one layer of one block."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.block_bytes // self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def run(self, block_id: int, first_layer: int, num_layers: int) -> tuple[int, int]:
        """(offset, length) in bytes of a range of layers of a block."""
        return (
            block_id * self.block_bytes + first_layer * self.layer_bytes,
            num_layers * self.layer_bytes,
        )

    def fingerprint(self) -> str:
        """16 hexadecimal digits over every field; the layout hash of the handshakes."""
        shape = f"{self.num_layers}|{self.num_kv_heads}|{self.head_dim}|{self.block_size}|{self.dtype}"
        return xxhash.xxh3_64_hexdigest(f"block,layer,kv,head,slot,dim|{self.model}|{shape}".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a worker's pool is cut: layers over `pp` stages, KV heads over `tp` ranks of each stage.

    Rank r is `pp_rank * tp + tp_rank`, and region r of the worker is its pool. Block ids mean the same block
    on every rank. With more ranks than KV heads, neighbouring ranks keep copies of one head.
    """

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise ConfigError(
                f"a sharding of tp = {self.tp} and pp = {self.pp} is not possible; use 1 or more"
            )

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def check(self, layout: KvLayout) -> None:
        """
        Raises:
            ConfigError: a model of these layers and KV heads cannot be cut so.
        """
        heads = layout.num_kv_heads
        if self.tp <= heads and heads % self.tp:
            raise ConfigError(
                f"{heads} KV heads cannot be cut into {self.tp} equal parts; use a tp that divides them"
            )
        if self.tp > heads and self.tp % heads:
            raise ConfigError(
                f"{heads} KV heads cannot be copied evenly to {self.tp} ranks; use a multiple of {heads}"
            )
        if self.pp > layout.num_layers:
            raise ConfigError(
                f"{layout.num_layers} layers cannot be cut into {self.pp} stages; use a pp of at most that"
            )

    def head_groups(self, layout: KvLayout) -> int:
        """Different parts that the KV heads are cut into."""
        return min(self.tp, layout.num_kv_heads)

    def copies(self, layout: KvLayout) -> int:
        """Ranks of a stage that keep the same heads."""
        return self.tp // self.head_groups(layout)

    def heads(self, layout: KvLayout, rank: int) -> range:
        """The KV heads that a rank keeps."""
        each = layout.num_kv_heads // self.head_groups(layout)
        first = rank % self.tp // self.copies(layout) * each
        return range(first, first + each)

    def layers(self, layout: KvLayout, rank: int) -> range:
        """The layers that a rank keeps: as many on each stage, and one more on the first ones of them."""
        stage = rank // self.tp
        each, more = divmod(layout.num_layers, self.pp)
        first = stage * each + min(stage, more)
        return range(first, first + each + (stage < more))

    def rank_layout(self, layout: KvLayout, rank: int) -> KvLayout:
        """The layout of one rank's pool; `block_bytes` of it times the number of blocks are its region."""
        return replace(
            layout,
            num_layers=len(self.layers(layout, rank)),
            num_kv_heads=len(self.heads(layout, rank)),
        )


UNSHARDED = Sharding()
"""One rank that keeps everything."""
