from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from diphase.kernels import copy_runs_triton
from diphase.kernels.copy_runs_triton import LAUNCHES, PIECE_BYTES, WARPS, cut
from diphase.proto.errors import KernelError

from .ahead_of_time import ARCHITECTURES, MAX_REGISTERS, MAX_SHARED_BYTES, compile_for
from .interpreter import check_interpreted


def test_kernel_in_the_interpreter() -> None:
    check_interpreted("interpreted_copy_runs.py")


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch[0]}x{launch[2]}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_compiles_ahead_of_time(
    launch: tuple[int, int, int], architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word_bytes, vector, columns = launch
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(
        architecture,
        copy_runs_triton._copy_runs_kernel,
        {"table_ptr": "*i64"},
        {"WORD_BYTES": word_bytes, "VECTOR": vector, "COLUMNS": columns},
        num_warps=WARPS,
        folder=tmp_path,
    )
    assert compiled.registers <= MAX_REGISTERS
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= MAX_SHARED_BYTES
    if vector > 1:  # sixteen bytes an access
        assert re.search(r"ld\.global[.\w]*\.v2\.b64", compiled.ptx)
        assert re.search(r"st\.global[.\w]*\.v2\.b64", compiled.ptx)


def test_long_runs_are_cut_and_empty_ones_left_out() -> None:
    runs = np.array([[0, 1000, 5], [7, 7, 0], [100, 5000, 2 * PIECE_BYTES + 1], [9, 9, PIECE_BYTES]])
    assert cut(runs).tolist() == [
        [0, 1000, 5],
        [100, 5000, PIECE_BYTES],
        [100 + PIECE_BYTES, 5000 + PIECE_BYTES, PIECE_BYTES],
        [100 + 2 * PIECE_BYTES, 5000 + 2 * PIECE_BYTES, 1],
        [9, 9, PIECE_BYTES],
    ]
    assert cut(runs[1:2]).tolist() == []


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(KernelError, match=r"int64 \[n, 3\]; got float64\[2\]"):
        copy_runs_triton.copy_runs_triton(np.zeros(2), "cpu")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="num_programs"):
        copy_runs_triton.copy_runs_triton(np.zeros((1, 3), dtype=np.int64), "cpu", num_programs=0)
