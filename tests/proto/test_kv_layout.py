"""Where KV bytes lie: runs of bytes that tile the pool, and a fingerprint of everything that matters."""

from __future__ import annotations

import dataclasses

import pytest
from diphase.proto.kv_layout import KvLayout

LAYOUT = KvLayout(model="m", num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bf16")


def test_sizes_of_the_default_model() -> None:
    assert LAYOUT.token_bytes == 23_040
    assert LAYOUT.layer_bytes == 12 * 1024
    assert LAYOUT.block_bytes == 30 * 12 * 1024


@pytest.mark.parametrize(("dtype", "item"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_bytes_follow_the_dtype(dtype: str, item: int) -> None:
    assert dataclasses.replace(LAYOUT, dtype=dtype).layer_bytes == 2 * 3 * 16 * 64 * item


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_the_last_block_may_be_partly_full(tokens: int, blocks: int) -> None:
    assert LAYOUT.num_blocks_for(tokens) == blocks


def test_runs_of_all_layers_of_all_blocks_tile_the_pool() -> None:
    runs = [LAYOUT.run(block, layer, 1) for block in range(3) for layer in range(LAYOUT.num_layers)]
    end = 0
    for offset, length in runs:
        assert offset == end
        end = offset + length
    assert end == 3 * LAYOUT.block_bytes


def test_a_range_of_layers_is_one_run() -> None:
    offset, length = LAYOUT.run(5, 10, 4)
    assert offset == LAYOUT.run(5, 10, 1)[0]
    assert offset + length == LAYOUT.run(5, 14, 1)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"num_layers": 31},
        {"num_kv_heads": 4},
        {"head_dim": 128},
        {"block_size": 32},
        {"dtype": "fp16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_difference_changes_the_fingerprint(change: dict[str, object]) -> None:
    assert dataclasses.replace(LAYOUT, **change).fingerprint() != LAYOUT.fingerprint()  # type: ignore[arg-type]


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert dataclasses.replace(LAYOUT).fingerprint() == LAYOUT.fingerprint()
    assert len(LAYOUT.fingerprint()) == 16
