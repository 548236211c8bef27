from __future__ import annotations

import pytest
import torch
from diphase.kernels import paged_attention_cpu
from diphase.kernels.paged_attention import PagedAttention, ReferencePagedAttention, Segment
from diphase.kernels.paged_attention_cpu import CpuPagedAttention, padded_length
from diphase.proto.errors import KernelError

from .pools import BLOCK_SIZE, random_pool, segment

NUM_BLOCKS = 200


@pytest.fixture(params=["grouped freely", "grouped by position"])
def numerics(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of keeping a row's bits: as this machine has it, and as one without AMX would."""
    if request.param == "grouped by position":
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(paged_attention_cpu, "_is_row_invariant", lambda *_: False)


def run(attention: PagedAttention, segments: list[Segment], q: torch.Tensor, layer: int = 1) -> torch.Tensor:
    """Attention of q [num_tokens, heads, dim], the same whether rows of other numbers follow or none."""
    step = attention.plan(segments)
    alone, among = (torch.cat((q, torch.ones(more, *q.shape[1:], dtype=q.dtype))) for more in (0, 130))
    outs = []
    for rows in (alone, among):
        out = torch.full_like(rows, 7.0)
        step.run(out, rows, layer)
        assert bool((out[len(q) :] == 7.0).all())
        outs.append(out[: len(q)])
    assert torch.equal(*outs)
    return outs[0]


def queries(num_rows: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, num_heads, head_dim, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("shape", [(2, 2, 64), (9, 3, 64), (8, 1, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.usefixtures("numerics")
def test_cpu_path_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, layer: int) -> None:
    num_q_heads, num_kv_heads, head_dim = shape
    pool = random_pool(NUM_BLOCKS, num_kv_heads, head_dim, dtype)
    segments = [
        segment(0, 1, single=True),
        segment(40, 1, first_block=1, single=True),
        segment(700, 1, first_block=2, single=True),
        segment(0, 130, first_block=1),  # a whole prompt over more than a tile
        segment(100, 77, first_block=0),  # a piece that begins and ends inside of tiles
        segment(63, 1, first_block=2),  # a piece of one row
    ]
    q = queries(sum(s.num_rows for s in segments), num_q_heads, head_dim, dtype)
    expected = run(ReferencePagedAttention(pool, num_q_heads, 1024), segments, q, layer)
    result = run(CpuPagedAttention(pool, num_q_heads, 1024), segments, q, layer)
    torch.testing.assert_close(result, expected, atol=2e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(2, 2), (4, 2), (9, 3)])
def test_rows_have_the_same_bits_in_any_company(numerics: str, num_q_heads: int, num_kv_heads: int) -> None:
    pool = random_pool(NUM_BLOCKS, num_kv_heads, 64, torch.bfloat16)
    attention = CpuPagedAttention(pool, num_q_heads, 1024)
    q = queries(300, num_q_heads, 64, torch.bfloat16)
    whole = run(attention, [segment(0, 300)], q)
    for size in (7, 64, 129):
        pieces = [segment(first, min(size, 300 - first)) for first in range(0, 300, size)]
        assert torch.equal(run(attention, pieces, q), whole)
    alone = [segment(i, 1, single=True) for i in range(300)]
    rows = torch.cat([run(attention, [piece], q[i : i + 1]) for i, piece in enumerate(alone)])
    assert torch.equal(run(attention, alone, q), rows)
    if attention.row_invariant:
        assert torch.equal(rows, whole)


def test_blocks_behind_the_context_are_never_looked_at() -> None:
    pool = random_pool(NUM_BLOCKS, 2, 32, torch.float32)
    attention = CpuPagedAttention(pool, 4, 1024)
    q = queries(6, 4, 32, torch.float32)
    segments = [segment(20, 1, single=True), segment(30, 5, first_block=1)]
    before = run(attention, segments, q)
    used = {0: 16, 3: 5, 1: 16, 4: 16, 7: 3}  # block: slots in use
    for block in range(NUM_BLOCKS):
        pool[block, :, :, :, used.get(block, 0) :] = 1e4
    assert torch.equal(run(attention, segments, q), before)


def test_padded_length_wastes_little_and_takes_few_values() -> None:
    lengths = [padded_length(n) for n in range(1, 8193)]
    assert all(n <= length < max(n + 64, n * 1.25) for n, length in enumerate(lengths, 1))
    assert all(length % BLOCK_SIZE == 0 for length in lengths)
    assert len(set(lengths)) < 40


def test_wrong_shapes_are_refused() -> None:
    pool = random_pool(4, 2, 32, torch.float32)
    with pytest.raises(KernelError, match="contiguous"):
        CpuPagedAttention(pool.transpose(0, 1), 4, 64)
    with pytest.raises(KernelError, match="3 query heads"):
        CpuPagedAttention(pool, 3, 64)
    with pytest.raises(KernelError, match="block_size 48"):
        CpuPagedAttention(torch.zeros(2, 1, 2, 2, 48, 32), 4, 64)
    step = CpuPagedAttention(pool, 4, 64).plan([segment(3, 1, single=True)])
    good = torch.zeros(1, 4, 32)
    for bad in (good[:0], good[:, :3], good.bfloat16(), good[0]):
        with pytest.raises(KernelError, match="paged_attention takes q"):
            step.run(good, bad, 0)
        with pytest.raises(KernelError, match="paged_attention takes out"):
            step.run(bad, good, 0)
