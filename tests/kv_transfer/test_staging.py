"""Staging: pieces of a buffer, who may write where, and when a piece may be used again."""

from __future__ import annotations

import errno
import itertools
import random
from contextlib import ExitStack

import pytest
from diphase.kv_transfer.arena import ALIGNMENT, Arena
from diphase.kv_transfer.config import KvTransferConfig
from diphase.kv_transfer.side import open_side
from diphase.kv_transfer.staging import HIGH_WATERMARK, LOW_WATERMARK, Credits, Lender, Window
from diphase.proto.clock import MonotonicClock
from diphase.proto.errors import ConfigError
from diphase.proto.kv_layout import KvLayout


@pytest.mark.parametrize("seed", range(30))
def test_pieces_never_overlap_and_all_come_back(seed: int) -> None:
    rng = random.Random(seed)
    arena = Arena(4096, 64 * ALIGNMENT)
    taken: dict[int, int] = {}
    for _ in range(300):
        if taken and rng.random() < 0.5:
            offset = rng.choice(list(taken))
            arena.give_back(offset)
            del taken[offset]
        else:
            length = rng.choice([1, ALIGNMENT, rng.randint(1, 20 * ALIGNMENT)])
            piece = arena.take(length)
            if piece is not None:
                taken[piece] = length
        spans = sorted((offset, offset + length) for offset, length in taken.items())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(begin >= 4096 and end <= 4096 + 64 * ALIGNMENT for begin, end in spans)
        assert all(begin % ALIGNMENT == 0 for begin, _ in spans)
        assert arena.used == sum(-(-n // ALIGNMENT) * ALIGNMENT for n in taken.values())
    for offset in taken:
        arena.give_back(offset)
    assert arena.take(64 * ALIGNMENT) == 4096, "all of it is one piece again"


def test_an_arena_says_what_could_never_fit() -> None:
    arena = Arena(0, 2 * ALIGNMENT)
    assert arena.take(ALIGNMENT + 1) == 0
    assert arena.take(1) is None
    assert arena.fits(2 * ALIGNMENT)
    assert not arena.fits(2 * ALIGNMENT + 1)
    with pytest.raises(KeyError):
        arena.give_back(ALIGNMENT)


def test_windows_are_lent_until_there_are_none() -> None:
    lender = Lender(3, size=10 * ALIGNMENT, window_size=4 * ALIGNMENT)
    first, second = lender.lend(), lender.lend()
    assert first is not None
    assert second is not None
    assert {first.offset, second.offset} == {0, 4 * ALIGNMENT}
    assert (first.region, first.size) == (3, 4 * ALIGNMENT)
    assert lender.lend() is None
    assert lender.lent_bytes == 8 * ALIGNMENT
    lender.take_back(first)
    assert lender.lent_bytes == 4 * ALIGNMENT
    assert lender.lend() == first
    assert lender.lend() is None


def lent(pieces: int = 4) -> Credits:
    return Credits(Window(1, 512, pieces * ALIGNMENT))


@pytest.mark.parametrize("order", [("done", "consumed"), ("consumed", "done")])
def test_a_piece_is_free_again_once_it_is_written_and_consumed(order: tuple[str, str]) -> None:
    window = lent(1)
    taken = window.take(10)
    assert taken == (1, 512)
    for say in order:
        assert window.take(1) is None
        getattr(window, say)(1)
    assert window.take(10) == (2, 512), "another number at the same place"


def test_a_torn_piece_waits_for_a_fence_that_was_asked_for_after_it_tore() -> None:
    window = lent(2)
    window.take(10)
    window.take(10)
    window.torn(1)
    asked = window.torn_now()
    window.torn(2)
    window.consumed(1)
    assert window.take(1) is None
    window.fenced(asked)
    assert window.take(1) == (3, 512)
    assert window.take(1) is None, "the second one tore after the fence was asked for"
    assert not window.consumed(1), "said of the old piece, not of the new one at its place"
    window.fenced(window.torn_now())
    assert window.used == 2 * ALIGNMENT, "its peer may read it: what was cancelled may have arrived"
    assert window.consumed(2)
    assert window.used == ALIGNMENT


def test_a_piece_nobody_was_told_of_comes_back_at_once() -> None:
    window = lent(1)
    window.take(10)
    window.untouched(1)
    assert window.used == 0


def test_a_piece_that_turned_out_smaller_gives_the_rest_back() -> None:
    window = lent(4)
    window.take(3 * ALIGNMENT)
    window.shrink(1, ALIGNMENT + 1)
    assert window.used == 2 * ALIGNMENT
    window.shrink(1, 3 * ALIGNMENT)
    assert window.used == 2 * ALIGNMENT, "a piece never grows"
    assert window.take(2 * ALIGNMENT) == (2, 512 + 2 * ALIGNMENT)
    window.untouched(1)
    window.untouched(2)
    assert window.take(4 * ALIGNMENT) == (3, 512), "all of it is one piece again"


def test_the_watermarks_have_hysteresis() -> None:
    window = lent(8)
    pieces = []
    while window.flowing:
        taken = window.take(1)
        assert taken is not None
        pieces.append(taken[0])
    assert len(pieces) == 8 * HIGH_WATERMARK
    while not window.flowing:
        window.untouched(pieces.pop())
    assert len(pieces) < 8 * LOW_WATERMARK


def test_a_staging_buffer_that_the_machine_does_not_give_is_a_mistake_of_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(size_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("diphase.kv_transfer.side.StagingMemory", refuse)
    with pytest.raises(
        ConfigError, match=r"kv_transfer\.staging_mib = 64 .*Cannot allocate memory; lower it"
    ):
        open_side(
            KvTransferConfig(),
            worker_id="d0",
            incarnation="a",
            cluster_token="",
            layout=KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=8, dtype="bf16", model="m"),
            pools=[],
            clock=MonotonicClock(),
            parts=ExitStack(),
        )
