"""Block-major against layer-major KV pools: what attention pays to gather, and what a hand-off pays to push.

    .venv/bin/python -P benchmarks/kv_layout.py [--output docs/results/kv_layout.json]

Both pools hold the default model's KV (30 layers, 3 heads of 64, blocks of 16 tokens, bf16).
block-major: [block][layer][k|v][head][slot][dim]; layer-major: [layer][block][k|v][head][slot][dim].
Attention: one decode step's gathers of all layers, as the CPU kernel does them. Push: copying a prompt's
blocks into another process's pool, whole or a group of layers at a time, run by run; and the number of runs,
which is what costs on real transports (a descriptor each). Blocks lie scattered or side by side.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diphase.benchmarks import harness
from diphase.proto.kv_layout import KvLayout

LAYOUT = KvLayout(model="smollm2", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bf16")
NUM_BLOCKS = 1456
PROMPT_BLOCKS = 32
LAYERS_AT_ONCE = 5
GATHERS = ((1, 128), (8, 1024))
"""(batch, context)"""
REPEATS = 15

Runs = list[tuple[int, int]]
"""(offset, length) in bytes."""


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    layout: str
    median_ms: float
    num_runs: int


def gather_ms(pool: torch.Tensor, block_stride: int, layer_stride: int, batch: int, context: int) -> float:
    """One index_select for each layer, K and V together, rows of one head of one block."""
    rng = random.Random(0)
    num_blocks = context // LAYOUT.block_size
    heads = np.arange(2 * LAYOUT.num_kv_heads)
    tables = np.array([rng.sample(range(NUM_BLOCKS), num_blocks) for _ in range(batch)])
    first = (tables[:, None, :] * block_stride + heads[None, :, None]).reshape(-1)
    layers = [torch.from_numpy(first + layer * layer_stride) for layer in range(LAYOUT.num_layers)]
    rows = pool.view(-1, LAYOUT.block_size * LAYOUT.head_dim)
    out = torch.empty(len(first), rows.shape[1], dtype=rows.dtype)

    def step() -> None:
        for index in layers:
            torch.index_select(rows, 0, index, out=out)

    return timed(step)


def block_major_runs(blocks: list[int], first_layer: int, num_layers: int) -> Runs:
    """One run a block; neighbouring blocks are one run where all layers are wanted."""
    return coalesced([LAYOUT.run(block, first_layer, num_layers) for block in blocks])


def layer_major_runs(blocks: list[int], first_layer: int, num_layers: int) -> Runs:
    """One run a block and layer; neighbouring blocks are one run within a layer."""
    size = LAYOUT.layer_bytes
    return coalesced(
        [
            ((layer * NUM_BLOCKS + block) * size, size)
            for layer in range(first_layer, first_layer + num_layers)
            for block in blocks
        ]
    )


def coalesced(runs: Runs) -> Runs:
    joined: Runs = []
    for offset, length in runs:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((offset, length))
    return joined


def push_ms(source: np.ndarray, target: np.ndarray, pushes: list[Runs]) -> float:
    def step() -> None:
        for runs in pushes:
            for offset, length in runs:
                target[offset : offset + length] = source[offset : offset + length]

    return timed(step)


def timed(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1000.0)
    return round(statistics.median(times), 3)


def shared_pool() -> mmap.mmap:
    size_bytes = NUM_BLOCKS * LAYOUT.block_bytes
    fd = os.memfd_create("kv-layout")
    os.ftruncate(fd, size_bytes)
    pool = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(fd)
    return pool


def measure() -> list[Result]:
    mine, peer = shared_pool(), shared_pool()
    pool = torch.frombuffer(mine, dtype=torch.bfloat16)
    pool.normal_(generator=torch.Generator().manual_seed(0))
    heads = 2 * LAYOUT.num_kv_heads
    strides = {
        "block-major": (LAYOUT.num_layers * heads, heads),
        "layer-major": (heads, NUM_BLOCKS * heads),
    }
    results = []
    for batch, context in GATHERS:
        for name, (block_stride, layer_stride) in strides.items():
            median = gather_ms(pool, block_stride, layer_stride, batch, context)
            results.append(Result(f"gather, batch {batch}, context {context}", name, median, 0))
    source, target = np.frombuffer(mine, np.uint8), np.frombuffer(peer, np.uint8)
    scattered = random.Random(1).sample(range(NUM_BLOCKS), PROMPT_BLOCKS)
    for where, blocks in (("scattered", scattered), ("side by side", list(range(100, 100 + PROMPT_BLOCKS)))):
        for at_once in (LAYOUT.num_layers, LAYERS_AT_ONCE):
            for name, runs_of in (("block-major", block_major_runs), ("layer-major", layer_major_runs)):
                pushes = [runs_of(blocks, first, at_once) for first in range(0, LAYOUT.num_layers, at_once)]
                case = f"push 512 tokens, blocks {where}, {at_once} layers at once"
                results.append(Result(case, name, push_ms(source, target, pushes), sum(map(len, pushes))))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/kv_layout.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    for result in results:
        print(f"{result.case:58} {result.layout:12} {result.median_ms:8.3f} ms {result.num_runs or '':>5}")
    document = {
        "what": "block-major against layer-major KV pools",
        "results": [asdict(result) for result in results],
    }
    harness.write_result(options.output, document)


if __name__ == "__main__":
    main()
