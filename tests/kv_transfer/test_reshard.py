"""Segments and canonical runs of pools that are cut in any two ways, checked with elements that know who they
are."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer.reshard import canonical_runs, reshard_segments
from diphase.proto.kv_layout import UNSHARDED, KvLayout, Sharding
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.int64]

NUM_BLOCKS = 12


def layout_of(num_layers: int, num_kv_heads: int) -> KvLayout:
    """Four elements of four bytes to a head of a block."""
    return KvLayout(
        model="test",
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=2,
        block_size=2,
        dtype="fp32",
    )


def canonical(layout: KvLayout) -> Array:
    """A pool that is not cut: every element is a number of its own, [block, layer, k|v, head, slot * dim]."""
    shape = (NUM_BLOCKS, layout.num_layers, 2, layout.num_kv_heads, 4)
    return np.arange(1, 1 + np.prod(shape), dtype=np.int64).reshape(shape)


def cut(layout: KvLayout, sharding: Sharding, whole: Array) -> list[Array]:
    """The pool of each rank, as flat elements. Written with slices, not with the code under test."""
    pools = []
    for stage in np.array_split(np.arange(layout.num_layers), sharding.pp):
        for rank in range(sharding.tp):
            each = max(1, layout.num_kv_heads // sharding.tp)
            first = rank * layout.num_kv_heads // sharding.tp
            pools.append(whole[:, stage, :, first : first + each].reshape(-1).copy())
    return pools


def moves(segments: Array) -> Array:
    """[n, 4]: source region, source element, target region, target element, one row for each element."""
    assert not (segments[:, [1, 3, 4]] % 4).any()
    rows = []
    for here, offset, there, target, length in segments.tolist():
        steps = np.arange(length // 4)
        row = np.empty((len(steps), 4), dtype=np.int64)
        row[:, 0], row[:, 1], row[:, 2], row[:, 3] = here, offset // 4 + steps, there, target // 4 + steps
        rows.append(row)
    return np.concatenate(rows) if rows else np.empty((0, 4), dtype=np.int64)


def shardings(layout: KvLayout) -> list[Sharding]:
    heads = layout.num_kv_heads
    tps = [tp for tp in range(1, 9) if (heads % tp == 0 if tp <= heads else tp % heads == 0)]
    return [Sharding(tp=tp, pp=pp) for tp in tps for pp in range(1, min(4, layout.num_layers) + 1)]


@st.composite
def pushes(draw: st.DrawFn) -> dict[str, Any]:
    layout = layout_of(draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 4, 6, 8])))
    possible = st.sampled_from(shardings(layout))
    first = draw(st.integers(0, layout.num_layers - 1))
    count = draw(st.integers(0, NUM_BLOCKS))
    rng = random.Random(draw(st.integers(0, 1 << 30)))

    def blocks() -> list[int]:
        begin = rng.randint(0, NUM_BLOCKS - count)
        return (
            list(range(begin, begin + count)) if rng.random() < 0.6 else rng.sample(range(NUM_BLOCKS), count)
        )

    return {
        "layout": layout,
        "source": draw(possible),
        "target": draw(possible),
        "local_blocks": blocks(),
        "remote_blocks": blocks(),
        "first_layer": first,
        "num_layers": draw(st.integers(1, layout.num_layers - first)),
    }


def after(push: dict[str, Any]) -> tuple[list[Array], list[Array]]:
    """Target pools as they should be, with -1 where nothing is written; and as they are."""
    layout, first = push["layout"], push["first_layer"]
    layers = slice(first, first + push["num_layers"])
    whole = canonical(layout)
    wanted = np.full_like(whole, -1)
    for mine, theirs in zip(push["local_blocks"], push["remote_blocks"], strict=True):
        wanted[theirs, layers] = whole[mine, layers]
    pools = cut(layout, push["source"], whole)
    found = cut(layout, push["target"], np.full_like(whole, -1))
    for here, element, there, target in moves(reshard_segments(**push)).tolist():
        assert found[there][target] == -1, "written twice"
        found[there][target] = pools[here][element]
    return cut(layout, push["target"], wanted), found


@settings(max_examples=150, deadline=None)
@given(pushes())
def test_every_element_arrives_where_it_belongs_exactly_once(push: dict[str, Any]) -> None:
    wanted, found = after(push)
    for mine, theirs in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(theirs, mine)


@settings(max_examples=150, deadline=None)
@given(pushes())
def test_no_source_byte_goes_to_a_target_rank_twice(push: dict[str, Any]) -> None:
    rows = moves(reshard_segments(**push))
    # Identity of the element, whichever copy of it was read, and the rank it goes to.
    pools = cut(push["layout"], push["source"], canonical(push["layout"]))
    sent = Counter((int(pools[here][element]), there) for here, element, there, _ in rows.tolist())
    assert all(times == 1 for times in sent.values())


@settings(max_examples=150, deadline=None)
@given(pushes())
def test_no_two_segments_that_follow_each_other_could_be_one(push: dict[str, Any]) -> None:
    """Apart from the turns of the source copies, which may cut what one rank could send in one."""
    segments = reshard_segments(**push)
    rows = moves(segments)
    steps = np.diff(rows, axis=0)
    breaks = (steps[:, 1] != 1) | (steps[:, 3] != 1) | steps[:, 0].astype(bool) | steps[:, 2].astype(bool)
    assert len(segments) == (1 + breaks.sum() if len(rows) else 0)


@settings(max_examples=150, deadline=None)
@given(pushes())
def test_segments_are_about_as_few_as_can_be(push: dict[str, Any]) -> None:
    """The fewest that any order of the elements gives when every target rank reads copy 0 only, and for each
    further source copy at most one more to a pair of ranks."""
    source, layout = push["source"], push["layout"]
    rows = moves(reshard_segments(**push))
    copies = source.copies(layout)
    rows[:, 0] -= rows[:, 0] % source.tp % copies
    rows = rows[np.lexsort((rows[:, 3], rows[:, 2], rows[:, 0]))]
    steps = np.diff(rows, axis=0)
    breaks = (steps[:, 1] != 1) | (steps[:, 3] != 1) | steps[:, 0].astype(bool) | steps[:, 2].astype(bool)
    fewest = 1 + int(breaks.sum()) if len(rows) else 0
    pairs = len(np.unique(rows[:, [0, 2]], axis=0))
    # Blocks whose neighbours come in another order of the list are not looked for.
    unordered = sum(np.diff(push["local_blocks"]) != 1) * pairs
    assert len(reshard_segments(**push)) <= fewest + (copies - 1) * pairs + unordered


@settings(max_examples=100, deadline=None)
@given(pushes())
def test_copies_of_a_head_are_read_in_equal_shares(push: dict[str, Any]) -> None:
    source, layout = push["source"], push["layout"]
    copies = source.copies(layout)
    segments = reshard_segments(**push)
    for first in range(0, source.num_ranks, copies):
        read = [int(segments[segments[:, 0] == first + copy, 4].sum()) for copy in range(copies)]
        # Of a stage that feeds several target stages the shares differ by at most a block of each.
        block = source.rank_layout(layout, first).block_bytes
        assert max(read) - min(read) <= block


@settings(max_examples=100, deadline=None)
@given(pushes(), st.integers(0, 7))
def test_canonical_runs_read_every_sharding_as_one_order(push: dict[str, Any], copy: int) -> None:
    layout, sharding, blocks = push["layout"], push["source"], push["local_blocks"]
    first, num = push["first_layer"], push["num_layers"]
    whole = canonical(layout)
    pools = cut(layout, sharding, whole)
    runs = canonical_runs(
        layout,
        sharding,
        blocks,
        first_layer=first,
        num_layers=num,
        base_region=5,
        copy=copy % sharding.copies(layout),
    )
    read = [pools[region - 5][offset // 4 : (offset + size) // 4] for region, offset, size in runs.tolist()]
    wanted = whole[blocks, first : first + num].reshape(-1)
    np.testing.assert_array_equal(np.concatenate([np.empty(0, np.int64), *read]), wanted)
    if blocks:
        assert (runs.reshape(len(blocks), -1, 3)[:, :, 2].sum(axis=1) == num * layout.layer_bytes).all()
    if sharding == UNSHARDED:
        assert len(runs) == len(blocks)


@settings(max_examples=100, deadline=None)
@given(pushes(), st.integers(0, 3))
def test_equal_shardings_pair_rank_by_rank(push: dict[str, Any], base: int) -> None:
    """Each rank sends exactly what a worker of its part alone would."""
    layout, sharding = push["layout"], push["source"]
    push["target"] = sharding
    segments = reshard_segments(**push, local_region=base, remote_region=2 * base)
    first, last = push["first_layer"], push["first_layer"] + push["num_layers"]
    count = 0
    for rank in range(sharding.num_ranks):
        layers = sharding.layers(layout, rank)
        begin, end = max(first, layers.start), min(last, layers.stop)
        mine = segments[segments[:, 0] == rank + base]
        count += len(mine)
        alone = whole_segments(
            sharding.rank_layout(layout, rank),
            push["local_blocks"],
            push["remote_blocks"],
            begin - layers.start,
            end - begin,
        )
        np.testing.assert_array_equal(mine[:, [1, 3, 4]], alone)
        assert (mine[:, 2] == rank + 2 * base).all()
    assert count == len(segments)


def whole_segments(layout: KvLayout, local: list[int], remote: list[int], first: int, num: int) -> Array:
    """[n, 3]: offsets and length of a copy between pools that are not cut, block by block."""
    rows: list[list[int]] = []
    if num > 0:
        for mine, theirs in zip(local, remote, strict=True):
            (begin, length), (to, _) = layout.run(mine, first, num), layout.run(theirs, first, num)
            if rows and rows[-1][0] + rows[-1][2] == begin and rows[-1][1] + rows[-1][2] == to:
                rows[-1][2] += length
            else:
                rows.append([begin, to, length])
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


@pytest.mark.parametrize(
    ("local", "remote", "blocks"),
    [
        ([3, 4, 5, 6], [10, 11, 12, 13], [4]),
        ([3, 4, 5, 6], [10, 11, 13, 14], [2, 2]),
        ([3, 4, 6, 7], [10, 11, 12, 13], [2, 2]),
        ([3, 4], [11, 10], [1, 1]),
        ([], [], []),
    ],
)
def test_whole_blocks_that_are_neighbours_at_both_ends_are_one_segment(
    local: list[int], remote: list[int], blocks: list[int]
) -> None:
    layout = layout_of(4, 2)
    segments = reshard_segments(layout, UNSHARDED, UNSHARDED, local, remote, first_layer=0, num_layers=4)
    assert [length // layout.block_bytes for length in segments[:, 4].tolist()] == blocks


def test_two_ranks_send_one_segment_for_each_half_of_k_and_of_v() -> None:
    layout = layout_of(3, 4)
    two = Sharding(tp=2)
    assert (
        len(reshard_segments(layout, two, UNSHARDED, [0, 1], [4, 5], first_layer=0, num_layers=3))
        == 2 * 2 * 3 * 2
    )
    assert len(reshard_segments(layout, two, two, [0, 1], [4, 5], first_layer=0, num_layers=3)) == 2
    # A stage of a pipeline is whole blocks of its own pool, but not of the other.
    assert (
        len(reshard_segments(layout, Sharding(pp=3), UNSHARDED, [0, 1], [4, 5], first_layer=0, num_layers=3))
        == 2 * 3
    )
    # Four copies of a single head: each sends a quarter of the blocks, all in whole blocks.
    alone = layout_of(3, 1)
    segments = reshard_segments(
        alone, Sharding(tp=4), UNSHARDED, range(8), range(8), first_layer=0, num_layers=3
    )
    assert segments[:, 0].tolist() == [0, 1, 2, 3]
    assert (segments[:, 4] == 2 * alone.block_bytes).all()
