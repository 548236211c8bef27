from __future__ import annotations

from pathlib import Path

import pytest
from diphase.kernels import kv_gather_triton
from diphase.kernels.kv_gather_triton import LAUNCHES, WARPS, Launch, choose_launch
from diphase.proto.errors import KernelError

from . import kv_gather_cases as cases
from .ahead_of_time import ARCHITECTURES, MAX_REGISTERS, MAX_SHARED_BYTES, compile_for
from .interpreter import check_interpreted

POINTERS = {8: "*i64", 4: "*i32", 2: "*i16", 1: "*u8"}


def test_kernel_in_the_interpreter() -> None:
    check_interpreted("interpreted_kv_gather.py")


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.word_bytes}x{launch.columns}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_compiles_ahead_of_time(
    launch: Launch, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = POINTERS[launch.word_bytes]
    for scatter in (False, True):
        compiled = compile_for(
            architecture,
            kv_gather_triton._copy_blocks_kernel,
            {"target_ptr": words, "source_ptr": words, "block_ids_ptr": "*i64"},
            {"SCATTER": scatter, "VECTOR": launch.vector, "ROWS": launch.rows, "COLUMNS": launch.columns},
            num_warps=WARPS,
            folder=tmp_path,
        )
        assert compiled.registers <= MAX_REGISTERS
        assert compiled.spilled_bytes == 0
        assert compiled.shared_bytes <= MAX_SHARED_BYTES
        access = f".v{launch.vector}.b{launch.word_bytes * 8}" if launch.vector > 1 else ""
        assert f"ld.global{access}" in compiled.ptx
        assert f"st.global{access}" in compiled.ptx


@pytest.mark.parametrize(
    ("run_bytes", "aligned", "word_bytes", "columns"),
    [
        (6144, 16, 8, 256),  # the default model's heads of K or V: more full tiles than of 1024 words
        (16384, 16, 8, 1024),
        (2048, 16, 8, 256),
        (256, 16, 8, 64),
        (48, 16, 8, 64),  # shorter than any tile
        (6144, 8, 4, 1024),
        (6140, 16, 4, 1024),
        (6144, 2, 2, 1024),
        (75, 16, 1, 1024),
    ],
)
def test_words_are_the_widest_that_alignment_allows(
    run_bytes: int, aligned: int, word_bytes: int, columns: int
) -> None:
    launch = choose_launch(run_bytes, aligned, 4096)
    assert (launch.word_bytes, launch.columns) == (word_bytes, columns)


def test_tensors_of_the_cpu_are_refused() -> None:
    sides = cases.sides(cases.CASES[0], "cpu")
    with pytest.raises(KernelError, match="CUDA"):
        kv_gather_triton.kv_gather_triton(sides.piece_part, sides.pool_part, sides.block_ids)
