"""Hand-offs whose parts are gathered into pieces of the window that the decode side lends, and pools that
are cut differently."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from diphase.kv_transfer.arena import Arena
from diphase.kv_transfer.byte_worker import ByteWorker, Job
from diphase.kv_transfer.reshard import canonical_runs
from diphase.kv_transfer.staging import Credits, Window
from diphase.kv_transfer.transports.local import LocalTransport
from diphase.proto.errors import Cancelled
from diphase.proto.ids import HandoffKey
from diphase.proto.kv_layout import Sharding

from .conftest import LAYOUT
from .handoff_checks import error_codes, idle
from .test_handoff import KEY, OTHER, send


def nothing_is_staged(pair: Any) -> bool:
    """At the writer, of the window and of its own buffer."""
    [session] = pair.sender._sessions.values()
    return bool(session.credits.used == pair.sender._parts._local.used == 0)


@pytest.mark.parametrize("digest", [True, False])
async def test_a_staged_prompt_arrives_whole_and_the_window_is_free_again(
    make_pair: Any, digest: bool
) -> None:
    pair = make_pair(staging="always", layerwise_tokens=0, layers_per_push=1, digest=digest)
    blocks = pair.begin(KEY, 10)
    for layer in range(4):
        pair.sender.computed(KEY, blocks, 10, layer, 1)
    pair.sender.seeded(KEY, 42, 3.0)
    pair.p.pool.release(blocks)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    assert 1 <= ready.num_segments < 12, "layers of a block are not pushed one by one"
    assert pair.d.staging.any()
    assert nothing_is_staged(pair)
    assert idle(pair)


async def test_parts_that_find_no_room_wait_for_it(make_pair: Any) -> None:
    pair = make_pair(num_blocks=8192, staging="always", max_push_bytes=1 << 19)
    tokens = 3 * (1 << 20) // pair.layout.token_bytes
    blocks = send(pair, num_tokens=tokens)
    pair.pump(1000)
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    assert ready.num_segments >= 6
    assert nothing_is_staged(pair)
    assert idle(pair)


async def test_of_what_is_staged_anyway_nobody_asks_how_it_would_go_directly(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(staging="always")
    monkeypatch.delattr("diphase.kv_transfer.outgoing_parts.reshard_segments")
    blocks = send(pair)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)


async def test_what_the_window_cannot_hold_goes_directly(make_pair: Any) -> None:
    pair = make_pair(num_blocks=4096, staging="always")
    pair.sender._parts._local = Arena(0, 1 << 19)
    blocks = send(pair, num_tokens=2 * (1 << 20) // pair.layout.token_bytes)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    assert not pair.d.staging.any()
    assert idle(pair)


async def test_by_itself_it_stages_runs_shorter_than_the_transport_likes(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    likes = dataclasses.replace(LocalTransport.capabilities, stage_below_bytes=2 * LAYOUT.layer_bytes)
    monkeypatch.setattr(LocalTransport, "capabilities", likes)
    pair = make_pair(layerwise_tokens=0, layers_per_push=1)
    blocks = pair.begin(KEY, 10)
    for first, count in ((0, 1), (1, 3)):
        pair.pump()
        pair.sender.computed(KEY, blocks, 10, first, count)
    pair.sender.seeded(KEY, 42, 3.0)
    pair.p.pool.release(blocks)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    assert ready.num_segments == 1 + 3, "one layer in one piece, three layers of each block directly"
    assert idle(pair)


async def test_above_the_high_watermark_lossless_parts_go_directly(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    likes = dataclasses.replace(LocalTransport.capabilities, stage_below_bytes=1 << 30)
    monkeypatch.setattr(LocalTransport, "capabilities", likes)
    pair = make_pair()
    send(pair)
    pair.pump()
    [session] = pair.sender._sessions.values()
    session.credits.take(int(0.8 * (1 << 20)))
    send(pair, OTHER)
    pair.pump()
    assert [ready.num_segments for ready in pair.received()] == [1, 3]


async def test_a_piece_that_changed_on_the_way_never_reaches_a_block(make_pair: Any) -> None:
    pair = make_pair(staging="always")
    pair.begin(HandoffKey("first", 0), 4)  # so that there is a session
    pair.pump()
    pair.data.held.add(("p-1", "d-1"))
    send(pair)
    pair.pump()
    pair.p.staging[:64] ^= 1
    pair.data.held.clear()
    pair.pump()
    pair.sender.abort(HandoffKey("first", 0), Cancelled("enough"))
    pair.pump()
    assert error_codes(pair.received()) == ["digest_mismatch"]
    assert not pair.d.memory.any()
    assert nothing_is_staged(pair)


class LaterWorker(ByteWorker):
    """Runs nothing before it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda: None, threaded=False)
        self.waiting: list[tuple[Any, Job]] = []

    def submit(self, ticket: Any, job: Job) -> None:
        self.waiting.append((ticket, job))

    def run(self) -> None:
        while self.waiting:
            super().submit(*self.waiting.pop(0))


async def test_a_window_is_lent_to_nobody_else_while_a_piece_of_it_is_copied(make_pair: Any) -> None:
    pair = make_pair(staging="always")
    pair.d.transports.worker = worker = LaterWorker()
    blocks = send(pair)
    pair.pump()
    assert worker.waiting, "all that is missing is the copy"
    pair.p.transports["local"].disconnect("d-1")
    pair.pump()
    assert not pair.receiver._sessions, "the writer is gone"
    assert pair.receiver._lender.lend() is None
    worker.run()
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    assert pair.receiver._lender.lend() == Window(1, 0, 1 << 20)
    assert pair.receiver.in_flight == 0


async def test_a_window_that_was_not_lent_is_refused_by_name(make_pair: Any) -> None:
    pair = make_pair(staging="always", staging_mib=2)
    pair.begin(HandoffKey("first", 0), 4)
    pair.pump()
    [session] = pair.sender._sessions.values()
    session.credits = Credits(Window(1, 0, 1 << 20))
    send(pair)
    pair.pump()
    pair.pass_time(20.0)
    assert all("outside of the window" in event.error.message for event in pair.received())
    assert len(pair.received()) == 2
    assert (pair.d.pool.counts().quarantined, pair.receiver.in_flight) == (0, 0)


@pytest.mark.parametrize("staging", ["always", "never"])
@pytest.mark.parametrize(("p", "d"), [(1, 2), (2, 1), (2, 4), (4, 1), (2, 2), (1, 4)])
async def test_pools_that_are_cut_differently_understand_each_other(
    make_pair: Any, p: int, d: int, staging: str
) -> None:
    pair = make_pair(
        p_sharding=Sharding(tp=p), d_sharding=Sharding(tp=d, pp=2), staging=staging, layerwise_tokens=0
    )
    blocks = send(pair)
    pair.pump()
    [ready] = pair.received()
    assert pair.read(pair.d, ready.block_ids) == pair.read(pair.p, blocks)
    for copy in range(Sharding(tp=d).copies(pair.layout)):
        runs = canonical_runs(
            pair.layout, Sharding(tp=d, pp=2), ready.block_ids, first_layer=0, num_layers=4, copy=copy
        )
        there = b"".join(pair.d.memories[r][o : o + n].tobytes() for r, o, n in runs.tolist())
        assert there == pair.read(pair.p, blocks)
    assert idle(pair)
