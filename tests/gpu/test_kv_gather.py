from __future__ import annotations

from functools import partial

import pytest
import torch
from diphase.kernels.kv_gather_triton import kv_gather_triton, kv_scatter_triton

from ..kernels import kv_gather_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.why)
@pytest.mark.parametrize("num_programs", [1, 20, 500])
def test_kernel_equals_the_reference(case: cases.Case, num_programs: int) -> None:
    cases.check_gather(partial(kv_gather_triton, num_programs=num_programs), case, "cuda")
    cases.check_scatter(partial(kv_scatter_triton, num_programs=num_programs), case, "cuda")


def test_reshard_is_one_gather_a_source_and_one_scatter_a_destination() -> None:
    cases.check_reshard(kv_gather_triton, kv_scatter_triton, "cuda")


def test_blocks_past_two_to_the_31_accesses() -> None:
    """A pool of 2**31 times sixteen bytes, of which the last block is copied there and back."""
    shape = (30, 2, 3, 16, 64)
    block_bytes = 30 * 2 * 3 * 16 * 64 * 2
    num_blocks = 2**31 * 16 // block_bytes + 2
    if torch.cuda.mem_get_info()[0] < num_blocks * block_bytes + 2**30:
        pytest.skip("needs 33 GiB of GPU memory")
    pool = torch.empty(num_blocks, *shape, dtype=torch.bfloat16, device="cuda")
    staged = cases.random_bytes((2, *shape), torch.bfloat16, 4).cuda()
    block_ids = torch.tensor([num_blocks - 1, 0], device="cuda")
    kv_scatter_triton(pool, staged, block_ids)
    back = torch.zeros_like(staged)
    kv_gather_triton(back, pool, block_ids)
    assert cases.equal_bytes(back, staged)
    assert cases.equal_bytes(pool[-1], staged[0])
