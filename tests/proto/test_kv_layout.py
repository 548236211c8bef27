"""Where KV bytes lie: runs of bytes that tile the pool, and a fingerprint of everything that matters."""

from __future__ import annotations

import dataclasses

import pytest
from diphase.proto.errors import ConfigError
from diphase.proto.kv_layout import UNSHARDED, KvLayout, Sharding

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


@pytest.mark.parametrize(
    ("tp", "pp", "named"),
    [(2, 1, "3 KV heads"), (4, 1, "3 KV heads"), (5, 1, "3 KV heads"), (1, 31, "30 layers")],
)
def test_a_model_that_cannot_be_cut_so_is_refused_with_its_numbers(tp: int, pp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sharding(tp=tp, pp=pp).check(LAYOUT)


@pytest.mark.parametrize(("tp", "pp"), [(0, 1), (1, 0), (-1, 1)])
def test_a_sharding_has_at_least_one_rank(tp: int, pp: int) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        Sharding(tp=tp, pp=pp)


@pytest.mark.parametrize(
    "sharding", [UNSHARDED, Sharding(tp=3), Sharding(tp=6, pp=4), Sharding(pp=7)], ids=str
)
def test_the_ranks_of_a_sharding_keep_the_whole_pool_and_each_head_as_often_as_it_is_copied(
    sharding: Sharding,
) -> None:
    sharding.check(LAYOUT)
    kept = [
        (layer, head)
        for rank in range(sharding.num_ranks)
        for layer in sharding.layers(LAYOUT, rank)
        for head in sharding.heads(LAYOUT, rank)
    ]
    assert sorted(kept) == sorted(
        [(layer, head) for layer in range(30) for head in range(3)] * sharding.copies(LAYOUT)
    )
    sizes = [len(sharding.layers(LAYOUT, rank)) for rank in range(sharding.num_ranks)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    total = sum(sharding.rank_layout(LAYOUT, rank).block_bytes for rank in range(sharding.num_ranks))
    assert total == LAYOUT.block_bytes * sharding.copies(LAYOUT)
