"""How much of a prompt one step takes."""

from __future__ import annotations

from .base import Chunk
from .sequence import Sequence


def next_chunk(sequence: Sequence, budget: int, block_size: int) -> Chunk | None:
    """The next piece of at most `budget` tokens. A piece that does not reach the end stops at a block's end,
    so that every block is written by one step; None when the budget is too small for that."""
    remaining = sequence.num_uncomputed
    if remaining <= budget:
        return Chunk(sequence=sequence, num_tokens=remaining, samples=True)
    end = (sequence.num_computed + budget) // block_size * block_size
    if end <= sequence.num_computed:
        return None
    return Chunk(sequence=sequence, num_tokens=end - sequence.num_computed, samples=False)
