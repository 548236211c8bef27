"""Gathers KV blocks into a piece of a staging buffer and scatters them back, on the host, with numpy alone.

The hand-off's thread copies beside the engine's on a laptop, so a copy is one numpy call over all of its rows
where numpy allows it: the interpreter lock is let go for as long as that takes, and no threads are started.
Knows no torch: the hand-off of a worker whose engine needs none can use it.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..proto.errors import KernelError
from ..proto.kv_layout import ITEM_BYTES, KvLayout

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int64]

_BOUNCE_BYTES = 256 * 1024
"""Stays in a core's cache."""
_LONG_BLOCK_BYTES = 32 * 1024
"""A copy takes so much longer than the call around it."""


def blocks_of(buffer: memoryview, layout: KvLayout) -> Bytes:
    """[num_blocks, num_layers, 2, num_kv_heads, bytes of a head]: a pool or a piece, as it lies.
    Ranges of layers and heads are slices of it.

    Raises:
        KernelError: `buffer` is not a number of whole blocks, or a block has no bytes.
    """
    if layout.block_bytes < 1:
        raise KernelError(f"blocks_of takes blocks that have bytes; got {layout}")
    if len(buffer) % layout.block_bytes:
        raise KernelError(
            f"blocks_of takes whole blocks of {layout.block_bytes} bytes; {len(buffer)} bytes are "
            f"{len(buffer) % layout.block_bytes} too many"
        )
    head_bytes = layout.block_size * layout.head_dim * ITEM_BYTES[layout.dtype]
    return np.frombuffer(buffer, np.uint8).reshape(-1, layout.num_layers, 2, layout.num_kv_heads, head_bytes)


def gather_blocks(out: Bytes, pool: Bytes, block_ids: Ids) -> None:
    """out[i] = pool[block_ids[i]].

    Args:
        out: [len(block_ids), ...], writable; of the piece, all or a range of its layers and heads.
        pool: [num_blocks, ...], alike from the second dimension on; the last dimension contiguous in both.
        block_ids: [len(out)], below num_blocks.

    Raises:
        KernelError: shapes, dtypes or strides do not fit, or an id is not of the pool.
    """
    _check("gather_blocks", out, pool, out, block_ids)
    if not out.size:
        return
    if not out.flags.c_contiguous:
        _gather_apart(out, pool, block_ids)
        return
    row_bytes = _row_bytes(out, pool)
    numbers = _row_numbers(pool, row_bytes, block_ids)
    np.take(_rows(pool, row_bytes), numbers, axis=0, out=_rows(out, row_bytes), mode="clip")


def _gather_apart(out: Bytes, pool: Bytes, block_ids: Ids) -> None:
    """Into a part of a piece, which numpy cannot do in one call: a call a block, or where a block's part is
    short, through memory that stays in the cache."""
    if out[0].size >= _LONG_BLOCK_BYTES:
        for i, block_id in enumerate(block_ids.tolist()):
            out[i] = pool[block_id]
        return
    at_once = max(1, _BOUNCE_BYTES // out[0].size)
    bounce = np.empty((min(at_once, len(out)), *out.shape[1:]), np.uint8)
    for begin in range(0, len(out), at_once):
        part = bounce[: len(out) - begin]
        gather_blocks(part, pool, block_ids[begin : begin + at_once])
        out[begin : begin + at_once] = part


def scatter_blocks(pool: Bytes, staged: Bytes, block_ids: Ids) -> None:
    """pool[block_ids[i]] = staged[i]; the ids are distinct. Otherwise as gather_blocks."""
    _check("scatter_blocks", pool, pool, staged, block_ids)
    if not staged.size:
        return
    row_bytes = _row_bytes(staged, pool)
    target, numbers = _rows(pool, row_bytes), _row_numbers(pool, row_bytes, block_ids)
    if staged.flags.c_contiguous:
        target[numbers] = _rows(staged, row_bytes)
    else:
        source = _runs_in_rows(staged, row_bytes)
        target[numbers.reshape(source.shape[:-1])] = source


def _check(name: str, written: Bytes, pool: Bytes, piece: Bytes, block_ids: Ids) -> None:
    if pool.ndim < 2 or pool.shape[1:] != piece.shape[1:] or not pool.dtype == piece.dtype == np.uint8:
        raise KernelError(
            f"{name} takes bytes of a pool [num_blocks, ...] and of a piece [num_ids, ...] that are alike "
            f"but for these numbers; got {pool.shape} of {pool.dtype} and {piece.shape} of {piece.dtype}"
        )
    if block_ids.shape != piece.shape[:1] or block_ids.dtype != np.int64:
        raise KernelError(
            f"{name} takes int64 block_ids [{len(piece)}]; got {block_ids.shape} of {block_ids.dtype}"
        )
    for array in (pool, piece):
        if array.size and ((array.shape[-1] > 1 and array.strides[-1] != 1) or min(array.strides) < 0):
            raise KernelError(
                f"{name} takes arrays whose last dimension is contiguous and whose strides are not negative; "
                f"got strides {array.strides}"
            )
    if not written.flags.writeable:
        raise KernelError(f"{name} writes into memory that is read-only; map it writable")
    if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(pool):
        raise KernelError(
            f"{name} takes block_ids below {len(pool)}; got {block_ids.min()} to {block_ids.max()}"
        )


def _split(array: Bytes) -> tuple[int, list[tuple[int, int]]]:
    """How one block lies: the bytes of its runs, and (size, stride) of the dimensions over the runs, the
    outermost first."""
    run_bytes = 1
    outer: list[tuple[int, int]] = []
    for size, stride in zip(array.shape[:0:-1], array.strides[:0:-1], strict=True):
        if size == 1:
            continue
        if stride == run_bytes and not outer:
            run_bytes *= size
        else:
            outer.insert(0, (size, stride))
    return run_bytes, outer


def _row_bytes(*arrays: Bytes) -> int:
    """The longest row that all runs of both arrays are made of and start at a multiple of."""
    row_bytes = 0
    for array in arrays:
        run_bytes, outer = _split(array)
        row_bytes = gcd(row_bytes, run_bytes, array.strides[0], *(stride for _, stride in outer))
    return row_bytes


def _row_numbers(array: Bytes, row_bytes: int, blocks: Ids) -> Ids:
    """Where the rows of these blocks are in _rows(array), in canonical order."""
    run_bytes, outer = _split(array)
    numbers = blocks * (array.strides[0] // row_bytes)
    for size, stride in [*outer, (run_bytes // row_bytes, row_bytes)]:
        numbers = (numbers[:, None] + np.arange(size) * (stride // row_bytes)).reshape(-1)
    return numbers


def _rows(array: Bytes, row_bytes: int) -> Bytes:
    """[num_rows, row_bytes]: from the array's first byte to its last, and what lies between its runs."""
    if array.flags.c_contiguous:  # as_strided takes 6 us
        return array.reshape(-1, row_bytes)
    span = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)) + 1
    return as_strided(array, (span // row_bytes, row_bytes), (row_bytes, 1), writeable=array.flags.writeable)


def _runs_in_rows(array: Bytes, row_bytes: int) -> Bytes:
    """[num_blocks, ..., rows of a run, row_bytes]: no more dimensions than the array's strides ask for."""
    run_bytes, outer = _split(array)
    shape = (len(array), *(size for size, _ in outer), run_bytes // row_bytes, row_bytes)
    strides = (array.strides[0], *(stride for _, stride in outer), row_bytes, 1)
    return as_strided(array, shape, strides, writeable=False)
