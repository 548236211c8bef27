"""Scatters the keys and values of new tokens into their slots of the paged pool."""

from __future__ import annotations

from typing import Protocol

import torch

from ..proto.errors import KernelError

_WORD_BYTES = 8


class KvWrite(Protocol):
    def __call__(
        self, pool: torch.Tensor, kv: torch.Tensor, block_ids: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """pool[block_ids[i], k|v, :, slots[i]] = kv[i].

        Args:
            pool: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim]; strided by block.
            kv: [num_tokens, 2, num_kv_heads, head_dim], the pool's dtype.
            block_ids: [num_tokens] int64. slots: [num_tokens] int64, below block_size.

        Raises:
            KernelError: shapes or dtypes do not fit. Indices are checked by torch (IndexError).
        """
        ...


def _check(pool: torch.Tensor, kv: torch.Tensor, block_ids: torch.Tensor, slots: torch.Tensor) -> None:
    _, two, heads, _, dim = pool.shape
    if kv.shape[1:] != (two, heads, dim) or kv.dtype != pool.dtype:
        raise KernelError(
            f"kv_write takes kv [num_tokens, {two}, {heads}, {dim}] of {pool.dtype}; "
            f"got {list(kv.shape)} of {kv.dtype}"
        )
    if block_ids.shape != kv.shape[:1] or slots.shape != kv.shape[:1] or block_ids.dtype != torch.int64:
        raise KernelError(
            f"kv_write takes int64 block_ids and slots [{kv.shape[0]}]; "
            f"got {list(block_ids.shape)} {block_ids.dtype} and {list(slots.shape)} {slots.dtype}"
        )


def kv_write_reference(
    pool: torch.Tensor, kv: torch.Tensor, block_ids: torch.Tensor, slots: torch.Tensor
) -> None:
    """One token at a time."""
    _check(pool, kv, block_ids, slots)
    for i, (block_id, slot) in enumerate(zip(block_ids.tolist(), slots.tolist(), strict=True)):
        pool[block_id, :, :, slot] = kv[i]


def kv_write_cpu(pool: torch.Tensor, kv: torch.Tensor, block_ids: torch.Tensor, slots: torch.Tensor) -> None:
    """One indexed write, in words of eight bytes where a head allows: half the time of writing bf16
    numbers."""
    _check(pool, kv, block_ids, slots)
    if pool.shape[4] * pool.element_size() % _WORD_BYTES == 0:
        pool, kv = pool.view(torch.int64), kv.view(torch.int64)
    # [num_blocks, block_size, 2, num_kv_heads, words]
    pool.permute(0, 3, 1, 2, 4).index_put_((block_ids, slots), kv)
