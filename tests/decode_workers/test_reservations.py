"""Hand-offs take blocks only where the running batch keeps room to grow."""

from __future__ import annotations

import pytest
from diphase.decode_workers.reservations import ReservationPool
from diphase.engine.block_manager import BlockManager
from diphase.proto.errors import OutOfBlocks


def test_room_to_grow_is_not_reserved() -> None:
    blocks = BlockManager(8, 16)
    growth = 3
    pool = ReservationPool(blocks, lambda: growth)
    with pytest.raises(OutOfBlocks, match="would leave 2 for 3"):
        pool.allocate(6)
    assert blocks.counts().used == 0
    taken = pool.allocate(5)
    assert len(taken) == 5
    growth = 0
    assert len(pool.allocate(3)) == 3


def test_everything_else_is_the_block_managers() -> None:
    blocks = BlockManager(8, 16)
    pool = ReservationPool(blocks, lambda: 0)
    taken = pool.allocate(2)
    pool.acquire(taken)
    pool.release(taken)
    blocks.seal(taken[0], b"0" * 16)
    assert pool.match_prefix([b"0" * 16]) == taken[:1]
    pool.release(taken[:1])
    pool.quarantine(taken)
    assert blocks.counts().quarantined == 2
    pool.lift(taken)
    assert (blocks.counts().used, pool.num_blocks) == (0, 8)
