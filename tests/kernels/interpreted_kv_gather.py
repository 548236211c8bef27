"""The Triton kernel of gather and scatter in the interpreter. Run by test_kv_gather_triton.py in a process
of its own: TRITON_INTERPRET counts when the kernel is imported."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
from diphase.kernels import kv_gather_triton as kv_gather_triton_module
from diphase.kernels.kv_gather_triton import kv_gather_triton, kv_scatter_triton
from diphase.proto.errors import KernelError

from . import kv_gather_cases as cases

# Three programs: some cases have fewer tiles than that, some more. Every program takes milliseconds here.
gather, scatter = partial(kv_gather_triton, num_programs=3), partial(kv_scatter_triton, num_programs=3)


def test_triton_interprets() -> None:
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.why)
def test_kernel_equals_the_reference(case: cases.Case) -> None:
    cases.check_gather(gather, case)
    cases.check_scatter(scatter, case)


def test_the_number_of_programs_changes_nothing() -> None:
    for num_programs in (1, 2, 7):
        cases.check_gather(partial(kv_gather_triton, num_programs=num_programs), cases.CASES[1])


def test_reshard_is_one_gather_a_source_and_one_scatter_a_destination() -> None:
    cases.check_reshard(gather, scatter)


def test_blocks_past_two_to_the_31_accesses() -> None:
    cases.check_past_two_to_the_31(gather, scatter)


@pytest.mark.parametrize("shift", [2, 4, 8], ids=lambda shift: f"{shift} bytes")
def test_pieces_may_start_anywhere(shift: int) -> None:
    case = cases.Case(why="", layers=(0, 1), piece_layers=1)
    sides = cases.sides(case, "cpu")
    memory = torch.zeros(sides.piece.numel() + 8, dtype=sides.piece.dtype)
    piece = memory[shift // 2 : shift // 2 + sides.piece.numel()].view(sides.piece.shape)
    gather(piece, sides.pool_part, sides.block_ids)
    assert cases.equal_bytes(piece, sides.pool_part[sides.block_ids])
    assert not memory[: shift // 2].any()
    assert not memory[shift // 2 + piece.numel() :].any()


@pytest.mark.parametrize("bad", [-1, 4])
def test_blocks_that_are_not_of_the_pool_are_left_out(bad: int) -> None:
    pool, piece = torch.zeros(6, 1, 2, 1, 4, 4), torch.ones(2, 1, 2, 1, 4, 4)
    scatter(pool[1:5], piece, torch.tensor([2, bad]))
    assert pool.flatten(1).any(dim=1).tolist() == [False, False, False, True, False, False]
    gather(piece, pool[1:5], torch.tensor([bad, 0]))
    assert piece.flatten(1).any(dim=1).tolist() == [True, False]


def test_more_tiles_than_the_kernel_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = cases.sides(cases.CASES[0], "cpu")  # 18 runs of 768 words: 15 tiles of 4 times 256
    monkeypatch.setattr(kv_gather_triton_module, "_MAX_TILES", 16)
    gather(sides.piece_part, sides.pool_part, sides.block_ids)
    monkeypatch.setattr(kv_gather_triton_module, "_MAX_TILES", 15)
    with pytest.raises(KernelError, match="copy fewer blocks"):
        gather(sides.piece_part, sides.pool_part, sides.block_ids)


def test_wrong_calls_are_refused() -> None:
    for said, call in cases.wrong_calls():
        piece, pool, block_ids = call()
        with pytest.raises(KernelError, match=said):
            gather(piece, pool, block_ids)
        with pytest.raises(KernelError, match=said):
            scatter(pool, piece, block_ids)
    sides = cases.sides(cases.CASES[0], "cpu")
    with pytest.raises(KernelError, match="num_programs"):
        kv_gather_triton(sides.piece_part, sides.pool_part, sides.block_ids, num_programs=0)
