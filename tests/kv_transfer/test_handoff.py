"""Sender and receiver against each other: what a worker sees, and where the blocks and bytes are."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
from diphase.kv_transfer import wire
from diphase.kv_transfer.receiver import Ready
from diphase.kv_transfer.sender import Sent
from diphase.proto.errors import Cancelled, TransferError
from diphase.proto.ids import HandoffKey
from diphase.proto.worker_pb2 import Submit

from .handoff_checks import error_codes, idle

KEY = HandoffKey("r", 0)
OTHER = HandoffKey("s", 0)


def send(pair: Any, key: HandoffKey = KEY, num_tokens: int = 10, hashes: tuple[bytes, ...] = ()) -> list[int]:
    """A hand-off whose prompt is computed and seeded at once; the sequence lets go of its blocks."""
    blocks: list[int] = pair.begin(key, num_tokens, hashes)
    pair.sender.computed(key, blocks, num_tokens)
    pair.sender.seeded(key, 42, 3.0)
    pair.p.pool.release(blocks)
    return blocks


class TestGoodCourse:
    async def test_a_prompt_arrives_whole_and_the_prefill_side_lets_go(self, make_pair: Any) -> None:
        pair = make_pair()
        blocks = send(pair)
        assert pair.p.pool.counts().used == 3
        pair.pump()
        [ready] = pair.received()
        assert isinstance(ready, Ready)
        assert (ready.token_id, ready.num_tokens, ready.cached_tokens) == (42, 10, 0)
        assert ready.submit == Submit(request_id="r")
        assert ready.num_bytes == 3 * pair.layout.block_bytes
        for mine, theirs in zip(blocks, ready.block_ids, strict=True):
            np.testing.assert_array_equal(pair.view(pair.p, mine), pair.view(pair.d, theirs))
        assert pair.sent() == [Sent(key=KEY)]
        assert idle(pair)
        for counters in (pair.sender.counters, pair.receiver.counters):
            total = counters.total()
            assert (total.transfers, total.num_bytes) == (1, ready.num_bytes)
            assert not total.failures
            assert not counters.refused
            assert {transport for transport, _peer in counters.peers} == {"local"}

    @pytest.mark.parametrize("late", ["control", "data"])
    async def test_bytes_and_their_description_may_come_in_either_order(
        self, make_pair: Any, late: str
    ) -> None:
        pair = make_pair()
        blocks = pair.begin(KEY, 10)
        pair.pump()
        lane = ("p:1", "d:1") if late == "control" else ("p-1", "d-1")
        getattr(pair, late).held.add(lane)
        pair.sender.computed(KEY, blocks, 10)
        pair.sender.seeded(KEY, 42, 3.0)
        pair.p.pool.release(blocks)
        pair.pump()
        assert pair.received() == []
        getattr(pair, late).held.clear()
        pair.pump()
        assert [type(event) for event in pair.received()] == [Ready]
        assert idle(pair)

    async def test_layers_go_while_later_ones_are_computed(self, make_pair: Any) -> None:
        pair = make_pair(layerwise_tokens=0, layers_per_push=2)
        blocks = pair.begin(KEY, 10)
        pair.pump()
        assert pair.sender.push_stops(KEY, last=False) == (2, 4)
        pair.sender.computed(KEY, blocks, 10, 0, 2)
        pair.pump()
        half = pair.layout.block_bytes // 2
        [target] = [b for b in range(16) if pair.view(pair.d, b)[:half].any()][:1]
        assert not pair.view(pair.d, target)[half:].any()
        pair.sender.computed(KEY, blocks, 10, 2, 2)
        pair.sender.seeded(KEY, 42, 3.0)
        pair.p.pool.release(blocks)
        pair.pump()
        [ready] = pair.received()
        assert ready.num_segments == 6
        np.testing.assert_array_equal(pair.view(pair.p, blocks[2]), pair.view(pair.d, ready.block_ids[2]))
        assert idle(pair)

    async def test_chunks_of_a_long_prompt_go_as_they_are_computed(self, make_pair: Any) -> None:
        pair = make_pair()
        blocks = pair.begin(KEY, 14)
        for num_tokens in (5, 9, 14):
            pair.sender.computed(KEY, blocks, num_tokens)
            pair.pump()
        assert pair.receiver.reserved_blocks == 4
        pair.sender.seeded(KEY, 42, 3.0)
        pair.p.pool.release(blocks)
        pair.pump()
        [ready] = pair.received()
        for mine, theirs in zip(blocks, ready.block_ids, strict=True):
            np.testing.assert_array_equal(pair.view(pair.p, mine), pair.view(pair.d, theirs))
        assert idle(pair)

    async def test_what_decode_has_cached_is_not_sent(self, make_pair: Any) -> None:
        pair = make_pair()
        hashes = (b"a" * 16, b"b" * 16)
        known = pair.d.pool.allocate(1)
        pair.d.pool.seal(known[0], hashes[0])
        pair.d.pool.release(known)
        send(pair, hashes=hashes)
        pair.pump()
        [ready] = pair.received()
        assert ready.block_ids[0] == known[0]
        assert ready.cached_tokens == 4
        assert ready.num_bytes == 2 * pair.layout.block_bytes
        assert idle(pair)

    async def test_a_fully_cached_prompt_moves_nothing(self, make_pair: Any) -> None:
        pair = make_pair()
        hashes = (b"a" * 16, b"b" * 16)
        known = pair.d.pool.allocate(2)
        for block, block_hash in zip(known, hashes, strict=True):
            pair.d.pool.seal(block, block_hash)
        pair.d.pool.release(known)
        send(pair, num_tokens=8, hashes=hashes)
        pair.pump()
        [ready] = pair.received()
        assert (ready.block_ids, ready.num_bytes) == (known, 0)
        assert idle(pair)

    async def test_without_room_the_kv_is_held_until_there_is(self, make_pair: Any) -> None:
        pair = make_pair(num_blocks=4)
        hashes = (b"a" * 16,)
        taken = pair.d.pool.allocate(4)
        pair.d.pool.seal(taken[3], hashes[0])
        pair.d.pool.release(taken[3:])
        taken = taken[:3]
        send(pair, hashes=hashes)
        send(pair, OTHER, num_tokens=4)
        pair.pass_time(100.0)  # far longer than the lease: decode says that it lives
        assert (pair.receiver.in_flight, pair.receiver.reserved_blocks) == (2, 0)
        assert pair.received() == pair.sent() == []
        assert pair.p.pool.counts().used == 4
        pair.d.pool.release(taken)
        pair.receiver.room_freed()
        pair.pump()
        assert [ready.key for ready in pair.received()] == [KEY, OTHER]
        assert idle(pair)

    async def test_when_the_first_token_ends_the_request_nothing_moves_and_nobody_is_told(
        self, make_pair: Any
    ) -> None:
        pair = make_pair()
        blocks = pair.begin(KEY, 10)
        pair.pump()
        assert pair.receiver.reserved_blocks == 3
        pair.sender.finish(KEY)
        pair.p.pool.release(blocks)
        pair.pump()
        assert pair.sent() == pair.received() == []
        assert not pair.d.memory.any()
        assert idle(pair)

    async def test_drain_returns_when_leases_are_served(self, make_pair: Any) -> None:
        pair = make_pair(num_blocks=4)
        taken = pair.d.pool.allocate(3)
        send(pair)
        pair.pump()
        draining = asyncio.ensure_future(pair.sender.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        pair.d.pool.release(taken)
        pair.pump()
        await draining
        await pair.receiver.drain()
        send(pair, OTHER)
        pair.pump()
        assert error_codes(pair.sent()) == ["draining"]
        assert idle(pair)


class TestFailures:
    @pytest.mark.parametrize("tag", [b"", b"short", wire.part_tag(99, 0), b"x" * 48])
    async def test_a_notice_that_belongs_to_nothing_is_counted(self, make_pair: Any, tag: bytes) -> None:
        pair = make_pair()
        send(pair)
        pair.pump()
        pair.p.transports["local"].notify("d-1", tag or b"?")
        pair.pump()
        reason = "stale" if wire.read_tag(tag) else "malformed"
        assert pair.receiver.counters.refused == {reason: 1}
        assert idle(pair)

    async def test_bytes_that_change_on_the_way_are_never_served(self, make_pair: Any) -> None:
        pair = make_pair()
        pair.data.held.add(("p-1", "d-1"))
        blocks = send(pair)
        pair.pump()
        pair.view(pair.p, blocks[1])[7] ^= 1
        pair.data.held.clear()
        pair.pump()
        assert error_codes(pair.received()) == error_codes(pair.sent()) == ["digest_mismatch"]
        assert pair.receiver.counters.digest_mismatches == 1
        assert pair.receiver.counters.total().quarantined_blocks == 3
        assert idle(pair)

    @pytest.mark.parametrize("who", ["sender", "receiver"])
    async def test_an_abort_at_any_step_leaves_nothing_behind(self, make_pair: Any, who: str) -> None:
        pair = make_pair()
        aborted = 0
        for moment in range(14):
            key = HandoffKey(f"r{moment}", 0)
            send(pair, key)
            pair.pump(rounds=moment)
            aborted += key in getattr(pair, who)._handoffs
            getattr(pair, who).abort(key, Cancelled("the client went away"))
            pair.pump()
            taken = [e for e in pair.received() if isinstance(e, Ready)]
            for event in taken:
                pair.d.pool.release(event.block_ids)
            told = pair.p.events if who == "sender" else pair.d.events
            assert not error_codes(told), "who aborts is not told"
            pair.p.events.clear()
            pair.d.events.clear()
            assert idle(pair)
        assert aborted >= 3

    async def test_a_prefill_worker_that_hangs_is_given_up(self, make_pair: Any) -> None:
        pair = make_pair()
        blocks = pair.begin(KEY, 10)
        pair.pump()
        pair.sender.computed(KEY, blocks, 5)
        pair.pump()
        for _ in range(12):  # only decode's process goes on
            pair.clock.time += 0.25
            pair.receiver.pump()
        assert error_codes(pair.received()) == ["deadline_exceeded"]
        assert pair.d.pool.counts().quarantined == 3
        pair.pump()  # and now prefill's
        assert error_codes(pair.sent()) == ["deadline_exceeded"]
        pair.p.pool.release(blocks)
        assert idle(pair)

    async def test_a_long_prefill_on_a_healthy_worker_is_not_a_hang(self, make_pair: Any) -> None:
        pair = make_pair()
        blocks = pair.begin(KEY, 10)
        pair.pass_time(60.0)
        pair.sender.computed(KEY, blocks, 10)
        pair.sender.seeded(KEY, 1, 0.0)
        pair.p.pool.release(blocks)
        pair.pump()
        assert [type(event) for event in pair.received()] == [Ready]

    async def test_a_decode_worker_that_hangs_is_given_up(self, make_pair: Any) -> None:
        pair = make_pair()
        send(pair)
        for _ in range(24):
            pair.clock.time += 0.25
            pair.sender.pump()
        assert error_codes(pair.sent()) == ["deadline_exceeded"]
        pair.pass_time(5.0)
        assert idle(pair)

    async def test_a_broken_link_fails_both_sides_and_the_next_hand_off_dials_again(
        self, make_pair: Any
    ) -> None:
        pair = make_pair()
        pair.data.held.add(("p-1", "d-1"))
        send(pair)
        pair.pump()
        pair.links.cut("p:1")
        pair.pump()
        assert error_codes(pair.sent()) == error_codes(pair.received()) == ["peer_lost"]
        pair.data.held.clear()
        pair.pump()
        assert idle(pair)
        assert not pair.d.memory.any(), "written after the link had gone"
        send(pair, OTHER)
        pair.pump()
        assert isinstance(pair.received()[-1], Ready)

    async def test_a_killed_decode_worker_fails_what_goes_there(self, make_pair: Any) -> None:
        pair = make_pair()
        pair.data.held.add(("p-1", "d-1"))
        send(pair)
        pair.pump()
        pair.links.kill("d:1")
        pair.data.held.clear()
        pair.d.transports.close()
        pair.control.held.add(("p:1", "d:1"))
        for _ in range(10):
            pair.control.step()
            pair.data.step()
            pair.sender.pump()
        assert error_codes(pair.sent()) == ["peer_lost"]
        assert pair.sender.in_flight == 0
        assert pair.p.pool.counts().free == 16

    async def test_a_restarted_decode_worker_is_another_peer(self, make_pair: Any) -> None:
        pair = make_pair()
        send(pair)
        pair.pump()
        old = pair.d
        pair.d = pair.worker("d", "d-2")
        pair.receiver = pair.new_receiver(pair.d)
        send(pair, OTHER)
        pair.pump()
        [ready] = pair.received()
        assert ready.key == OTHER
        assert pair.sent() == [Sent(key=KEY), Sent(key=OTHER)]
        old.transports.close()

    async def test_an_address_that_another_incarnation_answers_at_is_a_restarted_worker(
        self, make_pair: Any
    ) -> None:
        pair = make_pair()
        pair.d.identity = pair.worker("d", "d-0").identity  # what the gateway still believes
        send(pair)
        pair.pump()
        [failed] = pair.sent()
        assert "was restarted" in failed.error.message
        assert pair.sender.in_flight == 0

    async def test_a_newer_attempt_ends_the_older_and_stale_ones_are_refused(self, make_pair: Any) -> None:
        pair = make_pair()
        pair.begin(HandoffKey("r", 1), 10)
        pair.pump()
        pair.begin(HandoffKey("r", 2), 4)
        pair.pump()
        assert pair.receiver.reserved_blocks == 1
        pair.begin(HandoffKey("r", 0), 4)
        pair.pump()
        assert [event.key.attempt for event in pair.sent()] == [1, 0]
        assert "stale" in pair.sent()[1].error.message
        assert pair.received() == []

    async def test_a_prompt_that_could_never_fit_is_refused(self, make_pair: Any) -> None:
        pair = make_pair(num_blocks=4)
        pair.p.pool = type(pair.p.pool)(64, 4)
        pair.sender._pool = pair.p.pool
        pair.sender.begin(KEY, pair.address(), Submit(request_id="r"), 17)
        pair.pump()
        assert error_codes(pair.sent()) == ["prompt_too_long"]

    async def test_a_waiting_room_that_is_full_refuses(self, make_pair: Any) -> None:
        pair = make_pair(max_waiting=1)
        pair.d.pool.allocate(16)
        for i in range(2):
            pair.begin(HandoffKey(f"r{i}", 0), 4)
        pair.pump()
        assert error_codes(pair.sent()) == ["overloaded"]
        assert (pair.receiver.in_flight, pair.receiver.reserved_blocks) == (1, 0)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"cluster_token": "other"}, ["token"]),
            ({"layout_hash": "beef"}, ["beef", "layout"]),
            ({"protocol_version": 7}, ["7", "protocol"]),
        ],
    )
    async def test_workers_that_do_not_match_never_pair(
        self, make_pair: Any, change: dict[str, Any], words: list[str]
    ) -> None:
        pair = make_pair()
        pair.receiver._identity = dataclasses.replace(pair.receiver._identity, **change)
        send(pair)
        pair.pump()
        [failed] = pair.sent()
        assert all(word in failed.error.message for word in words)
        assert pair.sender.counters.peers["none", "d"].failures == {failed.error.code: 1}
        assert pair.received() == []
        assert idle(pair)

    async def test_the_same_key_twice_is_a_mistake(self, make_pair: Any) -> None:
        pair = make_pair()
        pair.begin(KEY, 4)
        with pytest.raises(ValueError, match="in flight"):
            pair.sender.begin(KEY, pair.address(), Submit(), 4)
        with pytest.raises(ValueError, match="tokens"):
            pair.sender.begin(OTHER, pair.address(), Submit(), 0)

    async def test_unknown_keys_do_no_harm(self, make_pair: Any) -> None:
        pair = make_pair()
        pair.sender.computed(KEY, [1], 4)
        pair.sender.seeded(KEY, 1, 0.0)
        pair.sender.finish(KEY)
        pair.sender.abort(KEY, TransferError("x"))
        pair.receiver.abort(KEY, TransferError("x"))
        pair.receiver.room_freed()
        assert idle(pair)
