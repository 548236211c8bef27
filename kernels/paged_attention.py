"""Causal grouped-query attention of new tokens over keys and values in the paged pool: contract and
reference.

The keys and values of the new tokens are in the pool before it is called (kv_write.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..proto.errors import KernelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive new tokens of one sequence: consecutive rows of the step."""

    block_table: Sequence[int]
    """Block ids in order of position, at least up to the segment's last token."""
    first_position: int
    num_rows: int
    single: bool
    """One decoding token (num_rows is 1). Rows that came as single tokens once are given so again when they
    are recomputed, if the implementation is not row_invariant."""


class AttentionStep(Protocol):
    """What attention needs to know of one step, made once and used for every layer."""

    def run(self, out: torch.Tensor, q: torch.Tensor, layer: int) -> None:
        """out, q: [rows of the segments or more, num_q_heads, head_dim], the pool's dtype, last dimension
        contiguous. Further rows may be read and are never written.

        Raises:
            KernelError: shapes or dtypes do not fit.
        """
        ...


class PagedAttention(Protocol):
    row_invariant: bool
    """Whether a row's bits are the same however it is grouped with others: alone, in a chunk, in any
    batch."""

    def padded_length(self, num_positions: int) -> int:
        """The context length that `num_positions` is computed at; single rows of equal ones are best
        neighbours."""
        ...

    def plan(self, segments: Sequence[Segment]) -> AttentionStep:
        """Prepares a step whose rows are those of the segments, in order."""
        ...


class MakePagedAttention(Protocol):
    def __call__(self, pool: torch.Tensor, num_q_heads: int, max_context: int) -> PagedAttention:
        """Attention over a pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].

        Args:
            max_context: most positions of a sequence.
        """
        ...


def check_pool(pool: torch.Tensor, num_q_heads: int) -> None:
    """Raises:
    KernelError: the pool's shape or the head counts do not fit together."""
    if pool.dim() != 6 or pool.shape[2] != 2 or not pool.is_contiguous():
        raise KernelError(
            "the KV pool must be contiguous [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]; "
            f"got {list(pool.shape)}"
        )
    if num_q_heads % pool.shape[3]:
        raise KernelError(f"{num_q_heads} query heads cannot share {pool.shape[3]} key-value heads")


def check_rows(
    out: torch.Tensor, q: torch.Tensor, num_rows: int, num_q_heads: int, pool: torch.Tensor
) -> None:
    """Raises:
    KernelError: out or q is too small, or of another shape or dtype than the pool asks for."""
    for name, x in (("out", out), ("q", q)):
        fits = x.dim() == 3 and x.shape[0] >= num_rows and x.shape[1:] == (num_q_heads, pool.shape[5])
        if not fits or x.dtype != pool.dtype:
            raise KernelError(
                f"paged_attention takes {name} [>= {num_rows}, {num_q_heads}, {pool.shape[5]}] of "
                f"{pool.dtype}; got {list(x.shape)} of {x.dtype}"
            )


class ReferencePagedAttention:
    """A row at a time, in fp32."""

    row_invariant = True

    def __init__(self, pool: torch.Tensor, num_q_heads: int, max_context: int) -> None:
        check_pool(pool, num_q_heads)
        self.pool = pool
        self.num_q_heads = num_q_heads

    def padded_length(self, num_positions: int) -> int:
        return num_positions

    def plan(self, segments: Sequence[Segment]) -> _ReferenceStep:
        return _ReferenceStep(self, segments)


class _ReferenceStep:
    def __init__(self, attention: ReferencePagedAttention, segments: Sequence[Segment]) -> None:
        self._num_rows = sum(segment.num_rows for segment in segments)
        self._attention = attention
        self._segments = segments

    def run(self, out: torch.Tensor, q: torch.Tensor, layer: int) -> None:
        pool, num_q_heads = self._attention.pool, self._attention.num_q_heads
        check_rows(out, q, self._num_rows, num_q_heads, pool)
        row = 0
        for segment in self._segments:
            # [blocks, 2, num_kv_heads, block_size, head_dim] -> [2, num_kv_heads, positions, head_dim]
            blocks = pool[list(segment.block_table), layer].float().permute(1, 2, 0, 3, 4).flatten(2, 3)
            keys, values = blocks.repeat_interleave(num_q_heads // pool.shape[3], dim=1)
            for i in range(segment.num_rows):
                end = segment.first_position + i + 1
                scores = torch.einsum("hd,htd->ht", q[row].float(), keys[:, :end]) * pool.shape[5] ** -0.5
                out[row] = torch.einsum("ht,htd->hd", scores.softmax(dim=1), values[:, :end]).to(out.dtype)
                row += 1
