"""What every gather and scatter of KV blocks must do, on whatever device: used by the tests of the CPU path,
of the Triton kernel in the interpreter, and of the kernel on a GPU."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diphase.kernels.kv_gather import KvGather, KvScatter, kv_gather_reference, kv_scatter_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Heads and layers of a pool that are copied to or from a part of a piece."""

    why: str
    block_ids: tuple[int, ...] = (6, 0, 4)
    pool_heads: int = 3
    heads: tuple[int, int] = (0, 3)
    """First head of the pool, and how many."""
    piece_heads: int = 3
    piece_first: int = 0
    layers: tuple[int, int] = (0, 3)
    piece_layers: int = 3
    piece_layer: int = 0
    block_size: int = 16
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16


NUM_BLOCKS = 7
NUM_LAYERS = 3

CASES = (
    Case(why="whole blocks: one run each"),
    Case(why="GQA 1: short runs, several in a tile", pool_heads=1, heads=(0, 1), piece_heads=1),
    Case(
        why="GQA 8: runs longer than a tile, 8 of 10 heads so that the last tile is not full",
        pool_heads=10,
        heads=(1, 9),
        piece_heads=9,
        layers=(0, 1),
        piece_layers=1,
    ),
    Case(why="GQA 4: heads of a pool that has more", pool_heads=8, heads=(4, 4), piece_heads=4, head_dim=16),
    Case(why="a range of layers", layers=(1, 2), piece_layers=2),
    Case(why="one layer of a piece that has more", layers=(2, 1), piece_layer=1),
    Case(why="a rank's heads of a piece of two ranks", piece_heads=6, piece_first=3),
    Case(
        why="strided on both sides, in layers and heads",
        heads=(1, 1),
        piece_heads=5,
        piece_first=3,
        layers=(1, 2),
        piece_layer=1,
    ),
    Case(why="no powers of two, runs of 180 bytes: four at a time", block_size=5, head_dim=6),
    Case(why="runs of 30 bytes: two at a time", block_size=5, head_dim=1),
    Case(
        why="odd bytes, one at a time",
        pool_heads=1,
        heads=(0, 1),
        piece_heads=1,
        block_size=5,
        head_dim=3,
        dtype=torch.uint8,
    ),
    Case(why="single bytes", block_size=1, head_dim=1, dtype=torch.uint8, heads=(1, 1), piece_heads=1),
    Case(why="more blocks than programs", block_ids=(1, 2, 3, 4, 5, 6, 0), layers=(0, 1), piece_layers=1),
    Case(why="no blocks", block_ids=()),
    Case(why="no layers", layers=(1, 0), piece_layers=0),
)


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """On the CPU. Any bits, NaNs too: copies must not look at them."""
    generator = torch.Generator().manual_seed(seed)
    last = shape[-1] * dtype.itemsize
    return torch.randint(0, 256, (*shape[:-1], last), generator=generator, dtype=torch.uint8).view(dtype)


def equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@dataclass(frozen=True, slots=True)
class Sides:
    """A pool and a piece with the parts of them that are copied."""

    pool: torch.Tensor
    piece: torch.Tensor
    pool_part: torch.Tensor
    piece_part: torch.Tensor
    block_ids: torch.Tensor


def sides(case: Case, device: str) -> Sides:
    tail = (case.block_size, case.head_dim)
    pool_shape = (NUM_BLOCKS, NUM_LAYERS, 2, case.pool_heads, *tail)
    piece_shape = (len(case.block_ids), case.piece_layers, 2, case.piece_heads, *tail)
    pool = random_bytes(pool_shape, case.dtype, 1).to(device)
    piece = random_bytes(piece_shape, case.dtype, 2).to(device)
    (layer, num_layers), (head, num_heads) = case.layers, case.heads
    return Sides(
        pool,
        piece,
        pool[:, layer : layer + num_layers, :, head : head + num_heads],
        piece[
            :,
            case.piece_layer : case.piece_layer + num_layers,
            :,
            case.piece_first : case.piece_first + num_heads,
        ],
        torch.tensor(case.block_ids, dtype=torch.int64, device=device),
    )


def check_gather(gather: KvGather, case: Case, device: str = "cpu") -> None:
    """Every byte of the piece is as after the reference: those outside of the part are left alone."""
    got, wanted = sides(case, device), sides(case, "cpu")
    gather(got.piece_part, got.pool_part, got.block_ids)
    kv_gather_reference(wanted.piece_part, wanted.pool_part, wanted.block_ids)
    assert equal_bytes(got.piece, wanted.piece)
    assert equal_bytes(got.pool, wanted.pool)


def check_scatter(scatter: KvScatter, case: Case, device: str = "cpu") -> None:
    """As check_gather, of the pool."""
    got, wanted = sides(case, device), sides(case, "cpu")
    scatter(got.pool_part, got.piece_part, got.block_ids)
    kv_scatter_reference(wanted.pool_part, wanted.piece_part, wanted.block_ids)
    assert equal_bytes(got.pool, wanted.pool)
    assert equal_bytes(got.piece, wanted.piece)


def check_reshard(gather: KvGather, scatter: KvScatter, device: str = "cpu") -> None:
    """Two ranks of three heads to three ranks of two: one gather each, one scatter each."""
    whole = random_bytes((NUM_BLOCKS, 2, 2, 6, 16, 8), torch.bfloat16, 3).to(device)
    sources = [whole[:, :, :, first : first + 3].contiguous() for first in (0, 3)]
    targets = [torch.zeros_like(whole[:, :, :, :2]) for _ in range(3)]
    source_ids, target_ids = (torch.tensor(ids, device=device) for ids in ((5, 1, 2), (0, 6, 3)))
    piece = torch.zeros_like(whole[:3])
    for rank, source in enumerate(sources):
        gather(piece[:, :, :, 3 * rank : 3 * rank + 3], source, source_ids)
    for rank, target in enumerate(targets):
        scatter(target, piece[:, :, :, 2 * rank : 2 * rank + 2], target_ids)
    assert equal_bytes(torch.cat([target[target_ids] for target in targets], dim=3), whole[source_ids])


def check_past_two_to_the_31(gather: KvGather, scatter: KvScatter) -> None:
    """There and back through the last block of a pool of 2**31 times sixteen bytes, a thread's widest access;
    only the pages that are touched exist."""
    shape = (2, 2, 2, 8, 8)
    block_bytes = 4 * 2 * 2 * 2 * 8 * 8
    num_blocks = 2**31 * 16 // block_bytes + 2
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, num_blocks * block_bytes)
    memory = mmap.mmap(fd, num_blocks * block_bytes)
    pool = torch.frombuffer(memory, dtype=torch.float32).view(num_blocks, *shape)
    block_ids = torch.tensor([num_blocks - 1, 0])
    staged, back = random_bytes((2, *shape), torch.float32, 4), torch.zeros(2, *shape)
    scatter(pool, staged, block_ids)
    gather(back, pool, block_ids)
    touched = os.fstat(fd).st_blocks * 512
    os.close(fd)
    assert equal_bytes(back, staged)
    assert equal_bytes(pool[-1], staged[0])
    assert touched < 2**20


def wrong_calls() -> list[tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]]:
    """Slots, pools and ids that do not fit, each with what the error says."""
    pool, piece, ids = torch.zeros(4, 2, 2, 3, 8, 4), torch.zeros(3, 2, 2, 3, 8, 4), torch.tensor([0, 1, 2])
    return [
        ("alike", lambda: (piece[0], pool, ids)),
        ("alike", lambda: (piece[:, :1], pool, ids)),
        ("alike", lambda: (piece[:, :, :1], pool[:, :, :1], ids)),
        ("int64", lambda: (piece, pool, ids[:2])),
        ("int64", lambda: (piece, pool, ids.int())),
        ("int64", lambda: (piece, pool, torch.zeros(6, dtype=torch.int64)[::2])),
        ("one dtype", lambda: (piece.half(), pool, ids)),
        ("one device", lambda: (piece, pool.to("meta"), ids)),
        ("strides", lambda: (piece.transpose(4, 5).contiguous().transpose(4, 5), pool, ids)),
        ("strides", lambda: (piece[..., :2], pool[..., :2], ids)),
        ("strides", lambda: (piece.transpose(1, 2), pool, ids)),
    ]
