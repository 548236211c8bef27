"""Blocks are conserved, shared, evicted and quarantined as the manager promises."""

from __future__ import annotations

from collections import Counter

import pytest
from diphase.engine.block_manager import BlockManager
from diphase.proto.errors import OutOfBlocks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

NUM_BLOCKS = 8


def content(i: int) -> bytes:
    return i.to_bytes(16, "little")


def counts(manager: BlockManager) -> tuple[int, int, int, int]:
    found = manager.counts()
    return found.free, found.cached, found.used, found.quarantined


class BlockLife(RuleBasedStateMachine):
    """Random use by careful owners, compared with a plain model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, 16)
        self.held: list[int] = []  # one entry a reference
        self.quarantined: list[int] = []
        self.known: set[bytes] = set()  # as a listener to events() sees it
        self.next_hash = 0

    @rule(n=st.integers(0, NUM_BLOCKS))
    def allocate(self, n: int) -> None:
        before = counts(self.manager)
        if n > self.manager.available:
            with pytest.raises(OutOfBlocks):
                self.manager.allocate(n)
            assert counts(self.manager) == before
            return
        taken = self.manager.allocate(n)
        assert len(set(taken)) == n
        assert not set(taken) & {*self.held, *self.quarantined}
        self.held += taken

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.manager.acquire([block])
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.manager.release([block])
        self.held.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), reuse=st.booleans())
    def seal(self, data: st.DataObject, reuse: bool) -> None:
        block = data.draw(st.sampled_from(self.held))
        if not reuse:
            self.next_hash += 1
        self.manager.seal(block, content(self.next_hash))

    @rule(i=st.integers(0, 40))
    def match(self, i: int) -> None:
        found = self.manager.match_prefix([content(i)])
        assert not set(found) & set(self.quarantined)
        self.held += found

    @precondition(lambda self: bool(set(self.held) - set(self.quarantined)))
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(set(self.held) - set(self.quarantined))))
        self.manager.quarantine([block])
        self.held.remove(block)
        self.quarantined.append(block)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def lift(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.quarantined))
        self.manager.lift([block])
        self.quarantined.remove(block)

    @rule()
    def listen(self) -> None:
        stored, evicted = self.manager.events()
        assert not set(stored) & set(evicted)
        assert not set(stored) & self.known
        assert set(evicted) <= self.known
        self.known = (self.known | set(stored)) - set(evicted)
        assert self.known == set(self.manager.known_hashes())

    @invariant()
    def blocks_are_conserved(self) -> None:
        free, cached, used, quarantined = counts(self.manager)
        assert free + cached + used + quarantined == NUM_BLOCKS
        assert quarantined == len(self.quarantined)
        assert used == len(Counter(self.held).keys() - set(self.quarantined))
        assert self.manager.available == free + cached


BlockLife.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestBlockLife = BlockLife.TestCase


def test_a_sealed_block_outlives_its_owner_and_is_found_again() -> None:
    manager = BlockManager(4, 16)
    blocks = manager.allocate(2)
    for i, block in enumerate(blocks):
        manager.seal(block, content(i))
    manager.release(blocks)
    assert counts(manager) == (2, 2, 0, 0)
    assert manager.match_prefix([content(0), content(1), content(2)]) == blocks
    assert counts(manager) == (2, 0, 2, 0)


def test_a_prefix_ends_at_the_first_unknown_block() -> None:
    manager = BlockManager(4, 16)
    (block,) = manager.allocate(1)
    manager.seal(block, content(1))
    assert manager.match_prefix([content(0), content(1)]) == []
    assert manager.match_prefix([content(1), content(2)]) == [block]


def test_the_least_recently_used_prefix_is_evicted_and_its_tail_first() -> None:
    manager = BlockManager(4, 16)
    old, young = manager.allocate(2), manager.allocate(2)
    for i, block in enumerate([*old, *young]):
        manager.seal(block, content(i))
    manager.release(old)
    manager.release(young)
    manager.release(manager.match_prefix([content(0), content(1)]))  # used again: now the younger one
    manager.events()
    evicted = []
    for _ in range(4):
        manager.allocate(1)
        evicted += manager.events()[1]
    assert evicted == [content(3), content(2), content(1), content(0)]


def test_free_blocks_go_before_cached_ones() -> None:
    manager = BlockManager(3, 16)
    (block,) = manager.allocate(1)
    manager.seal(block, content(0))
    manager.release([block])
    manager.allocate(2)
    assert manager.known_hashes() == [content(0)]


def test_content_that_is_known_keeps_its_first_block() -> None:
    manager = BlockManager(2, 16)
    first, second = manager.allocate(2)
    manager.seal(first, content(0))
    manager.seal(second, content(0))
    manager.release([first, second])
    assert manager.match_prefix([content(0)]) == [first]
    assert counts(manager) == (1, 0, 1, 0)


def test_a_quarantined_block_is_not_found_and_returns_only_when_lifted() -> None:
    manager = BlockManager(2, 16)
    blocks = manager.allocate(1)
    manager.seal(blocks[0], content(0))
    manager.quarantine(blocks)
    assert manager.match_prefix([content(0)]) == []
    with pytest.raises(OutOfBlocks):
        manager.allocate(2)
    manager.lift(blocks)
    assert counts(manager) == (2, 0, 0, 0)


def test_misuse_is_an_error_and_not_a_corruption() -> None:
    manager = BlockManager(2, 16)
    (block,) = manager.allocate(1)
    manager.release([block])
    with pytest.raises(ValueError, match="more often"):
        manager.release([block])
    with pytest.raises(ValueError, match="free"):
        manager.acquire([block])
    with pytest.raises(ValueError, match="holds no reference"):
        manager.seal(block, content(0))
    with pytest.raises(ValueError, match="does not own"):
        manager.quarantine([block])
    assert counts(manager) == (2, 0, 0, 0)
