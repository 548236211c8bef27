"""Pools and segments for the kernels' tests."""

from __future__ import annotations

import torch
from diphase.kernels.paged_attention import Segment

BLOCK_SIZE = 16


def random_pool(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_layers: int = 2
) -> torch.Tensor:
    """[num_blocks, num_layers, 2, num_kv_heads, BLOCK_SIZE, head_dim]"""
    generator = torch.Generator().manual_seed(num_blocks + head_dim)
    shape = (num_blocks, num_layers, 2, num_kv_heads, BLOCK_SIZE, head_dim)
    return torch.randn(shape, generator=generator).to(dtype)


def segment(first_position: int, num_rows: int, *, first_block: int = 0, single: bool = False) -> Segment:
    """A segment over scattered blocks: every third one, from `first_block` on."""
    num_blocks = -(-(first_position + num_rows) // BLOCK_SIZE)
    return Segment(
        block_table=[first_block + 3 * i for i in range(num_blocks)],
        first_position=first_position,
        num_rows=num_rows,
        single=single,
    )
