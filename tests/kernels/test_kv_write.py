from __future__ import annotations

import pytest
import torch
from diphase.kernels.kv_write import KvWrite, kv_write_cpu, kv_write_reference
from diphase.proto.errors import KernelError

from .pools import random_pool


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (6, torch.bfloat16), (16, torch.float32)]
)
def test_cpu_path_equals_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    pool = random_pool(10, 3, head_dim, dtype)
    wanted = pool.clone()
    generator = torch.Generator().manual_seed(1)
    # Keys and values as they lie in a fused projection: behind the queries of each row.
    rows = torch.randn(4, 9 + 6, head_dim, generator=generator).to(dtype)
    kv = rows[:, 9:].unflatten(1, (2, 3))
    block_ids, slots = torch.tensor([7, 7, 0, 9]), torch.tensor([14, 15, 0, 3])
    kv_write_reference(wanted[:, 1], kv, block_ids, slots)
    kv_write_cpu(pool[:, 1], kv, block_ids, slots)
    assert torch.equal(pool, wanted)


def test_no_tokens_write_nothing() -> None:
    pool = random_pool(4, 2, 8, torch.bfloat16)
    kept = pool.clone()
    none = torch.empty(0, dtype=torch.int64)
    kv_write_cpu(pool[:, 0], torch.empty(0, 2, 2, 8, dtype=torch.bfloat16), none, none)
    assert torch.equal(pool, kept)


@pytest.mark.parametrize("write", [kv_write_cpu, kv_write_reference])
def test_wrong_shapes_and_dtypes_are_refused(write: KvWrite) -> None:
    pool = random_pool(4, 2, 8, torch.float32)[:, 0]
    kv, ids = torch.zeros(3, 2, 2, 8), torch.zeros(3, dtype=torch.int64)
    for bad_kv, bad_blocks, bad_slots in (
        (kv[:, :, :1], ids, ids),
        (kv.bfloat16(), ids, ids),
        (kv, ids[:2], ids),
        (kv, ids, ids[:2]),
        (kv, ids.int(), ids),
    ):
        with pytest.raises(KernelError):
            write(pool, bad_kv, bad_blocks, bad_slots)
    with pytest.raises(IndexError):
        write(pool, kv, ids + 4, ids)
