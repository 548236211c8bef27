"""Gather and scatter of KV blocks on a GPU: right, how fast, and what they cost the model beside them.

A section of benchmarks/gpu.py; by itself, `.venv/bin/python -P benchmarks/gpu_kernels.py` prints it as JSON.
Speeds count bytes read and written, and stand beside a plain device copy of as many bytes that lie together.
The SMs that a copy uses are at most its programs. "beside" is the time of bf16 matrix products while copies
go on in another stream, over their time alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diphase.kernels.kv_gather import kv_gather_reference, kv_scatter_reference
from diphase.kernels.kv_gather_triton import NUM_PROGRAMS, kv_gather_triton, kv_scatter_triton

BLOCK_SIZE, HEAD_DIM, NUM_LAYERS = 16, 64, 32
HEADS = (1, 3, 8, 32)
"""K or V of a layer is one run: 2, 6, 16 and 64 KiB."""
PROGRAMS = (1, 5, NUM_PROGRAMS, 40, 80, 132, 264)
COPY_BYTES = 256 << 20
POOL_COPIES = 4
"""The pool has so many times what is copied, and the blocks lie scattered in it."""
REPEATS = 5
QUEUED = 8
"""Copies in a row: the host's time to queue them is hidden but for the first."""
MATRIX = 8192
MATRIX_PRODUCTS = 10


def section() -> dict[str, Any]:
    """Needs a CUDA device with 4 GiB free."""
    return {
        "what": "KV gather and scatter kernels",
        "copy_mib": COPY_BYTES >> 20,
        "runs": [measure(num_heads) for num_heads in HEADS],
        "beside": [beside(num_programs) for num_programs in PROGRAMS],
    }


def sides(num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool of random bits, a piece and the blocks that are copied."""
    block_shape = (NUM_LAYERS, 2, num_heads, BLOCK_SIZE, HEAD_DIM)
    num_ids = COPY_BYTES // (torch.Size(block_shape).numel() * 2)
    num_blocks = POOL_COPIES * num_ids
    pool = torch.randint(-(2**15), 2**15, (num_blocks, *block_shape), dtype=torch.int16, device="cuda")
    piece = torch.zeros(num_ids, *block_shape, dtype=torch.int16, device="cuda")
    scattered = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))[:num_ids]
    return pool, piece, scattered.cuda()


def measure(num_heads: int) -> dict[str, Any]:
    pool, piece, block_ids = sides(num_heads)
    right = is_right(pool, piece, block_ids)
    plain = gb_s(partial(piece.view(-1).copy_, pool.view(-1)[: piece.numel()]), piece)
    speeds = []
    for num_programs in PROGRAMS:
        gather = partial(kv_gather_triton, piece, pool, block_ids, num_programs=num_programs)
        scatter = partial(kv_scatter_triton, pool, piece, block_ids, num_programs=num_programs)
        speeds.append(
            {
                "programs": num_programs,
                "gather_gb_s": gb_s(gather, piece),
                "scatter_gb_s": gb_s(scatter, piece),
            }
        )
    return {
        "run_bytes": num_heads * BLOCK_SIZE * HEAD_DIM * 2,
        "equals_reference": right,
        "plain_copy_gb_s": plain,
        "speeds": speeds,
    }


def is_right(pool: torch.Tensor, piece: torch.Tensor, block_ids: torch.Tensor) -> bool:
    """Whether the kernels do what the references do, with a part of a piece's heads and layers too."""
    wanted = torch.zeros_like(piece)
    kv_gather_triton(piece, pool, block_ids)
    kv_gather_reference(wanted, pool, block_ids)
    right = torch.equal(piece, wanted)
    wanted.zero_()
    piece.zero_()
    last = piece.shape[3] - 1
    kv_gather_triton(piece[:, 1:, :, last:], pool[:, :-1, :, :1], block_ids)
    kv_gather_reference(wanted[:, 1:, :, last:], pool[:, :-1, :, :1], block_ids)
    right = right and torch.equal(piece, wanted)
    other = pool.clone()
    kv_scatter_triton(pool, piece, block_ids.flip(0))
    kv_scatter_reference(other, piece, block_ids.flip(0))
    return right and torch.equal(pool, other)


def milliseconds(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> float:
    """Of the current stream, the median of several, with what `meanwhile` queues on others going on."""
    work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        meanwhile()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def gb_s(copy: Callable[[], object], copied: torch.Tensor) -> float:
    def copies() -> None:
        for _ in range(QUEUED):
            copy()

    return round(2 * QUEUED * copied.numel() * copied.element_size() / milliseconds(copies) / 1e6, 1)


def beside(num_programs: int) -> dict[str, Any]:
    pool, piece, block_ids = sides(HEADS[1])
    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    stream = torch.cuda.Stream()
    gather = partial(kv_gather_triton, piece, pool, block_ids, num_programs=num_programs)

    def products() -> None:
        for _ in range(MATRIX_PRODUCTS):
            torch.mm(a, b, out=out)

    alone_ms = milliseconds(products)
    # Three times as many as fit beside them, since both slow each other down.
    num_copies = int(3 * alone_ms / milliseconds(gather)) + 1

    def copies() -> None:
        with torch.cuda.stream(stream):
            for _ in range(num_copies):
                gather()

    beside_ms = milliseconds(products, meanwhile=copies)
    return {"programs": num_programs, "products_time_to_alone": round(beside_ms / alone_ms, 3)}


if __name__ == "__main__":
    print(json.dumps(section(), indent=1))
