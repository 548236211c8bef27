from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diphase.kernels import kv_gather_cpu as in_host_memory
from diphase.kernels.kv_gather import (
    KvGather,
    KvScatter,
    kv_gather_cpu,
    kv_gather_reference,
    kv_scatter_cpu,
    kv_scatter_reference,
)
from diphase.kernels.kv_gather_cpu import blocks_of, gather_blocks, scatter_blocks
from diphase.proto.errors import KernelError
from diphase.proto.kv_layout import KvLayout

from . import kv_gather_cases as cases

LAYOUT = KvLayout(model="m", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="bf16")

COPIES = [(kv_gather_reference, kv_scatter_reference), (kv_gather_cpu, kv_scatter_cpu)]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.why)
def test_cpu_path_equals_the_reference(case: cases.Case) -> None:
    cases.check_gather(kv_gather_cpu, case)
    cases.check_scatter(kv_scatter_cpu, case)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.why)
def test_a_part_of_a_piece_is_gathered_alike_a_block_at_a_time_and_through_the_cache(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for long_block_bytes, bounce_bytes in ((1, 1), (1 << 30, 1), (1 << 30, 20_000)):
        monkeypatch.setattr(in_host_memory, "_LONG_BLOCK_BYTES", long_block_bytes)
        monkeypatch.setattr(in_host_memory, "_BOUNCE_BYTES", bounce_bytes)
        cases.check_gather(kv_gather_cpu, case)


def test_the_reference_copies_what_it_says() -> None:
    pool, piece = (
        torch.arange(4.0).view(4, 1, 1, 1, 1, 1).expand(4, 1, 2, 1, 1, 2).contiguous(),
        torch.zeros(2),
    )
    piece = torch.zeros(2, 1, 2, 1, 1, 2)
    kv_gather_reference(piece, pool, torch.tensor([3, 1]))
    assert piece.flatten(1).tolist() == [[3.0] * 4, [1.0] * 4]
    kv_scatter_reference(pool, piece, torch.tensor([0, 2]))
    assert pool.flatten(1)[:, 0].tolist() == [3.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize(("gather", "scatter"), COPIES)
def test_reshard_is_one_gather_a_source_and_one_scatter_a_destination(
    gather: KvGather, scatter: KvScatter
) -> None:
    cases.check_reshard(gather, scatter)


def test_blocks_past_two_to_the_31_accesses() -> None:
    cases.check_past_two_to_the_31(kv_gather_cpu, kv_scatter_cpu)


@pytest.mark.parametrize(("gather", "scatter"), COPIES)
def test_wrong_shapes_dtypes_devices_and_strides_are_refused(gather: KvGather, scatter: KvScatter) -> None:
    for said, call in cases.wrong_calls():
        piece, pool, block_ids = call()
        with pytest.raises(KernelError, match=said):
            gather(piece, pool, block_ids)
        with pytest.raises(KernelError, match=said):
            scatter(pool, piece, block_ids)


@pytest.mark.parametrize(("gather", "scatter"), COPIES)
@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_that_are_not_of_the_pool_are_refused_before_anything_is_written(
    gather: KvGather, scatter: KvScatter, bad: int
) -> None:
    pool, piece = torch.zeros(4, 1, 2, 1, 2, 2), torch.ones(2, 1, 2, 1, 2, 2)
    block_ids = torch.tensor([0, bad])
    with pytest.raises(KernelError, match="below 4"):
        gather(piece, pool, block_ids)
    with pytest.raises(KernelError, match="below 4"):
        scatter(pool, piece, block_ids)
    assert pool.eq(0).all()
    assert piece.eq(1).all()


def test_pool_and_slot_as_bytes() -> None:
    pool = blocks_of(memoryview(bytearray(range(256)) * (3 * LAYOUT.block_bytes // 256)), LAYOUT)
    assert pool.shape == (3, 3, 2, 2, 64)
    piece_layout = KvLayout(model="m", num_layers=1, num_kv_heads=4, head_dim=8, block_size=4, dtype="bf16")
    memory = bytearray(2 * piece_layout.block_bytes)
    piece = blocks_of(memoryview(memory), piece_layout)
    gather_blocks(piece[:, :, :, 1:3], pool[:, 2:], np.array([2, 0]))
    assert (piece[:, 0, :, 1:3] == pool[[2, 0], 2]).all()
    assert not piece[:, :, :, [0, 3]].any()
    scatter_blocks(pool[:, :1], piece[:, :, :, 1:3], np.array([1, 2]))
    assert (pool[[1, 2], 0] == piece[:, 0, :, 1:3]).all()


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(KernelError, match="1 too many"):
        blocks_of(memoryview(bytes(LAYOUT.block_bytes + 1)), LAYOUT)
    with pytest.raises(KernelError, match="have bytes"):
        blocks_of(memoryview(b""), replace(LAYOUT, num_layers=0))
    pool, piece, ids = np.zeros((4, 3, 8), np.uint8), np.zeros((2, 3, 8), np.uint8), np.array([0, 1])
    frozen = piece.copy()
    frozen.flags.writeable = False
    for said, call in (
        ("alike", (piece[:, :2], pool, ids)),
        ("alike", (piece.astype(np.int8), pool, ids)),
        ("int64", (piece, pool, ids.astype(np.int32))),
        ("int64", (piece, pool, ids[:1])),
        ("last dimension", (piece[:, :, ::2], pool[:, :, :4], ids)),
        ("not negative", (piece[::-1], pool, ids)),
        ("read-only", (frozen, pool, ids)),
        ("below 4", (piece, pool, ids + 3)),
    ):
        with pytest.raises(KernelError, match=said):
            gather_blocks(*call)


@pytest.mark.parametrize("first_head", [0, 1], ids=["contiguous piece", "part of a piece"])
@pytest.mark.parametrize("copy", [gather_blocks, scatter_blocks])
def test_other_threads_run_while_it_copies(copy: Callable[..., None], first_head: int) -> None:
    """The interpreter takes its lock from no thread here, so another runs only if the copy lets go of it."""
    pool = np.ones((64, 2, 2, 1 << 16), np.uint8)
    piece = np.zeros((64, 2, 2 + first_head, 1 << 16), np.uint8)[:, :, first_head:]
    pair = (piece, pool) if copy is gather_blocks else (pool, piece)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        # A busy machine may be late to wake this thread, but not every time.
        assert any(_runs_beside(lambda: copy(*pair, np.arange(64))) for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def _runs_beside(copy: Callable[[], None]) -> bool:
    """Whether this thread ran before the copy of another was over."""
    started, over = threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        copy()
        over.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    beside = not over.is_set()
    thread.join()
    return beside


def test_copies_in_host_memory_load_no_torch() -> None:
    code = "import sys, diphase.kernels.kv_gather_cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=False).returncode == 0
