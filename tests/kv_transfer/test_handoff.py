"""Sender and receiver against each other: what a worker sees, and where the blocks and bytes are."""

from __future__ import annotations

from typing import Any

import numpy as np
from diphase.kv_transfer.receiver import Ready
from diphase.kv_transfer.sender import Sent
from diphase.proto.ids import HandoffKey

KEY = HandoffKey("r", 0)


async def test_a_prompt_arrives_whole_and_the_prefill_side_lets_go(make_pair: Any) -> None:
    pair = make_pair()
    blocks = pair.begin(KEY, 10)
    pair.sender.computed(KEY, blocks, 10)
    pair.sender.seeded(KEY, 42, 3.0)
    pair.p.pool.release(blocks)
    assert pair.sender.held_blocks == 3
    pair.pump()
    [ready] = pair.received()
    assert isinstance(ready, Ready)
    assert ready.token_id == 42
    assert ready.num_tokens == 10
    assert ready.num_bytes == 3 * pair.layout.block_bytes
    for mine, theirs in zip(blocks, ready.block_ids, strict=True):
        np.testing.assert_array_equal(pair.view(pair.p, mine), pair.view(pair.d, theirs))
    assert pair.sent() == [Sent(key=KEY)]
    assert pair.p.pool.counts().free == 16
    assert pair.d.pool.counts().used == 3
    assert pair.sender.in_flight == pair.receiver.in_flight == 0
