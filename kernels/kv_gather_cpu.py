"""Gathers KV blocks into a staging slot and scatters them back, in host memory, with numpy alone.

The hand-off's thread copies beside the engine's on a laptop, so each copy is a numpy call over all of its
rows: it lets go of the interpreter lock for as long as it takes, and numpy starts no threads. Knows no torch:
the hand-off of a worker whose engine needs none can use it.
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


def blocks_of(buffer: memoryview, layout: KvLayout) -> Bytes:
    """[num_blocks, num_layers, 2, num_kv_heads, bytes of a head]: a pool, or the part of a slot that is used,
    as it lies. Ranges of layers and heads are slices of it.

    Raises:
        KernelError: `buffer` is not a number of whole blocks.
    """
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
        out: [len(block_ids), ...], writable; of the slot, all or a range of its layers and heads.
        pool: [num_blocks, ...], alike from the second dimension on; the last dimension contiguous in both.
        block_ids: [len(out)], below num_blocks.

    Raises:
        KernelError: shapes, dtypes or strides do not fit, or an id is not of the pool.
    """
    _check("gather_blocks", out, pool, out, block_ids)
    if not out.size:
        return
    row_bytes = _row_bytes(out, pool)
    source, target = _rows(pool, row_bytes), _rows(out, row_bytes)
    taken = _row_numbers(pool, row_bytes, block_ids)
    if out.flags.c_contiguous:
        np.take(source, taken, axis=0, out=target, mode="clip")
    else:
        _move(target, _row_numbers(out, row_bytes, np.arange(len(out))), source, taken)


def scatter_blocks(pool: Bytes, staged: Bytes, block_ids: Ids) -> None:
    """pool[block_ids[i]] = staged[i]; the ids are distinct. Otherwise as gather_blocks."""
    _check("scatter_blocks", pool, pool, staged, block_ids)
    if not staged.size:
        return
    row_bytes = _row_bytes(staged, pool)
    source, target = _rows(staged, row_bytes), _rows(pool, row_bytes)
    put = _row_numbers(pool, row_bytes, block_ids)
    if staged.flags.c_contiguous:
        target[put] = source
    else:
        _move(target, put, source, _row_numbers(staged, row_bytes, np.arange(len(staged))))


def _check(name: str, written: Bytes, pool: Bytes, slot: Bytes, block_ids: Ids) -> None:
    if pool.ndim < 2 or pool.shape[1:] != slot.shape[1:] or not pool.dtype == slot.dtype == np.uint8:
        raise KernelError(
            f"{name} takes bytes of a pool [num_blocks, ...] and of a slot [num_ids, ...] that are alike but "
            f"for the number of blocks; got {pool.shape} of {pool.dtype} and {slot.shape} of {slot.dtype}"
        )
    if block_ids.shape != slot.shape[:1] or block_ids.dtype != np.int64:
        raise KernelError(
            f"{name} takes int64 block_ids [{len(slot)}]; got {block_ids.shape} of {block_ids.dtype}"
        )
    for array in (pool, slot):
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


def _move(target: Bytes, put: Ids, source: Bytes, taken: Ids) -> None:
    """target[put] = source[taken], in pieces that pass through the cache: numpy has no copy that is indexed
    on both sides."""
    piece = max(1, _BOUNCE_BYTES // source.shape[1])
    bounce = np.empty((piece, source.shape[1]), np.uint8)
    for begin in range(0, len(put), piece):
        rows = bounce[: len(put) - begin]
        np.take(source, taken[begin : begin + piece], axis=0, out=rows, mode="clip")
        target[put[begin : begin + piece]] = rows
