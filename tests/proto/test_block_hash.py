"""The chained content hash: equal prefixes and nothing else share hashes."""

from __future__ import annotations

from diphase.proto.block_hash import HASH_BYTES, block_hashes, extend_hashes, root_hash
from hypothesis import given
from hypothesis import strategies as st

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=64)
ROOT = root_hash("model/layout")


@given(TOKENS, st.integers(1, 9))
def test_only_full_blocks_have_a_hash(tokens: list[int], block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, ROOT)
    assert len(hashes) == len(tokens) // block_size
    assert all(len(h) == HASH_BYTES for h in hashes)


@given(TOKENS, TOKENS, st.integers(1, 9))
def test_hashes_agree_exactly_as_far_as_the_prefixes_do(a: list[int], b: list[int], block_size: int) -> None:
    first, second = block_hashes(a, block_size, ROOT), block_hashes(b, block_size, ROOT)
    for i, (x, y) in enumerate(zip(first, second, strict=False)):
        end = (i + 1) * block_size
        assert (x == y) == (a[:end] == b[:end])


@given(TOKENS, st.integers(1, 9), st.data())
def test_extending_equals_computing_from_the_start(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    known = block_hashes(tokens[:cut], block_size, ROOT)
    before = list(known)
    assert extend_hashes(known, tokens, block_size, ROOT) == block_hashes(tokens, block_size, ROOT)
    assert known == before


def test_models_and_layouts_never_share_a_hash() -> None:
    tokens = list(range(32))
    ours, theirs = (set(block_hashes(tokens, 8, root_hash(seed))) for seed in ("a", "b"))
    assert not ours & theirs


def test_a_block_in_another_place_has_another_hash() -> None:
    hashes = block_hashes([7] * 32, 8, ROOT)
    assert len(set(hashes)) == 4


def test_the_hash_is_the_same_in_every_process_and_release() -> None:
    # Gateways and workers of different builds compare hashes: changing the function needs a new protocol
    # version.
    assert block_hashes(range(4), 4, root_hash("seed"))[0].hex() == "b5e7d3346c62ff904942d89039ea507a"
