"""What a decode worker does with a prefill worker that says nothing when a hand-off has failed."""

from __future__ import annotations

from typing import Any

from diphase.kv_transfer.receiver import Ready
from diphase.proto.ids import HandoffKey

from .handoff_checks import error_codes, idle

KEY = HandoffKey("r", 0)
OTHER = HandoffKey("s", 0)


async def test_a_prefill_worker_that_does_not_answer_an_abort_loses_its_connection(make_pair: Any) -> None:
    pair = make_pair()
    blocks = pair.begin(KEY, 10)
    pair.pump()
    pair.sender.computed(KEY, blocks, 5)
    pair.pump()
    for _ in range(20):  # only decode's process goes on: two seconds to give it up, two for the answer
        pair.clock.time += 0.25
        pair.receiver.pump()
    assert (pair.d.pool.counts().used, pair.d.pool.counts().quarantined) == (0, 0)
    assert pair.receiver.in_flight == 0
    pair.pump()  # and now prefill's
    pair.p.pool.release(blocks)
    assert error_codes(pair.received()) == ["deadline_exceeded"]
    assert idle(pair)
    blocks = pair.begin(OTHER, 10)
    pair.sender.computed(OTHER, blocks, 10)
    pair.sender.seeded(OTHER, 1, 0.0)
    pair.p.pool.release(blocks)
    pair.pump()
    assert isinstance(pair.received()[-1], Ready), "the next hand-off dials again"


async def test_a_prefill_worker_that_answers_an_abort_keeps_its_connection(make_pair: Any) -> None:
    pair = make_pair()
    pair.data.held.add(("p-1", "d-1"))  # its bytes do not come
    blocks = pair.begin(KEY, 10)
    pair.sender.computed(KEY, blocks, 10)
    pair.sender.seeded(KEY, 1, 0.0)
    pair.p.pool.release(blocks)
    other = pair.begin(OTHER, 10)
    pair.pass_time(9.0)
    assert error_codes(pair.received()) == ["deadline_exceeded"]
    pair.sender.computed(OTHER, other, 10)
    pair.sender.seeded(OTHER, 1, 0.0)
    pair.p.pool.release(other)
    pair.data.held.clear()
    pair.pump()
    assert [event.key for event in pair.received() if isinstance(event, Ready)] == [OTHER]
    assert idle(pair)
