"""Sender and receiver against each other while anything goes wrong at random."""

from __future__ import annotations

import random
from typing import Any

import pytest
from diphase.kv_transfer.arena import Arena
from diphase.kv_transfer.receiver import Ready
from diphase.kv_transfer.staging import Lender
from diphase.proto.errors import Cancelled, OutOfBlocks
from diphase.proto.ids import HandoffKey
from diphase.proto.worker_pb2 import Submit

from .handoff_checks import error_codes, idle


def hand_off(pair: Any, rng: random.Random, key: HandoffKey) -> None:
    """A hand-off whose prompt is computed in two chunks while the network goes on for a while."""
    num_tokens = rng.randint(1, 20)
    try:
        blocks = pair.p.pool.allocate(pair.layout.num_blocks_for(num_tokens))
    except OutOfBlocks:  # everything is held
        return
    submit = Submit(request_id=key.request_id, attempt=key.attempt)
    pair.sender.begin(key, pair.address(), submit, num_tokens)
    for chunk in sorted({rng.randint(1, num_tokens), num_tokens}):
        pair.pump(rounds=rng.randint(0, 6))
        first = 0
        for stop in pair.sender.push_stops(key, last=chunk == num_tokens):
            pair.sender.computed(key, blocks, chunk, first, stop - first)
            first = stop
    if rng.random() < 0.9:
        pair.sender.seeded(key, 7, 0.0)
    else:
        pair.sender.finish(key)
    pair.p.pool.release(blocks)


def go_wrong(pair: Any, rng: random.Random, key: HandoffKey) -> None:
    """One fault, or none."""
    faults = (
        lambda: pair.sender.abort(key, Cancelled("x")),
        lambda: pair.receiver.abort(key, Cancelled("x")),
        lambda: pair.links.cut("p:1"),
        lambda: pair.data.held.symmetric_difference_update({("p-1", "d-1")}),
        lambda: pair.control.held.symmetric_difference_update({("p:1", "d:1")}),
        lambda: pair.control.held.symmetric_difference_update({("d:1", "p:1")}),
        lambda: pair.pass_time(rng.choice([0.5, 2.5, 11.0])),
        lambda: pair.p.transports["local"].disconnect("d-1"),
    )
    which = rng.randrange(2 * len(faults))
    if which < len(faults):
        faults[which]()


def take(pair: Any, rng: random.Random, share: float) -> int:
    """Requests finish: their blocks go back."""
    finished = [e for e in pair.d.events if isinstance(e, Ready) and rng.random() < share]
    for event in finished:
        pair.d.pool.release(event.block_ids)
        pair.d.events.remove(event)
        pair.receiver.room_freed()
    return len(finished)


def crowd(pair: Any) -> None:
    """A window and a buffer that hold two or three parts."""
    size = 3 * pair.layout.block_bytes
    pair.receiver._lender = Lender(1, size, size)
    pair.sender._parts._local = Arena(0, size)


def staged_bytes(pair: Any) -> int:
    """What is in use of the writer's buffer and of the windows of sessions that live."""
    lent = [session.credits for session in pair.sender._sessions.values() if session.credits is not None]
    return int(pair.sender._parts._local.used) + sum(int(window.used) for window in lent)


@pytest.mark.parametrize("staging", ["never", "always"])
async def test_whatever_goes_wrong_every_pool_returns_to_idle(make_pair: Any, staging: str) -> None:
    ready = failed = 0
    for seed in range(80):
        rng = random.Random(seed)
        layers = rng.choice([1, 2, 3])
        pair = make_pair(
            num_blocks=12,
            layerwise_tokens=rng.choice([0, 8, 100]),
            layers_per_push=layers,
            staging=staging,
        )
        if staging == "always":
            crowd(pair)
        for number in range(rng.randint(5, 12)):
            key = HandoffKey(f"r{number % 5}", number)
            hand_off(pair, rng, key)
            go_wrong(pair, rng, key)
            ready += take(pair, rng, 0.5)
        pair.data.held.clear()
        pair.control.held.clear()
        for _ in range(6):
            pair.pass_time(11.0)
            ready += take(pair, rng, 1.0)
        assert idle(pair), seed
        assert staged_bytes(pair) == 0, seed
        failed += len(error_codes(pair.p.events))
        keys = [event.key for event in pair.p.events]
        assert len(set(keys)) == len(keys), "reported twice"
    assert ready > 200
    assert failed > 50
