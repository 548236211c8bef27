"""Many hand-offs over one link: what queues is not stuck, unless nothing moves."""

from __future__ import annotations

from typing import Any

from diphase.proto.ids import HandoffKey

from .handoff_checks import error_codes, idle
from .test_handoff import KEY, OTHER, send


async def test_who_queues_behind_others_is_not_without_progress_while_they_move(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64, max_push_bytes=1)
    send(pair, HandoffKey("first", 0), 4)
    pair.pump()
    lane = ("p-1", "d-1")
    pair.data.held.add(lane)
    send(pair, KEY, 60)  # fifteen parts
    send(pair, OTHER, 8)
    for _ in range(16):
        pair.data.held.discard(lane)
        pair.data.step()  # one write gets through
        pair.data.held.add(lane)
        pair.pass_time(0.5)
    assert error_codes(pair.received()) == error_codes(pair.sent()) == []
    pair.data.held.clear()
    pair.pump()
    assert {event.key for event in pair.received()} == {HandoffKey("first", 0), KEY, OTHER}
    assert idle(pair)


async def test_a_link_that_moves_nothing_at_all_is_given_up(make_pair: Any) -> None:
    pair = make_pair(num_blocks=64)
    send(pair, HandoffKey("first", 0), 4)
    pair.pump()
    pair.data.held.add(("p-1", "d-1"))
    send(pair, KEY, 60)
    send(pair, OTHER, 8)
    pair.pass_time(3.0)
    assert error_codes(pair.sent()) == ["deadline_exceeded"] * 2
