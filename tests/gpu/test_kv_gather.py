from __future__ import annotations

from functools import partial

import pytest
import torch
from diphase.kernels.registry import kv_copies_for

from ..kernels import kv_gather_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.why)
@pytest.mark.parametrize("num_programs", [1, 20, 500])
def test_kernel_equals_the_reference(case: cases.Case, num_programs: int) -> None:
    copies = kv_copies_for("cuda")
    cases.check_gather(partial(copies.kv_gather, num_programs=num_programs), case, "cuda")
    cases.check_scatter(partial(copies.kv_scatter, num_programs=num_programs), case, "cuda")


def test_reshard_is_one_gather_a_source_and_one_scatter_a_destination() -> None:
    copies = kv_copies_for("cuda")
    cases.check_reshard(copies.kv_gather, copies.kv_scatter, "cuda")


def test_blocks_past_two_to_the_31_words() -> None:
    """A pool of 16 GiB and a bit, of which the last block is copied there and back."""
    copies = kv_copies_for("cuda")
    shape = (30, 2, 3, 16, 64)
    block_bytes = 30 * 2 * 3 * 16 * 64 * 2
    num_blocks = 2**31 * 8 // block_bytes + 2
    if torch.cuda.mem_get_info()[0] < num_blocks * block_bytes + 2**30:
        pytest.skip("needs 17 GiB of GPU memory")
    pool = torch.empty(num_blocks, *shape, dtype=torch.bfloat16, device="cuda")
    staged = cases.random_bytes((2, *shape), torch.bfloat16, 4).cuda()
    block_ids = torch.tensor([num_blocks - 1, 0], device="cuda")
    copies.kv_scatter(pool, staged, block_ids)
    back = torch.zeros_like(staged)
    copies.kv_gather(back, pool, block_ids)
    assert cases.equal_bytes(back, staged)
    assert cases.equal_bytes(pool[-1], staged[0])
