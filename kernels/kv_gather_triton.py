"""Gather and scatter of KV blocks on a GPU: one kernel, run by a fixed number of programs.

A transfer goes on beside the steps of a model, so it must not take the SMs. A few programs of one warp loop
over all the work, which is how lightllm moves KV between GPUs with twenty of them; each SM that a program
sits on has its other warps for the model. What it moves in a second is in proportion to the programs until
the link or the memory is full: `num_programs` is the caller's to choose.

Imported on use: nothing but kernels/registry.py may import it, which does so by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl

from ..proto.errors import KernelError
from .kv_gather import check

NUM_PROGRAMS = 20
WARPS = 1
_ALIGNMENT = 16
"""Bytes of the widest access of a thread."""
_MAX_TILES = 2**30
"""The kernel counts in 32 bits: 64-bit divisions made it spill. Offsets have 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One way to compile the kernel."""

    word_bytes: int
    vector: int
    """Words that an access of a thread may span: runs start and end at multiples of them."""
    rows: int
    """Runs that one pass of a program's loop covers."""
    columns: int
    """Words of each of them."""


LAUNCHES = (
    Launch(word_bytes=8, vector=2, rows=1, columns=1024),
    Launch(word_bytes=8, vector=2, rows=4, columns=256),
    Launch(word_bytes=8, vector=2, rows=16, columns=64),
    Launch(word_bytes=4, vector=1, rows=1, columns=1024),
    Launch(word_bytes=2, vector=1, rows=1, columns=1024),
    Launch(word_bytes=1, vector=1, rows=1, columns=1024),
)
"""All that kv_gather_triton and kv_scatter_triton choose from. A pass of the first three is 8 KiB, sixteen
accesses of each thread in flight at once. The last three are for memory that is not aligned to 16 bytes."""

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def choose_launch(run_bytes: int, *alignments: int) -> Launch:
    """The launch for runs of so many bytes whose addresses are multiples of `alignments`: the widest words,
    and of those the widest tile that is not half empty."""
    aligned = gcd(_ALIGNMENT, run_bytes, *alignments)
    fits = [launch for launch in LAUNCHES if aligned % (launch.word_bytes * launch.vector) == 0]
    best = [launch for launch in fits if launch.word_bytes == fits[0].word_bytes]
    run_words = run_bytes // best[0].word_bytes
    return next((launch for launch in best if launch.columns <= run_words), best[-1])


def kv_gather_triton(
    out: torch.Tensor, pool: torch.Tensor, block_ids: torch.Tensor, *, num_programs: int = NUM_PROGRAMS
) -> None:
    """See KvGather; at most `num_programs` programs of one warp."""
    source, target = check("kv_gather", pool, out, block_ids)
    _copy(target, source, block_ids, num_programs, scatter=False)


def kv_scatter_triton(
    pool: torch.Tensor, staged: torch.Tensor, block_ids: torch.Tensor, *, num_programs: int = NUM_PROGRAMS
) -> None:
    """See KvScatter; at most `num_programs` programs of one warp."""
    target, source = check("kv_scatter", pool, staged, block_ids)
    _copy(target, source, block_ids, num_programs, scatter=True)


def _copy(
    target: torch.Tensor, source: torch.Tensor, block_ids: torch.Tensor, num_programs: int, *, scatter: bool
) -> None:
    """Planes to planes; the pool's are `target` of a scatter, else `source`."""
    if num_programs < 1:
        raise KernelError(f"num_programs is at least 1; got {num_programs}")
    if not target.is_cuda and isinstance(_copy_blocks_kernel, triton.JITFunction):
        raise KernelError(f"the Triton kernels run on CUDA devices; got tensors on {target.device}")
    rows = len(block_ids) * target.shape[1]
    if not rows * target.shape[2]:
        return
    item_bytes = target.element_size()
    strides = [tensor.stride(i) * item_bytes for tensor in (target, source) for i in (0, 1)]
    run_bytes = target.shape[2] * item_bytes
    launch = choose_launch(run_bytes, target.data_ptr(), source.data_ptr(), *strides)
    access_bytes = launch.word_bytes * launch.vector
    tiles = triton.cdiv(rows, launch.rows) * triton.cdiv(run_bytes, launch.columns * launch.word_bytes)
    if tiles >= _MAX_TILES:
        raise KernelError(f"one copy has at most {_MAX_TILES} tiles; got {tiles}: copy fewer blocks at once")
    with torch.cuda.device_of(target):
        _copy_blocks_kernel[(min(num_programs, tiles),)](
            target.view(WORDS[launch.word_bytes]),
            source.view(WORDS[launch.word_bytes]),
            block_ids,
            rows,
            target.shape[1],
            run_bytes // access_bytes,
            len(target if scatter else source),
            *(stride // access_bytes for stride in strides),
            SCATTER=scatter,
            VECTOR=launch.vector,
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            num_warps=WARPS,
        )


# Nothing is specialised, so that there are two compilations of each of LAUNCHES and no more.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_planes",
        "run_accesses",
        "num_pool_blocks",
        "target_block_stride",
        "target_plane_stride",
        "source_block_stride",
        "source_plane_stride",
    ],
    do_not_specialize_on_alignment=["target_ptr", "source_ptr", "block_ids_ptr"],
)
def _copy_blocks_kernel(
    target_ptr: tl.pointer_type,  # [blocks, num_planes, words of a run]
    source_ptr: tl.pointer_type,  # [blocks, num_planes, words of a run]
    block_ids_ptr: tl.pointer_type,  # [num_rows / num_planes] int64
    num_rows: tl.int32,
    num_planes: tl.int32,
    run_accesses: tl.int32,
    num_pool_blocks: tl.int32,
    target_block_stride: tl.int64,
    target_plane_stride: tl.int64,
    source_block_stride: tl.int64,
    source_plane_stride: tl.int64,
    SCATTER: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Each program takes every num_programs-th tile of [ROWS, COLUMNS]; a row is one plane of one block. Runs
    and strides count accesses of VECTOR words."""
    # The words of a thread become one access where the compiler knows what the launcher has checked: from the
    # products with VECTOR and, for the pointers, from the hints.
    word_bytes: tl.constexpr = target_ptr.dtype.element_ty.primitive_bitwidth // 8
    access_bytes: tl.constexpr = word_bytes * VECTOR
    run_words = run_accesses * VECTOR
    num_tiles = tl.cdiv(run_words, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * num_tiles, tl.num_programs(0)):
        rows = (tile // num_tiles) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        columns = (tile % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
        listed, plane = (rows // num_planes).to(tl.int64), (rows % num_planes).to(tl.int64)
        pool_block = tl.load(block_ids_ptr + listed, mask=rows < num_rows, other=-1)
        of_pool = (pool_block >= 0) & (pool_block < num_pool_blocks)
        if SCATTER:
            target_block, source_block = pool_block, listed
        else:
            target_block, source_block = listed, pool_block
        target_row = (target_block * target_block_stride + plane * target_plane_stride) * VECTOR
        source_row = (source_block * source_block_stride + plane * source_plane_stride) * VECTOR
        targets = tl.multiple_of(
            target_ptr + (target_row[:, None] + columns[None, :]), [word_bytes, access_bytes]
        )
        sources = tl.multiple_of(
            source_ptr + (source_row[:, None] + columns[None, :]), [word_bytes, access_bytes]
        )
        mask = of_pool[:, None] & (columns < run_words)[None, :]  # [ROWS, COLUMNS]
        tl.store(targets, tl.load(sources, mask=mask), mask=mask)
