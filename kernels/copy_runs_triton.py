"""Copies runs of bytes from addresses to addresses on a GPU, all with one launch: of 16 KiB runs, a call for
each costs many times what its bytes do. Run by a fixed number of programs, as kv_gather_triton.py says why.

Addresses are of memory that the device can reach, which nothing here can check: a wrong one is an error of
the device. Imported on use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from ..proto.errors import KernelError

NUM_PROGRAMS = 64
WARPS = 4
PIECE_BYTES = 64 * 1024
"""Longer runs are cut, so that every program has about as much to do."""
_ACCESS_BYTES = 16
LAUNCHES = ((8, 2, 1024), (1, 1, 1024))
"""Bytes of a word, words that one access of a thread may span, words of a tile: for runs that begin, end and
arrive at multiples of 16, and for all others."""


def cut(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs, [n, 3]: source, target, length, none of them longer than PIECE_BYTES, none empty."""
    runs = runs[runs[:, 2] > 0]
    counts = -(-runs[:, 2] // PIECE_BYTES)
    pieces = np.repeat(runs, counts, axis=0)
    begins = np.concatenate(([0], np.cumsum(counts)[:-1])) if len(runs) else counts
    offsets = (np.arange(len(pieces)) - np.repeat(begins, counts)) * PIECE_BYTES
    pieces[:, 0] += offsets
    pieces[:, 1] += offsets
    pieces[:, 2] = np.minimum(pieces[:, 2] - offsets, PIECE_BYTES)
    return pieces


def copy_runs_triton(
    runs: NDArray[np.int64], device: torch.device | str, *, num_programs: int = NUM_PROGRAMS
) -> Sequence[torch.Tensor]:
    """Copies the bytes of each run, on the current stream.

    Args:
        runs: [n, 3] int64: source address, target address, length; the targets do not overlap.

    Returns:
        What must stay until the copy has ended.

    Raises:
        KernelError: not of that shape, or no programs.
    """
    if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.int64:
        raise KernelError(f"copy_runs takes int64 [n, 3]; got {runs.dtype}{list(runs.shape)}")
    if num_programs < 1:
        raise KernelError(f"num_programs is at least 1; got {num_programs}")
    pieces = cut(runs)
    if not len(pieces):
        return []
    wide = not (np.bitwise_or.reduce(pieces, axis=None) % _ACCESS_BYTES)
    word_bytes, vector, columns = LAUNCHES[0 if wide else 1]
    longest = int(pieces[:, 2].max()) // word_bytes
    on_host = torch.from_numpy(pieces)
    if torch.device(device).type == "cuda":
        on_host = on_host.pin_memory()
    table = on_host.to(device, non_blocking=True)
    tiles = len(pieces) * triton.cdiv(longest, columns)
    _copy_runs_kernel[(min(num_programs, tiles),)](
        table,
        len(pieces),
        triton.cdiv(longest, columns),
        WORD_BYTES=word_bytes,
        VECTOR=vector,
        COLUMNS=columns,
        num_warps=WARPS,
    )
    return [on_host, table]


def copy_runs_on_stream(
    runs: NDArray[np.int64], device: int, stream: int, *, num_programs: int = NUM_PROGRAMS
) -> Sequence[torch.Tensor]:
    """As copy_runs_triton, on a stream given by its address."""
    on = torch.device("cuda", device)
    with torch.cuda.device(on), torch.cuda.stream(torch.cuda.ExternalStream(stream, device=on)):
        return copy_runs_triton(runs, on, num_programs=num_programs)


def prepare(device: int) -> None:
    """Compiles all of LAUNCHES, which else the first copies would wait for. Blocks."""
    scratch = torch.zeros(256, dtype=torch.uint8, device=torch.device("cuda", device))
    first = scratch.data_ptr()
    with torch.cuda.device(device):
        for length in (_ACCESS_BYTES, 1):
            copy_runs_triton(np.array([[first, first + 128, length]]), scratch.device)
        torch.cuda.synchronize()


@triton.jit(do_not_specialize=["num_runs", "tiles_per_run"], do_not_specialize_on_alignment=["table_ptr"])
def _copy_runs_kernel(
    table_ptr: tl.pointer_type,  # [num_runs, 3] int64: source, target, bytes
    num_runs: tl.int32,
    tiles_per_run: tl.int32,
    WORD_BYTES: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Each program takes every num_programs-th tile of COLUMNS words."""
    access_bytes: tl.constexpr = WORD_BYTES * VECTOR
    for tile in range(tl.program_id(0), num_runs * tiles_per_run, tl.num_programs(0)):
        run = table_ptr + (tile // tiles_per_run) * 3
        if WORD_BYTES == 8:
            source = tl.load(run).to(tl.pointer_type(tl.int64))
            target = tl.load(run + 1).to(tl.pointer_type(tl.int64))
        else:
            source = tl.load(run).to(tl.pointer_type(tl.uint8))
            target = tl.load(run + 1).to(tl.pointer_type(tl.uint8))
        accesses = tl.load(run + 2) // access_bytes
        # What the launcher has checked, said so that the words of a thread become one access.
        source = tl.multiple_of(source, access_bytes)
        target = tl.multiple_of(target, access_bytes)
        columns = (tile % tiles_per_run) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
        mask = columns < accesses * VECTOR
        tl.store(target + columns, tl.load(source + columns, mask=mask), mask=mask)
