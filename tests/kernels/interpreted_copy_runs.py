"""The Triton kernel that copies runs, in the interpreter. Run by test_copy_runs_triton.py in a process of its
own: TRITON_INTERPRET counts when the kernel is imported."""

from __future__ import annotations

import numpy as np
import pytest
import triton
from diphase.kernels.copy_runs_triton import PIECE_BYTES, copy_runs_triton


def test_triton_interprets() -> None:
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("alignment", [16, 8, 1])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_runs_are_copied_and_nothing_else(alignment: int, num_programs: int) -> None:
    rng = np.random.default_rng(alignment)
    memory = np.empty(PIECE_BYTES * 6 + 64, dtype=np.uint8)
    shift = -memory.ctypes.data % 16
    source = memory[shift:][: PIECE_BYTES * 3]
    target = memory[shift + PIECE_BYTES * 3 :][: PIECE_BYTES * 3]
    source[:], target[:] = rng.integers(1, 256, len(source), dtype=np.uint8), 0
    lengths = [alignment, 0, 48 * alignment, PIECE_BYTES + alignment, 8192]
    places = np.cumsum([0, *(length + alignment for length in lengths)])[:-1]
    runs = np.array([[at + 2 * alignment, at, length] for at, length in zip(places, lengths, strict=True)])
    wanted = np.zeros_like(target)
    for begin, to, length in runs.tolist():
        wanted[to : to + length] = source[begin : begin + length]
    runs += [source.ctypes.data, target.ctypes.data, 0]
    copy_runs_triton(runs, "cpu", num_programs=num_programs)
    np.testing.assert_array_equal(target, wanted)
