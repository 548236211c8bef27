"""Gathers KV blocks of a paged pool into a piece of a staging buffer, and scatters a piece into a pool:
contract, reference and CPU path.

A piece holds blocks in canonical order (docs/kv_plane.md), which is a pool's own,
[block][layer][k|v][kv_head][slot][head_dim], over the heads of all ranks. Ranges of layers and heads are
slices of the tensors, so a re-shard has no operation of its own: every source rank gathers its heads into its
part of a piece that has them all, every destination rank scatters its part.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..proto.errors import KernelError
from . import kv_gather_cpu as in_host_memory


class KvGather(Protocol):
    def __call__(self, out: torch.Tensor, pool: torch.Tensor, block_ids: torch.Tensor) -> None:
        """out[i] = pool[block_ids[i]].

        Args:
            out: [num_ids, num_layers, 2, num_kv_heads, block_size, head_dim]; contiguous, or a range of
                layers and heads of a contiguous tensor: K and V of all its layers lie equally far apart, and
                the heads of each are one run.
            pool: [num_blocks, num_layers, ...] alike, of the same dtype and device.
            block_ids: [num_ids] int64, contiguous, on that device.

        On a GPU it returns when the work is queued on the current stream, and ids are not checked: blocks
        that are not of the pool are left out.

        Raises:
            KernelError: shapes, dtypes, devices or strides do not fit; on the CPU, an id is not of the pool.
        """
        ...


class KvScatter(Protocol):
    def __call__(self, pool: torch.Tensor, staged: torch.Tensor, block_ids: torch.Tensor) -> None:
        """pool[block_ids[i]] = staged[i]. The ids are distinct; `staged` is as `out` of KvGather."""
        ...


def planes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[num_blocks, num_layers * 2, elements]: a view whose last dimension, the heads, is contiguous.

    Raises:
        KernelError: the strides do not allow it.
    """
    blocks, layers, two, heads, block_size, head_dim = tensor.shape
    try:
        runs = tensor.view(blocks, layers * two, heads * block_size * head_dim)
    except RuntimeError as error:
        raise KernelError(
            f"{name} takes ranges of layers and heads of contiguous tensors; "
            f"got {list(tensor.shape)} with strides {list(tensor.stride())}"
        ) from error
    if runs.shape[2] > 1 and runs.stride(2) != 1:
        raise KernelError(f"{name} takes contiguous heads; got strides {list(tensor.stride())}")
    return runs


def check(
    name: str, pool: torch.Tensor, piece: torch.Tensor, block_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes of pool and piece.

    Raises:
        KernelError: shapes, dtypes, devices or strides do not fit.
    """
    if pool.dim() != 6 or piece.dim() != 6 or pool.shape[2] != 2 or pool.shape[1:] != piece.shape[1:]:
        raise KernelError(
            f"{name} takes a pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim] and a "
            f"piece that is alike but for num_blocks; got {list(pool.shape)} and {list(piece.shape)}"
        )
    if block_ids.shape != piece.shape[:1] or block_ids.dtype != torch.int64 or not block_ids.is_contiguous():
        raise KernelError(
            f"{name} takes contiguous int64 block_ids [{len(piece)}]; "
            f"got {list(block_ids.shape)} of {block_ids.dtype}"
        )
    if pool.dtype != piece.dtype or not pool.device == piece.device == block_ids.device:
        raise KernelError(
            f"{name} takes one dtype and one device; got pool {pool.dtype} on {pool.device}, piece "
            f"{piece.dtype} on {piece.device}, block_ids on {block_ids.device}"
        )
    return planes(name, pool), planes(name, piece)


def _check_ids(name: str, pool: torch.Tensor, block_ids: torch.Tensor) -> None:
    for block_id in block_ids.tolist():
        if not 0 <= block_id < len(pool):
            raise KernelError(f"{name} takes block_ids below {len(pool)}; got {block_id}")


def kv_gather_reference(out: torch.Tensor, pool: torch.Tensor, block_ids: torch.Tensor) -> None:
    """One block at a time."""
    check("kv_gather", pool, out, block_ids)
    _check_ids("kv_gather", pool, block_ids)
    for i, block_id in enumerate(block_ids.tolist()):
        out[i] = pool[block_id]


def kv_scatter_reference(pool: torch.Tensor, staged: torch.Tensor, block_ids: torch.Tensor) -> None:
    """One block at a time."""
    check("kv_scatter", pool, staged, block_ids)
    _check_ids("kv_scatter", pool, block_ids)
    for i, block_id in enumerate(block_ids.tolist()):
        pool[block_id] = staged[i]


def kv_gather_cpu(out: torch.Tensor, pool: torch.Tensor, block_ids: torch.Tensor) -> None:
    """numpy's copies of whole rows: near memcpy, without torch's threads and its lock."""
    source, target = check("kv_gather", pool, out, block_ids)
    in_host_memory.gather_blocks(
        target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy(), block_ids.numpy()
    )


def kv_scatter_cpu(pool: torch.Tensor, staged: torch.Tensor, block_ids: torch.Tensor) -> None:
    """As kv_gather_cpu."""
    target, source = check("kv_scatter", pool, staged, block_ids)
    in_host_memory.scatter_blocks(
        target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy(), block_ids.numpy()
    )
