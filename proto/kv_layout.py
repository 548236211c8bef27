"""Where KV bytes lie in a pool, the same for the engine that fills it and the hand-off that moves it.

A pool is `[block][layer][k|v][kv_head][slot][head_dim]`: a whole block is one run of bytes, a range of layers
of a block is one run, and a range of heads is one run inside K and inside V. The slot of a token is its
position modulo block_size. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

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
