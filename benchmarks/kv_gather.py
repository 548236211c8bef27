"""What gathering KV blocks into a piece of a staging buffer costs on the CPU, and scattering them back.

    .venv/bin/python -P benchmarks/kv_gather.py [--output docs/results/kv_gather.json]

The default model's KV (30 layers, 3 heads of 64, blocks of 16 tokens, bf16) in a pool in shared memory, the
blocks scattered. In turns with each copy, a memcpy of as many bytes from anywhere in the pool into the same
piece: the ratio of the medians is the result, 1.0 where the copy is as quick as memcpy.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from diphase.benchmarks import harness
from diphase.kernels.kv_gather_cpu import blocks_of, gather_blocks, scatter_blocks
from diphase.proto.kv_layout import KvLayout

LAYOUT = KvLayout(model="smollm2", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bf16")
NUM_BLOCKS = 1456
ROUNDS = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    num_blocks: int
    num_layers: int = LAYOUT.num_layers
    num_heads: int = LAYOUT.num_kv_heads
    piece_heads: int = LAYOUT.num_kv_heads
    """More than num_heads: the piece is of several ranks."""


CASES = (
    Case(name="whole blocks", num_blocks=128),
    Case(name="5 layers", num_blocks=128, num_layers=5),
    Case(name="1 layer", num_blocks=128, num_layers=1),
    Case(name="1 layer", num_blocks=32, num_layers=1),
    Case(name="1 head of 3 into a piece of its own", num_blocks=128, num_heads=1, piece_heads=1),
    Case(name="all heads into a piece of two ranks", num_blocks=128, piece_heads=6),
    Case(name="1 head of 3 into a piece of 3", num_blocks=128, num_heads=1),
)


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    num_blocks: int
    run_bytes: int
    """Of the pool, from one gap to the next."""
    mib: float
    memcpy_gb_s: float
    gather_to_memcpy: float
    scatter_to_memcpy: float


def shared(size_bytes: int) -> memoryview:
    """Shared memory whose pages are all there."""
    fd = os.memfd_create("kv-gather")
    os.ftruncate(fd, size_bytes)
    memory = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(fd)
    return memoryview(memory)


def timed(copy: Callable[..., None], *arrays: np.ndarray) -> float:
    started = time.perf_counter()
    copy(*arrays)
    return time.perf_counter() - started


def measure(case: Case, pool_bytes: memoryview, rng: random.Random) -> Result:
    piece_layout = replace(LAYOUT, num_layers=case.num_layers, num_kv_heads=case.piece_heads)
    piece_bytes = shared(case.num_blocks * piece_layout.block_bytes)
    piece = blocks_of(piece_bytes, piece_layout)[:, :, :, : case.num_heads]
    pool = blocks_of(pool_bytes, LAYOUT)[:, : case.num_layers, :, : case.num_heads]
    source, target = np.frombuffer(pool_bytes, np.uint8), np.frombuffer(piece_bytes, np.uint8)[: piece.size]
    times: dict[str, list[float]] = {"memcpy": [], "gather": [], "scatter": []}

    for _ in range(ROUNDS):
        first = rng.randrange(len(source) - piece.size)
        times["memcpy"].append(timed(np.copyto, target, source[first : first + piece.size]))
        for name, copy, to, of in (
            ("gather", gather_blocks, piece, pool),
            ("scatter", scatter_blocks, pool, piece),
        ):
            ids = np.array(rng.sample(range(NUM_BLOCKS), case.num_blocks))
            times[name].append(timed(copy, to, of, ids))
    median = {name: statistics.median(values) for name, values in times.items()}
    heads_run = LAYOUT.layer_bytes // 2 // LAYOUT.num_kv_heads * case.num_heads
    whole_layers = case.num_heads == LAYOUT.num_kv_heads
    return Result(
        case=case.name,
        num_blocks=case.num_blocks,
        run_bytes=2 * heads_run * case.num_layers if whole_layers else heads_run,
        mib=round(piece.size / 2**20, 2),
        memcpy_gb_s=round(piece.size / median["memcpy"] / 1e9, 1),
        gather_to_memcpy=round(median["memcpy"] / median["gather"], 2),
        scatter_to_memcpy=round(median["memcpy"] / median["scatter"], 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/kv_gather.json"))
    options = parser.parse_args()
    rng = random.Random(0)
    pool_bytes = shared(NUM_BLOCKS * LAYOUT.block_bytes)
    np.frombuffer(pool_bytes, np.uint8)[:] = 1
    results = [measure(case, pool_bytes, rng) for case in CASES]
    for result in results:
        print(
            f"{result.case:36} {result.num_blocks:4} blocks, runs of {result.run_bytes >> 10:4} KiB, "
            f"{result.mib:6} MiB: memcpy {result.memcpy_gb_s:5} GB/s, gather {result.gather_to_memcpy:.2f}, "
            f"scatter {result.scatter_to_memcpy:.2f} of it"
        )
    what = "gather and scatter of KV blocks on the CPU, against memcpy"
    harness.write_result(options.output, {"what": what, "results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
