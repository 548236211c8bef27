"""Prefix hits: what counts as one, how the two caches differ, and the ratios of the public traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from diphase.cluster.load.trace_formats import TraceRecord
from diphase.cluster.load.traces import load_trace
from diphase.cluster.planner.prefix_study import lru_hits, prefix_hits
from diphase.proto.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

LONGEST = 5
PROMPTS = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=LONGEST, unique=True), min_size=1, max_size=25
)
"""Few ids in any order: gaps in the middle of a prompt, which real prefixes seldom have, are frequent."""


def records(prompts: Sequence[Sequence[int]]) -> list[TraceRecord]:
    return [
        TraceRecord(arrival_s=float(i), input_tokens=512 * len(ids), output_tokens=1, hash_ids=tuple(ids))
        for i, ids in enumerate(prompts)
    ]


def model_hits(prompts: Sequence[Sequence[int]], num_blocks: int) -> int:
    """What a block manager does, as its promises say it: a list of hashes, the next to go first."""
    idle: list[int] = []
    hits = 0
    for prompt in prompts:
        lead = next((i for i, hash_id in enumerate(prompt) if hash_id not in idle), len(prompt))
        hits += lead
        idle = [hash_id for hash_id in idle if hash_id not in prompt[:lead]]
        evictions = max(0, len(idle) + len(prompt) - num_blocks)
        idle = idle[evictions:]
        # A block behind a gap is there still and keeps its age; the new copy of it is thrown away.
        idle += [hash_id for hash_id in reversed(prompt) if hash_id not in idle]
    return hits


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompts=PROMPTS, num_blocks=st.integers(LONGEST, 14))
def test_a_block_manager_ages_later_blocks_first_and_leaves_those_behind_a_gap(
    prompts: list[list[int]], num_blocks: int
) -> None:
    assert prefix_hits(records(prompts), num_blocks).hits == model_hits(prompts, num_blocks)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompts=PROMPTS)
def test_a_cache_that_never_evicts_knows_all_that_came_before(prompts: list[list[int]]) -> None:
    found = prefix_hits(records(prompts))
    seen: set[int] = set()
    hits = 0
    for prompt in prompts:
        hits += next((i for i, hash_id in enumerate(prompt) if hash_id not in seen), len(prompt))
        seen.update(prompt)
    assert (found.hits, found.blocks) == (hits, sum(map(len, prompts)))
    assert lru_hits(records(prompts), 10).hits == hits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompts=PROMPTS)
def test_a_larger_lru_never_hits_less(prompts: list[list[int]]) -> None:
    hits = [lru_hits(records(prompts), num_blocks).hits for num_blocks in range(LONGEST, 12)]
    assert hits == sorted(hits)


def test_only_the_leading_run_counts() -> None:
    # Of the second prompt nothing, of the third one block: 3 is known too, but 9 stands before it.
    assert prefix_hits(records([(1, 2, 3), (9, 2, 3), (1, 8, 3)])).hits == 1


def test_the_two_caches_differ_where_room_is_scarce() -> None:
    # Room for one block beside the second prompt: the manager keeps the first of the first prompt, which is
    # of use to the third; the LRU keeps the last, which is of use to nobody without the first.
    prompts = records([(1, 2), (3, 4), (1, 2)])
    assert prefix_hits(prompts, 3).hits == 1
    assert lru_hits(prompts, 3).hits == 0


def test_the_engine_shares_full_blocks_and_computes_something_of_every_prompt() -> None:
    def hits(input_tokens: int) -> int:
        record = TraceRecord(arrival_s=0.0, input_tokens=input_tokens, output_tokens=1, hash_ids=(1, 2, 3))
        assert prefix_hits([record] * 2).hits == 3
        return prefix_hits([record] * 2, full_only=True).hits

    assert hits(3 * 512 - 1) == 2
    assert hits(3 * 512) == 2
    longer = [
        TraceRecord(arrival_s=0.0, input_tokens=512 * len(ids), output_tokens=1, hash_ids=ids)
        for ids in ((1, 2, 3), (1, 2, 3, 4))
    ]
    assert prefix_hits(longer, full_only=True).hits == 3


def test_what_cannot_be_studied_is_refused() -> None:
    bare = [TraceRecord(arrival_s=None, input_tokens=5, output_tokens=5)]
    with pytest.raises(ConfigError, match="has no hash ids"):
        prefix_hits(bare)
    for study in (prefix_hits, lru_hits):
        with pytest.raises(ConfigError, match="cache of 2 blocks cannot hold a prompt of 3"):
            study(records([(1, 2, 3)]), 2)


@pytest.mark.parametrize(
    ("name", "infinite", "limited"),
    [("mooncake-conversation", 0.3664, 0.3257), ("mooncake-synthetic", 0.6396, 0.6242)],
)
def test_public_traces_have_their_known_ratios(
    data: Path, name: str, infinite: float, limited: float
) -> None:
    trace = load_trace(name, data)
    assert round(prefix_hits(trace).ratio, 4) == infinite
    assert round(prefix_hits(trace, 30_000).ratio, 4) == limited
    assert round(lru_hits(trace, 30_000).ratio, 4) == limited
